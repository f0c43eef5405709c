"""A plan for verl: a Parquet file in verl's schema, rows in plan order, and a reward function.

    write_parquet(plan, pool, "train.parquet", reward="numeric")

    data.train_files=train.parquet data.shuffle=False data.filter_overlong_prompts=False
    data.train_batch_size=<plan.batch_size> trainer.total_epochs=1
    custom_reward_function.path=pkg://saerl_fast.integrations.verl custom_reward_function.name=compute_score

verl reads a file, so a plan that answers to pass rates (adaptive) cannot be used with it. Drop prompts
that are too long beforehand (`fit_context`): rows that verl drops would shift every later batch.
Schema, dataset class and reward call checked with verl 0.9.1; no training run was made with it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from saerl_fast.data.plan import Plan, StaticPlan
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import atomic_path
from saerl_fast.prompts import Pool
from saerl_fast.rl.rewards import Reward, get_reward, score_rewards


def write_parquet(plan: Plan, pool: Pool, path: str | Path, *, reward: str = "exact") -> Path:
    """Write ``plan.total_steps * plan.batch_size`` rows, each batch after the other; the path.

    ``plan`` is walked through from where it stands: pass a fresh one. Columns: data_source
    ("saerl/<reward>"), prompt (chat messages), ability (the column task, else "saerl"), reward_model
    (style "rule", ground_truth) and extra_info (index, prompt_id, step, and the pool's other columns as
    JSON, for `compute_score`). Raises SaerlError for an adaptive plan and for prompts that ``pool`` lacks.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if not isinstance(plan, StaticPlan):
        raise SaerlError(
            f"schedule {plan.schedule!r} chooses by pass rates, which a file cannot; "
            "use vanilla, literal, global or medium with verl"
        )
    get_reward(reward)
    row = {name: i for i, name in enumerate(pool.column("prompt_id"))}
    missing = [name for name in plan.prompt_ids if name not in row]
    if missing:
        raise SaerlError(f"{len(missing)} of the plan's prompts are not in the pool, first {missing[0]!r}")
    others = [name for name in pool.columns if name not in ("prompt_id", "prompt", "answer")]
    rows: list[dict[str, Any]] = []
    for step in range(plan.total_steps):
        for name in plan.next_batch():
            cells = {key: column[row[name]] for key, column in pool.columns.items()}
            prompt = cells["prompt"]
            rows.append(
                {
                    "data_source": f"saerl/{reward}",
                    "prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
                    "ability": str(cells.get("task") or "saerl"),
                    "reward_model": {"style": "rule", "ground_truth": cells["answer"]},
                    "extra_info": {
                        "index": len(rows),
                        "prompt_id": name,
                        "step": step,
                        "columns": json.dumps({key: cells[key] for key in others}, default=str),
                    },
                }
            )
    with atomic_path(path) as temporary:
        parquet.write_table(pa.Table.from_pylist(rows), temporary)
    return Path(path)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any], **_: Any
) -> float:
    """verl's custom reward function: the reward that `write_parquet` was given, on one completion."""
    prefix, _slash, name = data_source.partition("/")
    if prefix != "saerl" or not name:
        raise SaerlError(f"data_source {data_source!r} was not written by write_parquet")
    columns = {key: [value] for key, value in json.loads(extra_info["columns"]).items()}
    columns |= {"answer": [ground_truth], "prompt_id": [extra_info["prompt_id"]]}
    return float(score_rewards(_reward(name), [""], [solution_str], columns)[0])


@cache
def _reward(name: str) -> Reward:
    return get_reward(name)
