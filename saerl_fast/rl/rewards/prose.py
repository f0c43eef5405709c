"""The answer that a phrase or a sentence states: a formula, a number with its unit, or words."""

from __future__ import annotations

import re

from saerl_fast.rl.rewards.notation import balanced
from saerl_fast.rl.rewards.numbers import numbers, prepared
from saerl_fast.rl.rewards.quantities import measure, same_date

_GAP = r"(?:[\s$.(]|\\[()\[\],;: ]|\\q?quad(?![a-zA-Z]))*"
_AND = r"(?:,|;|\band\b|\bor\b|\\text\{\s*(?:and|or)\s*\})"
_ASIDE = r"(?:\([^()$\\]{0,80}\)\s*)?"  # \boxed{12} (if the order matters) or \boxed{6}
JOINT = re.compile(
    rf"[^\S\n]*|{_GAP}{_ASIDE}{_AND}{_GAP}(?:{_AND}{_GAP})?(?:[a-zA-Z](?:_\{{?\w\}}?)?\s*=\s*)?"
)
_FORMULA = re.compile(
    r"(?<!\\)\$\$(.+?)\$\$|(?<!\\)\$((?:[^$\\]|\\.)+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]"
    r"|\\begin\{((?:align|gather|equation|multline|eqnarray)(?:ed)?\*?)\}(.+?)\\end\{\5\}",
    re.DOTALL,
)
_REASON = re.compile(
    r"[,;]?\s+(?:because|unless|since|as|so|which|where|when|for|after|but|not|hence|i\.e\.)\b|\.\s|\.$|\n"
    r"|(?<=[a-zA-Z]{3})[!?]|\s+\(\s*(?:not|since|because|as|and|see|from|by|using)\b"
    r"|(?<=\d)\s+\((?!mod|or\b|alternatively)(?:[a-z]+(?:[ -][a-z]+)*|(?!base\b)[a-z]{3,}\s[^()]*)\)"
    r"|(?<=^[Yy]es),|(?<=^[Nn]o),"
)
_LABEL = re.compile(r"\(?[A-J][).:]\s")  # of a choice, before what it says
_VERB = re.compile(r"\b(?:is|are|equals|be)\b:?(?:\s+equal\s+to\b)?")
_FILLER = re.compile(
    r"^(?:(?:therefore|thus|then|hence|so|now|finally),?(?=\s)|(?:solution|result|total|ans)\s*:|"
    r"thus|then|hence|simply|just|exactly|only|approximately|about|equal to|equals|given by"
    r"|option|choice|indeed|clearly|also|now|so|it is|is|the|a|an|be|will be|[:=,])(?:\s+|(?<=[:=,]))",
    re.IGNORECASE,
)
_WORD = re.compile(
    r"(?<![\\a-zA-Z])(?:[a-zA-Z]{3,}|is|of|to|in|so|or|we|it|as|at|by|if|on|he|My|cm|km|kg)(?![a-zA-Z(])"
)
_MEASURE = re.compile(r"[-+$(\[{\\]*\d[\d.,/]*\s*\S{1,12}(?:\s\S{1,12}){0,3}$")  # a number and its unit
_SUM = re.compile(  # of two measures, at the end: 2 hours and 15 minutes
    r"(?<![\d.])\d[\d.]*\s[a-zA-Z]+(?:,\s|\sand\s|\s)(?:and\s)?\d[\d.]*\s[a-zA-Z]+(?=(?:\s(?:left|in\s(?:all|total)|altogether|remaining|over))?\W*$)"
)
_EITHER = re.compile(  # 12 if so, 6 if not
    r"[\d\0]\S{0,40}\s+(?:if|when)\s.*[\d\0]\S{0,40}\s+(?:if|when|otherwise|else)\b", re.DOTALL
)
_DERIVED = re.compile(
    r"\b(?:exceeds?|(?:multiple|factor|divisor|power|half|third|quarter|sum|product)\s+of)\s+\S*$"
)
_UNFINISHED = re.compile(r"(?<![\d.])\d[\d,]*\s*(?:\.\.\.|\u2026)\s*")
_SO_CHOICE = re.compile(
    r"\b(?:[Ss]o|[Tt]hus|[Hh]ence|[Tt]herefore|choose|pick|select)\b[^.A-Z()\d]{0,40}\(([A-J])\)\s*\.?$"
)
_REALS = re.compile(r"\b(?:is|are)\s+((?:the\s+set\s+of\s+)?all\s+real\s+numbers\b[^.!]*)[.!]?$")
_NONE = re.compile(r"\b(?:there (?:is|are)|has|have) (no (?:[a-z]+ ){0,2}[a-z]+)\s*[.!]?$", re.IGNORECASE)
# Before a number that is none of the answer: "$5 left from the $20", "will be 34 in 5 years".
_WHOLE = re.compile(
    r"\bwill\s+(?:be|have)\b[^.!?\n]*\d[^.!?\n]*\bin\s+$|"
    r"\b(?:left|over|remaining|remain|out)\s+(?:from|of|out\s+of)\s+"
    r"(?:the|her|his|their|its|our|my|those|these)\s+(?:original\s+|initial\s+|total\s+)?[$\\(]*$"
)
NEAR = 300  # characters around a number that are looked at
_OR_AND = re.compile(r"\b(?:or|and)\b")
_JOINED = re.compile(
    r"\s*\(?\s*(?:,|and|or|to|alternatively)\s*(?:and|or|alternatively)?,?\s*(?:perhaps|maybe|possibly)?\s*(?:[a-zA-Z]\s*=\s*)?"
)
# Before a number: it is denied, or a bound of what is meant.
_DENIED = re.compile(
    r"(?P<other>(?:,|\bbut)\s+)?(?:\bnot|n't|\bcannot|\bnever)\s+(?:(?:be|by|of|in|at|to|equals?(?:\s+to)?)\s+)?[$\\(]*$",
    re.IGNORECASE,
)
_BOUND = re.compile(
    r"(?:\bthan|\bexceeds?|\bat\s+(?:least|most)|\bup\s+to|\b(?:over|under|above|below|between))\s+[$\\(]*$",
    re.IGNORECASE,
)
# Numbers that name a part of the text, or count what was tried.
_ROLE = re.compile(
    r"\b(?:part|step|theorem|lemma|equation|problem|question|page|figure|table|section|example|line)\s+\(?$",
    re.I,
)
_TRIES = re.compile(r"\s+(?:[a-z]+\s)?(?:approaches|methods|attempts|tries|tests|checks)\b")
_BELOW = re.compile(
    r"\s+(?!(?:is|are|was|were|more|less|fewer)\b)[a-z]+(?:\s(?!(?:is|are|was|were)\b)[a-z]+)*?"
    r"\s(?:(?:less|smaller|greater|larger)\s+than|below|under|above|up\s+to)\s+\$?"
)
# The end of a text that was cut off in the middle of a sentence.
_CUT = re.compile(
    r"\w\W+(?:and|or|the|an?|of|to|then|we|is|are|by|with|from|for|that|so|which|because|since|if|as|in|at|on"
    r"|but|where|when|can|has|have|get|need|there|it|will|must|our|their|into|plus|times|minus)$"
)
_IS_WORDS = re.compile(
    r"\b(?:is|was|are|[Ii]t's)\s+(?:on\s+)?(?:an?\s+|the\s+)?([A-Za-z][\w'-]*(?: [A-Z][\w'-]*)*)\s*[.!]?$"
)
# "not 5 but 6": what is denied before the answer.
_NOT_BUT = re.compile(
    r"^not\s+\S+?(?:,?\s+but|[,;.]\s+it(?:'s|\s+is)|,)\s+(?:rather\s+|instead\s+)?(?!not\b)"
)
# What follows the answer: a sentence on how it was found ("I checked it 3 times.") or to the reader, or a
# clause on a part of it ("24 students, 3 of whom are absent").
_AFTERWARDS = re.compile(
    r",\s+(?:including|(?:\d+\s+)?of\s+(?:whom|which))\b[^.,!?\n]*[.!]?\s*$"
    r"|,\s+(?:(?:which|and)\s+(?:is\s+|are\s+|it\s+is\s+)?)?(?:attained|achieved|reached|obtained|occur(?:s|ring)?|with\s+equality)"
    r"\s+(?:only\s+)?(?:at|when|for|if|iff|by|where)\b(?:(?!\b(?:is|equals)\b)[^.!?\n])*[.!]?\s*$"
    r"|(?:\n|(?<=[.!?])\s)\W{0,8}(?:Verification|Check(?:ing)?|(?:To\s+)?(?:check|verify)|Confidence)\b"
    r"(?:(?!\b(?:[Ss]o|[Tt]hus|[Tt]herefore|[Hh]ence)\b)[\s\S])*\Z"
    r"|(?<=[.!?])\s+(?:Let me know|Feel free|I hope|Hope this|Thanks?)\b[^\n]*$"
    r"|(?<=[.!?])\s+[^.!?\n]*\b(?:checked|verified|tested|tried|confirmed|reread|repeated|recomputed|reviewed)\b"
    r"[^.!?\n]*\b\d+\s+(?:times|ways|methods|examples|cases|values|steps|different)\b[^.!?\n]*[.!?]*\s*$"
)
_ALIGNED = re.compile(r"\\(?:begin|end)\{(?:align|gather|split)(?:ed)?\*?\}")
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*|\\text(?:bf|it)?\{([^{}]+)\}")
_EMPHASIS = re.compile(r"`{1,3}|(?!(?<=[\d)])\*\*?[\d(]|(?<=[\w)] )\* [\w(])(?<!\d\*)\*{1,3}")
_CHATTER = {"correct", "right", "it", "done", "all", "clear", "helpful", "complete", "fine", "answer"}
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbb|begin|end|operatorname)\s*\{[^{}]*\}")


