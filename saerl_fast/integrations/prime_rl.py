"""A plan in prime-rl: a task sampler that follows it, and a gate that lets informative groups pass.

    curriculum.sampler = PlanTaskSampler(plan, tasks)  # of a prime_rl.orchestrator.curriculum.Curriculum
    curriculum.gates["signal"] = SignalGate()

They have the methods of prime-rl's ``TaskSampler`` and ``AdmissionGate`` as published in its repository
(src/prime_rl/orchestrator/curriculum: samplers/base.py and gates/base.py at commit 2cfe40f, and base.py at
0c771bb, which calls them). Its own curriculum makes the samplers of its configuration only, hence the
assignment. Tested against that interface: prime-rl is on no package index, and was not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import mismatch
from saerl_fast.integrations.journal import PassRate, Stream
from saerl_fast.plan import Plan
from saerl_fast.plan.sampler import dataset_rows


def task_id(task: Any) -> str:
    """The prompt id of a verifiers task: ``task.data.prompt_id`` if it has one, else ``task.key``."""
    return str(getattr(task.data, "prompt_id", None) or task.key)


class PlanTaskSampler(Iterator[Any]):
    """Tasks in plan order; a finished group's rewards are told to the plan, once.

    ``tasks``: a finite taskset with all of the plan's prompts, named by ``name``. ``pass_rate``: as in
    `plan_trainer`. A checkpoint also holds the tasks whose groups are on their way; they come again first.
    """

    def __init__(
        self,
        plan: Plan,
        tasks: Sequence[Any],
        *,
        name: Callable[[Any], str] = task_id,
        pass_rate: PassRate | None = None,
    ) -> None:
        self.tasks, self.pass_rate = tasks, pass_rate
        self._stream = Stream(plan)
        self._row = dataset_rows(plan, [name(task) for task in tasks])
        self._name = {task.key: name(task) for task in tasks}

    def __next__(self) -> Any:
        """The next task."""
        return self.tasks[self._row[self._stream.hand_out()]]

    def observe(self, group: list[Any]) -> None:
        """Tell the plan a finished group of episodes; what failed, or is not trained on, does not count."""
        stream = self._stream
        name = self._name.get(group[0].task.key) if group else None
        number = next((i for i, away in stream.away.items() if away == name), None)
        if number is not None:  # else it was handed out by somebody else
            stream.arrived(number, rewards(group), self.pass_rate)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return self._stream.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bring a fresh sampler to where another was. SaerlError on another plan's state."""
        if fault := mismatch(state_dict, Stream.FORM):
            raise SaerlError(f"the checkpoint holds no plan ({fault}); it was made with another sampler")
        self._stream.load(state_dict)

    def metrics(self) -> dict[str, float]:
        """The plan's figures, its step, and how many groups are on their way."""
        plan = self._stream.plan
        return plan.metrics() | {"step": float(plan.step), "away": float(len(self._stream.away))}


class SignalGate:
    """Admits the groups whose rewards differ: only they have a gradient in GRPO."""

    def __init__(self) -> None:
        self.seen = self.admitted = 0

    def admit(self, group: list[Any]) -> bool:
        """Whether two of the group's rewards differ."""
        passed = len({reward for reward in rewards(group) if reward == reward}) > 1
        self.seen, self.admitted = self.seen + 1, self.admitted + passed
        return passed

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "admitted": self.admitted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen, self.admitted = int(state_dict["seen"]), int(state_dict["admitted"])

    def metrics(self) -> dict[str, float]:
        """``informative``: the share of groups admitted."""
        return {"informative": self.admitted / max(self.seen, 1)}


def rewards(group: list[Any]) -> list[float]:
    """Of the traces in a group of episodes that are trained on; NaN: not judged."""
    return [
        float("nan" if trace.reward is None else trace.reward)
        for episode in group
        for trace in episode.traces
        if episode.ok and not trace.has_error and trace.agent.trainable and trace.num_turns > 0
    ]
