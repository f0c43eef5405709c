r"""Whether two answers, as they are written, are the same.

They are equal when their tidied text is, when they are equal numbers, when they are lists, sets, tuples or
intervals of equal parts, or when Math-Verify (github.com/huggingface/Math-Verify), where it is installed,
finds their expressions equal. What is tidied away is what the graders of Hendrycks' MATH, Minerva (arXiv
2206.14858), PRIME and verl also drop: delimiters, spacing, kinds of fraction, units, currency, ``x =``.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import cache
from importlib.util import find_spec

from saerl_fast.rl.judges import same_expression
from saerl_fast.rl.rewards.notation import balanced, squeeze, tidy
from saerl_fast.rl.rewards.numbers import equal, only_number

log = logging.getLogger(__name__)

MOST_CHARACTERS = 2000  # of an answer that is compared as an expression

# Algebra without end: towers of numbers, huge powers, factorials and binomials.
_ENDLESS = re.compile(
    r"(\^|\*\*)[\s{(]*-?\d+[\s})]*(\^|\*\*)|(\^|\*\*)[\s{(]*-?\d{5}|\d{4}\s*!|!\s*!|\d{400}"
    r"|binom\s*\{?\s*\d{5}|\^\s*\{?\s*\\[dt]?binom"
)
_LETTER = re.compile(r"\(?\s*([A-Z])\s*[).]?(?:\s.*)?")
_UNIT = re.compile(
    r"(?P<value>.*[\d})])\s*(?P<unit>\\?%|"
    r"(?!\\cdot)(?:(?:\^\s*\{?-?\d\}?|/|\\cdot|[()]|[.\u00b5'\"-]|[a-zA-Z]+(?![a-zA-Z]))\s*)+)"
)
# The label of one choice, before what it says; not of several.
_LABEL = re.compile(r"\(?([A-J])[).:]\s+(?=\S)(?!or\b|and\b|(?:.*\s)?\(?[A-J](?:[).:](?:\s|$)|$))")
_SIDE = re.compile(
    r"[a-zA-Z]\w*(?:_\{?\w+\}?)?(?:\([a-zA-Z]\w*(?:,\s*[a-zA-Z])*\)|\^\{-1\}\(x\))?'?|\|?[A-Z]{2,3}\|?"
)
_NOT_UNITS = {
    "ab", "abc", "ac", "am", "and", "arccos", "arcsin", "arctan", "bc", "cap", "cdot", "cos", "cot", "csc",
    "cup", "dx", "exp", "for", "gcd", "if", "in", "infty", "lcm", "ln", "log", "max", "min", "mn", "mod",
    "or", "pi", "pm", "pq", "sec", "sin", "sqrt", "st", "such", "tan", "th", "times", "to", "when", "xy",
    "xyz", "xz", "yz",
}  # fmt: skip
# Units of one kind, in the smallest: where both answers have one, its size counts.
_SCALES = {
    kind: {name: Fraction(size) for size, names in sizes.items() for name in names.split()}
    for kind, sizes in {
        "length": {"1": "mm", "10": "cm", "1000": "m meter meters", "1000000": "km kilometers"},
        "imperial": {"1": "in inch inches", "12": "ft foot feet", "36": "yd yards", "63360": "mi mile miles"},
        "mass": {"1": "mg", "1000": "g gram grams", "1000000": "kg kilograms"},
        "time": {"1": "s sec second seconds", "60": "min minute minutes", "3600": "h hr hour hours",
                 "86400": "day days"},
        "volume": {"1": "mL ml", "1000": "L l liter liters"},
        "money": {"1": "cent cents", "100": "dollar dollars"},
    }.items()
}  # fmt: skip
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def same(candidate: str, gold: str) -> bool:
    """Whether two answers, as they are written, are equal."""
    if len(candidate) > MOST_CHARACTERS or not candidate.strip():
        return False
    if squeeze(candidate) == squeeze(gold):
        return True
    return _same(tidy(candidate), tidy(gold))


def _same(one: str, gold: str, depth: int = 0) -> bool:
    if not one or not gold:
        return False
    if _text(one) == _text(gold):
        return True
    letter = _LETTER.fullmatch(gold)
    if letter and len(gold) <= 4:
        given = re.fullmatch(r"\(?\s*([A-Z]|[a-e])\s*[).]?", one) or _LABEL.match(one)
        return given is not None and given[1].upper() == letter[1]
    if label := _LABEL.match(one):
        one = one[label.end() :]
    ours, wanted = _measure(one), _measure(gold)
    if ours and wanted and ours[0] == wanted[0]:
        return equal(ours[1], wanted[1])
    one, gold = _bare(one, gold, inside=depth > 0)
    numbers = _number(one), _number(gold)
    if None not in numbers:
        return _equal_numbers(one, gold)
    for text, other in ((one, numbers[1]), (gold, numbers[0])):
        if (
            other is not None
            and _DECIMAL_COMMA.fullmatch(text)
            and equal(_number(text.replace(",", ".")), other)
        ):
            return True
    if _text(one) == _text(gold):
        return True
    if depth < 3:
        found = _same_parts(one, gold, depth)
        if found is not None:
            return found
    if _is_words(gold) or _is_words(one):
        return False
    return _same_expression(one, gold)


def _text(text: str) -> str:
    """Text to compare: without blanks and brackets around it, words in lower case."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if _THOUSANDS.fullmatch(text) else text
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", re.sub(r"[\s$]", "", text))
    text = re.sub(r"_\{(\d+)\}", r"_\1", text)
    words = re.search(r"[a-zA-Z]{3}|[ap]\.?m\b|[AP]\.?M\b", text)
    return text.lower() if words and re.fullmatch(r"[a-zA-Z0-9 ():.,'-]+", text) else text


