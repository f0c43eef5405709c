"""Pass rates for the difficulty probe: a column of the pool, or rollouts of a seeded subset."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from saerl_fast.config import Config
from saerl_fast.fileio import read_json
from saerl_fast.records import manifest
from saerl_fast.records.spilled import full, permutation
from saerl_fast.session import Session
from saerl_fast.signals.bank import Bank
from saerl_fast.signals.choose import spread_rows
from saerl_fast.signals.labelled import label_columns
from saerl_fast.stages.console import Echo, within_calls
from saerl_fast.stages.fingerprint import LABEL_SECTIONS, after_warmup, made_from, training_seed

LABEL_CHUNK = 16  # prompts rolled out for labels before they are saved


def difficulty_labels(
    config: Config, echo: Echo, session: Session, bank: Bank | None = None
) -> tuple[np.ndarray | None, dict[str, float]]:
    """Pass rates [n_prompts] (NaN where unlabelled) for the difficulty regressor, and what they cost.

    Labels are the column the config names, else the mean reward of a few rollouts of a subset: a seeded one,
    or with ``difficulty.choose=spread`` one that tells most of ``bank``. They are of the model after the
    warm-up, where there is one, which a copy of the model then goes through.
    Rollouts are made in chunks, each with its own seed and saved at once, so an interrupted labelling
    goes on where it stopped and ends with the same labels.
    """
    pool, settings = session.train, config.difficulty
    if settings.label_column is not None:
        _, rates = label_columns(pool, config)
        return rates, {"labelled": float(np.isfinite(rates).sum()), "rollouts": 0.0}
    if settings.n_labels < 1:
        return None, {"labelled": 0.0, "rollouts": 0.0}
    from saerl_fast.rl.decode import Sampling
    from saerl_fast.rl.evaluate import pass_rates, score_rollouts, warn_of_range
    from saerl_fast.rl.generate import generate
    from saerl_fast.rl.rewards import get_reward, with_timeout

    if bank is None:
        chosen = permutation(np.random.default_rng([config.seed, 1]), len(pool))[: settings.n_labels]
    else:
        chosen = spread_rows(bank, settings.n_labels, settings.features, config.seed)
    file = Path(config.run_dir) / "labels.json"
    form = {"rates": {str: (None, float)}, "tokens": int, "seconds": float}
    about, kept = made_from(config, LABEL_SECTIONS), manifest.look(config.run_dir, "labels")
    record: dict[str, Any] = {"rates": {}, "tokens": 0, "seconds": 0.0}
    if file.is_file() and (kept.fault or kept.entry is None):
        echo(f"{file} is made again: {kept.fault or f'{manifest.FILE} does not record it'}")
    elif kept.entry and kept.entry.get("fingerprint") == about["fingerprint"] and not kept.fault:
        record = read_json(file, "saerl score", form)
    train = config.train
    reward = with_timeout(get_reward(train.reward, train.reward_weights), train.reward_timeout)
    warned = False
    ids = pool.column("prompt_id")
    rollout = Sampling.of(config.train.rollout, group_size=settings.rollouts)
    model = session.model
    if after_warmup(config) and not all(ids[i] in record["rates"] for i in chosen):
        model = _warmed(config, echo, session)
    bar, width = echo.bar("difficulty labels", "prompt"), LABEL_CHUNK
    bar(0, len(chosen))
    for start in range(0, len(chosen), width):
        part = [int(i) for i in chosen[start : start + width]]
        if not all(ids[i] in record["rates"] for i in part):
            began = time.perf_counter()
            rows = pool.select(part)
            seed = int(np.random.SeedSequence([config.seed, 2, start]).generate_state(1)[0])
            count = len(part) * settings.rollouts
            passes = rollout.max_new_tokens * -(-count // (rollout.batch_size or count))
            with within_calls(model, passes, partial(_tell, bar, start, len(part), len(chosen))):
                made = generate(model, session.tokenizer, rows.ids, rollout, seed=seed)
            how: dict[str, Any] = {"prefill": rows.prefill, "pay_truncated": train.reward_truncated}
            paid = score_rollouts(made, rows.columns, rows.texts, reward, **how)
            warned = warned or warn_of_range(paid, train.pass_threshold)
            found = zip(part, pass_rates(paid, train.pass_threshold), strict=True)
            record["rates"].update({ids[i]: None if np.isnan(rate) else float(rate) for i, rate in found})
            record["tokens"] += int(made.lengths.sum())
            record["seconds"] += time.perf_counter() - began
            with manifest.publish(config.run_dir, "labels", about) as new:
                new(file.name).write_text(json.dumps(record, indent=1) + "\n")
        bar(min(start + width, len(chosen)), len(chosen))
    rates = full(len(pool), np.nan)
    rates[chosen] = np.array([record["rates"][ids[i]] for i in chosen], dtype=float)  # None: not judged
    costs = {"labelled": len(chosen), "rollouts": len(chosen) * settings.rollouts, "tokens": record["tokens"]}
    return rates, {key: float(value) for key, value in costs.items()} | {"seconds": record["seconds"]}


def _warmed(config: Config, echo: Echo, session: Session) -> Any:
    """A copy of the model after the warm-up that training begins with."""
    from saerl_fast.rl import seeds
    from saerl_fast.rl.lora import add_adapters
    from saerl_fast.rl.seeds import derived_seed
    from saerl_fast.rl.warmup import warm_up

    echo(f"difficulty labels: {config.train.warmup.steps} steps of warm-up, on a copy of the model")
    seed, model = training_seed(config), copy.deepcopy(session.model)
    if config.train.lora.rank:
        model = add_adapters(model, config.train.lora, derived_seed(seed, seeds.ADAPTER, 0))
    warm_up(model, session.tokenizer, session.train, config.train, seed)
    return model.eval()


def _tell(bar: Callable[[float, int], None], start: int, width: int, total: int, share: float) -> None:
    bar(start + share * width, total)
