"""One optimizer step from a batch of rollouts, micro-batch by micro-batch."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from saerl_fast.config import TrainConfig
from saerl_fast.errors import SaerlError
from saerl_fast.rl import distributed
from saerl_fast.rl.logprobs import completion_logprobs, micro_batches
from saerl_fast.rl.loss import BatchSize, importance_weights, policy_loss
from saerl_fast.rl.optimizer import Optimizer, training_mode
from saerl_fast.rl.rollouts import Rollouts
from saerl_fast.rl.runtime import Clock

log = logging.getLogger(__name__)
FIGURES = ("loss", "entropy", "clipped", "kl", "mismatch")


class Learner:
    """The policy, its optimizer, and the frozen policy it is held to when ``cfg.loss.beta`` > 0.

    With adapters (``cfg.lora``) that frozen policy is the model without them; else it is a copy, made by
    :meth:`freeze_reference`. ``micro_tokens`` shrinks when memory runs out.
    """

    def __init__(self, model: Any, cfg: TrainConfig) -> None:
        self.model, self.cfg = model, cfg
        self.optimizer = Optimizer(model, cfg.lr, weight_decay=cfg.weight_decay, betas=cfg.betas)
        self.micro_tokens = cfg.micro_tokens
        self.reference: Any | None = None

    def freeze_reference(self) -> Any:
        """Keep the policy as it is now for the KL term; returns the copy."""
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        return self.reference

    def update(
        self, rollouts: Rollouts, advantage: Tensor, used: Tensor, lr: float, clock: Clock
    ) -> dict[str, float | None]:
        """One optimizer step; figures for the log. Without any usable group, weights and moments stay.

        ``advantage`` [P, G] and ``used`` bool [P] belong to the P groups of ``rollouts``. Several processes
        hold the same rollouts and take a share of the groups each.
        """
        cfg, device = self.cfg, self.model.device
        keep = torch.ones_like(used) if cfg.loss.beta > 0 else used
        counted = rollouts.finished | (not cfg.loss.mask_truncated)
        whole = keep.to(device).repeat_interleave(rollouts.group_size) & counted
        if not whole.any():
            return {**dict.fromkeys(FIGURES), "grad_norm": None}
        groups = keep.nonzero()[:, 0]
        mine = torch.zeros_like(keep).index_fill_(0, groups[distributed.block(len(groups))], True)
        chosen = (mine.to(device).repeat_interleave(rollouts.group_size) & whole).nonzero()[:, 0]
        ids, starts, lengths = (part[chosen] for part in rollouts.sequences())
        owner = chosen // rollouts.group_size
        old, mask = rollouts.logprobs[chosen], rollouts.completion_mask[chosen]
        weight = advantage.flatten().to(device)[chosen]
        tokens = int((rollouts.lengths * counted).sum())
        size = BatchSize(int(counted.sum()), tokens, cfg.rollout.max_new_tokens)

        def accumulate() -> Tensor:
            """Gradients of this process's groups; sums of the figures, and its tokens, for the log."""
            sums = torch.zeros(len(FIGURES) + 1, device=device)
            sums[-1] = lengths.sum()
            for part in micro_batches(starts + lengths, self.micro_tokens, owner) if len(chosen) else ():
                with clock("logprob"):
                    batch = (ids[part], starts[part], lengths[part])
                    options: dict[str, Any] = {"temperature": cfg.rollout.temperature, "owner": owner[part]}
                    new, entropy = completion_logprobs(self.model, *batch, **options)
                    reference = self._reference_logprobs(batch, options)
                with clock("update"):
                    sampled, now = old[part][mask[part]], new.detach()
                    importance = None
                    if cfg.rollout.engine != "transformers" and cfg.loss.importance_cap > 0:
                        importance = importance_weights(now, sampled, cfg.loss.importance_cap)
                    # with one step per batch the policy before it is the one of this forward pass
                    before = now if cfg.loss.kind == "gspo" or importance is not None else sampled
                    share = (weight[part], lengths[part], size, cfg.loss, reference, importance)
                    loss, found = policy_loss(new, before, *share)
                    loss.backward()
                    self.optimizer.collect()
                found |= {"loss": loss.detach(), "entropy": entropy.sum()}
                found["mismatch"] = (now - sampled).abs().sum()
                sums[:-1] += torch.stack([found[name] for name in FIGURES])
            return sums

        with training_mode(self.model, cfg.gradient_checkpointing):
            sums = self._with_less_memory(accumulate, starts + lengths)
        with clock("update"):
            distributed.add_up([sums])
            norm = self.optimizer.step(lr, cfg.grad_norm)
        loss, *rest, tokens = sums.tolist()
        figures = {name: value / tokens for name, value in zip(FIGURES[1:], rest, strict=True)}
        return {"loss": loss, **figures, "grad_norm": norm}

    def _with_less_memory(self, accumulate: Callable[[], Tensor], lengths: Tensor) -> Tensor:
        """What ``accumulate`` returns, with smaller micro-batches (in this process) when memory runs out."""
        kept: list[Tensor] = []

        def attempt() -> None:
            while not kept:
                try:
                    kept.append(accumulate())
                except torch.OutOfMemoryError:
                    self.optimizer.clear()
                    longest = int(lengths.max())
                    if self.micro_tokens <= longest:
                        raise SaerlError(
                            f"out of memory on a single sequence of {longest} tokens; lower "
                            "rollout.max_new_tokens or set train.gradient_checkpointing=true"
                        ) from None
                    self.micro_tokens = max(longest, min(self.micro_tokens, int(lengths.sum())) // 2)
                    log.warning("out of memory in a micro-batch: micro_tokens is now %d", self.micro_tokens)

        distributed.share(attempt)
        return kept[0]

    def _reference_logprobs(self, batch: Sequence[Tensor], options: dict[str, Any]) -> Tensor | None:
        if self.cfg.loss.beta == 0:
            return None
        frozen = self.reference
        with torch.no_grad(), nullcontext() if frozen is not None else self.model.disable_adapter():
            return completion_logprobs(frozen or self.model, *batch, with_entropy=False, **options)[0]
