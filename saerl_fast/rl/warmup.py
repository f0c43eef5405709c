"""Supervised steps on ``prompt -> answer`` before GRPO: a model that never answers in the right form
earns no reward, and then has nothing to learn from.

Prompt and answer are tokenised apart, as in rollouts, where a completion's tokens follow the prompt's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saerl_fast.config import TrainConfig
from saerl_fast.errors import SaerlError
from saerl_fast.models import max_positions, token_ids
from saerl_fast.rl import distributed
from saerl_fast.rl.logprobs import completion_logprobs
from saerl_fast.rl.optimizer import Optimizer
from saerl_fast.rl.rewards import check_answers
from saerl_fast.rl.rollouts import stop_tokens


def answer_rows(
    model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids int64 [n, L] of prompt + answer + end token, padded on the right; lengths of both parts [n]."""
    stops = stop_tokens(model, tokenizer)
    own = tokenizer.eos_token_id
    end = [own] if own is not None else stops[:1]
    heads = token_ids(tokenizer, list(prompts))
    tails = [row + end for row in token_ids(tokenizer, list(answers), special=False)]
    width = max(len(a) + len(b) for a, b in zip(heads, tails, strict=True))
    ids = [a + b + [0] * (width - len(a) - len(b)) for a, b in zip(heads, tails, strict=True)]
    starts, lengths = ([len(row) for row in part] for part in (heads, tails))
    if min(starts) == 0 or min(lengths) == 0:
        raise SaerlError(
            "a prompt or an answer has no tokens; remove the row or give the tokenizer an end token"
        )
    limit = max_positions(model)
    if limit is not None and width > limit:
        raise SaerlError(
            f"a prompt with its answer has {width} tokens but the model reads {limit}; remove the row"
        )
    made = (torch.tensor(values, device=model.device) for values in (ids, starts, lengths))
    return tuple(made)  # type: ignore[return-value]


def warm_up(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    cfg: TrainConfig,
    seed: int = 0,
) -> dict[str, float]:
    """``cfg.warmup.steps`` (at least 1) steps on the mean negative log-likelihood of answer and end token.

    Sees ``cfg.warmup.rows`` seeded rows (all if None) in seeded passes. The rate rises over the first tenth
    of the steps. Returns the first and the last loss, and steps.
    """
    settings = cfg.warmup
    if not prompts:
        raise SaerlError("the warm-up has no rows; check data.train")
    check_answers(answers, "the warm-up")
    rng = np.random.default_rng([seed, 4])
    rows = rng.permutation(len(prompts))[: settings.rows]
    passes = -(-settings.steps * settings.batch_size // len(rows))
    order = np.concatenate([rng.permutation(rows) for _ in range(passes)])
    optimizer = Optimizer(model, cfg)

    def learn(step: int) -> float:
        chosen = order[(step - 1) * settings.batch_size : step * settings.batch_size]
        batch = answer_rows(model, tokenizer, [prompts[i] for i in chosen], [answers[i] for i in chosen])
        total = batch[2].sum()
        ids, starts, lengths = (part[distributed.shard(len(chosen))] for part in batch)

        def backward(part: Tensor) -> Tensor:
            logprobs, _ = completion_logprobs(
                model, ids[part], starts[part], lengths[part], with_entropy=False
            )
            loss = -logprobs.sum() / total
            loss.backward()
            return loss.detach()[None]

        loss = optimizer.accumulate(starts + lengths, backward, 1)
        optimizer.step(settings.lr * min(1.0, step / max(1, settings.steps // 10)), max_norm=1.0)
        return float(loss)

    losses = [learn(step) for step in range(1, settings.steps + 1)]
    return {"loss_first": losses[0], "loss": losses[-1], "steps": float(settings.steps)}
