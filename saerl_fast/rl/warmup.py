"""Supervised steps on ``prompt -> answer`` before GRPO: a model that never answers in the right form
earns no reward, and then has nothing to learn from.

Prompt and answer are tokenised apart, as in rollouts, where a completion's tokens follow the prompt's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saerl_fast.config import TrainConfig
from saerl_fast.errors import SaerlError
from saerl_fast.models.layout import check_fit
from saerl_fast.prompts.render import Prompts
from saerl_fast.rl import distributed
from saerl_fast.rl.logprobs import completion_logprobs
from saerl_fast.rl.optimizer import Optimizer
from saerl_fast.rl.rewards import check_answers
from saerl_fast.rl.rollouts import stop_tokens

log = logging.getLogger(__name__)


def answer_rows(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids int64 [n, L] of prompt + answer + end token, padded on the right; lengths of both parts [n].

    ``prompts``, ``answers``: token ids. SaerlError for a row that is empty or that the model cannot read.
    """
    stops = stop_tokens(model, tokenizer)
    own = tokenizer.eos_token_id
    end = [own] if own is not None else stops[:1]
    tails = [[*row, *end] for row in answers]
    starts, lengths = ([len(row) for row in part] for part in (prompts, tails))
    if min(starts) == 0 or min(lengths) == 0:
        raise SaerlError(
            "a prompt or an answer has no tokens; remove the row or give the tokenizer an end token"
        )
    rows = [[*head, *tail] for head, tail in zip(prompts, tails, strict=True)]
    check_fit(model, rows, what="the prompt with its answer in row")
    width = max(len(row) for row in rows)
    ids = [row + [0] * (width - len(row)) for row in rows]
    made = (torch.tensor(values, device=model.device) for values in (ids, starts, lengths))
    return tuple(made)  # type: ignore[return-value]


def warm_up(
    model: Any,
    tokenizer: Any,
    pool: Prompts,
    cfg: TrainConfig,
    seed: int = 0,
    *,
    after_step: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """``cfg.warmup.steps`` (at least 1) steps on the mean negative log-likelihood of answer and end token.

    Sees ``cfg.warmup.rows`` seeded rows (all if None) in seeded passes. The rate rises over the first tenth
    of the steps. Returns the first and the last loss, and steps.
    """
    settings = cfg.warmup
    if not len(pool):
        raise SaerlError("the warm-up has no rows; check data.train")
    check_answers(pool.column("answer"), "the warm-up")
    rng = np.random.default_rng([seed, 4])
    rows = rng.permutation(len(pool))[: settings.rows]
    passes = -(-settings.steps * settings.batch_size // len(rows))
    order = np.concatenate([rng.permutation(rows) for _ in range(passes)])
    optimizer = Optimizer(model, cfg)

    skipped: list[int] = []

    def learn(step: int) -> float:
        chosen = order[(step - 1) * settings.batch_size : step * settings.batch_size]
        prompts, answers = ([part[i] for i in chosen] for part in (pool.ids, pool.answer_ids))
        batch = answer_rows(model, tokenizer, prompts, answers)
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
        lr = settings.lr * min(1.0, step / max(1, settings.steps // 10))
        if not math.isfinite(optimizer.step(lr, max_norm=1.0)):
            skipped.append(step)
        after_step()
        return float(loss)

    losses = [learn(step) for step in range(1, settings.steps + 1)]
    if skipped:
        log.warning(
            "%d of the %d updates of the warm-up were skipped, from step %d on, since their gradients are "
            "not finite; lower train.warmup.lr",
            *(len(skipped), settings.steps, skipped[0]),
        )
    return {"loss_first": losses[0], "loss": losses[-1], "steps": float(settings.steps)}
