"""The adaptive choice: the prompts of greatest worth and Gumbel noise, no more of a cluster than its quota.

Of many prompts few are looked at, those of great noise and those with rollouts, wherever no other can be
better, and no noise of the others is drawn. A pool too large for a prediction of every prompt:
``saerl_fast.plan.wide``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

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

    @staticmethod
    @lru_cache(maxsize=16)
    def of(kappa: float, group: int) -> Prior:
        """A kept one: kappa is mostly that of the step before."""
        return Prior(kappa, group)

    def __call__(self, distance: np.ndarray) -> np.ndarray:
        """float64, of distances from 0 to 1/2, on lines between ``CELLS`` + 1 exact values."""
        place = np.minimum(distance * (2.0 * CELLS), CELLS)
        cell = place.astype(np.int64)
        return self._at[cell] + (place - cell) * self._step[cell]

    def within(self, least: float) -> float:
        """A distance past which worth is below ``least``."""
        return float(np.searchsorted(-self._at, -least, side="right")) / (2 * CELLS)


class Noise(NamedTuple):
    """Gumbel noise of this ``scale`` of many prompts, drawn where it matters.

    A prompt is loud with a chance of ``share``. The noise of ``loud`` rows, int64, ascending, is ``great``,
    above ``cut``; that of all others below it, and of ``known`` ones that are not loud ``small``.
    """

    share: float
    scale: float
    loud: np.ndarray
    great: np.ndarray
    known: np.ndarray
    small: np.ndarray
    cut: float

    @classmethod
    def draw(
        cls, n_rows: int, share: float, scale: float, known: np.ndarray, rng: np.random.Generator
    ) -> Noise:
        """Of ``n_rows`` prompts."""
        loud = np.sort(rng.choice(n_rows, rng.binomial(n_rows, share), replace=False, shuffle=False))
        great = gumbel(share * rng.random(len(loud)), scale)
        small = gumbel(share + (1 - share) * rng.random(len(known)), scale)
        return cls(share, scale, loud, great, known, small, float(gumbel(np.array([share]), scale)[0]))

    def foremost(
        self, worth: Callable[[np.ndarray], np.ndarray], limit: float, waiting: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Loud rows and known ones that could be better, ascending, their utilities, and a bound of others'.

        ``worth`` of rows is at most ``limit``, of known ones at most 1.
        """
        may = np.flatnonzero(self.small >= self.cut - (1.0 - limit))
        may = may[~among(self.known[may], self.loud)]
        rows = np.concatenate([self.loud, self.known[may]])
        order = np.argsort(rows, kind="stable")
        order = order[~among(rows[order], waiting)]
        rows = rows[order]
        return rows, np.concatenate([self.great, self.small[may]])[order] + worth(rows), self.cut + limit

    def of(self, rows: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """float64, noise of ascending ``rows``; others have it by their ``chance`` [n], uniform."""
        found = gumbel(self.share + (1 - self.share) * chance[rows], self.scale)
        for own, value in ((self.known, self.small), (self.loud, self.great)):
            at = np.flatnonzero(among(rows, own))
            found[at] = value[np.searchsorted(own, rows[at])]
        return found


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
    prior, known, n_rows = Prior.of(rule.kappa, rule.group), rule.known(), len(z)

    def distance(rows: np.ndarray | slice) -> np.ndarray:
        return np.abs(rule.predicted(z[rows]) - np.float32(0.5))

    def usual(rows: np.ndarray, far: np.ndarray) -> np.ndarray:
        """float64, worth of ascending rows, whose predictions are so far from 1/2."""
        found = prior(far)
        at = known if len(rows) == n_rows else np.flatnonzero(among(rows, known))
        found[at] = rule.worth(rows[at], z[rows[at]], step)
        return found

    share, rows, whole = NOISY * size / n_rows, np.arange(n_rows), slice(None)
    if n_rows <= MANY:
        utility = usual(rows, distance(whole)) + noise * rng.gumbel(size=n_rows)
    elif share > 0.5 or not noise:
        utility = usual(rows, distance(whole))
        utility += gumbel(rng.random(n_rows), noise) if noise else 0.0
    else:
        some = Noise.draw(n_rows, share, noise, known, rng)
        most = float(prior(np.zeros(1))[0])
        rows, utility, others = some.foremost(lambda rows: usual(rows, distance(rows)), most, waiting)
        order = np.lexsort((rows, -utility))
        kept = order[capped(rows[order], quota)][:size]
        least = utility[kept].min(initial=np.inf) if len(kept) == size else -np.inf
        if least > others:
            return rows[kept]
        far, chance = distance(whole), rng.random(n_rows)
        may = far <= prior.within(least - some.cut)  # or they are worth too little for what noise they have
        may[some.loud] = may[known] = True
        rows = np.flatnonzero(may)
        utility = usual(rows, far[rows]) + some.of(rows, chance)
    utility[waiting if len(rows) == n_rows else among(rows, waiting)] = -np.inf
    return rows[best(utility, quota and quota._replace(groups=quota.groups[rows]), size)]


def uniformly(
    n_rows: int, size: int, chosen: np.ndarray, waiting: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Of ``n_rows`` rows ``size`` int64, drawn one by one, none ``chosen`` or ``waiting``, which ascend."""
    rows, taken = np.empty(0, dtype=np.int64), np.sort(chosen)
    left = max(n_rows - len(chosen) - len(waiting), 1)
    block = min(size * n_rows // left, n_rows)  # the fewer are left, the more draws hit none of them
    while len(rows) < size:
        drawn = rng.integers(n_rows, size=block)
        rows = np.concatenate([rows, drawn[~(among(drawn, waiting) | among(drawn, taken))]])
        rows = rows[np.sort(np.unique(rows, return_index=True)[1])]
    return rows[:size]


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
