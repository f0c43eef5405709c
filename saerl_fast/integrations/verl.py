"""A plan for verl: a Parquet file in verl's schema, rows in plan order, and a reward function.

    write_parquet(plan, pool, "train.parquet", reward="numeric")

    data.train_files=train.parquet data.shuffle=False data.filter_overlong_prompts=False
    data.train_batch_size=<plan.batch_size> trainer.total_epochs=1
    reward.custom_reward_function.path=pkg://saerl_fast.integrations.verl
    reward.custom_reward_function.name=compute_score

A Parquet file that is in verl's schema already needs no rewriting: see integrations.verl_dataset.

A file has its order before the training begins: for a plan that answers to pass rates (adaptive) take
integrations.verl_dataset. Drop prompts that are too long beforehand (`Session.of` does): rows that verl drops
would shift every later batch. verl makes one optimizer step of a batch when
actor_rollout_ref.actor.ppo_mini_batch_size is the batch size. Checked with verl 0.9.1's own data loading and
reward code. No training step was made with it: its trainer, started on a CPU with these settings, accepts
them, and goes no further there. By its sources it takes its workers from what Ray counts as GPUs or NPUs,
has no platform but CUDA, ROCm and NPU, and samples by servers of vLLM, SGLang or TensorRT-LLM alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import atomic_path
from saerl_fast.plan.base import Plan
from saerl_fast.plan.sampler import dataset_rows
from saerl_fast.plan.static import StaticPlan
from saerl_fast.prompts.pool import Pool
from saerl_fast.rl.rewards import Reward, get_reward, score_rewards


def write_parquet(plan: Plan, pool: Pool, path: str | Path, *, reward: str | Sequence[str] = "exact") -> Path:
    """Write ``plan.total_steps * plan.batch_size`` rows, each batch after the other; the path.

    ``plan`` is walked through from where it stands: pass a fresh one. Columns: data_source
    ("saerl/<reward>"), prompt (chat messages), ability (the column task, else "saerl"), reward_model
    (style "rule", ground_truth) and extra_info (index, prompt_id, step, and the pool's other columns as
    JSON, for `compute_score`). Raises SaerlError for an adaptive plan and for prompts that ``pool`` lacks.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    row = dataset_rows(plan, pool.column("prompt_id"))
    get_reward(reward)
    reward = reward if isinstance(reward, str) else ",".join(reward)
    others = [name for name in pool.columns if name not in ("prompt_id", "prompt", "answer")]
    rows: list[dict[str, Any]] = []
    for step, batch in enumerate(planned_batches(plan)):
        for name in batch:
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


def planned_batches(plan: Plan) -> list[list[str]]:
    """The ``plan.total_steps`` batches of ids from where ``plan`` stands; SaerlError when it is adaptive."""
    if not isinstance(plan, StaticPlan):
        raise SaerlError(
            f"schedule {plan.schedule!r} chooses by pass rates, which a file cannot; "
            "use vanilla, literal, global or medium, or PlanDataset of integrations.verl_dataset"
        )
    return [plan.next_batch() for _ in range(plan.total_steps)]


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any], **_: Any
) -> float:
    """verl's custom reward function: the reward that `write_parquet` was given, on one completion."""
    prefix, _slash, name = str(data_source).partition("/")
    if prefix != "saerl" or not name or not {"columns", "prompt_id"} <= set(extra_info or ()):
        raise SaerlError(f"data_source {data_source!r} was not written by write_parquet")
    columns = {key: [value] for key, value in json.loads(extra_info["columns"]).items()}
    columns |= {"answer": [ground_truth], "prompt_id": [extra_info["prompt_id"]]}
    score = float(score_rewards(_reward(name), [""], [solution_str], columns)[0])
    return 0.0 if math.isnan(score) else score  # None: verl has no row that a reward leaves out


@cache
def _reward(name: str) -> Reward:
    return get_reward(name)
