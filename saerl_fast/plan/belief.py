"""What is believed of a prompt's pass rate, and what a group of rollouts of it is worth.

A prediction mu counts like kappa rollouts, and the rollouts seen so far, s passed and f failed, are added:
Beta(a, b) with a = kappa mu + s, b = kappa (1 - mu) + f. A group of G rollouts carries a gradient when
neither all pass nor all fail. The chance of that,

    worth(a, b) = 1 - B(a + G, b) / B(a, b) - B(a, b + G) / B(a, b),

is greatest where mu is near 1/2, and grows with doubt. kappa says how far predictions can be trusted:
infinite, the rollouts seen say nothing more; near 0, nothing but them counts, as in MoPPS (Qu et al., 2025,
"Can prompt difficulty be online predicted for accelerating RL finetuning of reasoning models?").
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import betaln

CELLS = 512  # of the line on which the worth of prompts without rollouts is interpolated
KAPPAS = 2.0 ** np.arange(-1, 8)  # rollouts that a prediction may count for
USUAL, SPREAD = 8.0, 1.0  # where log2 kappa is expected, before anything is seen, and its deviation
TINY = 1e-9
GONE = 0.1  # rollouts left of a prompt's after fading, below which they are forgotten
MANY = 1 << 14  # prompts above which a choice looks at those of great noise first
SHORT = 64  # rollouts of a group up to which a product is faster
LEAST = 8  # uniform groups, older ones faded, before choice and chance are compared


def worth(a: np.ndarray, b: np.ndarray, group: int) -> np.ndarray:
    """float64: the chance that ``group`` rollouts differ, under Beta(a, b)."""
    a, b = np.maximum(a, TINY), np.maximum(b, TINY)
    if group <= SHORT:  # B(a + G, b) / B(a, b) = prod over i < G of (a + i) / (a + b + i)
        passed, failed, total = a / (a + b), b / (a + b), a + b
        for i in range(1, group):
            passed, failed = passed * ((a + i) / (total + i)), failed * ((b + i) / (total + i))
    else:
        known = betaln(a, b)
        passed, failed = np.exp(betaln(a + group, b) - known), np.exp(betaln(a, b + group) - known)
    return np.clip(1.0 - passed - failed, 0.0, 1.0)


class Prior:
    """``worth`` of prompts without rollouts; it falls with the distance of their prediction from 1/2."""

    def __init__(self, kappa: float, group: int) -> None:
        self.kappa, self.group = kappa, group
        mu = 0.5 + 0.5 * np.arange(CELLS + 1) / CELLS
        self._at = np.minimum.accumulate(worth(kappa * mu, kappa * (1 - mu), group))
        self._step = np.append(np.diff(self._at), 0.0)

    def __call__(self, distance: np.ndarray) -> np.ndarray:
        """float64, of distances from 0 to 1/2, on lines between ``CELLS`` + 1 exact values."""
        place = np.minimum(distance * (2.0 * CELLS), CELLS)
        cell = place.astype(np.int64)
        return self._at[cell] + (place - cell) * self._step[cell]

    def updated(self, predicted: np.ndarray, passed: np.ndarray, failed: np.ndarray) -> np.ndarray:
        """float64, ``worth`` of prompts with rollouts."""
        return worth(self.kappa * predicted + passed, self.kappa * (1 - predicted) + failed, self.group)


class Counts:
    """Passed and failed rollouts of prompts; a step multiplies them by ``fading``.

    ``table`` float64 [n, 4]: row, ascending; step of its last group; passed and failed until then.
    """

    def __init__(self, fading: float) -> None:
        self.fading, self.table = fading, np.zeros((0, 4))

    def rows(self) -> np.ndarray:
        """int64, the rows that have any, ascending."""
        return self.table[:, 0].astype(np.int64)

    def of(self, rows: np.ndarray, step: int) -> np.ndarray:
        """float64 [n, 2]: passed and failed rollouts of ``rows`` that count in a step."""
        found = np.zeros((len(rows), 2))
        at = np.searchsorted(self.table[:, 0], rows)
        known = np.flatnonzero(at < len(self.table))
        known = known[self.table[at[known], 0] == rows[known]]
        entries = self.table[at[known]]
        found[known] = entries[:, 2:] * self.fading ** (step - entries[:, 1:2])
        return found

    def add(self, rows: np.ndarray, passed: np.ndarray, failed: np.ndarray, step: int) -> None:
        """Add the groups of a step; what has faded below ``GONE`` is forgotten."""
        each, place = np.unique(rows, return_inverse=True)
        counts = self.of(each, step)
        np.add.at(counts, place, np.stack([passed, failed], axis=1))
        fresh = np.column_stack([each, np.full(len(each), step), counts])
        left = self.table[:, 2:].sum(axis=1) * self.fading ** (step - self.table[:, 1])
        stay = (left > GONE) & ~np.isin(self.table[:, 0], each)
        together = np.concatenate([self.table[stay], fresh])
        self.table = together[np.argsort(together[:, 0])]


class Trust:
    """kappa by empirical Bayes: the one under which the pass rates seen were likeliest before they were seen.

    ``evidence`` float64 [len(KAPPAS)]: the log-probability (beta-binomial) of all groups so far under each,
    where older steps fade.
    """

    def __init__(self) -> None:
        self.evidence: np.ndarray = np.zeros(len(KAPPAS))

    def kappa(self) -> float:
        expected = -0.5 * (np.log2(KAPPAS / USUAL) / SPREAD) ** 2
        return float(KAPPAS[np.argmax(self.evidence + expected)])

    def observe(
        self, predicted: np.ndarray, counts: np.ndarray, rates: np.ndarray, group: int, fading: float
    ) -> None:
        """A step's groups: predicted, counts (passed, failed) before it [n, 2], and pass rates [n]."""
        a = np.maximum(KAPPAS * predicted[:, None] + counts[:, :1], TINY)
        b = np.maximum(KAPPAS * (1 - predicted[:, None]) + counts[:, 1:], TINY)
        passed = group * rates[:, None]
        likely = betaln(a + passed, b + group - passed) - betaln(a, b)
        self.evidence = fading * self.evidence + likely.sum(axis=0)


