"""What a step collects: batches of the plan with their rollouts, and the groups of them that it trains on.

Dynamic sampling (DAPO, arXiv 2503.14476): while fewer than a batch of groups have rewards that differ,
draw on; train on the first batch's worth of those that do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from saerl_fast.rl.rollouts import Rollouts


@dataclass
class Draw:
    """One batch of the plan: P prompts with G rollouts each."""

    ids: list[str]  # [P]
    prompts: list[str]  # [P] texts
    columns: dict[str, list[Any]]  # of the pool, P rows
    rollouts: Rollouts
    rewards: np.ndarray  # float64 [P, G], as the reward function gave them
    advantage: Tensor  # float32 [P, G]
    used: Tensor  # bool [P]: rewards that differ, so a gradient


def concat(parts: Sequence[Rollouts]) -> Rollouts:
    """Rollouts of several batches of prompts, one after the other, padded to one width."""
    if len(parts) == 1:
        return parts[0]
    tensors: dict[str, Any] = {}
    for name in _tensors(parts[0]):
        fields = [getattr(part, name) for part in parts]
        if fields[0].ndim == 2:
            width, left = max(field.shape[1] for field in fields), name == "prompt_ids"
            gaps = [width - field.shape[1] for field in fields]
            fields = [pad(f, (gap, 0) if left else (0, gap)) for f, gap in zip(fields, gaps, strict=True)]
        tensors[name] = torch.cat(fields)
    features = [part.features for part in parts if part.features is not None]
    joined = None
    if features:
        from saerl_kernels import CSR

        joined = CSR.concat(features)
    texts = [text for part in parts for text in part.texts]
    return replace(parts[0], texts=texts, features=joined, **tensors)


def select(rollouts: Rollouts, groups: Tensor) -> Rollouts:
    """The rollouts of some prompts, int64 [n], without features."""
    size = rollouts.group_size
    rows = (groups[:, None] * size + torch.arange(size)).flatten()
    of = {"prompt_ids": groups, "prompt_lens": groups}
    tensors = {
        name: tensor[of.get(name, rows).to(tensor.device)] for name, tensor in _tensors(rollouts).items()
    }
    return replace(rollouts, texts=[rollouts.texts[i] for i in rows], features=None, **tensors)


def join(draws: Sequence[Draw], most: int) -> tuple[Rollouts, Tensor, Tensor]:
    """What to train on: rollouts, advantages [P, G] and which groups carry a signal, bool [P].

    A single draw is taken whole. Of several, the first ``most`` groups with a signal make the batch, and
    nothing else counts in the loss's normaliser; if no group has one, the first draw stands for them.
    """
    used = torch.cat([draw.used for draw in draws])
    if len(draws) == 1 or not used.any():
        return draws[0].rollouts, draws[0].advantage, draws[0].used
    chosen = used.nonzero()[:most, 0]
    rollouts = select(concat([draw.rollouts for draw in draws]), chosen)
    return rollouts, torch.cat([draw.advantage for draw in draws])[chosen], used[chosen]


def _tensors(rollouts: Rollouts) -> dict[str, Any]:
    return {name: value for name, value in vars(rollouts).items() if isinstance(value, Tensor)}
