"""Rollouts, and what a step collects of them: batches of the plan, and the groups that it trains on.

Dynamic sampling (DAPO, arXiv 2503.14476): while fewer than a batch of groups have rewards that differ,
draw on; train on the first batch's worth of those that do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from saerl_fast.rl.rewards.ask import Notes

if TYPE_CHECKING:
    from saerl_kernels import CSR


@dataclass
class Rollouts:
    """Completions of P prompts, G each: row ``p * G + g`` holds sample g of prompt p (N = P * G rows).

    Log-probabilities are those of the distribution at temperature T (logits / T), before top-p, so that
    recomputing them takes nothing but the same division. They are 0 where the mask is False.
    """

    prompt_ids: Tensor  # int64 [P, S], left-padded
    prompt_lens: Tensor  # int64 [P]
    completion_ids: Tensor  # int64 [N, C], right-padded; the end token is part of a completion
    completion_mask: Tensor  # bool [N, C]
    logprobs: Tensor  # float32 [N, C]
    texts: list[str]  # decoded, without special tokens
    finished: Tensor  # bool [N]: ended with an end token rather than at max_new_tokens
    group_size: int
    features: CSR | None = None  # one row per prompt, when a capture object was given
    timings: dict[str, float] = field(default_factory=dict)  # seconds: generate, capture, encode

    @property
    def lengths(self) -> Tensor:
        """Tokens in each completion, int64 [N]."""
        return self.completion_mask.sum(1)

    def to(self, device: torch.device | str) -> Rollouts:
        """The same with its tensors on ``device`` (features stay where they are)."""
        moved: dict[str, Any] = {
            name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **moved)

    def sequences(self) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt and completion joined without a gap, for training.

        Returns ids int64 [N, L] padded on the right, prompt lengths [N], completion lengths [N].
        """
        prompts = self.prompt_ids.repeat_interleave(self.group_size, 0)
        starts, lengths = self.prompt_lens.repeat_interleave(self.group_size), self.lengths
        joined = torch.cat([prompts, self.completion_ids], 1)
        width = int((starts + lengths).max())
        # shift every row left by its padding, and fill what lies beyond its end with its first column
        index = torch.arange(width, device=joined.device) + (prompts.shape[1] - starts)[:, None]
        return joined.gather(1, index.clamp(max=joined.shape[1] - 1)), starts, lengths


@dataclass
class Draw:
    """One batch of the plan: P prompts with G rollouts each."""

    ids: list[str]  # [P]
    prompts: list[str]  # [P] texts
    columns: dict[str, list[Any]]  # of the pool, P rows
    rollouts: Rollouts
    rewards: np.ndarray  # float64 [P, G], as the reward function gave them; NaN for None
    advantage: Tensor  # float32 [P, G]
    used: Tensor  # bool [P]: rewards (of the task, not shaped) that differ, so a gradient
    notes: Notes = field(default_factory=Notes)  # what the reward functions logged


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
    return _taken(rollouts, groups, groups[:, None] * size + torch.arange(size))


def widen(first: Rollouts, rest: Rollouts) -> Rollouts:
    """Two samples of the same prompts in groups of both, those of ``first`` in front; without features."""
    count, sizes = len(first.prompt_lens), (first.group_size, rest.group_size)
    of_first, of_rest = (torch.arange(count * size).view(count, size) for size in sizes)
    rows = torch.cat([of_first, count * sizes[0] + of_rest], 1)
    return _taken(concat([first, rest]), torch.arange(count), rows)


def _taken(rollouts: Rollouts, groups: Tensor, rows: Tensor) -> Rollouts:
    """Prompts int64 [n] with the completions ``rows`` int64 [n, G]."""
    of, flat = {"prompt_ids": groups, "prompt_lens": groups}, rows.flatten()
    tensors = {
        name: tensor[of.get(name, flat).to(tensor.device)] for name, tensor in _tensors(rollouts).items()
    }
    texts = [rollouts.texts[i] for i in flat]
    return replace(rollouts, texts=texts, features=None, group_size=rows.shape[1], **tensors)


def join(draws: Sequence[Draw], most: int) -> tuple[Rollouts, Tensor, Tensor]:
    """What to train on: rollouts, advantages [P, G] and which groups carry a signal, bool [P].

    A single draw is taken whole. Of several, the first ``most`` groups with a signal make the batch, and
    nothing else counts in the loss's normaliser; if no group has one, the first draw stands for them. Draws
    without such a group may have groups of another size: those that ended after a first stage.
    """
    useful = [draw for draw in draws if draw.used.any()]
    if len(draws) == 1 or not useful:
        return draws[0].rollouts, draws[0].advantage, draws[0].used
    used = torch.cat([draw.used for draw in useful])
    chosen = used.nonzero()[:most, 0]
    rollouts = select(concat([draw.rollouts for draw in useful]), chosen)
    return rollouts, torch.cat([draw.advantage for draw in useful])[chosen], used[chosen]


def _tensors(rollouts: Rollouts) -> dict[str, Any]:
    return {name: value for name, value in vars(rollouts).items() if isinstance(value, Tensor)}


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a completion: the generation config's end token(s) and the tokenizer's."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(found) if isinstance(found, (list, tuple)) else [found]
    return sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None})


def left_pad(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids int64 [n, longest] padded on the left, and the rows' lengths int64 [n]."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    padded = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    return padded.to(device), lengths.to(device)


def decoded(tokenizer: Any, tokens: Tensor, mask: Tensor, stops: Tensor) -> tuple[Tensor, list[str]]:
    """Which completions ended by themselves, bool [N], and their texts without special tokens."""
    ends = torch.isin(tokens, stops) & mask
    kept = (mask & ~ends).tolist()
    plain = [[t for t, k in zip(*row, strict=True) if k] for row in zip(tokens.tolist(), kept, strict=True)]
    return ends.any(1), tokenizer.batch_decode(plain, skip_special_tokens=True)
