"""A plan with its history, which other trainers keep in their checkpoints."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import read_json, write_text
from saerl_fast.plan import Plan
from saerl_fast.plugins import call
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


class Stream(Journal):
    """The plan's prompts one by one, for rollouts that are on their way while further ones are asked for.

    Each is handed out under a number, from 0. A state also names those that are still on their way: they come
    again first when it is loaded, so that no prompt is lost, or told twice.
    """

    FORM = {"events": EVENTS, "again": [str], "next": int}  # of a `state`

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.away: dict[int, str] = {}  # number -> id
        self._again: deque[str] = deque()
        self._next = 0  # of the plan's prompts, counted from its start
        self._handed = 0

    def hand_out(self) -> str:
        """The id of the next prompt."""
        if self._again:
            name = self._again.popleft()
        else:
            name = self.batch(self._next // self.plan.batch_size)[self._next % self.plan.batch_size]
            self._next += 1
        self.away[self._handed] = name
        self._handed += 1
        return name

    def arrived(self, number: int, rewards: list[float], pass_rate: PassRate | None) -> None:
        """Tell the plan all rewards of that number's group; NaN: not judged."""
        name, known = self.away.pop(number), [reward for reward in rewards if reward == reward]
        if known:
            self.observe([name], [float(rates_of(np.array([known]), pass_rate)[0])])

    def state(self) -> dict[str, Any]:
        """What `load` goes on from, as plain values."""
        away = [*self.away.values(), *self._again]
        return {"events": list(self.events), "again": away, "next": self._next}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; SaerlError when it is of another plan."""
        self.replay(state["events"])
        self._again.extend(state["again"])
        self._next = state["next"]


def prompt_ids(dataset: Any) -> list[str]:
    """The ids of a dataset's rows; SaerlError when it has none, or no rows by number."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "column_names"):
        raise SaerlError(
            f"train_dataset is a {type(dataset).__name__}, and a plan needs rows in any order; make it a "
            "datasets.Dataset by to_dataset(pool)"
        )
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
    """Pass rates [n] of rewards [n, group size], by ``pass_rate`` of `plan_trainer` where it is given.

    Raises SaerlError where that raises, or gives anything but n numbers from 0 to 1.
    """
    if pass_rate is None:
        return pass_rates(rewards)
    rates = call("pass_rate", lambda: np.asarray(pass_rate(np.nan_to_num(rewards)), dtype=np.float64))
    if rates.shape != (len(rewards),) or not ((rates >= 0) & (rates <= 1)).all():
        raise SaerlError(
            f"pass_rate must give {len(rewards)} numbers from 0 to 1 for rewards of shape "
            f"{list(rewards.shape)}, one a prompt; it gave {str(rates.tolist()):.80}"
        )
    return rates
