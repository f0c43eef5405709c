"""What a step collects: batches of the plan with their rollouts, and the groups of them that it trains on.

Dynamic sampling (DAPO, arXiv 2503.14476): while fewer than a batch of groups have rewards that differ,
draw on; train on the first batch's worth of those that do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from saerl_fast.config import RolloutConfig
from saerl_fast.rl import distributed
from saerl_fast.rl.evaluate import score_rollouts
from saerl_fast.rl.rollouts import Rollouts, generate
from saerl_fast.rl.runtime import Clock


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


def sample_together(
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
    engine: Callable[..., Rollouts] = generate,
) -> tuple[Rollouts, np.ndarray]:
    """The rollouts of a batch and their rewards float64 [P, G]; each process makes a share, all get all.

    The reward function is called once in every process, with that process's share.
    """
    here = distributed.block(len(prompts))

    def sample() -> tuple[Rollouts, np.ndarray]:
        mine = prompts[here]
        made = engine(model, tokenizer, mine, cfg, seed=seed, first=here.start, capture=capture)
        for phase, seconds in made.timings.items():
            clock.add(phase, seconds)
        with clock("reward"):
            part = {name: column[here] for name, column in columns.items()}
            rewards = score_rollouts(made, part, mine, reward)
        return made.to("cpu") if distributed.size() > 1 else made, rewards

    parts = distributed.share(sample)
    if len(parts) == 1:
        return parts[0]
    whole = concat([rollouts for rollouts, _ in parts]).to(model.device)
    return whole, np.concatenate([rewards for _, rewards in parts])


def concat(parts: Sequence[Rollouts]) -> Rollouts:
    """Rollouts of several batches of prompts, one after the other, padded to one width."""
    width = max(part.prompt_ids.shape[1] for part in parts)
    longest = max(part.completion_ids.shape[1] for part in parts)

    def padded(name: str) -> Tensor:
        fields = [getattr(part, name) for part in parts]
        return torch.cat([pad(field, (0, longest - field.shape[1])) for field in fields])

    features = None
    if all(part.features is not None for part in parts):
        from saerl_kernels import CSR

        features = CSR.concat([part.features for part in parts if part.features is not None])
    return replace(
        parts[0],
        prompt_ids=torch.cat([pad(p.prompt_ids, (width - p.prompt_ids.shape[1], 0)) for p in parts]),
        prompt_lens=torch.cat([part.prompt_lens for part in parts]),
        texts=[text for part in parts for text in part.texts],
        finished=torch.cat([part.finished for part in parts]),
        features=features,
        completion_ids=padded("completion_ids"),
        completion_mask=padded("completion_mask"),
        logprobs=padded("logprobs"),
    )


def join(draws: Sequence[Draw], most: int) -> tuple[Rollouts, Tensor, Tensor]:
    """What to train on: rollouts, advantages [P, G] and which groups carry a signal, bool [P].

    A single draw is taken whole. Of several, the first ``most`` groups with a signal make the batch, and
    nothing else counts in the loss's normaliser; if no group has one, the first draw stands for them.
    """
    first, used = draws[0], torch.cat([draw.used for draw in draws])
    if len(draws) == 1 or not used.any():
        return first.rollouts, first.advantage, first.used
    chosen = used.nonzero()[:most, 0]
    whole = concat([replace(draw.rollouts, features=None) for draw in draws])
    size, device = whole.group_size, whole.logprobs.device
    groups = chosen.to(device)
    rows = (groups[:, None] * size + torch.arange(size, device=device)).flatten()
    rollouts = replace(
        whole,
        prompt_ids=whole.prompt_ids[groups],
        prompt_lens=whole.prompt_lens[groups],
        completion_ids=whole.completion_ids[rows],
        completion_mask=whole.completion_mask[rows],
        logprobs=whole.logprobs[rows],
        texts=[whole.texts[i] for i in rows.tolist()],
        finished=whole.finished[rows],
    )
    return rollouts, torch.cat([draw.advantage for draw in draws])[chosen], used[chosen]
