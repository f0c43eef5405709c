"""Calling reward functions, one or several, and naming the completion that one fails on.

A function is called as TRL's GRPOTrainer calls it, with keyword arguments: ``prompts`` and ``completions``
(text, or chat messages where the pool's prompts are chats), the pool's columns, ``completion_ids`` (token ids
of each completion), ``trainer_state`` (a ``State``), ``log_extra(name, values)`` (a value for each
completion, into rollouts.jsonl) and ``log_metric(name, value)`` (a number, into metrics.jsonl). A function
without ``**kwargs`` gets those that it names. It may be async. None means "not a row for me": that completion
is left out of the mean reward, its group's advantages and the pass rates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saerl_fast.errors import SaerlError
from saerl_fast.rl.rewards.apart import Limited
from saerl_fast.rl.rewards.ask import Failed, Notes, Reward, Rows, State, ask, at, name_of

OWN_NAMES = ("completion_ids", "trainer_state", "log_extra", "log_metric")
SEARCH = 10.0  # seconds, at most, to find the completion that a reward fails on


@dataclass
class Together:
    """Several reward functions as one: the weighted sum of those that judge a completion."""

    parts: list[Reward]
    weights: list[float]

    def __post_init__(self) -> None:
        self.__name__ = "+".join(name_of(part) for part in self.parts)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        plain = {key: column for key, column in columns.items() if key not in OWN_NAMES}
        own = {"ids": columns.get("completion_ids"), "state": columns.get("trainer_state")}
        scores = score_rewards(self, prompts, completions, plain, **own)
        return [None if math.isnan(v) else v for v in scores.tolist()]

    def total(self, scores: Sequence[np.ndarray]) -> np.ndarray:
        """float64 [n]: the weighted sum, NaN where no part judges."""
        table = np.stack(scores)
        total = np.nansum(table * np.array(self.weights)[:, None], axis=0)
        return np.where(np.isnan(table).all(0), np.nan, total)


def with_timeout(fn: Reward, seconds: float) -> Reward:
    """``fn``, except that a call of more than ``seconds`` (0: no limit) ends with a SaerlError.

    One that `get_reward` made is called in a child process; see ``saerl_fast.rl.rewards.apart``.
    """
    if not seconds:
        return fn
    if isinstance(fn, Together):
        return Together([with_timeout(part, seconds) for part in fn.parts], fn.weights)
    return Limited(fn, seconds)


def score_rewards(
    fn: Reward,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    *,
    ids: Sequence[Sequence[int]] | None = None,
    finished: Sequence[bool] | None = None,
    state: State | None = None,
    notes: Notes | None = None,
) -> np.ndarray:
    """float64 [n]: ``fn`` called on n completions, and its answer checked; NaN where it said None.

    ``ids``: token ids of the completions. ``finished``: which ended by themselves; the built-in rewards pay
    nothing for the others (None: all are judged). ``state`` and ``notes``: what it may read and log.
    SaerlError names the function, its file and line when it raises, exits, takes too long or returns another
    length or anything but finite numbers and None, and the completion where one alone does it too.
    """
    n = len(completions)
    uneven = [key for key, column in columns.items() if len(column) != n]
    if uneven or len(prompts) != n:
        what = f"column {uneven[0]!r}" if uneven else "the list of prompts"
        raise SaerlError(f"{what} must have one row for each of the {n} completions")
    taken = [key for key in columns if key in OWN_NAMES]
    if taken:
        raise SaerlError(f"the pool's column {taken[0]!r} has a name that rewards are given; rename it")
    rows = Rows(
        list(prompts),
        list(completions),
        {k: list(v) for k, v in columns.items() if k not in ("prompts", "completions", "prompt")},
        [list(row) for row in ids] if ids is not None else [[] for _ in range(n)],
        state or State(),
    )
    noted = notes if notes is not None else Notes()
    parts = fn.parts if isinstance(fn, Together) else [fn]
    scores = []
    for part in parts:
        found = _named(part, rows, noted)
        if finished is not None and getattr(part, "built_in", False):
            found = np.where(np.asarray(finished, dtype=bool), found, 0.0)
        scores.append(found)
    if not isinstance(fn, Together):
        return scores[0]
    for i, (part, found) in enumerate(zip(parts, scores, strict=True)):
        name = name_of(part)
        same_name = sum(name_of(other) == name for other in parts[:i])
        noted.parts.setdefault(f"{name}-{same_name + 1}" if same_name else name, []).extend(found.tolist())
    return fn.total(scores)


def _named(fn: Reward, rows: Rows, notes: Notes) -> np.ndarray:
    """`ask`; where ``fn`` fails, it is asked for one row after the other until it fails in the same way."""
    try:
        return _ask(fn, rows, notes)
    except Failed as err:
        end, n = time.monotonic() + SEARCH, len(rows.completions)
        if err.search and n == 1:
            err.at = at(rows, 0)
        for i in range(n if err.search and n > 1 else 0):
            try:
                if time.monotonic() < end:
                    _ask(fn, rows.only(i), Notes())
            except Failed as alone:
                if alone.what == err.what:
                    err.at, err.where = at(rows, i), alone.where
                    break
        raise


def _ask(fn: Reward, rows: Rows, notes: Notes) -> np.ndarray:
    return fn.ask(rows, notes) if isinstance(fn, Limited) else ask(fn, rows, notes)


def is_built_in(fn: Reward) -> bool:
    """Whether ``fn``, or one of several, reads answers by this package's own rules."""
    parts = fn.parts if isinstance(fn, Together) else [fn]
    return any(getattr(part, "built_in", False) for part in parts)
