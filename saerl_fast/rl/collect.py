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

    def counts(self) -> dict[str, int]:
        lengths = self.rollouts.lengths
        return {"rollouts": len(lengths), "tokens": int(lengths.sum()), "groups": len(self.ids)}


def join(draws: Sequence[Draw], most: int) -> tuple[Rollouts, Tensor, Tensor]:
    """What to train on: rollouts, advantages [P, G] and which groups carry a signal, bool [P].

    A single draw is taken whole. Of several, the first ``most`` groups with a signal make the batch, and
    nothing else counts in the loss's normaliser; if no group has one, the first draw stands for them.
    """
    first, used = draws[0], torch.cat([draw.used for draw in draws])
    if len(draws) == 1 or not used.any():
        return first.rollouts, first.advantage, first.used
    chosen = used.nonzero()[:most, 0]
    size, device = first.rollouts.group_size, first.rollouts.logprobs.device
    groups = chosen.to(device)
    members = (groups[:, None] * size + torch.arange(size, device=device)).flatten()
    parts = [draw.rollouts for draw in draws]
    width = max(part.prompt_ids.shape[1] for part in parts)
    longest = max(part.completion_ids.shape[1] for part in parts)

    def joined(name: str) -> Tensor:
        fields = [getattr(part, name) for part in parts]
        return torch.cat([pad(field, (0, longest - field.shape[1])) for field in fields])[members]

    texts = [text for part in parts for text in part.texts]
    rollouts = replace(
        first.rollouts,
        prompt_ids=torch.cat([pad(p.prompt_ids, (width - p.prompt_ids.shape[1], 0)) for p in parts])[groups],
        prompt_lens=torch.cat([part.prompt_lens for part in parts])[groups],
        completion_ids=joined("completion_ids"),
        completion_mask=joined("completion_mask"),
        logprobs=joined("logprobs"),
        texts=[texts[i] for i in members.tolist()],
        finished=torch.cat([part.finished for part in parts])[members],
        features=None,
    )
    return rollouts, torch.cat([draw.advantage for draw in draws])[chosen], used[chosen]
