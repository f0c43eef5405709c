"""The plan in a loop of your own: scores in, prompts in the planned order out, pass rates back.

    saerl score --config examples/demo.yaml && python examples/own_loop.py runs/demo

Nothing here needs saerl-fast's trainer: the sampler feeds a plain torch DataLoader.
"""

from __future__ import annotations

import sys

from torch.utils.data import DataLoader

from saerl_fast import PlanConfig, PlanSampler, Scores, build_plan


def main(run_dir: str, steps: int = 5, batch_size: int = 8) -> list[list[str]]:
    """Draw ``steps`` adaptive batches and pretend that every second prompt was solved."""
    scores = Scores.load(run_dir)
    plan = build_plan(
        scores, PlanConfig(schedule="adaptive"), batch_size=batch_size, total_steps=steps, seed=0
    )
    rows = [
        {"prompt_id": p, "prompt": text}
        for p, text in zip(scores.prompt_ids, scores.columns["prompt"], strict=True)
    ]
    loader = DataLoader(rows, batch_size=batch_size, sampler=PlanSampler(plan, scores.prompt_ids))
    seen = []
    for step, batch in enumerate(loader):
        pass_rates = [float(i % 2) for i in range(len(batch["prompt_id"]))]  # yours: rollouts and rewards
        plan.observe(batch["prompt_id"], pass_rates)
        print(f"step {step}: {', '.join(text.splitlines()[0][:24] for text in batch['prompt'][:3])} ...")
        seen.append(list(batch["prompt_id"]))
    return seen


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
