"""Held-out accuracy with a record per item, and pass rates of prompts for the difficulty signal."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from saerl_fast.config import TrainConfig
from saerl_fast.errors import SaerlError
from saerl_fast.prompts.render import Prompts
from saerl_fast.rl import distributed
from saerl_fast.rl.decode import Sampling
from saerl_fast.rl.generate import generate
from saerl_fast.rl.logprobs import completion_logprobs, micro_batches
from saerl_fast.rl.rewards import Notes, State, check_answers, is_built_in, score_rewards
from saerl_fast.rl.rollouts import Rollouts
from saerl_fast.rl.warmup import answer_rows

log = logging.getLogger(__name__)

Reward = Callable[..., Any]


@dataclass
class EvalResult:
    """``mean`` over the items that were judged, and per item: prompt_id, score (None when the reward does not
    judge it), completion (its first sample, or None)."""

    mean: float
    items: list[dict[str, Any]]
    mode: str
    tokens: int  # generated


def evaluate(
    model: Any,
    tokenizer: Any,
    pool: Prompts,
    reward: Reward,
    train: TrainConfig,
    seed: int = 0,
    state: State | None = None,
) -> EvalResult:
    """Score every row of ``pool``.

    sample: mean reward of ``train.eval.samples`` completions (avg@k), the same seed every time, so that two
    evaluations differ by the weights and not by luck; greedy: reward of the likeliest completion; prob:
    probability that the model samples exactly the reference answer and then ends, exp of the sum of
    teacher-forced log-probabilities at ``train.eval.temperature``, which has no sampling noise at all.
    ``train.micro_tokens`` bounds a forward pass in prob mode, ``train.rollout`` one in the others. Several
    processes take a share of the items each and all get the whole result. SaerlError on an empty pool, and
    in prob mode when no row has an answer.
    """
    cfg, rollout = train.eval, train.rollout
    if len(pool) == 0:
        raise SaerlError("the evaluation pool is empty; check data.eval and data.eval_size")
    if cfg.mode == "prob":
        check_answers(pool.column("answer"), "train.eval.mode=prob")
    here = distributed.shard(len(pool))
    mine = pool.select(range(len(pool))[here])
    greedy = cfg.mode == "greedy"
    settings = Sampling.of(
        rollout,
        group_size=1 if greedy else cfg.samples,
        temperature=0.0 if greedy else cfg.temperature,
        batch_size=rollout.batch_size or max(1, rollout.prompts_per_step * rollout.group_size),
    )

    def part() -> tuple[list[dict[str, Any]], int]:
        completions: list[str | None] = [None] * len(mine)
        scores, tokens = np.zeros(0), 0
        if cfg.mode == "prob" and len(mine):
            scores = answer_probabilities(model, tokenizer, mine, cfg.temperature, train.micro_tokens)
        elif len(mine):  # there may be more processes than items
            made = generate(model, tokenizer, mine.ids, settings, seed=seed, first=here.start)
            how: dict[str, Any] = {"prefill": mine.prefill, "pay_truncated": train.reward_truncated}
            rewards = score_rollouts(made, mine.columns, mine.texts, reward, state=state, **how)
            scores = known_mean(rewards)
            completions, tokens = [*made.texts[:: made.group_size]], int(made.lengths.sum())
        each = zip(mine.column("prompt_id"), scores, completions, strict=True)
        judged = [(i, None if np.isnan(s) else float(s), c) for i, s, c in each]
        return [{"prompt_id": i, "score": s, "completion": c} for i, s, c in judged], tokens

    parts = distributed.gather(part)
    items = [item for found, _ in parts for item in found]
    known = [item["score"] for item in items if item["score"] is not None]
    if not known:
        raise SaerlError(
            f"the reward gave None for all {len(items)} held-out prompts; it must judge some of them"
        )
    mean = float(np.mean(known))
    return EvalResult(mean, items, cfg.mode, sum(tokens for _, tokens in parts))


def score_rollouts(
    rollouts: Rollouts,
    columns: Mapping[str, Sequence[Any]],
    prompts: Sequence[str],
    reward: Reward,
    *,
    prefill: str = "",
    pay_truncated: bool = False,
    state: State | None = None,
    notes: Notes | None = None,
) -> np.ndarray:
    """Rewards float64 [P, G] of the rollouts of P prompts, NaN where the reward said None.

    ``columns`` are the pool's for these P rows, ``prompts`` their final texts. Where the pool's prompt is a
    list of chat messages, the reward is given those and its completions as messages. ``prefill``, the end of
    every final text, is given to it as the beginning of the completion. The built-in rewards
    pay nothing for completions that were cut off, unless ``pay_truncated``.
    """
    group = rollouts.group_size
    repeated = {name: [v for v in column for _ in range(group)] for name, column in columns.items()}
    given: list[Any] = []
    completions: list[Any] = [prefill + text for text in rollouts.texts]
    for p, (text, raw) in enumerate(zip(prompts, columns.get("prompt", prompts), strict=True)):
        chat = list(raw) if isinstance(raw, list) else None
        begun = chat.pop()["content"] if chat and chat[-1]["role"] == "assistant" else ""  # prefilled
        given += [text.removesuffix(prefill) if chat is None else chat] * group
        if chat is not None:
            for i in range(p * group, (p + 1) * group):
                completions[i] = [{"role": "assistant", "content": begun + completions[i]}]
    if not pay_truncated and not rollouts.finished.any() and is_built_in(reward):
        _say_cut_off()
    kept = zip(rollouts.completion_ids.tolist(), rollouts.lengths.tolist(), strict=True)
    return score_rewards(
        reward,
        given,
        completions,
        repeated,
        ids=[row[:length] for row, length in kept],
        finished=None if pay_truncated else rollouts.finished.tolist(),
        state=state,
        notes=notes,
    ).reshape(-1, group)


@cache
def _say_cut_off() -> None:
    log.warning(
        "no completion ended before train.rollout.max_new_tokens, and the built-in rewards pay nothing for "
        "text that is cut off; raise it, or set train.reward_truncated=true"
    )


def known_mean(rewards: np.ndarray) -> np.ndarray:
    """Means [P] of rewards [P, G] over those that are not NaN; NaN where none is."""
    known = ~np.isnan(rewards)
    if known.all():
        return rewards.mean(1)
    count = known.sum(1)
    return np.where(count > 0, np.where(known, rewards, 0.0).sum(1) / np.maximum(count, 1), np.nan)


def pass_rates(rewards: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """Share of passes [P] of rewards [P, G]: their mean after clipping each to [0, 1].

    For 0/1 rewards this is the pass rate; graded rewards in [0, 1] count by their grade. With ``threshold``
    the share of rewards at or above it, for rewards of any range. NaN is left out.
    """
    if threshold is None:
        return known_mean(np.clip(rewards, 0.0, 1.0))
    return known_mean(np.where(np.isnan(rewards), np.nan, rewards >= threshold))


def warn_of_range(rewards: np.ndarray, threshold: float | None) -> bool:
    """Say that pass rates cannot be seen in these rewards as they are; whether that had to be said."""
    low, high = (float(f(rewards)) if np.isfinite(rewards).any() else 0.0 for f in (np.nanmin, np.nanmax))
    if threshold is not None or (low >= 0 and high <= 1):
        return False
    log.warning(
        "rewards from %.3g to %.3g: pass rates, which the adaptive plan and the difficulty labels go by, "
        "count them clipped to [0, 1]; set train.pass_threshold to the reward from which a completion passes",
        low,
        high,
    )
    return True


@torch.no_grad()
def answer_probabilities(
    model: Any,
    tokenizer: Any,
    pool: Prompts,
    temperature: float = 1.0,
    max_tokens: int = 16384,
) -> np.ndarray:
    """Probability float64 [n] that a completion is exactly the answer followed by the end token."""
    ids, starts, lengths = answer_rows(model, tokenizer, pool.ids, pool.answer_ids)
    found = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    was_training = model.training
    model.eval()
    for part in micro_batches(starts + lengths, max_tokens):
        logprobs, _ = completion_logprobs(
            model, ids[part], starts[part], lengths[part], temperature=temperature, with_entropy=False
        )
        owner = part.repeat_interleave(lengths[part])
        found.index_add_(0, owner, logprobs.double())
    model.train(was_training)
    return found.exp().cpu().numpy()


def current_rates(model: Any, tokenizer: Any, pool: Prompts, train: TrainConfig) -> np.ndarray:
    """`answer_probabilities` at the temperature of rollouts, for an oracle; the same in all processes."""
    check_answers(pool.column("answer"), "plan.schedule=oracle")
    how = train.rollout.temperature, train.micro_tokens
    found = distributed.gather(lambda: answer_probabilities(model, tokenizer, pool, *how))
    return np.clip(found[0], 0.0, 1.0)
