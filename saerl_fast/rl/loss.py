"""Group-relative advantages and the policy-gradient losses.

Notation: prompt i has G completions with rewards R_ig; completion o has |o| tokens; N completions in
all; per token, r = exp(logp - logp_old) and A is its completion's advantage. The clipped term is

    L = -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)                            (PPO, arXiv 1707.06347)

with eps_high > eps_low ("clip-higher", DAPO); sg(x) is x without its gradient.

    dapo     sum_o sum_t L / sum_o |o|            each token weighs the same            (arXiv 2503.14476)
    grpo     1/N sum_o 1/|o| sum_t L              each completion weighs the same       (arXiv 2402.03300)
    dr_grpo  sum_o sum_t L / (N max_new_tokens)   a constant: no length bias; advantages without the
                                                  group's standard deviation            (arXiv 2503.20783)
    gspo     1/N sum_o L(s), one ratio for a completion: s = exp(1/|o| sum_t (logp - logp_old)), the
             geometric mean of its tokens' ratios                                       (arXiv 2507.18071)
    cispo    sum_o sum_t -sg(clip(r, 1 - eps_low, 1 + eps_high)) A logp / sum_o |o|
             the weight is bounded, but no token loses its gradient                     (arXiv 2506.13585)

Clip ranges, where the config leaves them open: 0.2 and 0.28 (DAPO); gspo 3e-4 and 4e-4 (its paper);
cispo no lower bound (its paper; 1 here, since r >= 0) and eps_high = 4, weights up to 5 (its paper
publishes none; 5 is the cap of ScaleRL, arXiv 2510.13786).

Sums run over the whole batch of an optimizer step, so micro-batches add up to exactly the same loss. At
the first step on a batch r = 1, and dapo, grpo, gspo and cispo differ only in how tokens are averaged.

A new loss is a function of ``Tokens`` and an entry of ``KINDS``; its name also stands in config.LOSSES. One
from outside is ``train.loss.kind=module:function``: such a function, or a ``Loss`` with other defaults.

    def reinforce(tokens: Tokens) -> Tensor:
        return -tokens.advantages * tokens.logprobs
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saerl_fast import plugins
from saerl_fast.config import LossConfig, TrainConfig
from saerl_fast.errors import SaerlError


@dataclass(frozen=True)
class BatchSize:
    """What the loss is normalised by: completions and completion tokens of the whole optimizer step."""

    completions: int
    tokens: int
    max_new_tokens: int


class Tokens(NamedTuple):
    """What a loss is given: the M tokens of n completions of a micro-batch, completion after completion."""

    logprobs: Tensor  # [M] float32, the policy's, with gradient
    old_logprobs: Tensor  # [M], of the policy that the rollouts came from
    ratio: Tensor  # [M], r above with gradient; one and the same s in a completion where Loss.sequence is set
    advantages: Tensor  # [M], of the token's completion
    lengths: Tensor  # int64 [n], tokens of each completion; their sum is M: there is no padding, so no mask
    low: float  # bounds of the ratio, 1 - eps_low
    high: float  # and 1 + eps_high
    cfg: LossConfig


def clipped(tokens: Tokens) -> Tensor:
    """L of each token."""
    ratio, advantages, low, high = tokens.ratio, tokens.advantages, tokens.low, tokens.high
    return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)


def weighted(tokens: Tokens) -> Tensor:
    """CISPO's term: the ratio is a weight without gradient."""
    return -tokens.ratio.detach().clamp(tokens.low, tokens.high) * tokens.advantages * tokens.logprobs


def token_mean(terms: Tensor, lengths: Tensor, size: BatchSize) -> Tensor:
    """Each token of the batch weighs the same."""
    return terms.sum() / size.tokens


def completion_mean(terms: Tensor, lengths: Tensor, size: BatchSize) -> Tensor:
    """Each completion of the batch weighs the same."""
    return (terms / lengths.repeat_interleave(lengths)).sum() / size.completions


def constant_mean(terms: Tensor, lengths: Tensor, size: BatchSize) -> Tensor:
    """The sum over a constant: as many tokens as the batch could have had."""
    return terms.sum() / (size.completions * size.max_new_tokens)


class Loss(NamedTuple):
    """A kind of loss. The share of a micro-batch is ``mean(terms)``, so that micro-batches add up."""

    terms: Callable[[Tokens], Tensor]  # [M], to be made small, each token's before averaging; no means inside
    mean: Callable[[Tensor, Tensor, BatchSize], Tensor] = token_mean  # of terms [M] and lengths [n]: a scalar
    clip: tuple[float, float] = (0.2, 0.28)  # eps_low, eps_high unless configured
    sequence: bool = False  # one ratio for a completion, the geometric mean of its tokens'
    scaled: bool = True  # advantages are divided by the group's standard deviation


KINDS = {
    "dapo": Loss(clipped),
    "grpo": Loss(clipped, completion_mean),
    "dr_grpo": Loss(clipped, constant_mean, scaled=False),
    "gspo": Loss(clipped, completion_mean, (3e-4, 4e-4), sequence=True),
    "cispo": Loss(weighted, clip=(1.0, 4.0)),
}


@functools.cache
def get_loss(kind: str) -> Loss:
    """The loss of that name, or of ``module:function``; SaerlError when there is none."""
    if kind in KINDS:
        return KINDS[kind]
    found = plugins.load_function(kind, "train.loss.kind", Loss, ("tokens",))
    return found if isinstance(found, Loss) else Loss(found)


