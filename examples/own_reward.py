"""A reward of your own: ``saerl train ... train.reward=examples.own_reward:close_enough`` from the root.

The signature is TRL's: lists of prompts and completions, every other column of the pool as a keyword.
"""

from __future__ import annotations

from typing import Any


def close_enough(
    prompts: list[str], completions: list[str], answer: list[str], **columns: Any
) -> list[float]:
    """1 for the exact answer, 0.2 for a number of the right length, 0 otherwise."""
    rewards = []
    for completion, wanted in zip(completions, answer, strict=True):
        given = completion.strip()
        close = given.lstrip("-").isdigit() and len(given) == len(wanted)
        rewards.append(1.0 if given == wanted else 0.2 if close else 0.0)
    return rewards
