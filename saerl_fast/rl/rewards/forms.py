r"""Answers that say the same in another form: ratios, angles in radians, vectors, functions of another
variable, chains of equations. Each reader gives None, or the text as it is, for anything else."""

from __future__ import annotations

import re
from collections.abc import Callable

from saerl_fast.rl.rewards.numbers import only_number

_FUNCTION = re.compile(r"([a-zA-Z])\(\s*([a-zA-Z])\s*\)\s*=\s*(.+)")
_CONSTANT = re.compile(r".*[+]\s*([CcKkDA])")
_INTEGER = re.compile(r"(?<![a-zA-Z])([a-z])\s*\\in\s*\\mathbb\s*\{?\s*[ZN]")
_DOMAIN = re.compile(
    r"(^|,)\s*\(?(?:(?:where|for|with)\s+)?(?:[a-z]\s*\\in\s*\\mathbb\s*\{?\s*[ZNRQ]\}?(?:\s*\^?\{?[+*]\}?)?"
    r"|(?:any\s+|all\s+|some\s+)?integers?\s+[a-z]|[a-z]\s+is\s+an(?:y|\s+arbitrary)?\s+integer)\)?\s*(,|$)"
)
_MODULO = re.compile(r"\s*\(?\s*\\?[pb]?mod(?![a-z])\s*\{?\s*\d+\s*\}?\s*\)?$")
_NESTED = re.compile(r"\[\s*\[[^\[\]]*\](?:\s*,\s*\[[^\[\]]*\])*\s*\]")
_MATRIX = re.compile(
    r"\\begin\{(?:[pbB]?matrix|array)\}(?:\s*\{[clr|]*\})?(.*)\\end\{(?:[pbB]?matrix|array)\}", re.DOTALL
)
_HATS = re.compile(r"\\(?:hat|vec|bar)\s*\{\s*\\?([ijk])(?:math)?\s*\}")
_TERM = re.compile(r"([-+]?)\s*([^-+ijk,]*?)\s*([ijk])(?![a-zA-Z])\s*")
_TIME = re.compile(r"\d{1,2}:[0-5]\d(?::[0-5]\d)?")
_RADIANS = re.compile(r"\s*\brad(?:ian)?s?\b")
_DEGREES = re.compile(r"\s*\bdegrees?\b")


def alike(one: str, gold: str) -> tuple[str, str]:
    """Both, the first in the second's form where they differ by a name or a notation only."""
    one, gold = _undeclared(one, gold)
    one = _function(one, gold)
    one = _constant(one, gold)
    one = _index(one, gold)
    if "\\cup" in gold and "\\cup" not in one:
        one = re.sub(r"(?<=[)\]])\s*,?\s*\bor\b\s*(?=[(\[])", r" \\cup ", one)
    if "," in gold and ("=" in gold or gold[0] == "("):
        one = _chain(one)
    elif "," in one and "=" in one:
        gold = _chain(gold)
    return _vector(one, gold), _vector(gold, one)


def _undeclared(one: str, gold: str) -> tuple[str, str]:
    """Both without "k \\in Z" and "mod 7", where only one of them says so."""
    if ("mod" in one) != ("mod" in gold):
        one, gold = (_MODULO.sub("", text) or text for text in (one, gold))
    if bool(_DOMAIN.search(one)) == bool(_DOMAIN.search(gold)):
        return one, gold
    return tuple(_DOMAIN.sub(lambda m: "," if m[1] and m[2] else "", t) or t for t in (one, gold))  # type: ignore[return-value]


def _function(one: str, gold: str) -> str:
    """f(t) = t^2 as f(x) = x^2: the variable of a function has no meaning of its own."""
    ours, wanted = _FUNCTION.fullmatch(one), _FUNCTION.fullmatch(gold)
    if not ours or not wanted or ours[1] != wanted[1] or ours[2] == wanted[2]:
        return one
    letters = re.sub(r"\\[a-zA-Z]+", "", ours[3])
    if wanted[2] in letters or re.search("[a-zA-Z]{3}", letters):
        return one
    body = re.sub(rf"\\[a-zA-Z]+|{ours[2]}", lambda m: m[0] if m[0][0] == "\\" else f" {wanted[2]} ", ours[3])
    return f"{ours[1]}({wanted[2]}) = {body}"


def _constant(one: str, gold: str) -> str:
    """The constant of integration by the letter that ``gold`` gives it."""
    ours, wanted = _CONSTANT.fullmatch(one), _CONSTANT.fullmatch(gold)
    if not ours or not wanted or ours[1] in one[:-1] or wanted[1] in gold[:-1]:
        return one
    return one[:-1] + wanted[1]


