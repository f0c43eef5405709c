"""A plan inside TRL's GRPOTrainer: its batches in plan order, its rewards back to the plan.

    trainer = plan_trainer(plan, model=model, args=GRPOConfig(...), train_dataset=to_dataset(pool),
                           reward_funcs=get_reward("numeric"))
    trainer.train()

One plan batch is one generation batch, so ``generation_batch_size / num_generations`` must equal
``plan.batch_size``. An adaptive plan chooses batch k + 1 before the rewards of batch k are known: the
dataloader fetches ahead. Checkpoints hold the plan's place, and resume to the exact next batch, as long
as they fall between generation batches (``steps_per_generation`` equal to the accumulation steps, TRL's
default). Checked with TRL 1.16, on one and on two processes; TRL is imported by `plan_trainer` only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import read_json, write_text
from saerl_fast.plan import Plan
from saerl_fast.plan.sampler import dataset_rows
from saerl_fast.rl.evaluate import pass_rates

STATE = "saerl_plan.json"
PassRate = Callable[[np.ndarray], np.ndarray]


class PlanRepeatSampler(Sampler[int]):
    """Dataset rows in plan order, repeated as TRL's RepeatSampler repeats them.

    Each batch gives every prompt ``group_size`` times in a row, and the whole batch ``repeats`` times.
    ``events`` is everything that happened to the plan, in order: [batch ids] when it was drawn,
    [ids, pass rates] when it was observed. It is the saved state: replayed, it gives the plan back.
    """

    def __init__(self, plan: Plan, ids: Sequence[str], group_size: int, repeats: int) -> None:
        self.plan, self.group_size, self.repeats = plan, group_size, repeats
        self._row = dataset_rows(plan, ids)
        self.events: list[list[Any]] = []
        self._drawn: list[list[str]] = []
        self._epoch = 0

    def __len__(self) -> int:
        return self.plan.total_steps * self.plan.batch_size * self.group_size * self.repeats

    def __iter__(self) -> Iterator[int]:
        first = self._epoch * self.plan.total_steps
        for index in range(first, first + self.plan.total_steps):
            batch = self._batch(index)
            for _ in range(self.repeats):
                for name in batch:
                    yield from [self._row[name]] * self.group_size

    def set_epoch(self, epoch: int) -> None:
        """Where the next iteration starts: one epoch is ``plan.total_steps`` batches."""
        self._epoch = epoch

    def observe(self, ids: list[str], rates: list[float]) -> None:
        """Tell the plan pass rates, and remember having done so."""
        self.plan.observe(ids, rates)
        self.events.append([ids, rates])

    def replay(self, events: list[list[Any]]) -> None:
        """Bring a fresh plan to where ``events`` left another. SaerlError when it was another plan."""
        if self.events or self.plan.step:
            raise SaerlError("the plan is under way already; load it again before resuming")
        for event in events:
            if len(event) == 2:
                self.observe(*event)
            elif [self._batch(len(self._drawn))] != event:
                raise SaerlError(
                    "the checkpoint was made with another plan; load the one it was started with"
                )

    def _batch(self, index: int) -> list[str]:
        while len(self._drawn) <= index:
            self._drawn.append(self.plan.next_batch())
            self.events.append([self._drawn[-1]])
        return self._drawn[index]


def plan_trainer(
    plan: Plan, *, base: type | None = None, pass_rate: PassRate | None = None, **kwargs: Any
) -> Any:
    """A GRPOTrainer (or ``base``, a subclass of it) built from ``kwargs`` that trains in plan order.

    ``train_dataset`` needs the column prompt_id. ``pass_rate`` turns rewards [n prompts, group size]
    (weighted sums over the reward functions) into pass rates [n] in [0, 1]; by default each is
    clipped and their mean taken. Raises SaerlError when the sizes of plan and GRPOConfig disagree.
    """
    try:
        from accelerate.utils import gather_object
        from transformers import TrainerCallback
        from transformers.trainer_utils import get_last_checkpoint
        from trl import GRPOTrainer
    except ImportError as err:
        raise SaerlError(f"plan_trainer needs TRL ({err}); pip install trl") from None

    class SavePlan(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                write_text(folder / STATE, json.dumps(sampler.events))

    class PlanGRPOTrainer(base or GRPOTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
            return sampler

        def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any, **more: Any) -> Any:
            gathered = super()._calculate_rewards(inputs, *args, **more)
            if self.model.training:
                ids = gather_object([row["prompt_id"] for row in inputs])
                total = (gathered * self.reward_weights.to(gathered.device)).nansum(dim=1)
                total[gathered.isnan().all(dim=1)] = float("nan")  # no reward function judges it
                rewards = total.double().cpu().numpy().reshape(-1, self.num_generations)
                names, known = ids[:: self.num_generations], np.flatnonzero(~np.isnan(rewards).all(1))
                rates = _rates(rewards[known], pass_rate)
                sampler.observe([names[i] for i in known], [float(r) for r in rates])
            return gathered

        def train(self, resume_from_checkpoint: Any = None, **more: Any) -> Any:
            folder = resume_from_checkpoint
            if folder is True:
                folder = get_last_checkpoint(self.args.output_dir)
            if folder:
                sampler.replay(read_json(Path(folder) / STATE, "a run of plan_trainer", [[([str], [float])]]))
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **more)

    trainer = PlanGRPOTrainer(**kwargs)
    args = trainer.args
    prompts = args.generation_batch_size // trainer.num_generations
    if prompts != plan.batch_size:
        raise SaerlError(
            f"GRPOConfig generates for {prompts} prompts at once but the plan has batches of "
            f"{plan.batch_size}; set generation_batch_size={plan.batch_size * trainer.num_generations}"
        )
    if "prompt_id" not in trainer.train_dataset.column_names:
        raise SaerlError("the training dataset has no column prompt_id; make it with to_dataset(pool)")
    sampler = PlanRepeatSampler(
        plan,
        trainer.train_dataset["prompt_id"],
        trainer.num_generations,
        trainer.num_iterations * args.steps_per_generation,
    )
    trainer.add_callback(SavePlan())
    return trainer


def _rates(rewards: np.ndarray, pass_rate: PassRate | None) -> np.ndarray:
    if pass_rate is None:
        return pass_rates(rewards)
    return np.asarray(pass_rate(np.nan_to_num(rewards)), dtype=np.float64)
