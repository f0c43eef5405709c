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
from saerl_fast.rl.rewards.forms import alike, same_angle, same_ratio
from saerl_fast.rl.rewards.intervals import same_intervals
from saerl_fast.rl.rewards.lists import THOUSANDS, as_tuple, closing, named_values, parts_of, split
from saerl_fast.rl.rewards.notation import balanced, squeeze, tidy
from saerl_fast.rl.rewards.numbers import equal, only_number, stuck
from saerl_fast.rl.rewards.quantities import measure, same_base, same_clock, same_date, spelled, unit

log = logging.getLogger(__name__)

MOST_CHARACTERS = 2000  # of an answer that is compared as an expression

# Algebra without end: towers of numbers, huge powers, factorials and binomials.
_ENDLESS = re.compile(
    r"(\^|\*\*)[\s{(]*-?\d+[\s})]*(\^|\*\*)|(\^|\*\*)[\s{(]*-?\d{5}|\d{4}\s*!|!\s*!|\d{400}"
    r"|binom\s*\{?\s*\d{5}|\^\s*\{?\s*\\[dt]?binom"
)
_LETTER = re.compile(r"\(?\s*([A-Z])\s*[).]?(?:\s.*)?")
_UNIT = re.compile(
    r"(?P<value>.*(?:[\d})]|\\pi))\s*(?P<unit>\\?%|"
    r"(?!\\cdot)(?:(?:\^\s*\{?-?\d\}?|/|\\cdot|[()]|[.\u00b5'\"-]|[a-zA-Z]+(?![a-zA-Z]))\s*)+)"
)
# The label of one choice, before what it says; not of several.
_LABEL = re.compile(r"\(?([A-J])[).:]\s+(?=\S)(?!or\b|and\b|(?:.*\s)?\(?[A-J](?:[).:](?:\s|$)|$))")
_CHOICE = re.compile(r"^(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)(?:\s+is)?:?\s+", re.IGNORECASE)
# What makes a number in a sentence another one, or a bound, or none.
_HEDGE = re.compile(
    r"\b(?:not|no|never|neither|nor|or|than|at (?:least|most)|up to|over|under|above|below|between|about half"
    r"|half|third|quarter|twice|thrice|double|triple|squared?|cubed?|root|factorial|plus|minus|times|divided"
    r"|multiplied|add(?:ed)?|subtract(?:ed)?|if|unless|except|dozens?|hundreds?|thousands?|millions?|billions?"
    r"|(?:multiple|factor|divisor|power)s? of|exceeds?|(?:sum|product) of \d"
    r"|wrong|incorrect|maybe|perhaps|(?:two|three|four|five|six|seven|eight|nine|ten) \w)|n't\b",
    re.IGNORECASE,
)
_SIDE = re.compile(
    r"[a-zA-Z]\w*(?:_\{?\w+\}?)?(?:\([a-zA-Z]\w*(?:,\s*[a-zA-Z])*\)|\^\{-1\}\(x\))?'?|\|?[A-Z]{2,3}\|?"
)
_NOT_UNITS = {
    "ab", "abc", "ac", "am", "and", "arccos", "arcsin", "arctan", "bc", "cap", "cdot", "cos", "cot", "csc",
    "cup", "dx", "exp", "for", "gcd", "if", "in", "infty", "lcm", "ln", "log", "max", "min", "mn", "mod",
    "or", "pi", "pm", "pq", "sec", "sin", "sqrt", "st", "such", "tan", "th", "times", "to", "when", "xy",
    "xyz", "xz", "yz", "squared", "cubed", "factorial", "plus", "minus", "less", "than", "below", "divided",
    "choose", "modulo", "not", "most", "least",
}  # fmt: skip
_ARROW = re.compile(r"\\(?:to|rightarrow|mapsto|vee|lor|wedge|land)(?![a-zA-Z])|->")
_OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_LOOSE = re.compile(
    r"[-+*/^][\s}]*$|\\\}\s*\^\s*\{?\s*c(?![a-z])"
)  # 2^+ and \{1\}^c, which Math-Verify reads past
# Two numbers that no operation joins, of which Math-Verify reads the last.
_APART = re.compile(r"(?<=[\d})])\s*(?:\\mid(?![a-zA-Z])|\\sim(?![a-zA-Z])|[?&|])\s*(?=[\d\\(-])")
_WHERE = re.compile(r"(.*[\d})].*?)\s+(?:where|when|for|at)\s+[a-zA-Z]\s*(?:=|[<>]|\\[lgn]e)[^,;]*")
_SAID = re.compile(r"(?<![\\a-zA-Z])(?:or|and|not|if|is|to|than|but|maybe)(?![a-zA-Z])")


