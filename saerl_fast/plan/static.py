"""The static schedules: passes over the prompts, each in a fresh seeded order.

``literal`` follows the published description of SAERL (arXiv 2605.27354): batches from one cluster,
easy-to-hard inside it, batches alternating between clusters, a few rows mixed between neighbours.
The paper leaves the mixing rule open; the one below is ours. ``global`` is this project's variant.

An order takes ``rows`` [m], distinct row indices with m a multiple of ``batch_size``, a generator, the
score columns and the settings, and returns [m / batch_size, batch_size] int64. Ties are broken at random.
A new schedule is such a function and an entry of ``STATIC``; its name also stands in config.SCHEDULES. One
from outside is ``plan.schedule=module:function``: such a function, or a ``Schedule`` that names the score
columns it needs. All its randomness must come from the generator: a run that is resumed draws again.

    def reverse(rows, batch_size, rng, table, cfg):
        return rows[np.argsort(-table["difficulty"][rows])].reshape(-1, batch_size)

    hard_to_easy = Schedule(reverse, needs=("difficulty",))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from saerl_fast import plugins
from saerl_fast.config import SCHEDULES, PlanConfig
from saerl_fast.errors import SaerlError
from saerl_fast.plan.base import Plan

Table = dict[str, np.ndarray]


def shuffled(
    rows: np.ndarray, batch_size: int, rng: np.random.Generator, table: Table, cfg: PlanConfig
) -> np.ndarray:
    """A uniform permutation, in batches."""
    return rng.permutation(rows).reshape(-1, batch_size)


def literal(
    rows: np.ndarray, batch_size: int, rng: np.random.Generator, table: Table, cfg: PlanConfig
) -> np.ndarray:
    """Cluster-coherent batches, each cluster's in easy-to-hard order, clusters taking turns.

    Rows left over after a cluster's last whole
    batch are its hardest; they are joined, cluster after cluster, into batches that take a turn
    like those of one more cluster. At last ``mix`` of each batch is exchanged with its neighbours:
    half from its hard end with the easy end of the next.
    """
    difficulty, cluster = table["difficulty"], table["cluster"]
    rows = rng.permutation(rows)
    names = rng.permutation(np.unique(cluster[rows]))
    runs: list[np.ndarray] = []  # each [n_batches, batch_size], to be interleaved
    left: list[np.ndarray] = []
    for name in names:
        members = rows[cluster[rows] == name]
        members = members[np.argsort(difficulty[members], kind="stable")]
        whole = len(members) // batch_size * batch_size
        if whole:
            runs.append(members[:whole].reshape(-1, batch_size))
        left.append(members[whole:])
    remainder = np.concatenate(left)
    if len(remainder):
        runs.append(remainder.reshape(-1, batch_size))
    # Spread every run's batches evenly over the pass, so that large clusters do not pile up at its end.
    place = np.concatenate([(np.arange(len(run)) + 0.5) / len(run) for run in runs])
    batches = np.concatenate(runs)[np.argsort(place, kind="stable")]

    swap = int(cfg.mix * batch_size / 2)
    if swap:
        tails = batches[:-1, -swap:].copy()
        batches[:-1, -swap:] = batches[1:, :swap]
        batches[1:, :swap] = tails
    return batches


def easy_to_hard(
    rows: np.ndarray, batch_size: int, rng: np.random.Generator, table: Table, cfg: PlanConfig
) -> np.ndarray:
    """Easy-to-hard over all rows, clusters balanced, ``mix`` of every batch drawn from anywhere.

    Balance conflicts with order when clusters differ in difficulty, so it is sought among
    ``window`` consecutive batches: their rows are dealt out cluster by cluster.
    """
    difficulty, cluster = table["difficulty"], table["cluster"]
    n_batches = len(rows) // batch_size
    anywhere = round(cfg.mix * batch_size)
    rows = rng.permutation(rows)
    loose, rest = np.split(rows, [n_batches * anywhere])
    rest = rest[np.argsort(difficulty[rest], kind="stable")]
    ordered = np.empty((n_batches, batch_size - anywhere), dtype=np.int64)
    for start in range(0, n_batches, cfg.window):
        count = min(cfg.window, n_batches - start)
        part = rest[start * ordered.shape[1] : (start + count) * ordered.shape[1]]
        part = rng.permutation(part)
        part = part[np.argsort(cluster[part], kind="stable")]
        ordered[start : start + count] = part.reshape(-1, count).T  # row i goes to batch i mod count
    return np.concatenate([ordered, loose.reshape(n_batches, anywhere)], axis=1)


def middle(difficulty: np.ndarray, rows: np.ndarray, keep: float) -> np.ndarray:
    """The rows whose difficulty ranks in the middle ``keep`` share of ``rows``, in row order."""
    count = max(1, round(keep * len(rows)))
    start = (len(rows) - count) // 2
    ranked = rows[np.argsort(difficulty[rows], kind="stable")]
    return np.sort(ranked[start : start + count])


class Schedule(NamedTuple):
    """What the rest needs to know of a static schedule.

    ``keep`` takes the difficulty [n] of all prompts, rows [m] and ``plan.medium_keep``, and returns rows.
    """

    order: Callable[..., np.ndarray]
    needs: tuple[str, ...] = ()  # of "difficulty" and "quality" float32 [n], "cluster" int32 [n], "pass_rate"
    filtered: bool = True  # by quality, unless plan.filter says otherwise
    spans: bool = False  # a pass goes from one end to the other: a short last one takes a sample
    keep: Callable[..., np.ndarray] | None = None  # which rows take part at all


STATIC = {
    "vanilla": Schedule(shuffled, filtered=False),
    "literal": Schedule(literal, ("difficulty", "cluster"), spans=True),
    "global": Schedule(easy_to_hard, ("difficulty", "cluster"), spans=True),
    "medium": Schedule(shuffled, ("difficulty",), keep=middle),
}


def get_schedule(name: str) -> Schedule | None:
    """The static schedule of that name, or of ``module:function``; None for ``adaptive``."""
    plugins.check_name(name, SCHEDULES, "plan.schedule")
    if ":" not in name:
        return STATIC.get(name)
    takes = ("rows", "batch_size", "rng", "table", "cfg")
    found = plugins.load_function(name, "plan.schedule", Schedule, takes)
    return found if isinstance(found, Schedule) else Schedule(found)


class StaticPlan(Plan):
    """Passes over the prompts in the order of the schedule.

    A pass takes the rows seen least so far (ties at random), cut to whole batches, so that counts
    never differ by more than one. A pass that the run's end would cut short takes a sample instead:
    the order then still spans easy to hard.
    """

    def __init__(
        self, schedule: str, *args: Any, batches: Sequence[Sequence[int]] | np.ndarray = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.schedule = schedule
        self._stored = batches  # from a plan file; the same as what would be drawn
        self._drawn: list[np.ndarray] = []
        self._passes = 0
        self._visits = np.zeros(len(self.prompt_ids), dtype=np.int64)
        if len(self._stored):  # whose function may be missing here
            return
        n_rows = len(self.prompt_ids)
        if self._entry.spans and n_rows >= self.batch_size:
            short = self.total_steps % (n_rows // self.batch_size)
            if short:
                self.note(f"the last pass is {short} batches long: it takes a sample of {n_rows} prompts")

    def batch_rows(self, index: int) -> np.ndarray:
        """Rows [batch_size] of the batch with this index, which may lie beyond ``total_steps``."""
        if index < len(self._stored):
            return np.asarray(self._stored[index], dtype=np.int64)
        while index >= len(self._drawn):
            self._draw_pass()
        return self._drawn[index]

    def next_batch(self) -> list[str]:
        rows = self.batch_rows(self.step)
        self.step += 1
        return [self.prompt_ids[i] for i in rows]

    def state_dict(self) -> dict[str, Any]:
        return self._base_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_state(state)
        self.step = int(state["step"])

    def metrics(self) -> dict[str, float]:
        if not self.step:
            return {}
        per_pass = max(1, len(self.prompt_ids) // self.batch_size)
        return {"epoch": self.step / per_pass, **self._mean_of(self.batch_rows(self.step - 1))}

    def _draw_pass(self) -> None:
        rng = np.random.Generator(np.random.PCG64([self.seed, self._passes]))
        self._passes += 1
        n_rows = len(self.prompt_ids)
        if n_rows < self.batch_size:
            self._drawn.append(np.resize(rng.permutation(n_rows), self.batch_size))
            return
        left = self.total_steps - len(self._drawn)
        count = n_rows // self.batch_size
        if left > 0:
            count = min(count, left)
        fewest = np.lexsort((rng.random(n_rows), self._visits))
        rows = fewest[: count * self.batch_size]
        self._visits[rows] += 1
        order, what = self._entry.order, f"schedule {self.schedule}"
        made = plugins.call(what, lambda: order(rows.copy(), self.batch_size, rng, self.table, self.cfg))
        self._drawn.extend(_checked(made, rows, self.batch_size, what))

    @cached_property
    def _entry(self) -> Schedule:
        entry = get_schedule(self.schedule)
        if entry is None:
            raise SaerlError(f"plan.schedule={self.schedule} is not a static schedule; use build_plan")
        return entry


def _checked(made: Any, rows: np.ndarray, batch_size: int, what: str) -> np.ndarray:
    """What an order returned, int64 [m / batch_size, batch_size], when it is a permutation of ``rows``."""
    try:
        batches = np.asarray(made)
    except ValueError:  # lists of different lengths
        batches = np.empty(0)
    shape = (len(rows) // batch_size, batch_size)
    if batches.shape != shape or not np.issubdtype(batches.dtype, np.integer):
        got = type(made).__name__ if made is None else f"{batches.dtype} {list(batches.shape)}"
        raise SaerlError(f"{what} returned {got}; return the rows as integers {list(shape)}, a batch a line")
    if not np.array_equal(np.sort(batches, axis=None), np.sort(rows)):
        raise SaerlError(f"{what} must return each of the given rows once; it repeats, drops or adds some")
    return batches.astype(np.int64, copy=False)
