"""Quantities that people write in more than one way: measures, times of day, dates, numbers in words and in
other bases. Each reader gives None for anything else."""

from __future__ import annotations

import re
from fractions import Fraction

from saerl_fast.rl.rewards.numbers import only_number

# Units of one kind, in the smallest: where both answers have one, its size counts.
_SCALES = {
    kind: {name: Fraction(size) for size, names in sizes.items() for name in names.split()}
    for kind, sizes in {
        "length": {"1": "mm millimeter millimeters", "10": "cm centimeter centimeters",
                   "1000": "m meter meters", "1000000": "km kilometer kilometers"},
        "imperial": {"1": "in inch inches", "12": "ft foot feet", "36": "yd yard yards",
                     "63360": "mi mile miles"},
        "mass": {"1": "mg milligrams", "1000": "g gram grams", "1000000": "kg kilogram kilograms"},
        "time": {"1": "s sec second seconds", "60": "min minute minutes", "3600": "h hr hrs hour hours",
                 "86400": "day days", "604800": "week weeks"},
        "volume": {"1": "mL ml milliliters", "1000": "L l liter liters"},
        "pounds": {"1": "oz ounce ounces", "16": "lb lbs pound pounds"},
        "force": {"1": "N newton newtons", "1000": "kN"},
        "energy": {"1": "J joule joules", "1000": "kJ", "1000000": "MJ"},
        "power": {"1": "W watt watts", "1000": "kW", "1000000": "MW"},
        "pressure": {"1": "Pa", "1000": "kPa", "1000000": "MPa"},
        "frequency": {"1": "Hz", "1000": "kHz", "1000000": "MHz"},
        "voltage": {"1": "mV", "1000": "V volt volts", "1000000": "kV"},
        "current": {"1": "mA", "1000": "A amp amps amperes"},
        "money": {"1": "cent cents", "100": "dollar dollars"},
        "angle": {"1": "arcminutes", "60": "degree degrees"},
        "count": {"12": "dozen", "100": "hundred", "1000": "thousand", "1000000": "million",
                  "1000000000": "billion", "1000000000000": "trillion"},
    }.items()
}  # fmt: skip
Kind = tuple[str, int] | tuple[str, int, str, int]  # of a unit, its power; those of what it is divided by
_SIZES = {name: (kind, size) for kind, names in _SCALES.items() for name, size in names.items()}
_MEASURE = re.compile(
    r"(?P<number>.*(?:[\d})]|\\pi))\s*(?:(?P<way>square|sq\.?|cubic)\s)?\s*(?P<unit>[a-zA-Z]{1,12})\.?"
    r"\s*(?:\^\s*\{?(?P<power>[23])\}?)?"
    r"(?:\s*(?:/|\bper\b)\s*(?P<per>[a-zA-Z]{1,12})\s*(?:\^\s*\{?(?P<per_power>[23])\}?)?)?"
)
_NEXT = re.compile(
    r"(?<!\\times)(?<!\\cdot)(?<=[a-zA-Z])\.?\s*(?:,\s*(?:and)?|\band\b)?\s*(?=\d)"
)  # between 5 ft and 6 in
_CLOCK = re.compile(r"(\d{1,2})(?::([0-5]\d))?(?::00)?\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_MONTH = r"(?P<month>jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]*\.?"
_DAY, _YEAR = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?", r"(?:,?\s*(?P<year>\d{4}))?"
_DATES = [re.compile(p, re.I) for p in (rf"{_MONTH}\s*{_DAY}{_YEAR}", rf"{_DAY}\s*(?:of\s+)?{_MONTH}{_YEAR}")]
_ISO = re.compile(r"(\d{4})-(\d{2})-(\d{2})")
_WEEKDAY = re.compile(r"^(?:on\s+)?(mon|tues|wednes|thurs|fri|satur|sun)day,?\s+(?=\S)")
_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SPELLED = {name: i for i, name in enumerate(_ONES)} | {name: 10 * i + 20 for i, name in enumerate(_TENS)}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
_BASE = re.compile(r"\(?\s*([0-9A-Z]+)\s*\)?\s*_\s*\{?\s*\(?\s*(?:base\s*)?(\d{1,2}|[a-z]+)\s*\)?\s*\}?")
_IN_BASE = re.compile(r"([0-9A-Z]+)\s*\(?\s*(?:in\s+)?base[ -]?(\d{1,2}|[a-z]+)\s*\)?")


def measure(text: str) -> tuple[Kind, Fraction, str] | None:
    """(kind and power, value in the smallest unit, last unit) of a number with a common unit (also 5 km/h),
    or a sum (5 ft 6 in) of such."""
    total, name = Fraction(0), ""
    kinds: set[Kind] = set()
    text = re.sub(r"(?<=\d)\s*mph\b", " mi/h", re.sub(r"(?<=\d)\s*km?ph\b", " km/h", text))
    text = re.sub(r"(?<=\d)\s*'", " arcminutes", text) if "degrees" in text else text
    for part in _NEXT.split(text.strip().rstrip(".")):
        match = _MEASURE.fullmatch(part.strip())
        number = match and only_number(match["number"])
        if match is None or number is None or (found := _unit(match)) is None:
            return None
        kinds.add(found[0])
        total, name = total + number * found[1], match["unit"]
    return (kinds.pop(), total, name) if len(kinds) == 1 else None


def _unit(match: re.Match[str]) -> tuple[Kind, Fraction] | None:
    """Kind and size of the unit of a match, None for one that is not known."""
    if match["unit"] not in _SIZES or match["per"] and match["per"] not in _SIZES:
        return None
    power = {"s": 2, "c": 3}[match["way"][0]] if match["way"] else int(match["power"] or 1)
    kind, size = _SIZES[match["unit"]]
    if not match["per"]:
        return (kind, power), size**power
    below, by = _SIZES[match["per"]]
    return (kind, power, below, int(match["per_power"] or 1)), size**power / by ** int(
        match["per_power"] or 1
    )


def unit(text: str) -> tuple[Kind, Fraction] | None:
    """Kind and size of the common unit that an expression (36\\pi cm^2) ends with."""
    match = _MEASURE.fullmatch(text.strip().rstrip("."))
    return _unit(match) if match else None


def clock(text: str) -> tuple[int, bool | None] | None:
    """Minutes past 12 and whether after noon (None where not said) of a time of day with a colon or am/pm."""
    named = re.sub(r"^(?:12(?::00)?\s)?(noon|midnight)$", r"\1", text.strip().lower())
    if named in ("noon", "midnight"):
        return 0, named == "noon"
    match = _CLOCK.fullmatch(text.strip())
    if match is None or not (match[2] or match[3]) or int(match[1]) > (12 if match[3] else 24):
        return None
    hour = int(match[1])
    half = match[3].lower() == "p" if match[3] else True if 12 < hour < 24 else None
    return hour % 12 * 60 + int(match[2] or 0), half


def same_clock(one: str, gold: str) -> bool | None:
    """Whether two times of day agree; None where one is none, or neither says am or pm. Of a length of time
    and one with a colon (1:45), whether these agree."""
    for text, other in ((one, gold), (gold, one)):
        length, long = re.fullmatch(r"(\d{1,3}):([0-5]\d)", text.strip()), measure(other)
        if length and long and long[0] == ("time", 1):
            return long[1] == (60 * int(length[1]) + int(length[2])) * (1 if long[2].startswith("s") else 60)
    a, b = clock(one), clock(gold)
    if a is None or b is None or not re.search("[mM]|noon", one + gold):
        return None
    return a[0] == b[0] and (None in (a[1], b[1]) or a[1] == b[1])


def same_date(one: str, gold: str) -> bool | None:
    """Whether two dates, the month in letters or both as 2024-01-05, agree; a year and the day of the week
    count where both have one."""
    weekdays = {day for text in (one, gold) for day in _WEEKDAY.findall(text.lower())}
    one, gold = (_WEEKDAY.sub("", _ISO.sub(_spelled_date, text.strip().lower())) for text in (one, gold))
    a, b = ([m for d in _DATES if (m := d.fullmatch(text.strip()))] for text in (one, gold))
    if not a or not b:
        return None
    days = [(_MONTHS.index(m["month"][:3].lower()), int(m["day"])) for m in (a[0], b[0])]
    years = {m["year"] for m in (a[0], b[0])} - {None}
    return days[0] == days[1] and len(years) < 2 and len(weekdays) < 2


def _spelled_date(match: re.Match[str]) -> str:
    month = int(match[2])
    return f"{int(match[3])} {_MONTHS[month - 1]} {match[1]}" if 1 <= month <= 12 else match[0]


def spelled(text: str) -> Fraction | None:
    """The number that words say: "forty-two", "one hundred and five", "minus three", "two thirds"."""
    words = re.sub(r"[-\s]+", " ", text.lower()).strip().split(" ")
    if words[-1].rstrip("s") in _PARTS:
        count = Fraction(1) if len(words) < 2 or words[:-1] == ["a"] else spelled(" ".join(words[:-1]))
        return count and count / _PARTS[words[-1].rstrip("s")]
    sign = -1 if words[0] in ("minus", "negative") else 1
    total = part = 0
    for i, word in enumerate(words[1:] if sign < 0 else words):
        if word in _SPELLED:
            part += _SPELLED[word]
        elif word == "hundred" and part:
            part *= 100
        elif word in ("thousand", "million") and part:
            total, part = total + part * int(_SIZES[word][1]), 0
        elif word != "and" or i == 0:
            return None
    return Fraction(sign * (total + part))


def in_base(text: str) -> tuple[str, int] | None:
    """Digits and base of ``1010_2``, ``(1010)_{two}``, ``1010 (base 2)``."""
    match = _BASE.fullmatch(text.strip()) or _IN_BASE.fullmatch(text.strip())
    if match is None:
        return None
    base = int(match[2]) if match[2].isdigit() else _SPELLED.get(match[2], 0)
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in match[1]):
        return None
    return match[1].lstrip("0") or "0", base


def same_base(one: str, gold: str) -> bool | None:
    """Whether two numbers agree of which one at least names its base; the other is taken to be in it."""
    ours, wanted = in_base(one), in_base(gold)
    if ours is None and wanted is None:
        return None
    plain = re.sub(r"^0+(?=.)|[\s,]", "", gold if wanted is None else one)
    if ours is None or wanted is None:
        known = ours or wanted
        return known is not None and known[0] == plain if plain.isalnum() else None
    return ours == wanted
