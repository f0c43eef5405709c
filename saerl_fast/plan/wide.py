"""The adaptive choice from a pool too large to look at every row in every step.

The rule is the plain one, the greatest ``noise * Gumbel + worth``, over the candidates of the step: ``MOST``
rows drawn at random; the shortlist, of predictions that lay nearest to 1/2 when they were last looked at; and
the rows with rollouts of their own. In a pool of which more than about one row in five hundred is worth as
much as the best, the batch is that of all rows; of rarer ones the shortlist gathers more with every step. No
step takes longer in a larger pool, the first included, and all that a step leaves behind is the shortlist.

The noise of all rows is independent, but only that of candidates is drawn: the greatest of n exponential
variables one after the other (Rényi, On the theory of order statistics, 1953), then, since an exponential
variable has no memory, those of the others on top of the last (as in A* sampling, Maddison, Tarlow and Minka,
2014). So rows come greatest noise first, and where no later one can be better, the rest is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from saerl_fast.plan.choice import Quota, among, capped

MOST = 1 << 15  # rows drawn in a step, of which repeated ones count once
PART = 1 << 13  # of them looked at together
SHORT = 1 << 12  # rows of the shortlist, at least
BLOCK = 1 << 11  # rows that fit the cache


class Candidates(NamedTuple):
    """Where a step looks: ``rows`` float32 [n, d] of the pool, and of it int64, ascending, ``short``, the
    shortlist, of which ``room`` are kept, and ``known``, which have a worth of their own, ``worth`` float64.
    """

    rows: np.ndarray
    short: np.ndarray
    room: int
    known: np.ndarray
    worth: np.ndarray


class Draw(NamedTuple):
    """Distinct random rows int64 [m] and, ascending, the m least of n exponential variables, float64 [m].

    - log of these is Gumbel noise, greatest first. ``ordered``: the rows ascending; ``place``: in ``rows``.
    """

    rows: np.ndarray
    least: np.ndarray
    ordered: np.ndarray
    place: np.ndarray


def room(size: int, cooldown: int) -> int:
    """Rows of the shortlist: as many again as may be waiting."""
    return max(SHORT, 2 * size * (cooldown + 1))


def choose(
    pool: Candidates,
    weights: np.ndarray,
    worth: Callable[[np.ndarray], np.ndarray],
    scale: float,
    size: int,
    waiting: np.ndarray,
    quota: Quota | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """The best ``size`` candidates int64, best first, without the ``waiting`` ones; and the next shortlist.

    ``weights`` float32 [d + 1], the last one the bias, as in ``predicted = clip(row @ weights + 0.5, 0, 1)``;
    ``worth`` falls with the distance of a prediction from 1/2; ``scale`` of the noise; ``waiting`` int64,
    ascending, at least ``size`` rows fewer than the pool has; ``quota``, if others are left among the
    candidates.
    """
    if not size:
        return np.empty(0, dtype=np.int64), pool.short
    drawn = draw(len(pool.rows), max(MOST, 16 * size), rng)
    noise, limit = -scale * np.log(drawn.least), float(worth(np.zeros(1))[0])
    first = np.sort(np.concatenate([pool.short, pool.known[~among(pool.known, pool.short)]]))
    at = np.searchsorted(drawn.ordered[:-1], first)
    later = -scale * np.log(drawn.least[-1] + rng.exponential(size=len(first)))
    later = np.where(drawn.ordered[at] == first, noise[drawn.place[at]], later)
    found, utility, worst = np.empty(0, dtype=np.int64), np.empty(0), -np.inf
    looked: list[tuple[np.ndarray, ...]] = []  # rows, distances, utilities

    def look(rows: np.ndarray, drawn_noise: np.ndarray, value: np.ndarray, distance: np.ndarray) -> None:
        nonlocal found, utility, worst
        total = drawn_noise + value
        looked.append((rows, distance, total))
        may = np.flatnonzero(total >= worst)
        may = may[~among(rows[may], waiting)]
        rows, total = np.concatenate([found, rows[may]]), np.concatenate([utility, total[may]])
        order = np.lexsort((rows, -total))
        best = order[capped(rows[order], quota)][:size]
        found, utility = rows[best], total[best]
        worst = utility[-1] if len(found) == size else -np.inf

    distance = _distance(pool.rows, first, weights)
    value = worth(distance)
    value[np.searchsorted(first, pool.known)] = pool.worth
    look(first, later, value, distance)
    for start in range(0, len(drawn.rows), PART):
        if noise[start] + limit < worst:
            break
        part = drawn.rows[start : start + PART]
        fresh = ~among(part, first)
        distance = _distance(pool.rows, part[fresh], weights)
        look(part[fresh], noise[start : start + PART][fresh], worth(distance), distance)
    rows, distance, total = (np.concatenate(parts) for parts in zip(*looked, strict=True))
    if len(found) < size:  # the quota leaves too few
        rest = ~among(rows, np.union1d(waiting, found))
        order = np.lexsort((rows[rest], -total[rest]))[: size - len(found)]
        found = np.concatenate([found, rows[rest][order]])
    if len(rows) > pool.room:
        rows = rows[np.argpartition(distance, pool.room)[: pool.room]]
    return found, np.sort(rows)


def draw(n_rows: int, count: int, rng: np.random.Generator) -> Draw:
    """The distinct ones of ``count`` random rows, with the noise of as many; all rows where they are few."""
    if n_rows <= 2 * count:
        rows = rng.permutation(n_rows)
        ordered, place = np.arange(n_rows), np.argsort(rows)
    else:
        rows = rng.integers(0, n_rows, count)
        keys = np.sort(rows * count + np.arange(count))  # faster than a sort of places
        ordered = keys // count
        once = np.append(True, ordered[1:] != ordered[:-1])
        ordered, place = ordered[once], keys[once] % count
        kept = np.zeros(count, dtype=np.int64)
        kept[place] = 1
        rows, place = rows[kept == 1], np.cumsum(kept)[place] - 1
    gaps = rng.exponential(size=len(rows)) / (n_rows - np.arange(len(rows)))
    return Draw(rows, np.maximum(np.cumsum(gaps), np.finfo(np.float64).tiny), ordered, place)


def _distance(rows: np.ndarray, at: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 distances from 1/2, to the last bit the same in whichever company a row comes."""
    scores, held = np.empty(len(at), dtype=np.float32), np.empty((BLOCK, rows.shape[1]), dtype=np.float32)
    for first in range(0, len(at), BLOCK):
        part = at[first : first + BLOCK]
        block = np.take(rows, part, axis=0, out=held[: len(part)], mode="clip")
        np.einsum("ij,j->i", block, weights[:-1], out=scores[first : first + BLOCK])
    return np.abs(np.clip(scores.astype(np.float64) + float(weights[-1]) + 0.5, 0.0, 1.0) - 0.5)
