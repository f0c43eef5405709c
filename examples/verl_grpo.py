"""A static plan for verl: writes the Parquet file in plan order and prints the command that trains on it.

    saerl score --config examples/demo.yaml && python examples/verl_grpo.py runs/demo --model YOUR/MODEL

A Parquet file that is in verl's schema already can stay as it is: saerl_fast/integrations/verl_dataset.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from saerl_fast import PlanConfig, Pool, Scores, build_plan, load_config, write_parquet


def main(run_dir: str, out: str, model: str, steps: int = 80, batch_size: int = 16) -> list[str]:
    """Write ``out`` (easy to hard over the whole pool, the quality filter applied); verl's command."""
    config, scores = load_config("examples/demo.yaml"), Scores.load(run_dir)
    schedule = PlanConfig(schedule="global")  # adaptive needs the pass rates of every step: see trl_grpo.py
    plan = build_plan(scores, schedule, batch_size=batch_size, total_steps=steps, seed=0)
    columns = ("prompt_id", "prompt", "answer", "task")
    pool = Pool({name: list(scores.columns[name]) for name in columns if name in scores.columns})
    path = write_parquet(plan, pool, out, reward=config.train.reward)
    return [
        "python -m verl.trainer.main_ppo",
        "algorithm.adv_estimator=grpo",
        f"actor_rollout_ref.model.path={model}",
        f"actor_rollout_ref.rollout.n={config.train.rollout.group_size}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={batch_size}",
        f"data.train_files={path.resolve()}",
        f"data.val_files={path.resolve()}",
        f"data.train_batch_size={batch_size}",
        "data.shuffle=False",
        "data.filter_overlong_prompts=False",
        "trainer.total_epochs=1",
        "reward.custom_reward_function.path=pkg://saerl_fast.integrations.verl",
        "reward.custom_reward_function.name=compute_score",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", nargs="?", default="runs/demo")
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    options = parser.parse_args()
    parquet = str(Path(options.run_dir) / "verl.parquet")
    print(" \\\n    ".join(main(options.run_dir, parquet, options.model)))