def phrase(text: str) -> str:
    """The answer that opens ``text``: a formula, a number with its unit, or the words themselves.

    Of a whole sentence ("the largest n is 34") it is what follows the last "is".
    """
    text = _EMPHASIS.sub("", text).lstrip("_#>: \t\n\r")
    text = _NOT_BUT.sub("", text)
    masked = _FORMULA.sub(lambda m: m[0] if _prose(_inside(m)) else "\0" * len(m[0]), text)
    masked = masked.split("\n")[0]
    stop = _REASON.search(masked)
    if stop and stop.start() > 0:
        masked = masked[: stop.start()]
    line = text[: len(masked)]
    verbs = list(_VERB.finditer(masked))
    if verbs:
        head, tail = masked[: verbs[-1].start()], masked[verbs[-1].end() :]
        if tail.strip() and (re.search(r"[\d\0]", tail) or not re.search(r"[\d\0]", head)):
            line = line[verbs[-1].end() :]
    if _EITHER.search(masked) or _UNFINISHED.match(line.lstrip("$ ")):
        return ""
    if _LABEL.match(_opening(line)):
        return _opening(line)
    formulas = [m for m in _FORMULA.finditer(line) if not _prose(_inside(m))]
    if formulas and not re.search(r"\d", line[: formulas[0].start()]):
        joined, end = [_inside(formulas[0])], formulas[0].end()
        for match in formulas[1:]:
            if not JOINT.fullmatch(line[end : match.start()]):
                break
            joined.append(_inside(match))
            end = match.end()
        return ", ".join(joined)
    line = _opening(line.replace(r"\$", "$"))
    return "" if re.match(r"(?:not|unknown|unclear)\b", line) else _value(line, 0) or ""


