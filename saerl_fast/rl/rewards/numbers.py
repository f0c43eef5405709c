r"""Numbers as people write them, read exactly.

Read are thousands (``1,000``, ``1 000``, ``1\,000``, ``1{,}000``), decimals, exponents (``1e3``,
``1.2 \times 10^3``, ``2^{10}``), fractions (``3/4``, ``\frac{3}{4}``, ``\dfrac34``) and mixed numbers
(``1 1/2``, ``1\frac{1}{2}``), with any of the signs that Unicode has for minus.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from saerl_fast.rl.rewards.notation import EUROPEAN, european, plain, tidy

MOST_DIGITS = 1000  # longer ones are noise, and slow

_NUMBER = re.compile(
    # A sign right after a digit or bracket ("5-3", "5 - 3") is an operation, not part of the number.
    r"(?:(?<![\w.)}])(?<![\d)}]\s)(?P<sign>[-+])\s?)?(?<![\w.^])(?<!\^\{)(?<!_\{)(?<!\^-)(?<!\^\{-)"
    r"[$€£]?(?:(?P<mixed>\d+)\s+(?=\d+/\d))?"
    r"(?P<whole>[1-9]\d{0,2}(?:,\d{3})+(?![\d])|[1-9]\d{0,2}(?: \d{3})+(?!\d| \d)|\d+)?(?P<dec>\.\d+)?"
    r"(?:[eE](?P<exp>[-+]?\d{1,3})(?!\w)|\s?(?:\\times|\\cdot|[*x])\s{0,2}10\s?\^\s?\{?(?P<ten>[-+]?\d{1,3})\}?"
    r"|\s?\^\s?\{?(?P<pow>-?\d{1,3})(?:\}|(?!\w)))?"
    r"(?:\s*/\s*(?P<den>\d+)(?!\d|\.\d))?(?:\s(?P<scale>thousand|million|billion|trillion)\b)?"
)
_INT = r"\s*(-?\s*\d+)\s*"
_FRAC = re.compile(rf"(?:(-)\s*)?\\[dtc]?frac\s*(?:\{{{_INT}\}}\s*\{{{_INT}\}}|(\d)\s*(\d)(?!\d))")
_PART = re.compile(r"\\[dtc]?frac\s*(?:(\d)\s*\{\s*(\d+)\s*\}|\{\s*(-?\d+)\s*\}\s*(\d))")
_GROUPS = re.compile(r"(?<![\d.,_])\d{1,3}(?:(?:\.\d{3}){2,}|(?:_\d{3})+)(?![\d.,])")  # 1.000.000, 1_000
_MONTH = re.compile(
    r"\bmay\s+\d|\d\s+may\b|\b(jan(uary)?|feb(ruary)?|march|apr(il)?|june?|july?|aug(ust)?|sept(ember)?|oct(ober)?|nov(ember)?"
    r"|dec(ember)?)\b",
    re.I,
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Before and after a number that is part of something else: a time, ratio, range, date or pair, a product with
# a variable, a root or another base; or that is denied.
_HEAD = re.compile(
    r"(?:\d\s*[:/]\s*|[\d)]\s?[-\u2013]\s?|[(\[]\s*[-\d./]+\s*,\s*|sqrt\s*[{(]?\s*|\u221a\s*|\b[Nn]ot\s+|\d\s+or\s+|\bor\s+(?:maybe|perhaps|possibly)\s+"
    r"|\b[Bb]etween\s+\S+\s+and\s+)$"
)
_TAIL = re.compile(
    r"\s?(?:[_^]|\\(?:pi|sqrt)(?![a-z])|pi\b|[\u03c0\u221a])|:\d|[abcijknpqrtuvwxyz](?![a-zA-Z])|\s*[-+*/]\s*\d"
)
_UNITS = frozenset({
    "mm", "cm", "km", "in", "ft", "yd", "mi", "mg", "kg", "lb", "lbs", "oz", "sec", "min", "hr", "hrs", "ml",
    "mL", "mph", "kph", "Hz", "kHz", "MHz", "Pa", "kPa", "kV", "kW", "kWh", "kJ", "mol", "rad", "deg", "st",
    "nd", "rd", "th", "am", "pm", "AM", "PM", "cc", "eV", "USD", "EUR", "GBP",
})  # that follow a number without a blank  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A number in a text: its value, and where it begins and ends in what `prepared` made of the text."""

    value: Fraction
    start: int
    end: int


