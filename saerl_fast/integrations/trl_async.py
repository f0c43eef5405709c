"""A plan inside TRL's AsyncGRPOTrainer, whose rollouts are made by another process all along.

    trainer = plan_trainer(plan, base=AsyncGRPOTrainer, model="path", args=AsyncGRPOConfig(...), ...)

Whenever that process has room for a group, it asks this one for the next prompt. The plan is told a group's
rewards once, when all of it has arrived, whether the trainer then uses it or drops it as stale. A checkpoint
holds all that happened to the plan and the prompts whose groups are still on their way: after a resume these
come first, so that a dropped group holds nothing up, and no prompt is lost or told twice. What the data
loader has fetched ahead counts as trained, as in TRL's own bookkeeping; a conversation that became several
training rows counts once for each. Prompts must be lists of messages.

Checked with TRL 1.16 on a CPU, with a worker and an attention kernel that run there: TRL's own need a GPU.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from multiprocessing import current_process
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import numpy as np

from saerl_fast.errors import SaerlError
from saerl_fast.integrations.journal import EVENTS, Journal, PassRate, prompt_ids, rates_of, saved, saving
from saerl_fast.plan import Plan
from saerl_fast.plan.sampler import dataset_rows


class PlanFeed:
    """Dataset rows in the order that a `Groups` names them; can be sent to another process."""

    def __init__(self, dataset: Any, address: Any) -> None:
        self.dataset, self.address = dataset, address

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with Client(self.address, authkey=current_process().authkey) as link:
            while True:
                link.send_bytes(b"next")
                yield self.dataset[int(link.recv_bytes())]

    def select(self, rows: Any) -> PlanFeed:
        """Itself: where a resumed run begins is the plan's to say."""
        return self


class Groups(Journal):
    """The plan's prompts as numbered groups: handed out, then told their rewards.

    ``again``: ids of groups that were on their way when the plan's state was saved.
    """

    def __init__(self, plan: Plan, ids: list[str], pass_rate: PassRate | None) -> None:
        super().__init__(plan)
        self.ids, self.pass_rate = ids, pass_rate
        self.again: deque[str] = deque()
        self._row = dataset_rows(plan, ids)
        self._next = 0  # of the plan's prompts, counted from its start
        self._away: dict[int, str] = {}  # group number -> id
        self._handed = 0
        self._open: tuple[int, list[float]] | None = None  # the group that is arriving, and its rewards
        self._lock = threading.Lock()

    def hand_out(self) -> int:
        """The dataset row of the next group's prompt; groups are numbered from 0 in this order."""
        with self._lock:
            if self.again:
                name = self.again.popleft()
            else:
                name = self.batch(self._next // self.plan.batch_size)[self._next % self.plan.batch_size]
                self._next += 1
            self._away[self._handed] = name
            self._handed += 1
            return self._row[name]

    def arrived(self, number: int, reward: float) -> None:
        """One of a group's rewards; a group has ended when another one's come."""
        with self._lock:
            if self._open is not None and self._open[0] != number:
                self._close(*self._open)
                self._open = None
            if self._open is None:
                self._open = (number, [])
            self._open[1].append(reward)

    def _close(self, number: int, rewards: list[float]) -> None:
        name, known = self._away.pop(number), [r for r in rewards if r == r]  # NaN: not judged
        if known:
            self.observe([name], [float(rates_of(np.array([known]), self.pass_rate)[0])])

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: events, ids of the groups on their way, the place in the plan."""
        with self._lock:
            away = [*self._away.values(), *self.again]
            return {"events": list(self.events), "again": away, "next": self._next}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; SaerlError when it is of another plan."""
        self.replay(state["events"])
        self.again.extend(state["again"])
        self._next = state["next"]

    def serve(self, listener: Listener) -> None:
        """Answer every `PlanFeed` that connects, in threads of their own."""

        def answer(link: Connection) -> None:
            try:
                while link.recv_bytes():
                    link.send_bytes(str(self.hand_out()).encode())
            except (EOFError, OSError):  # the other process has ended
                link.close()

        def accept() -> None:
            while True:
                threading.Thread(target=answer, args=(listener.accept(),), daemon=True).start()

        threading.Thread(target=accept, name="plan", daemon=True).start()


class _Watched:
    """The queue of scored samples, whose every ``get`` tells the groups."""

    def __init__(self, queue: Any, groups: Groups) -> None:
        self.queue, self.groups = queue, groups

    def get(self, *args: Any, **more: Any) -> Any:
        sample = self.queue.get(*args, **more)
        self.groups.arrived(int(sample.group_id), float(sample.metrics["reward"]))
        return sample

    def qsize(self) -> int:
        return self.queue.qsize()


def async_trainer(plan: Plan, base: type, pass_rate: PassRate | None, kwargs: dict[str, Any]) -> Any:
    """See `plan_trainer`. A worker of one's own must take its rows from the attribute ``dataset``."""

    class PlanAsyncTrainer(base):  # type: ignore[misc, valid-type]
        def train(self, resume_from_checkpoint: Any = None, **more: Any) -> Any:
            form = {"events": EVENTS, "again": [str], "next": int}
            if (state := saved(self, resume_from_checkpoint, form)) is not None:
                groups.load(state)
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **more)

    data: Any = kwargs["train_dataset"]
    ids = prompt_ids(data)
    if isinstance(data[0]["prompt"], str):
        raise SaerlError(
            "AsyncGRPOTrainer takes conversations; make each prompt [{'role': 'user', 'content': prompt}]"
        )
    groups = Groups(plan, ids, pass_rate)
    trainer = PlanAsyncTrainer(**kwargs)
    worker = trainer.rollout_worker
    if worker is not None:  # the first process's
        listener = Listener(authkey=current_process().authkey)
        groups.serve(listener)
        feed = PlanFeed(data, listener.address)
        if hasattr(worker, "_loop_kwargs"):
            worker._loop_kwargs["dataset"] = feed
        else:
            worker.dataset = feed
        trainer.rollout_queue = _Watched(trainer.rollout_queue, groups)
    trainer.add_callback(saving(groups.state))
    return trainer
