"""A plan inside TRL's AsyncGRPOTrainer, whose rollouts are made by another process all along.

    trainer = plan_trainer(plan, base=AsyncGRPOTrainer, model="path", args=AsyncGRPOConfig(...), ...)

Whenever that process has room for a group, it asks this one for the next prompt. The plan is told a group's
rewards once, when all of it has arrived, whether the trainer then uses it or drops it as stale. A checkpoint
holds all that happened to the plan and the prompts whose groups are still on their way: after a resume these
come first, so that a dropped group holds nothing up, and no prompt is lost or told twice. What the data
loader has fetched ahead counts as trained, as in TRL's own bookkeeping; a conversation that became several
training rows counts once for each. Prompts must be lists of messages.

Checked with TRL 1.16 on a CPU: with an attention kernel that runs there, for TRL's needs a GPU, and with its
own worker process on a stand-in for vLLM's server.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from multiprocessing import current_process
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from saerl_fast.errors import SaerlError
from saerl_fast.integrations.journal import PassRate, Stream, prompt_ids, saved, saving
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


class Groups(Stream):
    """The plan's prompts as TRL's numbered groups, whose rewards arrive one by one; for several threads."""

    def __init__(self, plan: Plan, ids: list[str], pass_rate: PassRate | None) -> None:
        super().__init__(plan)
        self.pass_rate = pass_rate
        self._row = dataset_rows(plan, ids)
        self._open: tuple[int, list[float]] | None = None  # the group that is arriving, and its rewards
        self._lock = threading.RLock()

    def next_row(self) -> int:
        """The dataset row of the next group's prompt."""
        with self._lock:
            return self._row[self.hand_out()]

    def reward(self, number: int, value: float) -> None:
        """One of a group's rewards; a group has ended when another one's come."""
        with self._lock:
            if self._open is not None and self._open[0] != number:
                self.arrived(*self._open, self.pass_rate)
                self._open = None
            if self._open is None:
                self._open = (number, [])
            self._open[1].append(value)

    def state(self) -> dict[str, Any]:
        with self._lock:
            return super().state()

    def serve(self, listener: Listener) -> None:
        """Answer every `PlanFeed` that connects, in threads of their own."""

        def answer(link: Connection) -> None:
            try:
                while link.recv_bytes():
                    link.send_bytes(str(self.next_row()).encode())
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
        self.groups.reward(int(sample.group_id), float(sample.metrics["reward"]))
        return sample

    def qsize(self) -> int:
        return self.queue.qsize()


def async_trainer(plan: Plan, base: type, pass_rate: PassRate | None, kwargs: dict[str, Any]) -> Any:
    """See `plan_trainer`. A worker of one's own must take its rows from the attribute ``dataset``."""
    if "AsyncGRPOTrainer" not in [one.__name__ for one in getattr(base, "__mro__", ())]:
        raise SaerlError(f"base={base} is neither TRL's GRPOTrainer nor AsyncGRPOTrainer; pass one of them")

    class PlanAsyncTrainer(base):  # type: ignore[misc, valid-type]
        def train(self, resume_from_checkpoint: Any = None, **more: Any) -> Any:
            if (state := saved(self, resume_from_checkpoint, Stream.FORM)) is not None:
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