def _index(one: str, gold: str) -> str:
    """k \\in Z by the letter that ``gold`` has for it."""
    ours, wanted = _INTEGER.search(one), _INTEGER.search(gold)
    if not ours or not wanted or ours[1] == wanted[1] or wanted[1] in re.sub(r"\\[a-zA-Z]+", "", one):
        return one
    return re.sub(rf"\\[a-zA-Z]+|{ours[1]}", lambda m: m[0] if m[0][0] == "\\" else wanted[1], one)


def _chain(text: str) -> str:
    """x = 3 = y as x=3, y=3."""
    sides = [side.strip() for side in text.split("=")]
    names = [side for side in sides if re.fullmatch("[a-zA-Z]", side)]
    if len(names) < 2 or len(names) != len(sides) - 1 or "," in text:
        return text
    value = next(side for side in sides if side not in names)
    return ", ".join(f"{name}={value}" for name in names)


def _vector(text: str, other: str) -> str:
    """A row, a column, lists in a list, or a sum of i, j and k as the tuple or matrix that ``other`` is."""
    if matrix := _MATRIX.fullmatch(text):
        if not other.startswith("(") or ("&" in matrix[1]) == ("\\\\" in matrix[1]):
            return text
        parts = [part.strip() for part in re.split(r"&|\\\\", matrix[1])]
        return f"({', '.join(filter(None, parts))})"
    if _NESTED.fullmatch(text) and "\\begin" in other:
        inner = re.sub(r"\]\s*,\s*\[", r" \\\\ ", text).strip("[] ").replace(",", " & ")
        return rf"\begin{{pmatrix}}{inner}\end{{pmatrix}}"
    plain = _HATS.sub(r" \1 ", text).strip()
    terms = _TERM.findall(plain) if "j" in plain else []
    units = [unit for *_, unit in terms]
    if "j" not in units or len(units) < 2 or len({*units}) < len(units) or _TERM.sub("", plain):
        return text
    sizes = {unit: f"{sign.strip('+')}{size or '1'}" for sign, size, unit in terms}
    column = _MATRIX.fullmatch(other)
    length = len(re.split(r"\\\\|&" if column else ",", other)) if column or other[:1] == "(" else 0
    if length not in (2, 3) or length < len("ijk"[: "ijk".index(max(units)) + 1]):
        return text
    values = [sizes.get(unit, "0") for unit in "ijk"[:length]]
    inner = r" \\ ".join(values)
    return rf"\begin{{pmatrix}}{inner}\end{{pmatrix}}" if column else f"({', '.join(values)})"


def same_ratio(one: str, gold: str, same: Callable[[str, str], bool]) -> bool | None:
    """Whether two ratios agree, which may be scaled unless ``gold`` may be a time; None where one is none."""
    ours, wanted = ([part.strip() for part in text.split(":")] for text in (one, gold))
    if min(len(ours), len(wanted)) < 2 or any(re.search(r"[,={|]", p) and "\\" not in p for p in wanted):
        return None
    if len(ours) != len(wanted):
        return False
    numbers, goal = ([only_number(part) for part in parts] for parts in (ours, wanted))
    if _TIME.fullmatch(gold):
        return None
    if None in numbers or None in goal:
        return True if all(map(same, ours, wanted)) else None if len(ours) == 2 else False
    first, of = numbers[0], goal[0]
    return bool(first and of) and all(a * of == b * first for a, b in zip(numbers, goal, strict=True))  # type: ignore[operator]


def same_angle(one: str, gold: str, same: Callable[[str, str], bool]) -> bool | None:
    """Whether an angle said to be in radians is one in degrees, and the other way round; else None."""
    texts = one, gold
    radians, degrees = ([bool(sign.search(text)) for text in texts] for sign in (_RADIANS, _DEGREES))
    number = re.compile(r"(?:[-+*/\d.{}() ]|\\(?:frac|pi|sqrt|cdot|times)(?![a-z]))+")
    bare = [_DEGREES.sub("", _RADIANS.sub("", text)).strip() for text in texts]
    if not all(map(number.fullmatch, bare)):
        return None
    if degrees != radians and sorted(degrees) == sorted(radians) == [False, True]:
        turn = degrees.index(True)
        bare[turn] = rf"\frac{{{bare[turn]}\cdot\pi}}{{180}}"
        return same(*bare)
    if any(d and "\\pi" in text for d, text in zip(degrees, bare, strict=True)) and degrees != [True, True]:
        return False  # \pi degrees are not \pi
    return None
