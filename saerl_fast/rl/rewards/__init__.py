"""Reward functions with TRL's signature: ``reward(prompts, completions, **columns) -> list[float | None]``.

``columns`` holds the pool's columns, repeated so that row i belongs to completion i. The built-in ones give
1.0 or 0.0; a user's may give any finite number, or None for a row that it does not judge. A completion is a
string, or a list of chat messages where the prompt is one. See ``saerl_fast.rl.rewards.call`` for what
else a function may ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import wraps
from typing import Any

from saerl_fast import plugins
from saerl_fast.errors import SaerlError
from saerl_fast.rl.rewards.answers import THINK_END, after_thinking, read_text
from saerl_fast.rl.rewards.ask import Notes, Reward, State
from saerl_fast.rl.rewards.basic import exact, maths, maths_boxed, numeric
from saerl_fast.rl.rewards.call import Together, is_built_in, score_rewards, with_timeout
from saerl_fast.rl.rewards.columns import check_answers
from saerl_fast.rl.rewards.gym import reasoning_gym

__all__ = [
    "BUILT_IN",
    "Notes",
    "Reward",
    "State",
    "check_answers",
    "get_reward",
    "is_built_in",
    "score_rewards",
    "with_timeout",
]


def _thinking(fn: Reward) -> Reward:
    """``fn`` on what follows the last </think> of each completion; without one a completion earns nothing."""

    @wraps(fn)
    def reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        texts = [read_text(completion) for completion in completions]
        scores = fn(prompts, [after_thinking(text) for text in texts], **columns)
        return [s if THINK_END in text else 0.0 for s, text in zip(scores, texts, strict=True)]

    return reward


BUILT_IN: dict[str, Reward] = {
    "exact": exact,
    "numeric": numeric,
    "maths": maths,
    "maths-boxed": maths_boxed,
    "reasoning-gym": reasoning_gym,
}
BUILT_IN |= {f"{name}-think": _thinking(fn) for name, fn in BUILT_IN.items()}
for _name, _fn in BUILT_IN.items():
    _fn.built_in = True  # type: ignore[attr-defined]
    _fn.reward_name = _name  # type: ignore[attr-defined]
    _fn.reward_spec = _name, _fn  # type: ignore[attr-defined]


def get_reward(names: str | Sequence[str], weights: Sequence[float] | None = None) -> Reward:
    """A built-in reward by name, or ``module:function`` (``file.py:function``) from the working folder.

    Several names (a list, or "a,b") make one reward: the sum of theirs, each times its weight (or 1).
    Raises SaerlError on an unknown name, a module that cannot be imported, a missing function and a number of
    weights that is not that of the names.
    """
    each = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    each = [name for name in each if name]
    if not each:
        raise SaerlError(f"train.reward names no reward; use {', '.join(BUILT_IN)} or module:function")
    if weights is not None and len(weights) != len(each):
        raise SaerlError(
            f"train.reward_weights has {len(weights)} numbers for {len(each)} rewards ({', '.join(each)})"
        )
    if len(each) == 1 and (weights is None or weights[0] == 1):
        return _one_reward(each[0])
    return Together([_one_reward(name) for name in each], list(weights or [1.0] * len(each)))


def _one_reward(name: str) -> Reward:
    plugins.check_name(name, BUILT_IN, "train.reward")
    if name in BUILT_IN:
        return BUILT_IN[name]
    fn = plugins.load_function(name, "train.reward")
    with suppress(AttributeError, TypeError):  # one of C's takes no attributes
        fn.reward_spec = name, fn
    return fn