def _opening(line: str) -> str:
    """A line without the words that may come before an answer."""
    line = line.strip(" \t")
    while filler := _FILLER.match(line):
        line = line[filler.end() :]
    return line


def last_expression(text: str) -> str | None:
    """Rule 3: the last formula or number, or a last line that is one and nothing else."""
    text = _AFTERWARDS.sub("", text).strip()
    bold = list(_BOLD.finditer(text.rpartition("\n")[2]))
    text = _EMPHASIS.sub("", text).strip()
    if not text or re.search(r"[-+*/=^_({\[\\,<>?]$", text) or _open_formula(text) or _CUT.search(text):
        return None
    formulas = [m for m in _FORMULA.finditer(text) if not _prose(_inside(m))]
    if formulas and not text[formulas[-1].end() :].strip(" .!\n"):
        run = [formulas[-1]]  # those that "and" or "or" joins to it are one list
        while len(run) < len(formulas):
            before = formulas[-len(run) - 1]
            gap = text[before.end() : run[0].start()]
            if not gap.strip() or not JOINT.fullmatch(gap):
                break
            run.insert(0, before)
        joined = re.search(r"\b(?:and|or)\b", text[run[-2].end() : run[-1].start()]) if run[1:] else None
        return ", ".join(map(_inside, run if joined else run[-1:]))
    line = text.splitlines()[-1].strip()
    verdict = re.match(r"(?:Yes|No|True|False)\b(?=\W)", line)
    if verdict and not re.search(r"\d|\$", line.rstrip(" .").rpartition(",")[2]):
        return verdict[0]
    if not re.search(r"\d", line) and not formulas:
        if none := _NONE.search(line):
            return none[1]
        if bold and not _DENIED.search(line[: line.rfind(bold[-1][1] or bold[-1][2])]):
            return bold[-1][1] or bold[-1][2]
        words = _IS_WORDS.search(line)
        if (
            words
            and words[1].lower() not in _CHATTER
            and (words[1][0].isupper() or not re.search(r"\d", text))
        ):
            return words[1]
    if (
        len(_WORD.findall(_TEXT.sub("", line))) <= 1
        and not re.search(rf"\bnot\b|{_FORMULA.pattern}", line)
        and len(line) < 200
    ):
        return None if _UNFINISHED.fullmatch(line) else _opening(line)
    if _EITHER.search(line):
        return None
    if named := _SO_CHOICE.search(line) or _REALS.search(line):
        return named[1]
    verbs = list(_VERB.finditer(line))
    denied = verbs and _DENIED.search(line[: verbs[-1].end()] + " ")
    tail = line[verbs[-1].end() :].strip(" .:") if verbs and not denied else ""
    if (
        re.match(r"[-+\d(\[{a-zA-Z]", tail)
        and re.search(r"\d", tail)
        and not _WORD.search(_OR_AND.sub(" ", tail))
    ):
        return tail if "$" not in tail else _value(tail, -1)
    parts = _SUM.findall(line)
    return parts[0] if parts and measure(parts[0]) else _value(text, -1)