def same(candidate: str, gold: str) -> bool:
    """Whether two answers, as they are written, are equal."""
    if candidate.strip() and squeeze(candidate) == squeeze(gold):
        return True
    if len(candidate) > MOST_CHARACTERS or not candidate.strip():
        return False
    return _same(tidy(candidate), tidy(gold))


def _same(one: str, gold: str, depth: int = 0) -> bool:
    if not one or not gold:
        return False
    if _text(one) == _text(gold):
        return True
    choice = _same_choice(one, gold)
    if choice is not None:
        return choice
    label, wanted = _LABEL.match(one), _LABEL.match(gold)
    if wanted:
        given = label or _LETTER.fullmatch(one)
        if given:
            return given[1] == wanted[1]
        gold = gold[wanted.end() :]
    if label:
        one = one[label.end() :]
    if _verdict(gold):
        return _verdict(one) == _verdict(gold)
    if depth == 0:
        where = None if _WHERE.fullmatch(gold) or _SAID.search(one) else _WHERE.fullmatch(one)
        one = where[1] if where else one  # 7 where x = 5
        one = _core(re.sub(r"\s*\(or ([^()]*)\)$", r" or \1", one), gold)
        if _text(one) == _text(gold):
            return True
    if ":" in gold:
        one = re.sub(r"(?<=\d)\s+to\s+(?=\d)", ":", one)  # a ratio
    one, gold = alike(one, gold)
    for agree in (same_base, same_date, same_clock, _same_measure):
        found = agree(one, gold)
        if found is not None:
            return found
    for agree_by in (same_ratio, same_angle, same_intervals) if depth < 2 else ():
        found = agree_by(one, gold, lambda a, b: _same(a, b, depth + 1))
        if found is not None:
            return found
    one, gold = _bare(one, gold, inside=depth > 0)
    if not one:
        return False
    numbers = _number(one), _number(gold)
    if None not in numbers:
        return _equal_numbers(one, gold)
    for text, other in ((one, numbers[1]), (gold, numbers[0])):
        if other is not None and (
            equal(_number(re.sub(r"^(\d+) and (\d+/\d+)$", r"\1 \2", text)), other)
            or (_DECIMAL_COMMA.fullmatch(text) and equal(_number(text.replace(",", ".")), other))
            or equal(_worded(text), other)
        ):
            return True
    if _text(one) == _text(gold):
        return True
    if numbers[1] is not None and re.fullmatch(r"-?\d[\d.]*[a-zA-Z]{1,3}|\d+_.*|(?:[<>]|\\[lgn]e).*", one):
        return False  # 9ab, < 9
    if depth < 3:
        found = _same_parts(one, gold, depth)
        if found is not None:
            return found
    if _is_words(gold) or _is_words(one):
        return False
    return _same_expression(one, gold)


def _same_choice(one: str, gold: str) -> bool | None:
    """Whether both name the same choice, or all of several; None where ``gold`` is no letter of a choice."""
    letter = _LETTER.fullmatch(gold)
    if letter and len(gold) <= 4:
        one = _CHOICE.sub("", one)
        given = re.fullmatch(r"[(\[]?\s*([A-Z]|[a-e])\s*[).\]]?", one) or _LABEL.match(one)
        return given is not None and given[1].upper() == letter[1]
    several = re.fullmatch(r"[A-J](?:\s*,\s*[A-J])+", gold)
    if several and re.fullmatch("[A-J]{2,}", one):
        return sorted(one) == sorted(re.findall("[A-J]", gold))
    return None


def _core(text: str, gold: str) -> str:
    """An answer without the words before it: "The number of ways is 7", "Total: 7", "It is Monday",
    "The point (2,3)", "A(2,3)"."""
    if _HEDGE.search(text):
        return text
    if _is_words(gold):
        return re.sub(r"^(?:[A-Za-z]+ )+(?:is|are) (?:on )?", "", text)
    text = re.sub(r"^[A-Za-z][A-Za-z ]*(?:\s(?:is|are|equals|equal to)|:)\s+(?=.*[\d\\])", "", text)
    named = re.fullmatch(r"([A-Z]|[A-Za-z]+(?: [A-Za-z]+)* )([(\[].*,.*[)\]])", text)
    if named and not {word.lower() for word in named[1].split()} & _NOT_UNITS:
        return named[2] if closing(named[2]) == len(named[2]) - 1 else text
    return text


