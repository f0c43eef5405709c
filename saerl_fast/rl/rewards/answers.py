r"""Which answer a completion states: always one, by one rule.

    0. where there is a </think>, only what follows the last one counts; an open <think> hides the rest;
    1. the last \boxed{...} or \fbox{...} (several that are joined by a comma, "and" or "or" are a list);
    2. else what follows the last mark: "answer is", "Answer:", "####", <answer>;
    3. else the last formula or number, remarks on checks, steps and bounds aside.

Whatever else the text states is not looked at, so a second answer never pays. A box without its closing
brace reaches to the end of its line; an empty box states nothing.
"""

from __future__ import annotations

import re
from typing import Any

from saerl_fast.rl.rewards.notation import balanced
from saerl_fast.rl.rewards.numbers import numbers, prepared
from saerl_fast.rl.rewards.quantities import measure, same_date

THINK, THINK_END = "<think>", "</think>"

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")
_SPECIAL = re.compile(r"<\|[^|<>\n]{1,40}\|>(?:user|assistant|system)?|</?s>|<(?:eos|bos|pad|end_of_turn)>")
# What goes on with the answer after its box: \boxed{2}^5, \boxed{5}\%, \boxed{5} radians.
_AFTER_BOX = re.compile(
    r"((?:\^|\\(?:sqrt|pi|cdot|times)(?![a-z]))[^\s$,.]*)"
    r"|(?:\\?\$|\\\)|\s)*(?:\\text\{\s*)?(\\?%|(?:rad(?:ian)?s|mm|cm|km|kg|mg|(?:milli|centi|kilo)?(?:met[er]{2}|gram)s"
    r"|seconds|minutes|hours|days|weeks|inches|feet|yards|miles|degrees)\b)"
)
_GAP = r"(?:[\s$.(]|\\[()\[\],;: ]|\\q?quad(?![a-zA-Z]))*"
_AND = r"(?:,|;|\band\b|\bor\b|\\text\{\s*(?:and|or)\s*\})"
_JOINT = re.compile(rf"[^\S\n]*|{_GAP}{_AND}{_GAP}(?:{_AND}{_GAP})?(?:[a-zA-Z](?:_\{{?\w\}}?)?\s*=\s*)?")
MARK = re.compile(
    r"####|<answer>|\b(?:correct|right)\s+(?:option|choice)\s+is:?|\banswer[*_\"']*\s*(?:(?:is|are|(?:must|should|would|will)\s+be)\b\s*:?|[:=])"
    r"|\b(?:final\s+)answer\s+-\s|\bI\s+(?:choose|pick|select)\b:?|答案(?:是|为|為|[:：])"
    r"|(?:答え|回答)(?:は|[:：])|(?:정답|답)(?:은|[:：])|\b(?:ответ|réponse|respuesta|resposta|risposta|antwort)"
    r"(?:\s+final[ea]?)?(?:\s*[:：]|\s+(?:est|es|é|è|ist|lautet)\b:?)"
    r"|^[#*_ \t]*(?:final\s+)?answer[*_: \t]*(?:$|(?=\\\[|\$))",
    re.IGNORECASE | re.MULTILINE,
)
_FORMULA = re.compile(
    r"(?<!\\)\$\$(.+?)\$\$|(?<!\\)\$((?:[^$\\]|\\.)+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
# A choice that is said to be right after it is named: "option B is correct".
_CHOSEN = re.compile(
    r"(?<!\bor )(?<!\band )(?<!\bnor )(?<!\bif )(?<!\bwhether )(?<!\bthat )(?<![\w\\])\(?([A-J])\)?\s+is\s+"
    r"(?:the\s+)?(?:only\s+)?(?:correct|right|best|true)\b(?!\s*\?)"
)
_THE_ANSWER = re.compile(  # "12 is the answer"; nothing where it is not
    r"(?:(?<![\d.,/])(\$?-?\d[\d.,/]{0,30}\$?)\s+is|\bis\s+not)\s+the\s+(?:final\s+|correct\s+|right\s+)?answer\b(?!\s*(?:is|:))"
)
_REASON = re.compile(
    r"[,;]?\s+(?:because|unless|since|as|so|which|where|when|for|after|but|not|hence|i\.e\.)\b|\.\s|\.$|\n"
    r"|(?<=[a-zA-Z]{3})[!?]|\s+\(\s*(?:not|since|because|as|and|see|from|by|using)\b"
    r"|(?<=\d)\s+\((?!mod|or\b)(?:[a-z]+(?:[ -][a-z]+)*|(?!base\b)[a-z]{3,}\s[^()]*)\)"
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
    r"(?<![\d.])\d[\d.]*\s[a-zA-Z]+(?:,\s|\sand\s|\s)(?:and\s)?\d[\d.]*\s[a-zA-Z]+(?=\W*$)"
)
NEAR = 300  # characters around a number that are looked at
_OR_AND = re.compile(r"\b(?:or|and)\b")
_JOINED = re.compile(
    r"\s*\(?\s*(?:,|and|or|to)\s*(?:and|or)?\s*(?:perhaps|maybe|possibly)?\s*(?:[a-zA-Z]\s*=\s*)?"
)
# Before a number: it is denied, or a bound of what is meant.
_DENIED = re.compile(
    r"(?P<other>(?:,|\bbut)\s+)?(?:\bnot|n't|\bcannot|\bnever)\s+(?:(?:be|by|of|in|at|to|equals?(?:\s+to)?)\s+)?[$\\(]*$",
    re.IGNORECASE,
)
_BOUND = re.compile(
    r"(?:\bthan|\bat\s+(?:least|most)|\bup\s+to|\b(?:over|under|above|below|between))\s+[$\\(]*$",
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
    r"\b(?:is|was|are)\s+(?:on\s+)?(?:an?\s+|the\s+)?([A-Za-z][\w'-]*(?: [A-Z][\w'-]*)*)\s*[.!]?$"
)
# "not 5 but 6": what is denied before the answer.
_NOT_BUT = re.compile(
    r"^not\s+\S+?(?:,?\s+but|[,;.]\s+it(?:'s|\s+is)|,)\s+(?:rather\s+|instead\s+)?(?!not\b)"
)
# "I get 17! That ...": the end of a sentence, no factorial.
_SHOUT = re.compile(r"(\b[a-z]+:?\s\**\$?\d[\d,.]*)!(?=[!*]*(?:\s+[A-Z]|\s*\Z))")
# What follows the answer: a sentence on how it was found ("I checked it 3 times.") or to the reader, or a
# clause on a part of it ("24 students, 3 of whom are absent").
_AFTERWARDS = re.compile(
    r",\s+(?:including|(?:\d+\s+)?of\s+(?:whom|which))\b[^.,!?\n]*[.!]?\s*$"
    r"|(?:\n|(?<=[.!?])\s)\W{0,8}(?:Verification|Check(?:ing)?|(?:To\s+)?(?:check|verify)|Confidence)\b"
    r"(?:(?!\b(?:[Ss]o|[Tt]hus|[Tt]herefore|[Hh]ence)\b)[\s\S])*\Z"
    r"|(?<=[.!?])\s+(?:Let me know|Feel free|I hope|Hope this|Thanks?)\b[^\n]*$"
    r"|(?<=[.!?])\s+[^.!?\n]*\b(?:checked|verified|tested|tried|confirmed|reread|repeated|recomputed|reviewed)\b"
    r"[^.!?\n]*\b\d+\s+(?:times|ways|methods|examples|cases|values|steps|different)\b[^.!?\n]*[.!?]*\s*$"
)
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*|\\text(?:bf|it)?\{([^{}]+)\}")
_EMPHASIS = re.compile(r"`{1,3}|(?!(?<=[\d)])\*\*?[\d(]|(?<=[\w)] )\* [\w(])(?<!\d\*)\*{1,3}")
_CHATTER = {"correct", "right", "it", "done", "all", "clear", "helpful", "complete", "fine", "answer"}
_TEXT = re.compile(r"\\(?:text|mbox|mathrm|textbf|mathbb|begin|end|operatorname)\s*\{[^{}]*\}")


def read_text(completion: Any) -> str:
    """The text of a completion: a string, or chat messages of which the last counts."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def spoken(text: str) -> str:
    """Rule 0: what follows the last </think>, or all, up to a <think> that nothing closes; without the tokens
    that end a turn."""
    return _SPECIAL.sub("\n", text.rpartition(THINK_END)[2].partition(THINK)[0])


def after_thinking(text: str) -> str:
    """What follows the last </think>; nothing when there is none."""
    _, end, rest = text.rpartition(THINK_END)
    return rest if end else ""


def boxed(text: str) -> str | None:
    r"""The contents of the last \boxed{...}; None without one, "" for an empty one."""
    found = boxes(text)
    return found[-1][0] if found else None


def boxes(text: str) -> list[tuple[str, int, int]]:
    """Contents, start and end of every outermost box."""
    found, at = [], 0
    while match := _BOX.search(text, at):
        content, at = _group(text, match.end())
        inner = list(_BOX.finditer(content))  # boxes in a box: the innermost last one
        while inner:
            content = _group(content, inner[-1].end())[0]
            inner = list(_BOX.finditer(content))
        found.append((content.strip(), match.start(), at))
    return found


def _group(text: str, start: int) -> tuple[str, int]:
    """What stands in the braces that open at ``start``, and where it ends; without braces one word."""
    if text[start : start + 1] != "{":
        word = re.match(r"\\[dt]?frac\s*\d\s*\d|[^\s{}$,;]+(?:\{[^{}]*\})*", text[start:])
        return (word[0].rstrip(".,;") if word else ""), start + (word.end() if word else 0)
    depth = 0
    for i in range(start, len(text)):
        if text[i] in "{}" and text[i - 1] != "\\":
            depth += 1 if text[i] == "{" else -1
            if depth == 0:
                return text[start + 1 : i], i + 1
    line = text[start + 1 :].split("\n")[0]
    return line.rstrip().rstrip("$"), start + 1 + len(line)


def boxed_answer(text: str) -> str | None:
    """Rules 0 and 1: the last box, or the list that the last boxes make."""
    text = spoken(text)
    found = boxes(text)
    if not found:
        return None
    tail = _AFTER_BOX.match(text[found[-1][2] :])
    sign = "-" if re.search(r"[=$(]\s*-\s*$|^-$", text[: found[-1][1]]) else ""
    answer = f"{sign}{found[-1][0]}{(tail[1] or f' {tail[2]}') if tail else ''}"
    for (content, _, end), (_, start, _) in zip(found[-2::-1], found[:0:-1], strict=True):
        operator = re.fullmatch(r"\s*([-/+*:^])\s*", text[end:start])
        if not operator and not _JOINT.fullmatch(text[end:start]):
            break
        answer = f"{content}{operator[1] if operator else ', '}{answer}"
    return answer


def marked(text: str) -> str | None:
    """Rules 0 to 2: a box, or the phrase after the last mark; None when the text has neither."""
    text = _SHOUT.sub(r"\1.", spoken(text))
    inside = boxed_answer(text)
    if inside is not None:
        return inside
    marks = list(MARK.finditer(text))
    chosen = [*_CHOSEN.finditer(text), *_THE_ANSWER.finditer(text)]
    if chosen and chosen[-1].end() > max((m.end() for m in marks), default=0):
        return chosen[-1][1] or ""
    return phrase(text[marks[-1].end() :].split("</answer>")[0]) if marks else None


def stated(text: str) -> str | None:
    """The one answer that ``text`` states, by the rule above; None when it states none."""
    text = spoken(text)
    found = marked(text)
    return last_expression(_AFTERWARDS.sub("", _SHOUT.sub(r"\1.", text))) if found is None else found


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
    formulas = [m for m in _FORMULA.finditer(line) if not _prose(_inside(m))]
    if formulas and not re.search(r"\d", line[: formulas[0].start()]):
        joined, end = [_inside(formulas[0])], formulas[0].end()
        for match in formulas[1:]:
            if not _JOINT.fullmatch(line[end : match.start()]):
                break
            joined.append(_inside(match))
            end = match.end()
        return ", ".join(joined)
    line = line.strip(" \t").replace(r"\$", "$")
    while filler := _FILLER.match(line):
        line = line[filler.end() :]
    if _LABEL.match(line):
        return line
    return "" if re.match(r"(?:not|unknown|unclear)\b", line) else _value(line, 0) or ""


def last_expression(text: str) -> str | None:
    """Rule 3: the last formula or number, or a last line that is one and nothing else."""
    text = text.strip()
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
            if not gap.strip() or not _JOINT.fullmatch(gap):
                break
            run.insert(0, before)
        joined = re.search(r"\b(?:and|or)\b", text[run[-2].end() : run[-1].start()]) if run[1:] else None
        return ", ".join(map(_inside, run if joined else run[-1:]))
    line = text.splitlines()[-1].strip()
    if not re.search(r"\d", line) and not formulas:
        if bold and not _DENIED.search(line[: line.rfind(bold[-1][1] or bold[-1][2])]):
            return bold[-1][1] or bold[-1][2]
        if verdict := re.match(r"(?:Yes|No|True|False)\b(?=\W)", line):
            return verdict[0]
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
        while filler := _FILLER.match(line):
            line = line[filler.end() :]
        return line
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
        next_to = [n for n in found if n.start >= end][:1]
        if next_to and _JOINED.fullmatch(read[end : next_to[0].start]) or _BOUND.search(read[:start]):
            return text  # several numbers are no one answer, and a bound is none
        return read[start:end].strip().rstrip(".,;:?\"'").strip()
    while denied := _DENIED.search(read[: found[-1].start]):  # "7, not 8"
        found.pop()
        if not denied["other"] or not found:
            return None
    while len(found) > 1 and (_ROLE.search(read[: found[-1].start]) or _TRIES.match(read[found[-1].end :])):
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
    percent = re.match(r"\s?(?:\\?%|percent\b)", text[end:])
    return start, end + (percent.end() if percent else 0)


def _inside(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).strip()


def _prose(formula: str) -> bool:
    """Whether what stands between two dollar signs is a sentence: they were money, not mathematics."""
    return len(_WORD.findall(_TEXT.sub("", formula))) >= 2


def _open_formula(text: str) -> bool:
    """Whether the text ends inside a formula."""
    last = text.splitlines()[-1]
    dollars = len(re.findall(r"(?<!\\)\$", last))
    money = len(re.findall(r"(?<!\\)\$\d[\d,.]*(?![\d$])(?!\s*[-+*/^=\\<>])|\d\s?\$", last))
    return (dollars % 2 == 1 and money < 1) or not balanced(last)
