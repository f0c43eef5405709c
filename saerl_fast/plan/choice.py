"""The adaptive choice: the prompts of greatest worth and Gumbel noise, no more of a cluster than its quota.

With many prompts it comes from a look at few, those of great noise and those with rollouts, wherever no other
can be better. A pool too large for a noise of every prompt: ``saerl_fast.plan.wide``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from saerl_fast.config import AdaptiveConfig
from saerl_fast.plan.rule import Rule, posterior, worth

CELLS = 512  # of the line on which the worth of prompts without rollouts is interpolated
MANY = 1 << 14  # prompts above which a choice looks at those of great noise first
NOISY = 8  # times a batch, the prompts of greatest noise that a choice from many looks at first


class Quota(NamedTuple):
    """At most ``most`` rows of a batch may be of one of ``groups``, integer [n]."""

    groups: np.ndarray
    most: int

    @classmethod
    def of(cls, clusters: np.ndarray | None, cfg: AdaptiveConfig, size: int, seed: int) -> Quota | None:
        """``quota`` * ``size`` / clusters, of shuffled ones as a control; None where there is no limit."""
        if clusters is None or not cfg.quota:
            return None
        if cfg.shuffle_clusters:
            clusters = np.random.Generator(np.random.PCG64([seed, 0, 1])).permutation(clusters)
        return cls(clusters, max(1, math.ceil(cfg.quota * size / len(np.unique(clusters)))))


class Prior:
    """``worth`` of prompts without rollouts; it falls with the distance of their prediction from 1/2."""

    def __init__(self, kappa: float, group: int) -> None:
        mu = 0.5 + 0.5 * np.arange(CELLS + 1) / CELLS
        self._at = np.minimum.accumulate(worth(*posterior(kappa, mu, np.zeros(2)), group))
        self._step = np.append(np.diff(self._at), 0.0)

    def __call__(self, distance: np.ndarray) -> np.ndarray:
        """float64, of distances from 0 to 1/2, on lines between ``CELLS`` + 1 exact values."""
        place = np.minimum(distance * (2.0 * CELLS), CELLS)
        cell = place.astype(np.int64)
        return self._at[cell] + (place - cell) * self._step[cell]


def choose(
    z: np.ndarray,
    rule: Rule,
    step: int,
    noise: float,
    size: int,
    waiting: np.ndarray,
    quota: Quota | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """The best ``size`` of all rows int64, best first, without the ``waiting`` ones, int64, ascending.

    ``z`` float32 [n, d + 1] of the whole pool; ``noise``, the scale of Gumbel's. Where the quota leaves too
    few, it is off.
    """
    prior, known, n_rows = Prior(rule.kappa, rule.group), rule.known(), len(z)

    def usual(rows: Any) -> np.ndarray:
        """float64, worth of ascending rows or slice(None)."""
        found = prior(np.abs(rule.predicted(z[rows]) - np.float32(0.5)))
        at = mine = known
        if isinstance(rows, np.ndarray):
            mine = known[among(known, rows)]
            at = np.searchsorted(rows, mine)
        found[at] = rule.worth(mine, z[mine], step)
        return found

    if n_rows <= MANY or not noise:
        drawn = noise * rng.gumbel(size=n_rows)
    else:
        chance, limit = rng.random(n_rows), float(prior(np.zeros(1))[0])
        rows, utility, others = foremost(usual, limit, noise, NOISY * size / n_rows, chance, known, waiting)
        order = np.lexsort((rows, -utility))
        kept = order[capped(rows[order], quota)][:size]
        if len(kept) == size and utility[kept].min(initial=np.inf) > others:
            return rows[kept]
        drawn = gumbel(chance, noise)
    utility = usual(slice(None)) + drawn
    utility[waiting] = -np.inf
    return best(utility, quota, size)


def uniformly(n_rows: int, size: int, taken: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of ``n_rows`` rows ``size`` that are not among ``taken``, int64, drawn without replacement."""
    out, rows = set(taken.tolist()), dict[int, None]()
    while len(rows) < size:
        row = int(rng.integers(n_rows))
        if row not in out:
            rows[row] = None
    return np.fromiter(rows, dtype=np.int64, count=size)


def best(utility: np.ndarray, quota: Quota | None, size: int) -> np.ndarray:
    """The ``size`` rows of greatest ``utility`` [n], int64, best first, under the quota.

    Rows at -inf are out; where the quota leaves too few, it is off.
    """
    first, n_rows = 4 * size + 1, len(utility)
    while True:
        first = min(first, n_rows)
        rows = np.flatnonzero(utility >= np.partition(utility, n_rows - first)[n_rows - first])
        rows = rows[np.lexsort((rows, -utility[rows]))]
        rows = rows[utility[rows] > -np.inf]
        kept = rows[capped(rows, quota)]
        if len(kept) >= size:
            return kept[:size]
        if first == n_rows:
            rest = rows[~np.isin(rows, kept)]
            return np.concatenate([kept, rest])[:size]
        first *= 4


def foremost(
    worth: Callable[[np.ndarray], np.ndarray],
    limit: float,
    noise: float,
    share: float,
    chance: np.ndarray,
    known: np.ndarray,
    waiting: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Rows int64 of great noise, ascending, their utilities, and what the utility of no other row exceeds.

    They are the rows whose ``chance`` [n] is below ``share``, and those ``known`` ones that could be better.
    ``worth`` of rows is at most ``limit``, of known ones at most 1; ``noise`` is its scale.
    """
    cut = float(gumbel(np.array([share]), noise)[0])
    loud = known[gumbel(chance[known], noise) >= cut - (1.0 - limit)]
    rows = np.union1d(np.flatnonzero(chance < share), loud)
    rows = rows[~among(rows, waiting)]
    return rows, gumbel(chance[rows], noise) + worth(rows), cut + limit


def gumbel(chance: np.ndarray, scale: float) -> np.ndarray:
    """Gumbel noise float64 of uniform ``chance``, falling with it."""
    return -scale * np.log(-np.log1p(-np.maximum(chance, np.finfo(np.float64).tiny)))


def capped(rows: np.ndarray, quota: Quota | None) -> np.ndarray:
    """bool [len(rows)]: which of the rows, best first, are among the first ``most`` of their group."""
    if quota is None:
        return np.ones(len(rows), dtype=bool)
    of = quota.groups[rows]
    order = np.argsort(of, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(of[order]) != 0])
    turn = np.empty(len(of), dtype=np.int64)
    turn[order] = np.arange(len(of)) - np.repeat(starts, np.diff(np.r_[starts, len(of)]))
    return turn < quota.most


def among(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether each row is one of ``others``, which are sorted."""
    if not len(others):
        return np.zeros(len(rows), dtype=bool)
    return others[np.minimum(np.searchsorted(others, rows), len(others) - 1)] == rows