def _same_measure(one: str, gold: str) -> bool | None:
    """Two measures by their size; a number in words of scale (1.2 million) also against one in digits."""
    ours, wanted = measure(one), measure(gold)
    if ours and wanted:
        if ours[0] == wanted[0]:
            return equal(ours[1], wanted[1])
        if len(ours[0]) != len(wanted[0]):  # 5 dollars per hour, where 5 dollars are asked for
            return None
        names = {ours[2], wanted[2]}  # m may be minutes, miles or millions
        return None if "m" in names and len(names) > 1 and all(name[0] == "m" for name in names) else False
    if not (ours or wanted) and unit(one) and unit(gold) and unit(one) != unit(gold):
        return False  # 36\pi cm^2 and 36\pi cm^3
    for known, other in ((ours, gold), (wanted, one)):
        if known and known[0] == ("count", 1) and equal(_number(other), known[1]):
            return True
    return None


def _worded(text: str) -> Fraction | None:
    """The one number of "there are 7 ways", or that words say ("seven")."""
    if not re.search("[a-zA-Z]{2}", text) or re.search(r"[^\w\s.,'$%-]|_", text):
        return None
    if (number := spelled(text)) is not None:
        return number
    plain = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b", "", text)
    odd = re.search(r"\d[a-zA-Z]|[a-zA-Z]\d|\b[b-zB-HJ-Z]\b|\d\s+[A-Z]\b", plain)
    return None if odd or _HEDGE.search(text) else only_number(text)


def _verdict(text: str) -> str | None:
    """Yes, no, true or false, where an answer is that or begins with it and a comma; not "Yes, no"."""
    match = re.match(r"(yes|no|true|false)\b(?=\s*(?:[,.;:]|$))", text, re.IGNORECASE)
    if match is None:
        return None
    ends = re.search(rf"\b{_OPPOSITE[match[1].lower()]}\W*$", text, re.IGNORECASE)
    return None if ends else match[1].lower()


