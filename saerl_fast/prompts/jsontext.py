"""The rows of a JSON list, each parsed by itself, so that an error names its line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import DECODER, guarded_json

_SPACE = re.compile(r"[ \t\r\n]*")


def elements(text: str, name: str) -> Iterator[Any]:
    """The elements of the list in ``text``, each parsed by itself, so that an error names its line."""
    at = _skip(text, 0) + 1
    line, counted = 1, 0
    while True:
        at = _skip(text, at)
        line, counted = line + text.count("\n", counted, at), at
        where = f"{name} line {line}"
        if text[at : at + 1] == "]":
            if _skip(text, at + 1) != len(text):
                raise SaerlError(f"{where} is not valid JSON (more text after the list); mend it")
            return
        value, end = guarded_json(text, where, lambda start=at: DECODER.raw_decode(text, start))
        yield value
        at = _skip(text, end)
        if text[at : at + 1] == "," and text[(after := _skip(text, at + 1)) : after + 1] != "]":
            at += 1
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            raise SaerlError(f"{name} line {line} is not valid JSON (no comma or ] after a row); mend it")


def is_list(text: str) -> bool:
    """Whether the first value in ``text`` is a list."""
    at = _skip(text, 0)
    return text[at : at + 1] == "["


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()