def _value(text: str, which: int) -> str | None:
    """The first (0) or last (-1) formula or number in ``text``; all of it if it is an expression or words."""
    text = text.strip()
    if which == 0 and same_date(text, text):
        return text
    formulas = [m for m in _FORMULA.finditer(text) if not _prose(_inside(m))]
    if not formulas and (not _WORD.search(_OR_AND.sub(" ", _TEXT.sub("", text))) or _MEASURE.match(text)):
        return text
    if formulas:
        chosen = formulas[which]
        text = text[: chosen.start()] if which == 0 else text[chosen.end() :]
        if not numbers(prepared(text)):
            return _inside(chosen)
    read = prepared(text)
    found = numbers(read)
    if not found:
        return text if which == 0 else None
    read = read[max(0, found[which].start - NEAR) : found[which].end + NEAR]
    found = numbers(read)
    if which == 0:
        start, end = _whole(read, found[0].start, found[0].end)
        if _DERIVED.search(read[:start]) or re.match(r"-[a-z]", read[end:]):
            return text
        next_to = [n for n in found if n.start >= end][:1]
        if next_to and _JOINED.fullmatch(read[end : next_to[0].start]) or _BOUND.search(read[:start]):
            return text  # several numbers are no one answer, and a bound is none
        return read[start:end].strip().rstrip(".,;:?\"'").strip()
    while denied := _DENIED.search(read[: found[-1].start]):  # "7, not 8"
        found.pop()
        if not denied["other"] or not found:
            return None
    while len(found) > 1 and (
        _ROLE.search(read[: found[-1].start])
        or _WHOLE.search(read[: found[-1].start])
        or _TRIES.match(read[found[-1].end :])
    ):
        found.pop()
    if _BOUND.search(read[: found[-1].start]):  # "24 primes below 100" is 24, "less than 100" is nothing
        if len(found) < 2 or not _BELOW.fullmatch(read[found[-2].end : found[-1].start]):
            return None
        found.pop()
    start, end = _whole(read, found[-1].start, found[-1].end)
    last = start
    for number in reversed([n for n in found if n.end <= start]):  # "-2, 0 and 5" is a list
        between = read[number.end : start]
        if not _JOINED.fullmatch(between) or "to" in between or "(" in between:
            break
        if not re.search("and|or", read[number.end : end]):
            break
        start = number.start
    if start < last and (name := re.search(r"\b[a-zA-Z]\s*=\s*$", read[:start])):  # x = 8 or x = -8
        start = name.start()
    if re.search(r"\b(?:between|from)\s+$", read[:start]) and re.search("and|or", read[start:end]):
        return None
    return read[start:end].strip().rstrip(".,;:?\"'").strip()


