"""Group-relative advantages and the clipped policy-gradient losses.

Notation: prompt i has G completions with rewards R_ig; completion o has |o| tokens; per token,
r = exp(logp - logp_old) and A is its completion's advantage. The clipped term is

    L = -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)                            (PPO, arXiv 1707.06347)

with eps_high > eps_low ("clip-higher", DAPO). The losses differ only in how tokens are averaged:

    grpo     1/N sum_o 1/|o| sum_t L              each completion weighs the same       (arXiv 2402.03300)
    dapo     sum_o sum_t L / sum_o |o|            each token weighs the same            (arXiv 2503.14476)
    dr_grpo  sum_o sum_t L / (N max_new_tokens)   a constant: no length bias; advantages without the
                                                  group's standard deviation            (arXiv 2503.20783)

Sums run over the whole batch of an optimizer step, so micro-batches add up to exactly the same loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saerl_fast.config import LossConfig
from saerl_fast.errors import SaerlError

KINDS = ("dapo", "grpo", "dr_grpo")


@dataclass(frozen=True)
class BatchSize:
    """What the loss is normalised by: completions and completion tokens of the whole optimizer step."""

    completions: int
    tokens: int
    max_new_tokens: int


def check_loss(cfg: LossConfig) -> None:
    """SaerlError on an unknown kind or a bound out of range."""
    if cfg.kind not in KINDS:
        raise SaerlError(f"train.loss.kind={cfg.kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if cfg.clip_low < 0 or cfg.clip_high < 0 or cfg.beta < 0:
        raise SaerlError(
            f"train.loss.clip_low={cfg.clip_low}, clip_high={cfg.clip_high}, beta={cfg.beta}: "
            "none may be negative"
        )


def advantages(rewards: Tensor, cfg: LossConfig) -> tuple[Tensor, Tensor]:
    """Advantages float32 [P, G] of rewards [P, G], and which groups [P] bool carry a signal.

    A_ig = (R_ig - mean_g R) / (std_g R + 1e-4), the division only with ``cfg.scale_rewards`` and not for
    dr_grpo (std: over G - 1; arXiv 2402.03300). A group of equal rewards has no signal: all zeros.
    """
    rewards = rewards.float()
    centred = rewards - rewards.mean(1, keepdim=True)
    used = rewards.amax(1) > rewards.amin(1)
    if cfg.scale_rewards and cfg.kind != "dr_grpo" and rewards.shape[1] > 1:
        centred = centred / (rewards.std(1, keepdim=True) + 1e-4)
    return centred * used[:, None], used


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantage: Tensor,
    lengths: Tensor,
    size: BatchSize,
    cfg: LossConfig,
    ref_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of the batch's loss that these n completions contribute, and sums for the log.

    ``logprobs``, ``old_logprobs``, ``ref_logprobs``: [M], all tokens of completion 0, then 1, ...;
    ``advantage`` and ``lengths``: [n], M = sum of lengths. Adding the losses of all micro-batches of a
    step gives the batch's loss, and so do their gradients.
    With ``cfg.beta`` > 0, beta times the k3 estimate of KL(policy || reference) is added per token:
    exp(d) - d - 1, d = ref_logp - logp (http://joschu.net/blog/kl-approx.html).
    The sums (not yet divided): ``clipped`` tokens, ``kl``, ``mismatch`` = sum |logp - logp_old|.
    """
    ratio = (logprobs - old_logprobs).exp()
    per_token = advantage.repeat_interleave(lengths)
    bounded = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    loss = -torch.minimum(ratio * per_token, bounded * per_token)
    kl = torch.zeros((), device=loss.device)
    if ref_logprobs is not None and cfg.beta > 0:
        ahead = ref_logprobs - logprobs
        k3 = ahead.exp() - ahead - 1
        loss = loss + cfg.beta * k3
        kl = k3.detach().sum()
    if cfg.kind == "grpo":
        total = (loss / lengths.repeat_interleave(lengths)).sum() / size.completions
    elif cfg.kind == "dr_grpo":
        total = loss.sum() / (size.completions * size.max_new_tokens)
    else:
        total = loss.sum() / size.tokens
    with torch.no_grad():
        low, high = ratio < 1 - cfg.clip_low, ratio > 1 + cfg.clip_high
        clipped = ((low & (per_token < 0)) | (high & (per_token > 0))).sum()
        mismatch = (logprobs - old_logprobs).abs().sum()
    return total, {"clipped": clipped, "kl": kl, "mismatch": mismatch}
