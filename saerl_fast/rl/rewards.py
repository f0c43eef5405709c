"""Reward functions with TRL's signature: ``reward(prompts, completions, **columns) -> list[float]``.

``columns`` holds the pool's columns, repeated so that row i belongs to completion i. The built-in ones give
1.0 or 0.0; a user's may give any finite number. A completion is a string or a list of chat messages.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from saerl_fast import plugins
from saerl_fast.errors import SaerlError
from saerl_fast.rl.interrupt import TimeUp, call_within

log = logging.getLogger(__name__)

Reward = Callable[..., Any]

_said: list[str] = []  # answers already complained about

_NUMBER = re.compile(
    # A sign right after a digit or bracket ("5-3", "5 - 3") is an operation, not part of the number.
    r"(?:(?<![\w.)])(?<![\d)]\s)(?P<sign>[-\u2212+])\s?)?(?<![\w.])"
    r"\$?(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<dec>\.\d+)?"
    r"(?P<exp>[eE][-+]?\d{1,3}(?!\w))?(?:\s*/\s*(?P<den>\d+)(?![\d.]))?"
)
_FRAC = re.compile(r"(-?)\s*\\[dt]?frac\s*\{\s*(-?)(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_ANSWER = re.compile(r"answer\s*(?:is\s*:?|:)", re.IGNORECASE)
# Algebra without end: towers of numbers, huge powers and factorials ...
_ENDLESS = re.compile(
    r"(\^|\*\*)[\s{(]*-?\d+[\s})]*(\^|\*\*)|(\^|\*\*)[\s{(]*-?\d{5}|\d{4}\s*!|!\s*!|\d{400}"
)
# ... and what may be, where nothing can stop it.
_HEAVY = re.compile(r"(\^|\*\*).*(\^|\*\*)|!|\d{30}", re.DOTALL)


def get_reward(name: str) -> Reward:
    """A built-in reward by name, or ``module:function`` (``file.py:function``) from the working folder.

    Raises SaerlError on an unknown name, a module that cannot be imported and a missing function.
    """
    plugins.check_name(name, BUILT_IN, "train.reward")
    return BUILT_IN.get(name) or plugins.load_function(name, "train.reward")


def with_timeout(fn: Reward, seconds: float) -> Reward:
    """``fn``, except that a call of more than ``seconds`` (0: no limit) ends with a SaerlError."""
    if not seconds:
        return fn

    def limited(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        try:
            return call_within(seconds, lambda: fn(prompts=prompts, completions=completions, **columns))
        except TimeUp:
            raise SaerlError(
                f"reward {_name(fn)} took more than train.reward_timeout={seconds:g} s for "
                f"{len(completions)} completions; mend it or raise the limit"
            ) from None

    limited.__name__ = _name(fn)
    return limited


def score_rewards(
    fn: Reward, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> np.ndarray:
    """float64 [n]: ``fn`` called on n completions, and its answer checked.

    SaerlError names the function when it raises, returns another length, or anything but finite numbers.
    """
    name = _name(fn)
    uneven = [key for key, column in columns.items() if len(column) != len(completions)]
    if uneven or len(prompts) != len(completions):
        what = f"column {uneven[0]!r}" if uneven else "the list of prompts"
        raise SaerlError(f"{what} must have one row for each of the {len(completions)} completions")
    passed = {k: list(v) for k, v in columns.items() if k not in ("prompts", "completions", "prompt")}
    texts = {"prompts": list(prompts), "completions": list(completions)}
    raw = plugins.call(f"reward {name}", lambda: fn(**texts, **passed))
    try:
        values = list(raw)
    except TypeError:
        raise SaerlError(f"reward {name} returned a {type(raw).__name__}; return a list of numbers") from None
    if len(values) != len(completions):
        raise SaerlError(f"reward {name} returned {len(values)} values for {len(completions)} completions")
    scores = np.empty(len(values))
    for i, value in enumerate(values):
        try:
            if value is None or isinstance(value, (str, bytes)):
                raise TypeError
            scores[i] = float(value)
        except (TypeError, ValueError):
            raise SaerlError(
                f"reward {name} returned {value!r} for completion {i}; return a number"
            ) from None
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise SaerlError(f"reward {name} returned {scores[bad]} for completion {bad}; return finite numbers")
    return scores


def check_answers(answers: Sequence[Any], use: str) -> None:
    """SaerlError when no row has a reference answer (data.answer_column=null, say), but ``use`` needs it."""
    if len(answers) and not any(str(answer).strip() for answer in answers):
        raise SaerlError(
            f"{use} needs reference answers, but all {len(answers)} are empty; set data.answer_column"
        )


def exact(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 when the whole completion is the answer, white space aside."""
    answers = _answers(columns, prompts, "exact")
    return [float(_squeeze(_text(c)) == _squeeze(a)) for c, a in zip(completions, answers, strict=True)]


