"""Supervised steps on ``prompt -> answer`` before GRPO: a model that never answers in the right form
earns no reward, and then has nothing to learn from.

Prompt and answer are tokenised apart, as in rollouts, where a completion's tokens follow the prompt's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saerl_fast.config import WarmupConfig
from saerl_fast.errors import SaerlError
from saerl_fast.models import max_positions, token_ids
from saerl_fast.rl import distributed
from saerl_fast.rl.logprobs import completion_logprobs, micro_batches
from saerl_fast.rl.optimizer import Optimizer, training_mode
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
    cfg: WarmupConfig,
    *,
    seed: int = 0,
    max_tokens: int = 16384,
    gradient_checkpointing: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> dict[str, float]:
    """``cfg.steps`` AdamW steps on the mean negative log-likelihood of answer and end token.

    Sees ``cfg.rows`` seeded rows (all if None) in seeded passes. The rate rises over the first tenth of
    the steps. ``on_step`` gets (step, loss). Returns the first and the last loss, steps and seconds.
    """
    if not prompts:
        raise SaerlError("the warm-up has no rows; check data.train and train.warmup.rows")
    if cfg.batch_size < 1:
        raise SaerlError(f"train.warmup.batch_size={cfg.batch_size} must be at least 1")
    check_answers(answers, "the warm-up")
    started = time.perf_counter()
    rng = np.random.default_rng([seed, 4])
    rows = rng.permutation(len(prompts))[: cfg.rows]
    if len(rows) == 0:
        raise SaerlError(f"train.warmup.rows={cfg.rows} leaves the warm-up nothing to learn from; raise it")
    optimizer = Optimizer(model, lr=cfg.lr)
    queue: list[int] = []
    losses = []
    with training_mode(model, gradient_checkpointing):
        for step in range(1, cfg.steps + 1):
            while len(queue) < cfg.batch_size:
                queue += rng.permutation(rows).tolist()
            chosen, queue = queue[: cfg.batch_size], queue[cfg.batch_size :]
            ids, starts, lengths = answer_rows(
                model, tokenizer, [prompts[i] for i in chosen], [answers[i] for i in chosen]
            )
            total = int(lengths.sum())
            loss = torch.zeros((), dtype=torch.float64, device=ids.device)
            mine = torch.arange(len(ids), device=ids.device)[distributed.block(len(ids))]
            for local in micro_batches((starts + lengths)[mine], max_tokens):
                part = mine[local]
                logprobs, _ = completion_logprobs(
                    model, ids[part], starts[part], lengths[part], with_entropy=False
                )
                share = -logprobs.sum() / total
                share.backward()
                optimizer.collect()
                loss += share.detach()
            distributed.add_up([loss])
            optimizer.step(cfg.lr * min(1.0, step / max(1, cfg.steps // 10)), max_norm=1.0)
            losses.append(float(loss))
            if on_step is not None:
                on_step(step, losses[-1])
    return {
        "loss_first": losses[0] if losses else float("nan"),
        "loss": losses[-1] if losses else float("nan"),
        "steps": float(cfg.steps),
        "seconds": time.perf_counter() - started,
    }
