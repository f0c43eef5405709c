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
EVENTS = [[([str], [float])]]  # the form of Journal.events
PassRate = Callable[[np.ndarray], np.ndarray]


class Journal:
    """A plan and everything that happened to it.

    ``events``, in order: [batch ids] when a batch was drawn, [ids, pass rates] when it was observed. They are
    the saved state: replayed, they give the plan back.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.events: list[list[Any]] = []
        self._drawn: list[list[str]] = []

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
            elif [self.batch(len(self._drawn))] != event:
                raise SaerlError(
                    "the checkpoint was made with another plan; load the one it was started with"
                )

    def batch(self, index: int) -> list[str]:
        """The ids of the batch with this number."""
        while len(self._drawn) <= index:
            self._drawn.append(self.plan.next_batch())
            self.events.append([self._drawn[-1]])
        return self._drawn[index]


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

    if base is not None and not issubclass(base, GRPOTrainer):
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


def prompt_ids(dataset: Any) -> list[str]:
    """The ids of a dataset's rows; SaerlError when it has none."""
    if "prompt_id" not in dataset.column_names:
        raise SaerlError("the training dataset has no column prompt_id; make it with to_dataset(pool)")
    return list(dataset["prompt_id"])


def saving(held: Callable[[], Any]) -> Any:
    """A callback that writes ``held()`` as JSON into every checkpoint."""
    from transformers import TrainerCallback

    class SavePlan(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                write_text(folder / STATE, json.dumps(held()))

    return SavePlan()


def saved(trainer: Any, resume: Any, form: Any) -> Any:
    """What `saving` wrote into the checkpoint that a trainer resumes from (True: its latest), if any."""
    from transformers.trainer_utils import get_last_checkpoint

    folder = get_last_checkpoint(trainer.args.output_dir) if resume is True else resume
    return read_json(Path(folder) / STATE, "a run of plan_trainer", form) if folder else None


def rates_of(rewards: np.ndarray, pass_rate: PassRate | None) -> np.ndarray:
    """Pass rates [n] of rewards [n, group size], by ``pass_rate`` of `plan_trainer` where it is given."""
    if pass_rate is None:
        return pass_rates(rewards)
    return np.asarray(pass_rate(np.nan_to_num(rewards)), dtype=np.float64)
