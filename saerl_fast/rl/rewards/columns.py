"""What the built-in rewards read of a pool's columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saerl_fast.errors import SaerlError


def need(columns: Mapping[str, Any], name: str, reward: str) -> Sequence[Any]:
    """The column of that name; SaerlError when there is none."""
    if name not in columns:
        raise SaerlError(
            f"the reward {reward} needs the column {name!r}; there are {', '.join(columns) or 'none'}"
        )
    return columns[name]


def answers_of(columns: Mapping[str, Any], prompts: Sequence[Any], reward: str) -> Sequence[Any]:
    """The reference answers; SaerlError when all rows of several prompts lack one."""
    answers = need(columns, "answer", reward)
    if any(prompt != prompts[0] for prompt in prompts):  # a single prompt may just be a bad row
        check_answers(answers, f"the reward {reward}")
    return answers


def check_answers(answers: Sequence[Any], use: str) -> None:
    """SaerlError when no row has a reference answer (data.answer_column=null, say), but ``use`` needs it."""
    if len(answers) and not any(str(answer).strip() for answer in answers):
        raise SaerlError(
            f"{use} needs reference answers, but all {len(answers)} are empty; set data.answer_column"
        )
