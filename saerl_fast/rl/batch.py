"""The rollouts of one training batch: sampled and rewarded by all processes, known to each in figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from saerl_fast.config import RolloutConfig
from saerl_fast.rl import distributed
from saerl_fast.rl.evaluate import score_rollouts
from saerl_fast.rl.rollouts import Rollouts, generate
from saerl_fast.rl.runtime import Clock


@dataclass
class Batch:
    """What every process knows of the P prompts of a batch and their rollouts, G each."""

    rewards: np.ndarray  # float64 [P, G]
    features: Any  # CSR, one row per prompt, or None
    tokens: int
    finished: int  # rollouts that ended by themselves
    examples: list[dict[str, Any]]  # the first prompts with all their completions, for the log


def sample_batch(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    columns: Mapping[str, list[Any]],
    reward: Callable[..., Any],
    cfg: RolloutConfig,
    *,
    seed: int,
    capture: Any | None,
    clock: Clock,
    n_examples: int = 0,
) -> tuple[Rollouts, Batch]:
    """This process's share of the rollouts (prompts ``distributed.block(P)``), and the figures of all.

    ``prompts`` and ``columns`` are the whole batch's; the reward function sees only the share.
    """
    here = distributed.block(len(prompts))
    mine = prompts[here]
    part_columns = {name: column[here] for name, column in columns.items()}
    kept: list[Rollouts] = []

    def sample() -> Batch:
        made = generate(model, tokenizer, mine, cfg, seed=seed, first=here.start, capture=capture)
        kept.append(made)
        for phase, seconds in made.timings.items():
            clock.add(phase, seconds)
        with clock("reward"):
            rewards = score_rollouts(made, part_columns, mine, reward)
        examples = []
        for i in range(max(0, min(n_examples - here.start, len(mine)))):
            row = {"prompt_id": part_columns["prompt_id"][i], "prompt": mine[i]}
            row |= {"answer": part_columns["answer"][i], "rewards": rewards[i].tolist()}
            texts = made.texts[i * made.group_size : (i + 1) * made.group_size]
            examples.append(row | {"completions": texts})
        tokens, finished = int(made.lengths.sum()), int(made.finished.sum())
        return Batch(rewards, made.features, tokens, finished, examples)

    parts = distributed.share(sample)
    return kept[0], _join(parts)


def _join(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    features = None
    if all(part.features is not None for part in parts):
        from saerl_kernels import CSR

        features = CSR.concat([part.features for part in parts])
    return Batch(
        np.concatenate([part.rewards for part in parts]),
        features,
        sum(part.tokens for part in parts),
        sum(part.finished for part in parts),
        [row for part in parts for row in part.examples],
    )