def _whole(text: str, start: int, end: int) -> tuple[int, int]:
    """Where the expression that the number text[start:end] belongs to begins and ends: (2, 3), 4:45 PM."""
    for match in re.finditer(r"[(\[{][^()\[\]{}]*,[^()\[\]{}]*[)\]}]", text):
        if match.start() <= start and end <= match.end() and not _WORD.search(match[0]):
            return match.span()
    before = start
    if re.match(r"[-+]\s", text[start:]) and re.search(r"(?:\b[a-zA-Z]|\d[a-zA-Z]*|[)}])\s*$", text[:start]):
        start = len(text[:start].rstrip()) - 1
    while operation := re.search(r"[\w)}]\s*[-+*/^\u00d7\u00f7]\s*$", text[:start]):
        start = operation.start()
    left = max(text.rfind(c, 0, start) for c in " \n\t=")
    right = min((i for c in " \n\t=" if (i := text.find(c, end)) >= 0), default=len(text))
    run = text[left + 1 : right]
    if re.fullmatch(r"[$\u00a3\u20ac]?[\d.,:/]+", run) and (
        noon := re.match(r"\s?[ap]\.?m\b\.?", text[right:], re.I)
    ):
        right += noon.end()
    if pi := re.match(r"\s?pi\b", text[right:]):
        right += pi.end()
    if start < before or pi or re.search(r"[\\^_!:]|\d[a-zA-Z]{1,2}\b", run):
        return left + 1, right
    named = re.match(r"\s?[a-zA-Z]{2,12}(?:/[a-z]{1,6}|\sper\s[a-z]{4,7})?(?=[.!]?\s*$)", text[end:])
    if named and measure(text[start : end + named.end()]):
        return start, end + named.end()
    percent = re.match(r"\s?(?:\\?%|percent\b)", text[end:])
    return start, end + (percent.end() if percent else 0)


def _inside(match: re.Match[str]) -> str:
    inside = _ALIGNED.sub("", match[6] or next(group for group in match.groups() if group is not None))
    if "&" not in inside or "\\begin" in inside:
        return inside.strip()
    rows = [row.strip() for row in re.split(r"\\\\", inside) if row.strip()]
    if rows[-1].startswith("&"):  # one chain of equations, a step a row
        return rows[-1].lstrip("&= ").rstrip(" .,")
    return ", ".join(row.replace("&", "").rstrip(" .,") for row in rows)


def _prose(formula: str) -> bool:
    """Whether what stands between two dollar signs is a sentence: they were money, not mathematics."""
    return len(_WORD.findall(_TEXT.sub("", formula))) >= 2


def _open_formula(text: str) -> bool:
    """Whether the text ends inside a formula."""
    last = text.splitlines()[-1]
    dollars = len(re.findall(r"(?<!\\)\$", last))
    money = len(re.findall(r"(?<!\\)\$\d[\d,.]*(?![\d$])(?!\s*[-+*/^=\\<>])|\d\s?\$", last))
    return (dollars % 2 == 1 and money < 1) or not balanced(last)
