"""A plan inside TRL's GRPOTrainer: its batches in plan order, its rewards back to the plan.

    trainer = plan_trainer(plan, model=model, args=GRPOConfig(...), train_dataset=to_dataset(pool),
                           reward_funcs=get_reward("numeric"))
    trainer.train()

One plan batch is one generation batch, so ``generation_batch_size / num_generations`` must equal
``plan.batch_size``. An adaptive plan chooses batch k + 1 before the rewards of batch k are known: the
dataloader fetches ahead. Checkpoints hold the plan's place, and resume to the exact next batch, as long
as they fall between generation batches (``steps_per_generation`` equal to the accumulation steps, TRL's
default). Checked with TRL 1.16, on one and on two processes; TRL is imported by `plan_trainer` only.

``base=AsyncGRPOTrainer`` trains in plan order as well, see ``integrations.trl_async``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from saerl_fast.errors import SaerlError
from saerl_fast.integrations.journal import EVENTS, Journal, PassRate, prompt_ids, rates_of, saved, saving
from saerl_fast.plan import Plan
from saerl_fast.plan.sampler import dataset_rows


class PlanRepeatSampler(Journal, Sampler[int]):
    """Dataset rows in plan order, repeated as TRL's RepeatSampler repeats them.

    Each batch gives every prompt ``group_size`` times in a row, and the whole batch ``repeats`` times.
    """

    def __init__(self, plan: Plan, ids: Sequence[str], group_size: int, repeats: int) -> None:
        super().__init__(plan)
        self.group_size, self.repeats = group_size, repeats
        self._row = dataset_rows(plan, ids)
        self._epoch = 0

    def __len__(self) -> int:
        return self.plan.total_steps * self.plan.batch_size * self.group_size * self.repeats

    def __iter__(self) -> Iterator[int]:
        first = self._epoch * self.plan.total_steps
        for index in range(first, first + self.plan.total_steps):
            batch = self.batch(index)
            for _ in range(self.repeats):
                for name in batch:
                    yield from [self._row[name]] * self.group_size

    def set_epoch(self, epoch: int) -> None:
        """Where the next iteration starts: one epoch is ``plan.total_steps`` batches."""
        self._epoch = epoch


def plan_trainer(
    plan: Plan, *, base: type | None = None, pass_rate: PassRate | None = None, **kwargs: Any
) -> Any:
    """A GRPOTrainer (or ``base``, a subclass of it or of AsyncGRPOTrainer) that trains in plan order.

    ``kwargs`` are the trainer's; ``train_dataset`` needs the column prompt_id. ``pass_rate`` turns rewards
    [n prompts, group size] (weighted sums over the reward functions) into pass rates [n] in [0, 1]; by
    default each is clipped and their mean taken. Raises SaerlError when plan and GRPOConfig differ in size.
    """
    try:
        from accelerate.utils import gather_object
        from trl import GRPOTrainer
    except ImportError as err:
        raise SaerlError(f"plan_trainer needs TRL ({err}); pip install trl") from None

    if not isinstance(plan, Plan):
        raise SaerlError(f"plan_trainer takes a plan, not a {type(plan).__name__}; load_plan reads plan.json")
    prompt_ids(kwargs.get("train_dataset"))
    if base is not None and not (isinstance(base, type) and issubclass(base, GRPOTrainer)):
        from saerl_fast.integrations.trl_async import async_trainer

        return async_trainer(plan, base, pass_rate, kwargs)

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
                rates = rates_of(rewards[known], pass_rate)
                sampler.observe([names[i] for i in known], [float(r) for r in rates])
            return gathered

        def train(self, resume_from_checkpoint: Any = None, **more: Any) -> Any:
            if (events := saved(self, resume_from_checkpoint, EVENTS)) is not None:
                sampler.replay(events)
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **more)

    trainer = PlanGRPOTrainer(**kwargs)
    args = trainer.args
    prompts = args.generation_batch_size // trainer.num_generations
    if prompts != plan.batch_size:
        raise SaerlError(
            f"GRPOConfig generates for {prompts} prompts at once but the plan has batches of "
            f"{plan.batch_size}; set generation_batch_size={plan.batch_size * trainer.num_generations}"
        )
    sampler = PlanRepeatSampler(
        plan,
        prompt_ids(trainer.train_dataset),
        trainer.num_generations,
        trainer.num_iterations * args.steps_per_generation,
    )
    trainer.add_callback(saving(lambda: sampler.events))
    return trainer