def numeric(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 when the last number of the completion equals the last number of the answer.

    Reads thousands separators, decimals, exponents, a/b and \\frac{a}{b}; equal within 1e-6 relative.
    An answer without a number (a bad row) scores 0 whatever the completion; the first one is logged.
    """
    scores = []
    for completion, answer in zip(completions, _answers(columns, prompts, "numeric"), strict=True):
        wanted = last_number(answer)
        if wanted is None:
            _say_no_number(str(answer)[:80])
        scores.append(float(wanted is not None and _equal(last_number(_text(completion)), wanted)))
    return scores


def maths(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 when the completion's final expression equals the answer, by math-verify when it is installed.

    Without it (said once in the log): \\boxed{...} or the text after "Answer:" as text, else as a number.
    """
    tools = _math_verify()
    return [
        float(_same_maths(_text(c), a, tools))
        for c, a in zip(completions, _answers(columns, prompts, "maths"), strict=True)
    ]


def reasoning_gym(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 when reasoning-gym's own scorer gives full marks (its partial credit counts as 0).

    Needs the column ``rg_entry``. The candidate is \\boxed{...}, else what follows the last "Answer:",
    else the last line; for answers of several lines the whole text serves in place of a line.
    """
    scores = []
    for completion, text in zip(completions, _need(columns, "rg_entry", "reasoning-gym"), strict=True):
        try:
            entry = json.loads(text)
            generator, gold = entry["metadata"]["source_dataset"], str(entry["answer"])
        except (TypeError, KeyError, ValueError):
            raise SaerlError(f"column rg_entry holds {str(text)[:80]!r}, not a reasoning-gym entry") from None
        candidate = final_answer(_text(completion), multiline="\n" in gold)
        scorer = _scorer(generator)
        try:
            scores.append(float(candidate != "" and scorer(candidate, entry) >= 0.99))
        except Exception:  # scorers raise on text they cannot parse (prime_factorization does)
            scores.append(0.0)
    return scores


BUILT_IN: dict[str, Reward] = {
    "exact": exact,
    "numeric": numeric,
    "maths": maths,
    "reasoning-gym": reasoning_gym,
}


def final_answer(text: str, multiline: bool = False) -> str:
    """What a completion offers as its answer: \\boxed{...}, else after "Answer:", else its last line."""
    inside = boxed(text)
    if inside is not None:
        return inside
    marks = list(_ANSWER.finditer(text))
    rest = text[marks[-1].end() :] if marks else text
    if multiline:
        return rest.strip("\n")
    lines = [line for line in rest.splitlines() if line.strip()]
    if not lines:
        return ""
    line = (lines[0] if marks else lines[-1]).strip(" \t*`$")
    return line[:-1].rstrip(" \t*`$") if line.endswith(".") else line


def boxed(text: str) -> str | None:
    """The contents of the last \\boxed{...} with balanced braces, or None."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begin + 1 : i].strip()
    return None


def last_number(text: str) -> Fraction | None:
    """The last number in ``text``, exactly; None when there is none."""
    text = _FRAC.sub(lambda m: f" {'-' * (m[1] != m[2])}{m[3]}/{m[4]} ", str(text))
    found = None
    for match in _NUMBER.finditer(text):
        if match["whole"] or match["dec"]:
            found = match
    if found is None:
        return None
    if len(found[0]) > 1000:  # longer digit strings are noise, and slow
        return None
    number = Fraction((found["whole"] or "0").replace(",", "") + (found["dec"] or "") + (found["exp"] or ""))
    if found["den"]:
        if int(found["den"]) == 0:
            return None
        number /= int(found["den"])
    return -number if found["sign"] in ("-", "\u2212") else number


def _equal(a: Fraction | None, b: Fraction) -> bool:
    return a is not None and abs(a - b) <= Fraction(1, 10**6) * abs(b)


def _same_maths(text: str, answer: str, tools: tuple[Callable, Callable] | None) -> bool:
    candidate = final_answer(text)
    if candidate and _squeeze(candidate) == _squeeze(answer):
        return True
    in_main = threading.current_thread() is threading.main_thread()
    # math-verify stops long computations with SIGALRM, which only the main thread may use.
    risky = _ENDLESS.search(text) or (not in_main and (_HEAVY.search(candidate) or len(candidate) > 200))
    if tools is not None and not risky:
        parse, verify = tools
        gold = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
        seconds = 3 if in_main else None
        wanted = parse(gold, parsing_timeout=seconds)
        return bool(verify(wanted, parse(text, parsing_timeout=seconds), timeout_seconds=seconds))
    wanted_number = last_number(answer)
    return wanted_number is not None and _equal(last_number(candidate or text), wanted_number)


def _say_no_number(answer: str) -> None:
    if not _said:
        _said.append(answer)
        log.warning("reward numeric: the answer %r holds no number, so its row always scores 0", answer)


@cache
def _math_verify() -> tuple[Callable, Callable] | None:
    try:
        from math_verify import parse, verify
    except ImportError:
        log.warning("math-verify is not installed: the maths reward compares \\boxed{} or the last number")
        return None
    # Its notice about disabled time-outs, once per run, concerns what _same_maths already guards.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse, verify


@cache
def _scorer(generator: str) -> Callable[[str, dict[str, Any]], float]:
    try:
        import reasoning_gym as package
    except ImportError:
        raise SaerlError("the reward reasoning-gym needs its package; pip install reasoning-gym") from None
    try:
        return package.create_dataset(generator, seed=0, size=1).score_answer
    except ValueError:
        raise SaerlError(f"column rg_entry names the unknown reasoning-gym generator {generator!r}") from None


def _need(columns: Mapping[str, Any], name: str, reward: str) -> Sequence[Any]:
    if name not in columns:
        raise SaerlError(
            f"the reward {reward} needs the column {name!r}; there are {', '.join(columns) or 'none'}"
        )
    return columns[name]


def _answers(columns: Mapping[str, Any], prompts: Sequence[Any], reward: str) -> Sequence[Any]:
    answers = _need(columns, "answer", reward)
    if any(prompt != prompts[0] for prompt in prompts):  # a single prompt may just be a bad row
        check_answers(answers, f"the reward {reward}")
    return answers


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _squeeze(text: Any) -> str:
    return " ".join(str(text).split())


def _name(fn: Reward) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
