"""The adaptive plan in TRL's GRPOTrainer, on the demo's model and prompts.

    pip install trl
    saerl score --config examples/demo.yaml && python examples/trl_grpo.py runs/demo --steps 20

`plan_trainer` builds an ordinary GRPOTrainer (or the subclass given as ``base``) from the same arguments; it
draws its batches from the plan and tells it the pass rates. Also on several processes: put
`torchrun --nproc_per_node=2` in front.
"""

from __future__ import annotations

import argparse
import os

from saerl_fast import Scores, Session, build_plan, get_reward, load_config, plan_trainer, to_dataset


def main(
    run_dir: str, steps: int = 20, prompts: int = 8, group: int = 8, out: str = "runs/trl"
) -> list[float]:
    """Train for ``steps`` steps of ``prompts`` x ``group`` rollouts; the mean reward of every step."""
    import torch
    from trl import GRPOConfig

    config = load_config("examples/demo.yaml")
    plan = build_plan(Scores.load(run_dir), config.plan, batch_size=prompts, total_steps=steps, seed=0)
    session = Session.open(config)
    dataset = to_dataset(session.train).remove_columns("prompt")
    dataset = dataset.add_column("prompt", session.train.texts)
    args = GRPOConfig(
        output_dir=out,
        # over all processes, one plan batch is one optimizer step
        per_device_train_batch_size=prompts * group // int(os.environ.get("WORLD_SIZE", 1)),
        num_generations=group,
        max_completion_length=config.train.rollout.max_new_tokens,
        learning_rate=config.train.lr,
        lr_scheduler_type="constant",
        max_steps=steps,
        logging_steps=1,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
    )
    trainer = plan_trainer(
        plan,
        model=session.model,
        args=args,
        train_dataset=dataset,
        reward_funcs=get_reward(config.train.reward),
        processing_class=session.tokenizer,
    )
    trainer.train()
    return [row["reward"] for row in trainer.state.log_history if "reward" in row]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", nargs="?", default="runs/demo")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    rewards = main(options.run_dir, options.steps)
    if os.environ.get("RANK", "0") == "0":
        print("mean reward of each step:", " ".join(f"{reward:.2f}" for reward in rewards))