def _text(text: str) -> str:
    """Text to compare: without blanks and brackets around it, words in lower case."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if THOUSANDS.fullmatch(text) else text
    text = re.sub(r"^(?:the|an?)\s+(?=[a-z]{3}[a-z ]*$)", "", text.strip(), flags=re.IGNORECASE)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", re.sub(r"[\s$]+(?!\d)|(?<!\d)[\s$]+", "", text))
    text = re.sub(r"_\{(\d+)\}", r"_\1", text)
    words = re.search(r"[a-zA-Z]{3}|[ap]\.?m\b|[AP]\.?M\b", text)
    text = re.sub(r"^(no.*[a-z])s$", r"\1", text, flags=re.IGNORECASE)  # no solutions, no solution
    return text.lower() if words and re.fullmatch(r"[a-zA-Z0-9 ():.,'-]+", text) else text


_DECIMAL_COMMA = re.compile(r"-?(?:\d+,\d{1,2}|0,\d+|\d+,\d{4,})")


def _bare(one: str, gold: str, inside: bool) -> tuple[str, str]:
    """Both without units and without ``x =``; ``inside`` a list, names must agree where both have one."""
    one, gold = _without_unit(one), _without_unit(gold)
    sides, wanted = _sides(one), _sides(gold)
    if len(sides) == len(wanted) == 2:  # x = 5 is not y = 5
        inside |= _other_name(sides[0], wanted[0])
    values = [side for side in sides if _number(side) is not None]
    if any(not _near(value, values[0]) for value in values):
        return "", gold  # 3 = 4
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


def _other_name(one: str, gold: str) -> bool:
    """Whether two names of one kind (x and y, f(x) and g(x), AB and CD) differ."""
    for kind in (r"([a-zA-Z](?:_\{?\w+\}?)?)'?", r"([a-zA-Z](?:_\{?\w+\}?)?)'?\(.*\)", r"([A-Z]{2,3})"):
        a, b = re.fullmatch(kind, one), re.fullmatch(kind, gold)
        if a and b:
            return sorted(re.sub("[{}]", "", a[1])) != sorted(re.sub("[{}]", "", b[1]))
    return False


def _near(one: str, other: str) -> bool:
    a, b = _number(one), _number(other)
    assert a is not None and b is not None
    return _equal_numbers(one, other) or abs(a - b) * 100 <= max(abs(a), abs(b))


def _reducible(sides: list[str]) -> bool:
    """Whether a chain of equations says what its last side is: of a name, or of a sum of numbers."""
    if len(sides) < 2:
        return False
    letters = re.sub(r"\\(?:frac|times|cdot|div|sqrt|left|right)", "", sides[0] + sides[-1])
    return _SIDE.fullmatch(sides[0]) is not None or not re.search(r"[a-zA-Z]", letters)


def _sides(text: str) -> list[str]:
    """The sides of a chain of equations; the text alone when it is a list or has inequalities."""
    if split(text, ",;") != [text] or re.search(
        r"[<>]|\\(?:le|ge|ne|or|and|in)(?![a-z])|\b(?:or|and)\b", text
    ):
        return [text]
    exact, about, rest = re.split(r"(\\approx)", text, maxsplit=1) if "\\approx" in text else (text, "", "")
    inner = re.sub(r"\{[^{}]*\}", lambda m: m[0].replace("=", "\0"), exact)  # a sum's "k=0" is no equation
    sides = [part.strip().replace("\0", "=") for part in re.split(r"(?<![\\<>!])=|\\equiv", inner)]
    if about and len(sides) == 1 and _SIDE.fullmatch(sides[0]):  # x \approx 3.1
        sides.append(rest.strip())
    return sides


def _without_unit(text: str) -> str:
    """A number without its unit or currency; anything else as it is."""
    text = text.strip().strip("$€£¥ ").rstrip(" .,;:")
    match = _UNIT.fullmatch(text)
    if match is None or match["unit"].startswith("-") or "\\%" in match["unit"] or "%" in match["unit"]:
        return text
    words = re.findall(r"[a-zA-Z]+", match["unit"].replace("\\cdot", " "))
    if not words or {w.lower() for w in words} & (_NOT_UNITS - {"in"} if len(words) == 1 else _NOT_UNITS):
        return text
    if words == ["percent"]:
        return text
    single = len(words) == 1 and len(words[0]) == 1
    if single and (match.start("unit") == match.end("value") or words[0] not in "mgslhLKCFVWJN"):
        return text  # 5m may be five times m
    if match.start("unit") == match.end("value") and stuck(match["unit"]):
        return text
    return match["value"].strip() if only_number(match["value"]) is not None or " " in text else text


def _number(text: str) -> Fraction | None:
    r"""The number that an answer is, without units; 50\% is 50. None for anything else."""
    text = re.sub(r"\s*(?:\\?%|percent(?:age)?|degrees?)$", "", text.strip().strip("$"))
    text = re.sub(r"^[$\s]+|^([-+])\s*\$", r"\1", text)
    text = text.replace(",", "") if THOUSANDS.fullmatch(text) else text
    if re.search(r"[a-zA-Z,]", re.sub(r"\\(?:frac|times|cdot)|[eE][-+]?\d|\d,\d{3}(?!\d)", "", text)):
        return None
    return only_number(text)


def _equal_numbers(one: str, gold: str) -> bool:
    r"""Numbers; a percentage is the number before the sign, or the share when the other has no sign."""
    a, b = _number(one), _number(gold)
    assert a is not None and b is not None
    if equal(a, b) and not ("%" in one and "%" not in gold and "/" in gold.replace("\\frac", "/") and b < 1):
        return True
    signs = [bool(re.search(r"%|percent", text)) for text in (one, gold)]
    if signs == [True, False]:
        return equal(a / 100, b)
    return equal(a, b / 100) if signs == [False, True] else False


def _same_parts(one: str, gold: str, depth: int) -> bool | None:
    """Lists, sets, tuples and intervals, part by part; None when these are no such things."""
    named, wanted_names = named_values(one), named_values(gold)
    if named and wanted_names:
        return named.keys() == wanted_names.keys() and all(
            _same(value, wanted_names[name], depth + 1) for name, value in named.items()
        )
    one, gold = as_tuple(one, named, gold), as_tuple(gold, wanted_names, one)
    ours, wanted = parts_of(one), parts_of(gold)
    if ours and wanted is None and ours[0] == "" and re.search(r"\bor\b", one):
        return all(_same(part, gold, depth + 1) for part in ours[1])  # 3/4 or .75
    if ours is None or wanted is None:
        return None
    (open_one, first), (open_gold, second) = ours, wanted
    if (open_one == "{") != (open_gold == "{"):  # the set of one pair
        if len(first) == 1:
            return _same(first[0], gold, depth + 1)
        if len(second) == 1:
            return _same(one, second[0], depth + 1)
    plain_list = {"", "{"}
    if open_one != open_gold and not (open_one in plain_list and open_gold in plain_list):
        if "," in one and "," in gold and {open_one[:1], open_gold[:1]} <= {"(", "[", "{"}:
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


def _is_words(text: str) -> bool:
    return re.fullmatch(r"[a-zA-Z][a-zA-Z' -]{2,}", text) is not None and "\\" not in text and len(text) > 3


def _same_expression(one: str, gold: str) -> bool:
    """By Math-Verify; False without it, for expressions that could take for ever, and for "3 \\to 4"."""
    if any(odd.search(one) and not odd.search(gold) for odd in (_ARROW, _SAID, _LOOSE, _APART)):
        return False
    if not one.isascii() and gold.isascii() and len(re.findall(r"\d+", one)) > 1:
        return False  # words of another language, "or" perhaps
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
