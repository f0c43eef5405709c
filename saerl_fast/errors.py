"""The one exception users see: a sentence that says what is wrong and how to mend it."""

from __future__ import annotations

import re

_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST = 2000  # characters of a message
_FULL = re.compile("OutOfMemory|out of memory|allocate memory|[Ss]torage size")  # torch has several ways


def printable(text: str) -> str:
    r"""``text`` with what a terminal would obey, or cannot show, as escapes; line ends and tabs stay.

    That is control characters, marks that turn the direction of text, and halves of surrogate pairs.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def halved(text: str) -> bool:
    """Whether ``text`` holds half of a surrogate pair, which is no character and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def no_memory(err: BaseException | None) -> BaseException | None:
    """The error that says that there is no memory left: ``err``, or what it came from. None for any other.

    What reads files and calls libraries takes every error for a fault of theirs, and so this one as well.
    """
    while err is not None:
        text = "" if isinstance(err, SaerlError) else f"{type(err).__name__} {err}"
        if isinstance(err, MemoryError) or _FULL.search(text):
            return err
        err = err.__cause__ or err.__context__
    return None


def first_line(err: BaseException) -> str:
    """The first line of an exception's message, safe to print, or the name of its class."""
    try:
        lines = str(err).strip().splitlines()
    except Exception:  # its class has a __str__ of its own
        lines = []
    return "".join(c if c.isprintable() else " " for c in (lines or [type(err).__name__])[0])[:300]


def named(err: BaseException) -> str:
    """The same after the name of its class: ``KeyError: 'x'``."""
    line, name = first_line(err), type(err).__name__
    return line if line == name else f"{name}: {line}"


class SaerlError(ValueError):
    """Bad input. The command line prints the message alone, one line, and exits with code 2."""

    def __init__(self, message: object = "", *more: object) -> None:
        line = printable(str(message)).replace("\n", r"\n")
        cut = len(line) > _LONGEST
        super().__init__(f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}" if cut else line, *more)


class Unreadable(SaerlError):
    """A file that cannot be read now, whatever it holds: no reason to make it again."""
