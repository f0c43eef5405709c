"""The adaptive choice from a pool too large to look at every row in every step.

The rule is the plain one, the greatest ``noise * Gumbel - |predicted - target|``, over the candidates of the
step: ``MOST`` rows drawn at random, and the shortlist, those that lay nearest to the target when they were
last looked at. In a pool of which more than about one row in five hundred lies near the target, the batch is
that of all rows; of rarer ones the shortlist gathers more with every step. No step takes longer in a larger
pool, the first included, and all that a step leaves behind is the shortlist.

The noise of all rows is independent, but only that of candidates is drawn: the greatest of n exponential
variables one after the other (Rényi, On the theory of order statistics, 1953), then, since an exponential
variable has no memory, those of the others on top of the last (as in A* sampling, Maddison, Tarlow and Minka,
2014). So rows come greatest noise first, and where no later one can be better, the rest is not looked at.
"""

from __future__ import annotations

import numpy as np

MOST = 1 << 15  # rows drawn in a step, of which repeated ones count once
PART = 1 << 13  # of them looked at together
SHORT = 1 << 12  # rows of the shortlist, at least
BLOCK = 1 << 11  # rows that fit the cache


def room(size: int, cooldown: int) -> int:
    """Rows of the shortlist: as many again as may be waiting."""
    return max(SHORT, 2 * size * (cooldown + 1))


def choose(
    rows: np.ndarray,
    weights: np.ndarray,
    target: float,
    scale: float,
    size: int,
    waiting: np.ndarray,
    short: np.ndarray,
    short_room: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """The best ``size`` candidates int64, best first, without the ``waiting`` ones; and the next shortlist.

    ``rows`` float32 [n, d], n at least ``size`` more than are waiting; ``weights`` float32 [d + 1], the last
    one the bias, as in ``predicted = clip(row @ weights + 0.5, 0, 1)``; ``scale`` of the Gumbel noise;
    ``waiting`` and ``short`` int64, ascending.
    """
    drawn, later, ordered = draw(len(rows), max(MOST, 16 * size), rng)
    rest = short[~_among(short, ordered)]
    noise = -scale * np.log(later)
    last = -scale * np.log(later[-1] + rng.exponential(size=len(rest)))
    seen, away = [rest], [_distance(rows, rest, weights, target)]
    found, utility = _best(rest, last - away[0], size, waiting)
    for at in range(0, len(drawn), PART):
        full = len(found) == size
        if full and noise[at] < utility[-1]:
            break
        part = drawn[at : at + PART]
        seen.append(part)
        away.append(_distance(rows, part, weights, target))
        value = noise[at : at + PART] - away[-1]
        may = value >= (utility[-1] if full else -np.inf)
        better = np.concatenate([found, part[may]]), np.concatenate([utility, value[may]])
        found, utility = _best(*better, size, waiting)
    looked_at, distance = np.concatenate(seen), np.concatenate(away)
    if len(looked_at) > short_room:
        looked_at = looked_at[np.argpartition(distance, short_room)[:short_room]]
    return found, np.sort(looked_at)


def draw(n_rows: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct ones of ``count`` random rows, int64; the least of ``n_rows`` exponential variables,
    float64 ascending: - log of them is the greatest Gumbel noise first; the same rows in order.
    """
    if n_rows <= 2 * count:
        drawn, ordered = rng.permutation(n_rows), np.arange(n_rows)
    else:
        drawn = rng.integers(0, n_rows, count)
        keys = np.sort(drawn * count + np.arange(count))  # faster than a sort of places
        ordered = keys // count
        first = np.append(True, ordered[1:] != ordered[:-1])
        ordered, drawn = ordered[first], drawn[np.sort(keys[first] % count)]
    gaps = rng.exponential(size=len(drawn)) / (n_rows - np.arange(len(drawn)))
    return drawn, np.maximum(np.cumsum(gaps), np.finfo(np.float64).tiny), ordered


def _best(
    rows: np.ndarray, utility: np.ndarray, size: int, waiting: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of greatest utility that need not wait, best first; of equal ones the lower row."""
    able = np.flatnonzero(~_among(rows, waiting))
    if len(able) > 4 * size:  # equal ones of the least stay
        able = able[utility[able] >= -np.partition(-utility[able], size - 1)[size - 1]]
    best = able[np.lexsort((rows[able], -utility[able]))[:size]]
    return rows[best], utility[best]


def _among(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether each row is one of ``others``, which are sorted."""
    if not len(others):
        return np.zeros(len(rows), dtype=bool)
    return others[np.minimum(np.searchsorted(others, rows), len(others) - 1)] == rows


def _distance(rows: np.ndarray, at: np.ndarray, weights: np.ndarray, target: float) -> np.ndarray:
    """float64 distances to the target, to the last bit the same in whichever company a row comes."""
    scores, held = np.empty(len(at), dtype=np.float32), np.empty((BLOCK, rows.shape[1]), dtype=np.float32)
    for first in range(0, len(at), BLOCK):
        part = at[first : first + BLOCK]
        block = np.take(rows, part, axis=0, out=held[: len(part)], mode="clip")
        np.einsum("ij,j->i", block, weights[:-1], out=scores[first : first + BLOCK])
    return np.abs(np.clip(scores.astype(np.float64) + float(weights[-1]) + 0.5, 0.0, 1.0) - target)
