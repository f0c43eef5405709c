"""One optimizer step from a batch of rollouts, micro-batch by micro-batch."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from saerl_fast.config import TrainConfig
from saerl_fast.rl import distributed
from saerl_fast.rl.clock import Clock
from saerl_fast.rl.logprobs import completion_logprobs
from saerl_fast.rl.loss import BatchSize, get_loss, importance_weights, policy_loss
from saerl_fast.rl.optimizer import Optimizer
from saerl_fast.rl.rollouts import Rollouts

FIGURES = ("loss", "entropy", "clipped", "kl", "mismatch")


class Learner:
    """The policy, its optimizer, and the frozen policy it is held to when ``cfg.loss.beta`` > 0.

    With adapters (``cfg.lora``) that frozen policy is the model without them; else it is ``reference``, a
    copy of the policy as it is now.
    """

    def __init__(self, model: Any, cfg: TrainConfig) -> None:
        self.model, self.cfg = model, cfg
        self.optimizer = Optimizer(model, cfg)
        copied = cfg.loss.beta > 0 and cfg.lora.rank == 0
        self.reference = copy.deepcopy(model).requires_grad_(False) if copied else None

    def update(
        self, rollouts: Rollouts, advantage: Tensor, used: Tensor, lr: float, clock: Clock
    ) -> dict[str, float | None]:
        """One optimizer step; figures for the log. Without any usable group, weights and moments stay.

        ``advantage`` [P, G] and ``used`` bool [P] belong to the P groups of ``rollouts``. Several processes
        hold the same rollouts and take a share of the groups each.
        """
        cfg, device = self.cfg, self.model.device
        groups = torch.arange(len(used)) if cfg.loss.beta > 0 else used.nonzero()[:, 0]
        counted = rollouts.finished | (not cfg.loss.mask_truncated)
        owner = torch.arange(len(counted), device=device) // rollouts.group_size
        if not (counted & torch.isin(owner, groups.to(device))).any():
            return {**dict.fromkeys(FIGURES), "grad_norm": None}
        mine = groups[distributed.shard(len(groups))].to(device)
        chosen = (counted & torch.isin(owner, mine)).nonzero()[:, 0]
        owner = owner[chosen]
        ids, starts, lengths = (part[chosen] for part in rollouts.sequences())
        sampled, mask = rollouts.logprobs[chosen], rollouts.completion_mask[chosen]
        weight = advantage.flatten().to(device)[chosen]
        tokens = int((rollouts.lengths * counted).sum())
        size = BatchSize(int(counted.sum()), tokens, cfg.rollout.max_new_tokens)
        sequence = get_loss(cfg.loss.kind).sequence
        corrected = cfg.rollout.engine != "transformers" and cfg.loss.importance_cap > 0

        def backward(part: Tensor) -> Tensor:
            """Gradients of a micro-batch; its figures and its number of tokens."""
            with clock("logprob"):
                batch = (ids[part], starts[part], lengths[part])
                options: dict[str, Any] = {"temperature": cfg.rollout.temperature, "owner": owner[part]}
                new, entropy = completion_logprobs(self.model, *batch, **options)
                reference = None
                if cfg.loss.beta > 0:
                    without = nullcontext() if self.reference is not None else self.model.disable_adapter()
                    with torch.no_grad(), without:
                        frozen = self.reference if self.reference is not None else self.model
                        reference, _ = completion_logprobs(frozen, *batch, with_entropy=False, **options)
            with clock("update"):
                now, then = new.detach(), sampled[part][mask[part]]
                importance = importance_weights(now, then, cfg.loss.importance_cap) if corrected else None
                # with one step per batch the policy before it is the one of this forward pass
                before = now if corrected or sequence else then
                share = (weight[part], lengths[part], size, cfg.loss, reference, importance)
                loss, found = policy_loss(new, before, *share)
                loss.backward()
            found |= {"loss": loss.detach(), "entropy": entropy.sum(), "mismatch": (now - then).abs().sum()}
            return torch.stack([*(found[name] for name in FIGURES), lengths[part].sum()])

        sums = self.optimizer.accumulate(starts + lengths, backward, len(FIGURES) + 1, owner)
        with clock("update"):
            norm = self.optimizer.step(lr, cfg.grad_norm)
        loss, *rest, tokens = sums.tolist()
        figures = {name: value / tokens for name, value in zip(FIGURES[1:], rest, strict=True)}
        return {"loss": loss, **figures, "grad_norm": norm}
