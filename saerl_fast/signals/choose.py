"""Which prompts to label: at random, or such that all others are well explained by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from saerl_fast.records.spilled import permutation
from saerl_fast.signals.bank import Bank
from saerl_fast.signals.ridge import NOISE, SIGNAL, Block

CANDIDATES = 2000  # prompts that `spread` chooses among: its cost is quadratic in them


def spread_rows(bank: Bank, count: int, features: Sequence[str] | None, seed: int) -> np.ndarray:
    """``count`` rows (all of a smaller pool) by `spread` among a seeded sample, the most telling first."""
    some = permutation(np.random.default_rng([seed, 1]), bank.n_rows)[: max(CANDIDATES, 2 * count)]
    blocks = bank.blocks(bank.names(features, "difficulty.features"), some)
    return some[spread(blocks, np.arange(len(some)), count)]


def spread(blocks: Mapping[str, Block], rows: np.ndarray, count: int) -> np.ndarray:
    """Positions in ``rows`` of ``count`` rows whose labels reduce the variance of all rows' predictions most.

    Chosen one after the other (Yu, Bi and Tresp, Active learning via transductive experimental design, ICML
    2006), under the variances that the regression expects before it has seen a label.
    """
    K = np.sum([block.kernel(rows) for block in blocks.values()], axis=0) / len(blocks)
    noise, found, free = NOISE / SIGNAL, [], np.ones(len(rows), dtype=bool)
    for _ in range(min(count, len(rows))):
        gain = np.where(free, np.square(K).sum(axis=0) / (np.diag(K) + noise), -np.inf)
        best = int(gain.argmax())
        found.append(best)
        free[best] = False
        column = K[:, best].copy()
        K -= np.outer(column, column / (column[best] + noise))
    return np.array(found)