class Guard:
    """Whether chosen prompts are informative more often than prompts drawn uniformly.

    ``seen`` float64 [2, 2]: groups, and those that carried a gradient, among chosen and uniform ones.
    """

    def __init__(self) -> None:
        self.seen: np.ndarray = np.zeros((2, 2))

    def observe(self, uniform: np.ndarray, rates: np.ndarray, fading: float) -> None:
        """A step's groups: whether each was drawn uniformly, and pass rates; older steps fade."""
        self.seen *= fading
        informative = (rates > 0) & (rates < 1)
        for kind, among in enumerate((~uniform, uniform)):
            self.seen[kind] += among.sum(), (among & informative).sum()

    def shares(self) -> np.ndarray:
        """float64 [2], of chosen and uniform groups; NaN where none was seen."""
        with np.errstate(invalid="ignore"):
            return self.seen[:, 1] / np.where(self.seen[:, 0] > 0, self.seen[:, 0], np.nan)

    def holds(self) -> bool:
        """False where the share of the chosen ones is lower by more than a standard error."""
        if self.seen[1, 0] < LEAST:
            return True
        share = (self.seen[:, 1] + 1) / (self.seen[:, 0] + 2)
        error = np.sqrt((share * (1 - share) / (self.seen[:, 0] + 3)).sum())
        return bool(share[0] + error >= share[1])


def best(utility: np.ndarray, groups: np.ndarray | None, most: int, size: int) -> np.ndarray:
    """The ``size`` rows of greatest ``utility`` [n], int64, best first, at most ``most`` of one group.

    ``groups``: integer [n], or None. Rows at -inf are out; where groups leave too few, their limit is off.
    """
    first, n_rows = 4 * size + 1, len(utility)
    while True:
        first = min(first, n_rows)
        rows = np.flatnonzero(utility >= np.partition(utility, n_rows - first)[n_rows - first])
        rows = rows[np.lexsort((rows, -utility[rows]))]
        rows = rows[utility[rows] > -np.inf]
        kept = rows[capped(rows, groups, most)]
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


def capped(rows: np.ndarray, groups: np.ndarray | None, most: int) -> np.ndarray:
    """bool [len(rows)]: which of the rows, best first, are among the first ``most`` of their group."""
    if groups is None:
        return np.ones(len(rows), dtype=bool)
    of = groups[rows]
    order = np.argsort(of, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(of[order]) != 0])
    turn = np.empty(len(of), dtype=np.int64)
    turn[order] = np.arange(len(of)) - np.repeat(starts, np.diff(np.r_[starts, len(of)]))
    return turn < most


def among(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether each row is one of ``others``, which are sorted."""
    if not len(others):
        return np.zeros(len(rows), dtype=bool)
    return others[np.minimum(np.searchsorted(others, rows), len(others) - 1)] == rows
