"""Held-out accuracy with a record per item, and pass rates of prompts for the difficulty signal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from saerl_fast.rl.rewards import check_answers, score_rewards
from saerl_fast.rl.rollouts import Rollouts
from saerl_fast.rl.warmup import answer_rows

Reward = Callable[..., Any]


@dataclass
class EvalResult:
    """``mean`` over items, and per item: prompt_id, score, completion (its first sample, or None)."""

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
            scores = score_rollouts(made, mine.columns, mine.texts, reward).mean(1)
            completions, tokens = [*made.texts[:: made.group_size]], int(made.lengths.sum())
        each = zip(mine.column("prompt_id"), scores, completions, strict=True)
        return [{"prompt_id": i, "score": float(s), "completion": c} for i, s, c in each], tokens

    parts = distributed.gather(part)
    items = [item for found, _ in parts for item in found]
    mean = float(np.mean([item["score"] for item in items]))
    return EvalResult(mean, items, cfg.mode, sum(tokens for _, tokens in parts))


def score_rollouts(
    rollouts: Rollouts, columns: Mapping[str, Sequence[Any]], prompts: Sequence[str], reward: Reward
) -> np.ndarray:
    """Rewards float64 [P, G] of the rollouts of P prompts; ``columns`` are the pool's for these P rows."""
    group = rollouts.group_size
    repeated = {name: [v for v in column for _ in range(group)] for name, column in columns.items()}
    texts = [text for text in prompts for _ in range(group)]
    return score_rewards(reward, texts, rollouts.texts, repeated).reshape(-1, group)


def pass_rates(rewards: np.ndarray) -> np.ndarray:
    """Share of passes [P] of rewards [P, G]: their mean after clipping each to [0, 1].

    For 0/1 rewards this is the pass rate; graded rewards in [0, 1] count by their grade.
    """
    return np.clip(rewards, 0.0, 1.0).mean(1)


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
