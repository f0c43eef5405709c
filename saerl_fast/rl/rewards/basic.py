"""The rewards ``exact``, ``numeric`` and ``maths``, and what they read of a reference answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from saerl_fast.rl.rewards.answers import boxed_answer, marked, read_text, spoken, stated
from saerl_fast.rl.rewards.columns import answers_of
from saerl_fast.rl.rewards.equal import math_verify, same
from saerl_fast.rl.rewards.notation import balanced, squeeze, tidy
from saerl_fast.rl.rewards.numbers import equal, last_number, only_number

MOST_WORDS = 15  # of a reference answer without a box or a mark: longer ones are worked solutions


def exact(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 when the whole completion is the answer, white space aside."""
    answers = answers_of(columns, prompts, "exact")
    return [float(squeeze(read_text(c)) == squeeze(a)) for c, a in zip(completions, answers, strict=True)]


def numeric_gold(answer: Any) -> Fraction | None:
    r"""The one number of a reference answer: of its \boxed{...}, after its ####, or of all of it."""
    text = str(answer)
    part = marked(text)
    return only_number(text if part is None else part)


def numeric(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1.0 when the last number of the completion (after its </think>, if any) equals the answer's.

    Whole numbers must be equal exactly, others within 1e-6 relative. An answer without a number, or with
    several, scores 0 whatever the completion; such rows are counted and named before a run.
    """
    scores = []
    for completion, answer in zip(completions, answers_of(columns, prompts, "numeric"), strict=True):
        wanted = numeric_gold(answer)
        scores.append(float(wanted is not None and equal(last_number(spoken(read_text(completion))), wanted)))
    return scores


def maths(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    r"""1.0 when the one answer that the completion states equals the reference answer.

    The answer is read by the rule of ``saerl_fast.rl.rewards.answers``: after the last </think>, if any,
    the last \boxed{...}, else what follows the last "answer is", "Answer:" or "####", else the last formula
    or number.
    """
    return _score(stated, "maths", prompts, completions, columns)


def maths_boxed(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    r"""As :func:`maths`, but only a \boxed{...} (or \fbox{...}) states an answer."""
    return _score(boxed_answer, "maths-boxed", prompts, completions, columns)


def _score(
    read: Callable[[str], str | None],
    name: str,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: dict[str, Any],
) -> list[float]:
    math_verify()  # says once that it is missing
    scores = []
    for completion, answer in zip(completions, answers_of(columns, prompts, name), strict=True):
        candidate, gold = read(read_text(completion)), maths_gold(str(answer))
        scores.append(float(candidate is not None and gold is not None and same(candidate, gold)))
    return scores


def maths_gold(answer: str) -> str | None:
    r"""What a reference answer says: its box, what follows its mark (####), or all of it; None if unreadable.

    Unreadable are empty answers, worked solutions without a mark, and braces that do not match.
    """
    answer = answer.strip()
    part = marked(answer) if len(answer) > 1 else answer
    if part is None:
        part = answer
        if len(part.split()) > MOST_WORDS and len(re.findall(r"(?<!\\)\b[a-zA-Z]{2,}\b", part)) > MOST_WORDS:
            return None
    part = part.strip()
    return part if tidy(part) and balanced(part) else None
