"""What the tests of borders share: damaged JSON, and the judges of an answer."""

from __future__ import annotations

import copy
import re

import pytest

from saerl_fast import cli
from saerl_fast.errors import SaerlError

UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
RAW = {  # what may stand where a JSON file should be
    "nothing": b"",
    "zeros": b"\0" * 64,
    "a list": b"[]",
    "a number": b"3",
    "text": b'"x"',
    "null": b"null",
    "cut off": b'{"format": "sa',
    "NaN": b'{"step": NaN, "kind": NaN}',
    "infinity": b'{"step": Infinity}',
    "1e999": b'{"step": 1e999}',
    "10**400": b'{"step": 1' + b"0" * 400 + b"}",
    "5000 digits": b'{"step": 1' + b"0" * 5000 + b"}",
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"config":' * 400 + b"1" + b"}" * 400,
    "a key twice": b'{"step": 1, "step": 2}',
    "latin-1": b'{"kind": "\xe9"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"step": 1}'.encode("utf-16"),
    "escapes": b'{"\\u001b[31m": "\\u001b[31m"}',
}
IDS = [f"p{i}" for i in range(6)]


def said(argv, capsys) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    code = cli.main([str(part) for part in argv])
    out, err = capsys.readouterr()
    assert not UNSEEN.search(out + err), repr(out + err)[:300]
    assert code in (0, 2) and "Traceback" not in err and "unexpected" not in err, err[-600:]
    assert code == 0 or err.splitlines()[-1].startswith("saerl: "), err
    return code, err


def refused(call, *words: str) -> str:
    """The sentence that ``call`` raises; it is one printable line."""
    with pytest.raises(SaerlError) as caught:
        call()
    text = str(caught.value)
    assert not UNSEEN.search(text) and "\n" not in text and len(text) <= 2010
    assert all(word in text for word in words), text
    return text


def altered(value, at: tuple, new):
    """A copy with ``new`` at the place ``at``; gone where ``new`` is Ellipsis."""
    made = copy.deepcopy(value)
    node = made
    for key in at[:-1]:
        node = node[key]
    if new is ...:
        del node[at[-1]]
    else:
        node[at[-1]] = new
    return made
