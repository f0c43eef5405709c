r"""Which answer a completion states: always one, by one rule.

    0. where there is a </think>, only what follows the last one counts; an open <think> hides the rest;
    1. the last \boxed{...} or \fbox{...} (several that are joined by a comma, "and" or "or" are a list);
    2. else what follows the last mark: "answer is", "Answer:", "####", <answer>; nothing where that is only
       supposed ("if the answer is 12"), and what a retraction after it ("Wait, ...") comes to;
    3. else the last formula or number, remarks on checks, steps and bounds aside.

Whatever else the text states is not looked at, so a second answer never pays. A box without its closing
brace reaches to the end of its line; an empty box states nothing.
"""

from __future__ import annotations

import re
from typing import Any

from saerl_fast.rl.rewards.prose import JOINT, last_expression, phrase

THINK, THINK_END = "<think>", "</think>"
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")
_SPECIAL = re.compile(r"<\|[^|<>\n]{1,40}\|>(?:user|assistant|system)?|</?s>|<(?:eos|bos|pad|end_of_turn)>")
# What goes on with the answer after its box: \boxed{2}^5, \boxed{5}\%, \boxed{5} radians.
_AFTER_BOX = re.compile(
    r"((?:\^|\\(?:sqrt|pi|cdot|times)(?![a-z]))[^\s$,.]*)"
    r"|(?:\\?\$|\\\)|\s)*(?:\\text\{\s*)?(\\?%|(?:rad(?:ian)?s|mm|cm|km|kg|mg|(?:milli|centi|kilo)?(?:met[er]{2}|gram)s"
    r"|seconds|minutes|hours|days|weeks|inches|feet|yards|miles|degrees)\b)"
)
MARK = re.compile(
    r"####|<answer>|\b(?:correct|right)\s+(?:option|choice)\s+is:?|\banswer[*_\"']*\s*(?:(?:is|are|(?:must|should|would|will)\s+be)\b\s*:?|[:=])"
    r"|\b(?:final\s+)answer\s+-\s|\bI\s+(?:choose|pick|select)\b:?|答案(?:是|为|為|[:：])"
    r"|[选選](?:择)?\s*[:：]?\s*(?=[(（]?[A-J][)）]?\s*[。.．]?\s*$)"
    r"|(?:答え|回答)(?:は|[:：])|(?:정답|답)(?:은|[:：])|\b(?:ответ|réponse|respuesta|resposta|risposta|antwort)"
    r"(?:\s+final[ea]?)?(?:\s*[:：]|\s+(?:est|es|é|è|ist|lautet)\b:?)"
    r"|^[#*_ \t]*(?:final\s+)?answer[*_: \t]*(?:$|(?=\\\[|\$))",
    re.IGNORECASE | re.MULTILINE,
)
# Before a mark that states no answer: "if the answer is 12, we get a contradiction".
_SUPPOSED = re.compile(
    r"\b(?:if|suppos(?:e|ing)|assum(?:e|ing)|imagine|whether|unless|(?:people|students|others|they)\s+\w+)\s+"
    r"(?:that\s+)?(?:(?:the|my|our|your|his|her|their)\s+)?(?:final\s+)?$",
    re.IGNORECASE,
)
# After an answer that is taken back: what follows is read afresh.
_RETRACTED = re.compile(
    r"(?:[.!?)}$\u2026]|\n|--|\u2014)\s{0,4}(?:(?:(?:but|hmm)?,? ?wait|actually|oops|sorry|correction"
    r"|hold on|scratch that|on second thoughts?)\b|no,\s+(?:(?:it|that|the|wait)\b|(?=\W?\d)))",
    re.IGNORECASE,
)
# A choice that is said to be right after it is named: "option B is correct".
_CHOSEN = re.compile(
    r"(?<!\bor )(?<!\band )(?<!\bnor )(?<!\bif )(?<!\bwhether )(?<!\bthat )(?<![\w\\])\(?([A-J])\)?\s+is\s+"
    r"(?:the\s+)?(?:only\s+)?(?:correct|right|best|true)\b(?!\s*\?)"
)
_THE_ANSWER = re.compile(  # "12 is the answer"; nothing where it is not
    r"(?:(?<![\d.,/])(\$?-?\d[\d.,/]{0,30}\$?)\s+is|\bis\s+not)\s+the\s+(?:final\s+|correct\s+|right\s+)?answer\b(?!\s*(?:is|:))"
)
# "I get 17! That ...": the end of a sentence, no factorial.
_SHOUT = re.compile(r"(\b[a-z]+:?\s\**\$?\d[\d,.]*)!(?=[!*]*(?:\s+[A-Z]|\s*\Z))")


def read_text(completion: Any) -> str:
    """The text of a completion: a string, or chat messages of which the last counts."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def spoken(text: str) -> str:
    """Rule 0: what follows the last </think>, or all, up to a <think> that nothing closes; without the tokens
    that end a turn."""
    text = text.rpartition(THINK_END)[2].partition(THINK)[0]
    return _SPECIAL.sub("\n", text).replace("\u3002", ". ")


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
        if not operator and not JOINT.fullmatch(text[end:start]):
            break
        answer = f"{content}{operator[1] if operator else ', '}{answer}"
    return answer


def marked(text: str) -> str | None:
    """Rules 0 to 2: a box, or the phrase after the last mark; None when the text has neither."""
    text = _SHOUT.sub(r"\1.", spoken(text))
    inside = boxed_answer(text)
    if inside is not None:
        return inside
    marks = [mark for mark in MARK.finditer(text) if not _SUPPOSED.search(text[: mark.start()][-80:])]
    chosen = [*_CHOSEN.finditer(text), *_THE_ANSWER.finditer(text)]
    if chosen and chosen[-1].end() > max((m.end() for m in marks), default=0):
        return chosen[-1][1] or ""
    if not marks:
        return None
    rest = text[marks[-1].end() :].split("</answer>")[0]
    back = [match.end() for match in _RETRACTED.finditer(rest) if rest[: match.start()].strip("*_: \n")]
    return (last_expression(rest[back[-1] :]) or "") if back else phrase(rest)


def stated(text: str) -> str | None:
    """The one answer that ``text`` states, by the rule above; None when it states none."""
    text = spoken(text)
    found = marked(text)
    if found is not None:
        return found
    for mark in list(MARK.finditer(text))[-1:]:  # it states no answer, nor does the rest of its sentence
        text = (re.split(r"[.!?]\s|\n", text[mark.end() :], maxsplit=1) + [""])[1]
    return last_expression(_SHOUT.sub(r"\1.", text))