_DECIMAL_COMMA = re.compile(r"-?(?:\d+,\d{1,2}|0,\d+|\d+,\d{4,})")
_NAME = re.compile(r"\s*([a-zA-Z])(?:_?\w|_\{\w+\})?\s*=")
_THOUSANDS = re.compile(r"[-+$]*[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?\W*")


def _bare(one: str, gold: str, inside: bool) -> tuple[str, str]:
    """Both without units and without ``x =``; ``inside`` a list, names must agree where both have one."""
    one, gold = _without_unit(one), _without_unit(gold)
    sides, wanted = _sides(one), _sides(gold)
    if len(sides) == len(wanted) == 2 and sides[0] != wanted[0]:  # x = 5 is not y = 5
        inside |= all(re.fullmatch("[a-z]", side[0]) for side in (sides, wanted))
    if inside and len(sides) > 1 and len(wanted) > 1 and sides[0] != wanted[0]:
        return one, gold
    named = all(map(_SIDE.fullmatch, (sides[0], wanted[0])))
    pairs = len(sides) == len(wanted) == 2
    if len(sides) > 1 and len(wanted) > 1 and not (named and (pairs or sides[0] == wanted[0])):
        return one, gold
    one, gold = (
        text if not _reducible(parts) else parts[-1] for text, parts in ((one, sides), (gold, wanted))
    )
    one, gold = (re.sub(r"^\w+\s*\\in\s*(?![a-zA-Z])", "", text) for text in (one, gold))
    return _without_unit(one), _without_unit(gold)


def _reducible(sides: list[str]) -> bool:
    """Whether a chain of equations says what its last side is: of a name, or of a sum of numbers."""
    if len(sides) < 2:
        return False
    letters = re.sub(r"\\(?:frac|times|cdot|div|sqrt|left|right)", "", sides[0] + sides[-1])
    return _SIDE.fullmatch(sides[0]) is not None or not re.search(r"[a-zA-Z]", letters)


def _sides(text: str) -> list[str]:
    """The sides of a chain of equations; the text alone when it is a list or has inequalities."""
    if _split(text, ",;") != [text] or re.search(
        r"[<>]|\\(?:le|ge|ne|or|and|in)(?![a-z])|\b(?:or|and)\b", text
    ):
        return [text]
    exact, about, rest = re.split(r"(\\approx)", text, maxsplit=1) if "\\approx" in text else (text, "", "")
    inner = re.sub(r"\{[^{}]*\}", lambda m: m[0].replace("=", "\0"), exact)  # a sum's "k=0" is no equation
    sides = [part.strip().replace("\0", "=") for part in re.split(r"(?<![\\<>!])=|\\equiv", inner)]
    if about and len(sides) == 1 and _SIDE.fullmatch(sides[0]):  # x \approx 3.1
        sides.append(rest.strip())
    return sides


def _measure(text: str) -> tuple[str, Fraction] | None:
    """(kind of unit, value in its smallest unit) of a number with one of the common units."""
    match = re.fullmatch(r"(.*[\d}])\s*([a-zA-Z]{1,10})", text.strip().rstrip("."))
    number = match and only_number(match[1])
    if match is None or number is None:
        return None
    return next(
        ((kind, number * names[match[2]]) for kind, names in _SCALES.items() if match[2] in names), None
    )


def _without_unit(text: str) -> str:
    """A number without its unit or currency; anything else as it is."""
    text = text.strip().strip("$ ").rstrip(" .,;:")
    match = _UNIT.fullmatch(text)
    if match is None or "\\%" in match["unit"] or "%" in match["unit"]:
        return text
    words = re.findall(r"[a-zA-Z]+", match["unit"].replace("\\cdot", " "))
    if not words or {w.lower() for w in words} & (_NOT_UNITS - {"in"} if len(words) == 1 else _NOT_UNITS):
        return text
    if words == ["percent"]:
        return text
    single = len(words) == 1 and len(words[0]) == 1
    if single and (match.start("unit") == match.end("value") or words[0] not in "mgslhLKCFVWJN"):
        return text  # 5m may be five times m
    return match["value"].strip() if only_number(match["value"]) is not None or " " in text else text


