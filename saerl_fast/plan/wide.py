"""The adaptive choice from a pool too large to look at every row in every step.

The rule is the plain one: the rows with the greatest ``noise * Gumbel + worth``, where the worth of rows
without rollouts falls with ``|predicted - 1/2|``; those with rollouts are few, and come with theirs. Two
orders in which few rows need be looked at lead to the same batch, as in the threshold algorithm (Fagin,
Lotem and Naor, 2003), with noise that is drawn from the top down (Maddison, Tarlow and Minka, A* sampling,
2014):

* by noise. The row of every rank of the noise is computed, not stored (``Noise``), so rows come greatest
  noise first, and all rows not seen yet have less.
* by distance. Rows lie in segments, and sorted by an earlier prediction in them. Weights that moved by ``dw``
  since then moved no prediction by more than ``|row| |dw|``: this bounds the distance of each bucket of rows.

Once the bound on all rows that were not looked at lies below the batch found, the batch is the one that a
scan of all rows gives. Where the bounds are too loose, whole segments are scored again, at worst all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from saerl_fast.plan.belief import capped

BUCKET = 256  # rows that share a bound
SEGMENT = BUCKET << 8  # rows scored at a time, and sorted among themselves
FIRST = 1 << 13  # ranks looked at before the first look at the bounds ...
MOST = 1 << 19  # ... and at most, before segments are scored again
LOOSE = 0.1  # share of a segment's buckets that come into question, from which it is scored again
BLOCK = 1 << 13  # rows held in float64 at a time
NONE = np.empty(0, dtype=np.int64), np.empty(0)


class Noise:
    """``scale`` times standard Gumbel noise of rows 0 .. n-1, by row and by rank (0 is the greatest).

    Nothing is stored. A random bijection of 2^bits > 4n places gives a row its rank; the rank, with a random
    fraction, is the quantile. Each row's noise is exactly Gumbel; that of different rows is a little less
    than independent, as in any draw without replacement, here of at most a quarter of the places.
    """

    def __init__(self, n_rows: int, scale: float, rng: np.random.Generator) -> None:
        bits = n_rows.bit_length() + 2
        self.n_rows, self.scale, self.places = n_rows, scale, 1 << bits
        self._mask, self._shift = np.uint64(self.places - 1), np.uint64((bits + 1) // 2)
        self._add = rng.integers(0, self.places, 4, dtype=np.uint64)
        self._factor = rng.integers(0, self.places, 4, dtype=np.uint64) | np.uint64(1)
        inverse = [pow(int(factor), -1, self.places) for factor in self._factor]
        self._inverse = np.array(inverse, dtype=np.uint64)

    def ranks(self, rows: np.ndarray) -> np.ndarray:
        """uint64, of rows of any integer type."""
        x = rows.astype(np.uint64)
        for add, factor in zip(self._add, self._factor, strict=True):
            x = ((x + add) * factor) & self._mask
            x ^= x >> self._shift  # its own inverse: the shift is at least half of the bits
        return x

    def rows(self, start: int, stop: int) -> np.ndarray:
        """int64, the rows of ranks ``start`` to ``stop``, greatest noise first."""
        x = np.arange(start, min(stop, self.places), dtype=np.uint64)
        for add, inverse in zip(self._add[::-1], self._inverse[::-1], strict=True):
            x ^= x >> self._shift
            x = (x * inverse - add) & self._mask
        return x[x < self.n_rows].astype(np.int64)

    def of(self, ranks: np.ndarray) -> np.ndarray:
        """float64 noise of rows of these ranks."""
        fraction = (((ranks * self._factor[0] + self._add[0]) & self._mask) + 0.5) / self.places
        return self._at(ranks + fraction)

    def below(self, rank: int) -> float:
        """What no noise of this rank or a later one exceeds."""
        return float(self._at(np.float64(rank))) + 1e-9

    def _at(self, place: np.ndarray | np.float64) -> np.ndarray:
        quantile = np.minimum(place / self.places, 1 - 2.0**-53)
        return -self.scale * np.log(-np.log1p(-np.maximum(quantile, 0.1 / self.places)))


class Wide:
    """Chooses from ``rows`` float32 [n, d], of which it keeps no copy: 4 bytes a row and a few a bucket."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows
        n_rows, width = rows.shape
        self._order = np.arange(n_rows, dtype=np.int32)
        self._segments = [slice(at, min(at + SEGMENT, n_rows)) for at in range(0, n_rows, SEGMENT)]
        self._segment = np.arange(0, n_rows, BUCKET) // SEGMENT  # of each bucket
        self._low = np.zeros(len(self._segment))  # least score of a bucket, with the weights below
        self._high = np.zeros(len(self._segment))
        self._scored = np.zeros((len(self._segments), width + 1))  # weights that each segment was scored with
        squares = [np.einsum("ij,ij->i", rows[part], rows[part]).max() for part in self._segments]
        self._norm = np.sqrt(np.array(squares, dtype=np.float64))  # the greatest in each segment
        self._changed: dict[int, None] = {}  # rows written to since their segment was scored
        self._turn = 0
        self.looked_at = 0  # rows read by the last choice, those of segments scored again included

    def changed(self, rows: Iterable[int]) -> None:
        """Must be told of every row that is written to."""
        self._changed.update(dict.fromkeys(map(int, rows)))

    def choose(
        self,
        weights: np.ndarray,
        worth: Callable[[np.ndarray], np.ndarray],
        noise: Noise,
        size: int,
        waiting: np.ndarray,
        known: tuple[np.ndarray, np.ndarray] = NONE,
        groups: np.ndarray | None = None,
        most: int = 0,
    ) -> np.ndarray:
        """The best ``size`` rows, int64, best first, without the ``waiting`` ones (sorted).

        ``weights`` [d + 1], the last one the bias, as in ``predicted = clip(row @ weights + 0.5, 0, 1)``.
        ``worth`` falls with the distance of a prediction from 1/2; ``known``: rows, sorted, which have a
        worth of their own, and it. At most ``most`` rows of one of ``groups`` [n], if others are left.
        """
        self.looked_at = 0
        self._turn = (self._turn + 1) % len(self._segments)
        self._score(self._turn, weights)  # so that bounds do not all become loose at once
        bounds = self._bounds(slice(None), weights, worth)
        found, utility = known[0][:0].astype(np.int64), np.empty(0)
        seen, until, worst = 0, max(FIRST, 16 * size), -np.inf
        skipped = np.union1d(waiting, known[0])

        def keep(rows: np.ndarray, value: np.ndarray) -> None:
            nonlocal found, utility, worst
            rows, value = np.concatenate([found, rows]), np.concatenate([utility, value])
            order = np.lexsort((rows, -value))
            best = order[capped(rows[order], groups, most)][:size]
            found, utility = rows[best], value[best]
            worst = utility[-1] if len(found) == size else -np.inf

        def look(rows: np.ndarray, ranks: np.ndarray, highest: np.ndarray | float) -> None:
            drawn = noise.of(ranks)
            may = (drawn + highest >= worst) & ~_among(rows, skipped)
            keep(rows[may], drawn[may] + worth(self._distance(rows[may], weights)))

        free = ~_among(known[0], waiting)
        keep(known[0][free], noise.of(noise.ranks(known[0][free])) + known[1][free])
        near = np.ones(len(bounds), dtype=bool)
        while seen < noise.places:
            rows = noise.rows(seen, until)
            look(rows, noise.ranks(rows), 1.0)
            seen, until = until, 2 * until
            if len(found) == size:
                near = bounds + noise.below(seen) >= worst
                if seen >= MOST or near.sum() * BUCKET <= 8 * seen:
                    break
        else:
            if len(found) < min(size, noise.n_rows - len(waiting)):  # groups leave too few
                rest = np.union1d(waiting, found)
                more = self.choose(weights, worth, noise, size - len(found), rest, known)
                found = np.concatenate([found, more])
            return found

        def look_unseen(rows: np.ndarray, highest: np.ndarray | float) -> None:
            ranks = noise.ranks(rows)
            rest = ranks >= seen
            look(rows[rest], ranks[rest], highest if isinstance(highest, float) else highest[rest])

        for at, part in enumerate(self._segments):
            buckets = slice(part.start // BUCKET, -(-part.stop // BUCKET))
            near = bounds[buckets] + noise.below(seen) >= worst
            if near.mean() > LOOSE:
                self._score(at, weights)
                bounds[buckets] = self._bounds(buckets, weights, worth)
                near = bounds[buckets] + noise.below(seen) >= worst
            if near.any():
                each = np.repeat(near, BUCKET)[: part.stop - part.start]
                highest = np.repeat(bounds[buckets], BUCKET)[: len(each)]
                look_unseen(self._order[part][each].astype(np.int64), highest[each])
        rest = np.setdiff1d(np.fromiter(self._changed, dtype=np.int64, count=len(self._changed)), found)
        look_unseen(rest, 1.0)
        return found

    def _distance(self, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """float64, to the last bit the same with whichever rows a row is asked for."""
        self.looked_at += len(rows)
        scores = np.empty(len(rows))
        precise = weights[:-1].astype(np.float64)
        for at in range(0, len(rows), BLOCK):
            part = self._rows[rows[at : at + BLOCK]].astype(np.float64)
            scores[at : at + BLOCK] = np.einsum("ij,j->i", part, precise)
        return np.abs(np.clip(scores + float(weights[-1]) + 0.5, 0.0, 1.0) - 0.5)

    def _score(self, at: int, weights: np.ndarray) -> None:
        """Sort a segment by its scores with these weights."""
        part = self._segments[at]
        self.looked_at += part.stop - part.start
        scores = self._rows[part] @ weights[:-1]
        order = np.argsort(scores)
        self._order[part] = order + part.start
        scores = scores[order]
        buckets = slice(part.start // BUCKET, -(-part.stop // BUCKET))
        self._low[buckets] = scores[::BUCKET]
        self._high[buckets] = np.append(scores[BUCKET - 1 :: BUCKET], scores[-1:])[: len(scores[::BUCKET])]
        self._scored[at] = weights
        rows = [row for row in self._changed if part.start <= row < part.stop]
        if rows:
            self._norm[at] = max(self._norm[at], np.linalg.norm(self._rows[rows], axis=1).max())
            for row in rows:
                del self._changed[row]

    def _bounds(
        self, buckets: slice, weights: np.ndarray, worth: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """float64, what no row of a bucket is worth more than; changed rows apart."""
        moved = np.linalg.norm(weights[:-1] - self._scored[:, :-1], axis=1)
        size = np.linalg.norm(weights[:-1]) + np.linalg.norm(self._scored[:, :-1], axis=1)
        moved += 2 * len(weights) * np.finfo(np.float32).eps * size  # rounding of the float32 products
        slack = ((1 + 1e-6) * moved * self._norm)[self._segment[buckets]] + 1e-6
        middle = float(weights[-1]) + 0.5
        low = np.clip(self._low[buckets] + middle - slack, 0.0, 1.0)
        high = np.clip(self._high[buckets] + middle + slack, 0.0, 1.0)
        return worth(np.maximum(0.0, np.maximum(low - 0.5, 0.5 - high) - 1e-9)) + 1e-9


def _among(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether each row is one of ``others``, which are sorted."""
    if not len(others):
        return np.zeros(len(rows), dtype=bool)
    return others[np.minimum(np.searchsorted(others, rows), len(others) - 1)] == rows
