r"""Sets of real numbers in all their notations: ``x<-1 or x>1``, ``(-\infty,-1)\cup(1,\infty)``, ``|x|>1``,
``x \ne 2``, ``\{x : x \ge 5\}``, ``]0,4[``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

_REAL = re.compile(r"(?:the set of )?(?:all )?real(?: number)?s|\\mathbb\s*\{?R\}?|all reals?", re.IGNORECASE)
_BUILDER = re.compile(
    r"\\?\{\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\s*\{?R\}?)?\s*(?:\||:|\\mid|\\vert)\s*(.*?)\s*\\?\}"
)
_SAID = re.compile(  # "all real numbers greater than or equal to 3"
    r"(?:the set of )?all real numbers(?: [a-z])?,? (?:such that |that are |which are )?"
    r"(?P<sign>[a-z ]+?)\s(?P<end>\S+)",
    re.IGNORECASE,
)
_WORDS = {
    "greater than or equal to": r"\ge", "at least": r"\ge", "no less than": r"\ge", "greater than": ">",
    "less than or equal to": r"\le", "at most": r"\le", "no more than": r"\le", "less than": "<",
    "more than": ">", "except": r"\ne", "except for": r"\ne", "other than": r"\ne", "not equal to": r"\ne",
}  # fmt: skip
_LITERAL = re.compile(r"([(\[\]])\s*([^,;()\[\]]+?)\s*[,;]\s*([^,;()\[\]]+?)\s*([)\]\[])")
_SIGN = re.compile(r"\s*(\\le|\\ge|\\ne(?:q)?(?![a-z])|<=|>=|<|>)(?:q(?![a-z]))?\s*")
_OR = re.compile(r"\\(?:cup|lor|vee)(?![a-z])|\bor\b|\bunion\b")
_AND = re.compile(r"\\(?:land|wedge)(?![a-z])|\band\b")
_ENDS = {"-": r"-\infty", "+": r"\infty"}


class Interval(NamedTuple):
    """Its ends as they are written, and whether they belong to it."""

    low: str
    low_in: bool
    high: str
    high_in: bool


def _above(end: str, inside: bool) -> Interval:
    return Interval(end, inside, _ENDS["+"], False)


def _below(end: str, inside: bool) -> Interval:
    return Interval(_ENDS["-"], False, end, inside)


def same_intervals(one: str, gold: str, same: Callable[[str, str], bool]) -> bool | None:
    """Whether two unions of intervals agree, their ends by ``same``; None where one of them is none, or both
    are written with brackets alone."""
    ours, wanted = _union(one), _union(gold)
    if ours is None or wanted is None or not (ours[0] or wanted[0]):
        return None
    names, wanted_names = ours[0] - {"R"}, wanted[0] - {"R"}
    if names and wanted_names and names != wanted_names or len(ours[1]) != len(wanted[1]):
        return False
    left = list(wanted[1])
    for part in ours[1]:
        for other in left:
            if (part.low_in, part.high_in) == (other.low_in, other.high_in) and all(
                a.lstrip("+") == b.lstrip("+") or same(a, b)
                for a, b in ((part.low, other.low), (part.high, other.high))
            ):
                left.remove(other)
                break
        else:
            return False
    return True


def _union(text: str) -> tuple[set[str], list[Interval]] | None:
    """The variables named ("R" for all numbers by name) and the intervals."""
    text, names, found = text.strip(), set(), []
    if builder := _BUILDER.fullmatch(text):
        text = builder[2]
        names.add(builder[1])
    text = re.sub(r"^[a-zA-Z]\s*\\in(?![a-zA-Z])\s*", "", text)
    if _REAL.fullmatch(text):
        return names | {"R"}, [Interval(_ENDS["-"], False, _ENDS["+"], False)]
    if (said := _SAID.fullmatch(text)) and (sign := _WORDS.get(said["sign"].lower())):
        text = f"x {sign} {said['end']}"
        names.add("said")
    parts = _OR.split(text)
    if len(parts) == 1 and "," in text and all(_SIGN.search(part) for part in text.split(",")):
        parts = [part for part in text.split(",") if part.strip()]
    for part in parts:
        some = _one(part.strip().strip(",").strip())
        if some is None:
            return None
        names |= some[0]
        found += some[1]
    names = {"R"} if "said" in names else names
    return (names, found) if len(names) < 2 and found else None


def _one(text: str) -> tuple[set[str], list[Interval]] | None:
    if literal := _LITERAL.fullmatch(text):
        outward = literal[1] == "]" or literal[4] == "["
        low, high = literal[1] == "[", literal[4] == "]"
        return ({"R"} if outward else set()), [Interval(literal[2], low, literal[3], high)]
    both = [_bound(part.strip()) for part in _AND.split(text)]
    if None in both or len(both) > 2:
        return None
    (names, found), *second = [bound for bound in both if bound is not None]
    if second:
        more_names, more = second[0]
        if names != more_names or len(found) != 1 or len(more) != 1:
            return None
        low, high = sorted((found[0], more[0]), key=lambda i: i.low == _ENDS["-"])
        if low.high != _ENDS["+"] or high.low != _ENDS["-"] or low.low == _ENDS["-"]:
            return None
        found = [Interval(low.low, low.low_in, high.high, high.high_in)]
    return names, found


def _bound(text: str) -> tuple[set[str], list[Interval]] | None:
    """One inequality about one letter: a ray, what is between two ends, or both sides of one."""
    sides = [side.strip() for side in _SIGN.split(text)]
    signs, terms = sides[1::2], sides[::2]
    if len(terms) == 3 and "ne" not in "".join(signs) and re.fullmatch(r"[a-zA-Z]", terms[1]):
        if {sign[0] if sign[0] != "\\" else sign[1] for sign in signs} <= {"<", "l"}:
            return {terms[1]}, [Interval(terms[0], _closed(signs[0]), terms[2], _closed(signs[1]))]
        if {sign[0] if sign[0] != "\\" else sign[1] for sign in signs} <= {">", "g"}:
            return {terms[1]}, [Interval(terms[2], _closed(signs[1]), terms[0], _closed(signs[0]))]
        return None
    if len(terms) != 2:
        return None
    (left, right), (sign,) = terms, signs
    if re.fullmatch(r"\|?\s*[a-zA-Z]\s*\|?", right) and not re.fullmatch(r"\|?\s*[a-zA-Z]\s*\|?", left):
        left, right, turned = right, left, True
    else:
        turned = False
    match = re.fullmatch(r"(\|?)\s*([a-zA-Z])\s*\1", left)
    if match is None or not right or match[2] in right.replace("\\infty", "") or match[2] in "ei":
        return None
    name, closed = {match[2]}, _closed(sign)
    if "ne" in sign:
        return (name, [_below(right, False), _above(right, False)]) if not match[1] else None
    above = (sign[0] == ">" or sign.startswith("\\g")) != turned
    if match[1]:
        low = right[1:] if right.startswith("-") else f"-{right}"
        ends = (
            [_below(low, closed), _above(right, closed)] if above else [Interval(low, closed, right, closed)]
        )
        return name, ends
    return name, [_above(right, closed) if above else _below(right, closed)]


def _closed(sign: str) -> bool:
    return sign.startswith(("\\le", "\\ge")) or sign.endswith("=")
