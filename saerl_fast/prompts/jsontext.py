"""JSON, read strictly: what parsers read differently, or cannot hold, is one sentence with file and line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from saerl_fast.errors import SaerlError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half a character
_SPACE = re.compile(r"[ \t\r\n]*")


def parse(text: str, where: str) -> Any:
    """The value in ``text``; ``where`` ("pool.jsonl line 3") opens the sentence of any error.

    NaN, which Python and pandas write for a missing value, becomes None. Refused: infinite numbers, integers
    of more digits than Python reads, a key twice in one object, half a surrogate pair, nesting beyond
    Python's recursion limit.
    """
    return _guarded(text, where, lambda: _DECODER.decode(text))


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
        value, end = _guarded(text, where, lambda start=at: _DECODER.raw_decode(text, start))
        yield value
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            raise SaerlError(f"{name} line {line} is not valid JSON (no comma or ] after a row); mend it")


def is_list(text: str) -> bool:
    """Whether the first value in ``text`` is a list."""
    at = _skip(text, 0)
    return text[at : at + 1] == "["


class _Fault(Exception):
    """The end of a sentence about a value that is not read."""


def _guarded(text: str, where: str, read: Any) -> Any:
    try:
        value = read()
    except json.JSONDecodeError as err:
        inside = err.lineno > 1 and " line " not in where
        at = f"{where} line {err.lineno}" if inside or " line " not in where else where
        raise SaerlError(f"{at} is not valid JSON ({err.msg}); mend it") from None
    except RecursionError:
        raise SaerlError(f"{where} is nested too deeply to be read; flatten it") from None
    except _Fault as fault:
        raise SaerlError(f"{where} {fault}") from None
    except ValueError:  # sys.get_int_max_str_digits
        raise SaerlError(
            f"{where} holds an integer of more digits than Python reads; write it as text, in quotes"
        ) from None
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise SaerlError(
                f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; mend it"
            ) from None
    return value


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Fault(f"has the key {twice!r} twice in one object; keep one of them")
    return made


def _constant(name: str) -> None:
    if name != "NaN":
        raise _Fault(f"holds {name}, which is no number of JSON; write null or text")


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise _Fault(f"holds a number too large to be read ({digits[:20]}); write it as text, in quotes")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
