"""A plan as torch samplers, for a ``DataLoader`` or any loop of one's own.

Batches are drawn one at a time, so that an adaptive plan sees every ``plan.observe`` made before.
Rows of an export hold nulls, which torch's own collation refuses: use ``collate_fn=list``.
A DataLoader with workers asks for batches ahead: with an adaptive plan use ``num_workers=0``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from saerl_fast.errors import SaerlError
from saerl_fast.plan.base import Plan
from saerl_fast.records.packed import Rows

TOLD = "plan.schedule={} is told pass rates by `saerl train` alone; choose another schedule here"


def dataset_rows(plan: Plan, ids: Sequence[str]) -> Rows:
    """The dataset row of every prompt id, which may be numbers there; SaerlError when the plan has prompts
    that ``ids`` lacks, or an id occurs twice, and for an oracle, which nobody but `saerl train` tells."""
    if plan.asks:
        raise SaerlError(TOLD.format(plan.schedule))
    if len(ids) and not isinstance(ids[0], str):
        ids = [str(name) for name in ids]
    rows = Rows(ids)
    if rows.repeated is not None:
        raise SaerlError(f"prompt id {rows.repeated!r} is that of two dataset rows; leave one of them out")
    missing = rows.lacking(plan.prompt_ids)
    if missing:
        raise SaerlError(
            f"{len(missing)} of the plan's prompts are not in the dataset, first {missing[0]!r}; "
            "pass the dataset the plan was made for"
        )
    return rows


class PlanBatchSampler(Sampler[list[int]]):
    """Yields lists of dataset row indices, one per batch of the plan (``DataLoader(batch_sampler=...)``).

    ``ids``: the prompt id of every dataset row, in dataset order. Iterating goes on from the plan's
    place to ``plan.total_steps``; from there the next iteration covers another ``total_steps``.
    """

    def __init__(self, plan: Plan, ids: Sequence[str]) -> None:
        self.plan = plan
        self._index = dataset_rows(plan, ids)

    def __len__(self) -> int:
        return self.plan.total_steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.plan.total_steps - self.plan.step % self.plan.total_steps):
            yield [self._index[name] for name in self.plan.next_batch()]

    def state_dict(self) -> dict[str, Any]:
        """The plan's own state; flat, ints, floats, strings and tensors."""
        return self.plan.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plan.load_state_dict(state)


class PlanSampler(Sampler[int]):
    """Yields single dataset row indices in plan order (``DataLoader(sampler=..., batch_size=...)``).

    Its state remembers the rows of the current batch that are still to come.
    """

    def __init__(self, plan: Plan, ids: Sequence[str]) -> None:
        self.batches = PlanBatchSampler(plan, ids)
        self._pending: list[int] = []

    def __len__(self) -> int:
        return self.batches.plan.total_steps * self.batches.plan.batch_size

    def __iter__(self) -> Iterator[int]:
        plan = self.batches.plan
        last = bool(self._pending) and plan.step % plan.total_steps == 0
        # Popped before it is yielded: whoever saves the state in the loop's body has used that row.
        while self._pending:
            yield self._pending.pop(0)
        for batch in () if last else self.batches:
            self._pending = list(batch)
            while self._pending:
                yield self._pending.pop(0)

    def state_dict(self) -> dict[str, Any]:
        """The plan's state and the list of row indices of its last batch that were not yielded yet."""
        return {**self.batches.state_dict(), "pending": list(self._pending)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)
        self._pending = [int(i) for i in state.get("pending", [])]