def _number(text: str) -> Fraction | None:
    r"""The number that an answer is, without units; 50\% is 50. None for anything else."""
    text = re.sub(r"\s*(?:\\?%|percent(?:age)?|degrees?)$", "", text.strip().strip("$"))
    text = re.sub(r"^[$\s]+|^([-+])\s*\$", r"\1", text)
    if re.search(r"[a-zA-Z,]", re.sub(r"\\(?:frac|times|cdot)|[eE][-+]?\d|\d,\d{3}(?!\d)", "", text)):
        return None
    return only_number(text)


def _equal_numbers(one: str, gold: str) -> bool:
    r"""Numbers; a percentage is the number before the sign, or the share when the other has no sign."""
    a, b = _number(one), _number(gold)
    assert a is not None and b is not None
    if equal(a, b):
        return True
    signs = [bool(re.search(r"%|percent", text)) for text in (one, gold)]
    if signs == [True, False]:
        return equal(a / 100, b)
    return equal(a, b / 100) if signs == [False, True] else False


def _same_parts(one: str, gold: str, depth: int) -> bool | None:
    """Lists, sets, tuples and intervals, part by part; None when these are no such things."""
    ours, wanted = _parts(one), _parts(gold)
    if ours is None or wanted is None:
        return None
    (open_one, first), (open_gold, second) = ours, wanted
    plain_list = {"", "{"}
    if open_one != open_gold and not (open_one in plain_list and open_gold in plain_list):
        if "," in one and "," in gold and {open_one[:1], open_gold[:1]} <= {"(", "["}:
            return False
        return None
    if open_gold not in plain_list:
        if len(first) != len(second):
            return False
        return all(_same(a, b, depth + 1) for a, b in zip(first, second, strict=True))
    if len(first) < len(second):
        return False if not any("=" in p for p in first + second) else None
    left = list(second)
    for part in first:  # one that is stated twice does no harm
        match = next((other for other in [*left, *second] if _same(part, other, depth + 1)), None)
        if match is None:
            return False
        if match in left:
            left.remove(match)
    return not left


def _parts(text: str) -> tuple[str, list[str]] | None:
    r"""Brackets ("" for a bare list, "{" for a set) and parts of a list; two values for one with \pm."""
    text = text.strip()
    text = re.sub(r"\\[{}]", lambda m: m[0][1], text)
    if text and text[0] in _PAIRS and _closing(text) == len(text) - 1 and not text.startswith("{}"):
        inner = _split(_ungrouped(text[1:-1]), ",;")
        brackets = "{" if text[0] == "{" else text[0] + text[-1]
        if len(inner) > 1 or text[0] == "{":
            return brackets, [v for part in inner for v in _both(part)] if brackets == "{" else inner
        return None
    text = _ungrouped(text)
    listed = re.sub(r",?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])\s*,?", ",", text)
    inner = [v for part in _split(listed, ",;") for v in _both(part) if part.strip()]
    if len(inner) < 2:
        return None
    names = [_NAME.match(part) for part in inner]
    letters = {name[1] for name in names if name}
    if len(letters) == 1 and all(name or "=" not in part for name, part in zip(names, inner, strict=True)):
        inner = [_NAME.sub("", part) for part in inner]
    return "", inner


def _ungrouped(text: str) -> str:
    """A list without its thousands commas, which no blank follows where one follows what separates."""
    if re.search(r"[(\[{]", text) or not re.search(r",\s|;|\b(?:and|or)\b", text):
        return text
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _both(part: str) -> list[str]:
    r"""``1 \pm x`` as two values."""
    if part.count("\\pm") != 1:
        return [part.strip()]
    return [part.replace("\\pm", sign).strip().lstrip("+").strip() for sign in ("+", "-")]


def _closing(text: str) -> int:
    """Where the bracket that opens ``text`` closes; round and square ones may close each other."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return i
    return -1


def _split(text: str, separators: str) -> list[str]:
    """``text`` at its separators outside all brackets; a thousands comma is none."""
    if _THOUSANDS.fullmatch(text):
        return [text]
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and char in separators and text[i - 1 : i] != "\\":
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _is_words(text: str) -> bool:
    return re.fullmatch(r"[a-zA-Z][a-zA-Z' -]{2,}", text) is not None and "\\" not in text and len(text) > 3


def _same_expression(one: str, gold: str) -> bool:
    """By Math-Verify; False without it, and for expressions that could take for ever."""
    if not math_verify() or not balanced(one) or _ENDLESS.search(one) or _ENDLESS.search(gold):
        return False
    return same_expression(one, gold)


@cache
def math_verify() -> bool:
    """Whether it is installed; that it is not is said once."""
    try:
        found = find_spec("math_verify") is not None
    except ValueError:  # as for a module that was made unavailable
        found = False
    if not found:
        log.warning(
            "math-verify is not installed: the maths reward compares numbers, lists and text, not expressions"
        )
    return found
