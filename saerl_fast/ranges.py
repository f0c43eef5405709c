"""Which values of a config a stage can work with, by dotted key; applied by ``config.check_ranges``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_AT_LEAST_0 = """
    seed sae.aux_k sae.dead_after sae.sink_ratio sae.seed difficulty.n_labels diversity.svd
    diversity.polish diversity.seed diversity.null_rounds plan.seed plan.adaptive.noise
    plan.adaptive.cooldown train.seed train.steps train.lr train.grad_norm train.warmup_steps
    train.weight_decay train.dynamic_sampling train.reward_timeout train.save_every train.rollout_log
    train.loss.clip_low train.loss.clip_high train.loss.beta train.loss.importance_cap
    train.loss.overlong_window train.lora.rank train.warmup.steps train.warmup.lr train.eval.every
"""
_AT_LEAST_1 = """
    threads data.eval_size data.limit data.eval_limit data.size data.max_prompt_tokens sae.d_sae sae.k
    sae.steps sae.batch_size sae.max_tokens score.batch_tokens score.shard difficulty.rollouts
    diversity.n_clusters diversity.n_init plan.window plan.adaptive.svd train.micro_tokens train.keep
    train.warmup.batch_size train.warmup.rows train.rollout.prompts_per_step train.rollout.max_new_tokens
    train.rollout.batch_size train.eval.samples compare.smooth
"""
_ABOVE_0 = """
    plan.adaptive.forgetting plan.adaptive.ridge plan.medium_keep
    sae.lr quality.c train.lora.alpha train.rollout.temperature train.rollout.top_p
    train.rollout.gpu_memory train.eval.temperature
"""
_SHARES = """
    plan.mix plan.medium_keep plan.adaptive.forgetting plan.adaptive.target_start plan.adaptive.target_end
    train.rollout.top_p train.rollout.gpu_memory
"""
RULES: list[tuple[str, str, Callable[[Any], bool]]] = [  # keys, what they must be, the test of it
    (_AT_LEAST_0, "at least 0", lambda value: value >= 0),
    (_AT_LEAST_1, "at least 1", lambda value: value >= 1),
    ("quality.folds difficulty.folds train.rollout.group_size", "at least 2", lambda value: value >= 2),
    (_ABOVE_0, "above 0", lambda value: value > 0),
    (_SHARES, "between 0 and 1", lambda value: 0 <= value <= 1),
    ("train.betas", "two numbers from 0 to below 1", lambda value: all(0 <= beta < 1 for beta in value)),
    ("train.lora.targets", "one or more names", lambda value: bool(value) and all(value)),
]
