"""The plan: which prompts a run trains on, in which order, decided before it or while it goes.

A ``Plan`` hands out batches of prompt ids, is told the pass rates they had, and can save and
restore its place to the exact next batch. Static schedules ignore what they are told;
``adaptive`` (``saerl_fast.plan.adaptive``) chooses by it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from saerl_fast.config import PlanConfig
from saerl_fast.errors import SaerlError
from saerl_fast.records import packed
from saerl_fast.records.packed import Packed, Rows

if TYPE_CHECKING:
    from saerl_kernels import CSR

log = logging.getLogger(__name__)


class Dropped(Mapping[str, str]):
    """Ids that a plan leaves out -> the reason."""

    def __init__(self, ids: Sequence[str], reasons: Sequence[str]) -> None:
        self.ids, self.reasons = ids, reasons

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __getitem__(self, name: str) -> str:
        return self.reasons[self._row[name]]

    @cached_property
    def _row(self) -> Rows:
        return Rows(self.ids)


class Plan(ABC):
    """A seeded, serialisable source of batches.

    Attributes: ``schedule``; ``prompt_ids``, all ids that may be drawn; ``dropped``, id -> reason;
    ``batch_size``; ``total_steps``, the length the schedule is paced for (``next_batch`` goes on
    after it); ``seed``; ``step``, batches handed out so far; ``notes``, sentences for the user;
    ``table``, the per-prompt score columns (float32 or int32 [n], rows as in ``prompt_ids``);
    ``dropped_table``, the same columns of the dropped ids; ``wants_features``, whether ``observe``
    uses features captured during rollouts (if not, capturing them for the plan is wasted); ``learns``,
    whether the order depends on what ``observe`` is told; ``asks``, whether `know` is to be told what no
    order can know.
    """

    schedule: str
    wants_features: bool = False
    learns: bool = False
    asks: bool = False

    def __init__(
        self,
        prompt_ids: Sequence[str],
        cfg: PlanConfig,
        *,
        batch_size: int,
        total_steps: int,
        seed: int,
        table: dict[str, np.ndarray] | None = None,
        dropped: Mapping[str, str] | None = None,
        dropped_table: dict[str, np.ndarray] | None = None,
        notes: list[str] | None = None,
    ) -> None:
        if not prompt_ids:
            raise SaerlError("the plan has no prompts; check the data and the filters that were applied")
        if batch_size < 1 or total_steps < 1:
            name, value = ("batch_size", batch_size) if batch_size < 1 else ("total_steps", total_steps)
            raise SaerlError(f"a plan's {name} must be at least 1, got {value}")
        if seed < 0:
            raise SaerlError(f"a plan's seed must not be negative, got {seed}")
        self.cfg, self.seed = cfg, seed
        large = len(prompt_ids) > packed.LARGE and not isinstance(prompt_ids, Packed)
        self.prompt_ids: Sequence[str] = Packed.of(prompt_ids) if large else prompt_ids
        self.batch_size, self.total_steps = batch_size, total_steps
        self.table, self.dropped_table = table or {}, dropped_table or {}
        if not isinstance(dropped, Dropped):
            dropped = Dropped(list(dropped or ()), list((dropped or {}).values()))
        self.dropped = dropped
        self.notes = list(notes or [])
        self.step = 0
        self._row = Rows(self.prompt_ids)
        if self._row.repeated is not None:
            raise SaerlError("prompt ids are not unique; choose another data.id_column")
        if len(self.prompt_ids) < batch_size:
            count = len(self.prompt_ids)
            self.note(f"{count} prompts for batches of {batch_size}: prompts repeat inside a batch")

    @abstractmethod
    def next_batch(self) -> list[str]:
        """The next ``batch_size`` prompt ids; distinct whenever there are that many prompts."""

    def observe(self, prompt_ids: list[str], pass_rates: Any, features: CSR | None = None) -> None:
        """Tell the plan the pass rates (floats in [0, 1], one per id) that rollouts of these ids had.

        ``features``: pooled SAE features captured during those rollouts, one CSR row per id.
        Raises SaerlError on an unknown id, another length or a value outside [0, 1].
        """
        self._check(prompt_ids, pass_rates)

    def know(self, pass_rates: Any) -> None:
        """Before a step: the pass rate of each of ``prompt_ids`` under the model as it is, [n]."""
        raise NotImplementedError  # who asks for it defines it

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that changes during a run: ints, floats, strings and torch tensors, flat."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken. Raises SaerlError on another plan's state."""

    def metrics(self) -> dict[str, float]:
        """Figures about the last batch for a log line."""
        return {}

    def note(self, sentence: str) -> None:
        """Add to ``notes`` what the user should know, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            log.info(sentence)

    def _check(self, prompt_ids: list[str], pass_rates: Any) -> tuple[np.ndarray, np.ndarray]:
        rates = np.asarray(pass_rates, dtype=np.float64)
        if rates.shape != (len(prompt_ids),):
            raise SaerlError(
                f"observe got {len(prompt_ids)} prompt ids and pass rates of shape {list(rates.shape)}; "
                "give one pass rate per id"
            )
        bad = ~((rates >= 0) & (rates <= 1))
        if bad.any():
            raise SaerlError(
                f"pass rate {rates[bad][0]} of prompt {prompt_ids[int(bad.argmax())]!r} is not in [0, 1]"
            )
        rows = self._row.of(prompt_ids)
        if None in rows:
            unknown = prompt_ids[rows.index(None)]
            raise SaerlError(f"prompt id {unknown!r} is not in the plan; observe only ids it handed out")
        return np.array(rows, dtype=np.int64), rates

    def _check_state(self, state: dict[str, Any]) -> None:
        mine = {"schedule": self.schedule, "seed": self.seed, "n_prompts": len(self.prompt_ids)}
        mine["batch_size"] = self.batch_size
        for key, value in mine.items():
            if key not in state or state[key] != value:
                raise SaerlError(
                    f"the saved plan state has {key}={state.get(key)!r} but this plan has {value!r}; "
                    "resume with the plan.json that the run was started with"
                )

    def _base_state(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule,
            "seed": self.seed,
            "n_prompts": len(self.prompt_ids),
            "batch_size": self.batch_size,
            "step": self.step,
        }

    def _mean_of(self, rows: np.ndarray) -> dict[str, float]:
        return {
            name: float(self.table[name][rows].mean())
            for name in ("difficulty", "quality")
            if name in self.table and np.isfinite(self.table[name][rows]).all()
        }