def prepared(text: str) -> str:
    """``text`` with its signs in ASCII and its LaTeX fractions and spacing as plain text."""
    text = re.sub(r"\s{4,}", "   ", plain(text))  # long runs would be looked through again and again
    text = re.sub(r"(?<=\d)(?:\\[,;:! ]|\{,\}|,\\!)+(?=\d{3}(?!\d))", "", text)
    text = EUROPEAN.sub(european, text)
    text = _GROUPS.sub(lambda m: re.sub("[._]", "", m[0]), text)
    text = re.sub(r"\b(?:negative|minus)\s+(?=\d)", "-", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=\d)\s+out\s+of\s+(?=\d)", "/", text)
    text = _PART.sub(lambda m: f"\\frac{{{m[1] or m[3]}}}{{{m[2] or m[4]}}}", text)
    return _FRAC.sub(_plain_fraction, text)


def _plain_fraction(match: re.Match[str]) -> str:
    top, below = (match[2] or match[4]), (match[3] or match[5])
    top, below = top.replace(" ", ""), below.replace(" ", "")
    minus = (match[1] == "-") ^ top.startswith("-") ^ below.startswith("-")
    lead = "-" if minus else ""
    operator = match[1] == "-" and match.string[: match.start()].rstrip()[-1:].isdigit()
    return f"{'- ' if operator else ' ' + lead}{top.lstrip('-')}/{below.lstrip('-')} "


def numbers(text: str) -> list[Found]:
    """Every number of a text that `prepared` has made, in order."""
    found = []
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is not None:
            found.append(Found(value, match.start(), match.end()))
    return found


def _value(match: re.Match[str]) -> Fraction | None:
    if not (match["whole"] or match["dec"]) or len(match[0]) > MOST_DIGITS:
        return None
    digits = re.sub("[, ]", "", match["whole"] or "0")
    number = Fraction(digits + (match["dec"] or "") + (f"e{match['exp']}" if match["exp"] else ""))
    if match["ten"]:
        number *= Fraction(10) ** int(match["ten"])
    elif match["pow"]:
        power = int(match["pow"])
        if len(digits) * abs(power) > MOST_DIGITS or (number == 0 and power < 0):
            return None
        number **= power
    if match["scale"]:
        number *= _SCALES[match["scale"]]
    if match["den"]:
        below = int(match["den"])
        if below == 0:
            return None
        number /= below
        if match["mixed"] and number < 1:
            number += int(match["mixed"])
    return -number if match["sign"] == "-" else number


def last_number(text: str) -> Fraction | None:
    """The last number in ``text``, exactly; None when there is none, or it is part of something else (a time,
    a range, a pair, ``5x``, ``2\\sqrt{3}``) or denied ("not 5")."""
    text = prepared(str(text))
    found = numbers(text)
    if not found or _HEAD.search(text[: found[-1].start]):
        return None
    after = text[found[-1].end :]
    return None if _TAIL.match(after) or stuck(after) else found[-1].value


def only_number(text: str) -> Fraction | None:
    r"""The number that ``text`` is, units, currency and ``x =`` aside.

    None when it holds none or several (``12:30``, ``(1,2)``, a date), or when the number is part of an
    expression (``2\sqrt{3}``, ``5x``, ``2104_5``).
    """
    text = re.sub(r"^[a-zA-Z]\w*\([^()]*\)\s*=\s*", "", prepared(tidy(text)))
    found = numbers(text)
    if len(found) != 1 or _MONTH.search(text):
        return None
    before, after = text[: found[0].start], text[found[0].end :]
    if re.search(r"\d|\\|[!^_&|<>\[\]]", before) or not re.fullmatch(r"[^\\!_&|<>\d\[\]]*", _units(after)):
        return None
    if re.match(r"[a-zA-Z](?![a-zA-Z])", after) and after[0] in "xyznkabcietpqruvw":
        return None
    if stuck(after):
        return None
    if re.search(r"[-+*]\s*$|[a-zA-Z]\($", before) or re.match(
        r"\s*[-+*/(:=]\s*\w|[\s^{]*[-+*/][\s}]*$|\s+[a-zA-Z]\s*[-+*/=]", after
    ):
        return None
    return found[0].value


def stuck(after: str) -> bool:
    """Whether what follows a number without a blank is a product of variables (6ab), not a unit."""
    match = re.match(r"[a-zA-Z]{2,3}(?![a-zA-Z])", after)
    return match is not None and match[0] not in _UNITS


def _units(after: str) -> str:
    """What follows a number, without the powers of units (cm^2)."""
    return re.sub(r"(?<=[a-zA-Z ])\s*\^\s*\{?\d\}?", "", after)


def equal(a: Fraction | None, b: Fraction) -> bool:
    """Whole numbers exactly, others within 1e-6 relative."""
    if a is None:
        return False
    if a.denominator == b.denominator == 1:
        return a == b
    return abs(a - b) <= Fraction(1, 10**6) * max(abs(a), abs(b))