def clip_range(cfg: LossConfig) -> tuple[float, float]:
    """The bounds of a ratio, (1 - eps_low, 1 + eps_high)."""
    default_low, default_high = get_loss(cfg.kind).clip
    low = default_low if cfg.clip_low is None else cfg.clip_low
    high = default_high if cfg.clip_high is None else cfg.clip_high
    return 1 - low, 1 + high


def advantages(rewards: Tensor, cfg: LossConfig, shaped: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Advantages float32 [P, G] of rewards [P, G], and which groups [P] bool carry a signal.

    A_ig = (R_ig - mean_g R) / (std_g R + 1e-4), the division only with ``cfg.scale_rewards`` and where the
    loss is ``scaled`` (std: over G - 1; arXiv 2402.03300). A group of equal rewards has no signal: all zeros.
    ``shaped`` [P, G]: the rewards with what was added for length, say; advantages are of these, but a group
    whose ``rewards`` are equal has no signal however its shaped ones differ. NaN in ``rewards`` is no reward:
    such a completion is left out of its group, with advantage 0.
    """
    known = ~rewards.isnan()
    values = rewards if shaped is None else shaped
    if rewards.masked_fill(~known, 0).abs().max() < 1e6:  # beyond, float32 would lose differences
        rewards, values = rewards.float(), values.float()
    used = rewards.masked_fill(~known, -torch.inf).amax(1) > rewards.masked_fill(~known, torch.inf).amin(1)
    scale = cfg.scale_rewards and get_loss(cfg.kind).scaled and rewards.shape[1] > 1
    if known.all():
        centred = values - values.mean(1, keepdim=True)
        if scale:
            centred = centred / (values.std(1, keepdim=True) + 1e-4)
        return (centred * used[:, None]).float(), used
    count = known.sum(1, keepdim=True)
    mean = values.masked_fill(~known, 0).sum(1, keepdim=True) / count.clamp(min=1)
    centred = (values - mean).masked_fill(~known, 0)
    if scale:
        std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std + 1e-4)
    return (centred * used[:, None]).float(), used


def overlong_penalty(lengths: Tensor, cfg: TrainConfig) -> Tensor:
    """Soft overlong punishment (arXiv 2503.14476) float64 [N] of completions of these lengths [N].

    0 up to ``max_new_tokens - overlong_window`` tokens, then falling linearly to -1 at the limit.
    """
    window, limit = cfg.loss.overlong_window, cfg.rollout.max_new_tokens
    return ((limit - window - lengths.double()) / max(window, 1)).clamp(-1.0, 0.0)


def importance_weights(logprobs: Tensor, sampled: Tensor, cap: float) -> Tensor:
    """min(p / q, cap) per token [M], without gradient: p the training engine's probability, q the sampler's.

    Truncated importance sampling (Ionides 2008), which makes rollouts of another engine on-policy but for
    the truncation: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy training".
    """
    return (logprobs.detach() - sampled).exp().clamp(max=cap)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantage: Tensor,
    lengths: Tensor,
    size: BatchSize,
    cfg: LossConfig,
    ref_logprobs: Tensor | None = None,
    importance: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of the batch's loss that these n completions contribute, and sums for the log.

    ``logprobs``, ``old_logprobs``, ``ref_logprobs``: [M], all tokens of completion 0, then 1, ...;
    ``advantage`` and ``lengths``: [n], M = sum of lengths. Adding the losses of all micro-batches of a
    step gives the batch's loss, and so do their gradients.
    With ``cfg.beta`` > 0, beta times the k3 estimate of KL(policy || reference) is added per token:
    exp(d) - d - 1, d = ref_logp - logp (http://joschu.net/blog/kl-approx.html). ``importance`` [M] are
    weights of the tokens' policy terms, for samples of another engine.
    The sums (not yet divided): ``clipped`` tokens and ``kl``.
    """
    kind, drift = get_loss(cfg.kind), logprobs - old_logprobs
    if kind.sequence:
        drift = torch.segment_reduce(drift, "mean", lengths=lengths).repeat_interleave(lengths)
    ratio, (low, high) = drift.exp(), clip_range(cfg)
    per_token = advantage.repeat_interleave(lengths)
    tokens = Tokens(logprobs, old_logprobs, ratio, per_token, lengths, low, high, cfg)
    loss = _checked(tokens, kind)
    if importance is not None:
        loss = loss * importance
    kl = torch.zeros((), device=loss.device)
    if ref_logprobs is not None and cfg.beta > 0:
        ahead = ref_logprobs - logprobs
        k3 = ahead.exp() - ahead - 1
        loss = loss + cfg.beta * k3
        kl = k3.detach().sum()
    total = kind.mean(loss, lengths, size)
    with torch.no_grad():
        outside = (((ratio < low) & (per_token < 0)) | ((ratio > high) & (per_token > 0))).sum()
    return total, {"clipped": outside, "kl": kl}


def _checked(tokens: Tokens, kind: Loss) -> Tensor:
    """The terms of a loss; SaerlError when they are not one number with a gradient for each token."""
    name = tokens.cfg.kind
    terms = plugins.call(f"loss {name}", lambda: kind.terms(tokens), let=torch.OutOfMemoryError)
    if not isinstance(terms, Tensor) or terms.shape != tokens.logprobs.shape:
        got = f"shape {list(terms.shape)}" if isinstance(terms, Tensor) else f"a {type(terms).__name__}"
        wanted = list(tokens.logprobs.shape)
        raise SaerlError(f"loss {name} returned {got}; return a tensor {wanted}, a number for each token")
    if tokens.ratio.requires_grad and not terms.requires_grad:
        raise SaerlError(f"loss {name} has no gradient; compute it from tokens.logprobs or tokens.ratio")
    return terms
