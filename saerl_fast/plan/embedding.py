"""Dense features of the prompts, small enough to be read in every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from saerl_fast.config import AdaptiveConfig
from saerl_fast.signals.bank import Bank
from saerl_fast.signals.features import SAMPLE, Features, block, blocks, checked, svd_reduce, weighted
from saerl_kernels import CSR, csr

BLOCK = 1 << 14  # rows worked on at a time where all are


class Embedding(NamedTuple):
    """Dense prompt features and what is needed to embed more rows in the same way.

    rows float32 [n, d]: ``(weighted features @ components.T - mean) * scale``, centred, with mean
    squared norm 1, so that ``ridge`` means the same for every SAE; idf float32 [n_cols];
    components float32 [d, n_cols]; mean float32 [d]; scale float.
    """

    rows: np.ndarray
    idf: np.ndarray
    components: np.ndarray
    mean: np.ndarray
    scale: float

    def project(self, X: CSR) -> np.ndarray:
        """float32 [n_rows, d] for pooled features of the same SAE."""
        rows = weighted(checked(X), torch.from_numpy(self.idf)).to_scipy()
        dense = np.asarray(rows @ self.components.T, dtype=np.float32)
        return (dense - self.mean) * np.float32(self.scale)


def embed(X: Features, rows: np.ndarray, cfg: AdaptiveConfig, *, seed: int) -> Embedding:
    """The embedding of the given rows of ``X``, in ascending order, fitted to them.

    With more than ``SAMPLE`` rows, frequencies and components are those of a sample of as many.
    """
    X = checked(X)
    near = X.select_rows(torch.from_numpy(_sample(rows, SAMPLE, seed)))
    idf = csr.idf(near, floor=1.0)
    dense, components = svd_reduce(weighted(near, idf), cfg.svd, seed)
    if len(rows) > SAMPLE:
        del near
        dense = np.empty((len(rows), len(components)), dtype=np.float32)
        for at in blocks(len(rows)):
            first, last = int(rows[at][0]), int(rows[at][-1]) + 1
            part = block(X, slice(first, last)).select_rows(torch.from_numpy(rows[at] - first))
            dense[at] = weighted(part, idf).to_scipy() @ components.T
    mean, scale = _scale(dense)
    return Embedding(dense, idf.numpy(), components, mean, scale)


def embed_kinds(
    bank: Bank, names: Sequence[str], rows: np.ndarray, cfg: AdaptiveConfig, *, seed: int
) -> Embedding:
    """The same of any kinds of features, each of them standardised and of equal weight.

    Nothing of what rollouts show can be embedded in the same way: ``idf`` and ``components`` are empty.
    """
    from scipy.sparse import csr_matrix, hstack
    from sklearn.utils.extmath import randomized_svd

    made = bank.blocks(names, _sample(rows, BLOCK, seed))
    parts = [csr_matrix(b.X - b.mean if isinstance(b.X, np.ndarray) else b.X) for b in made.values()]
    joined = hstack(parts, format="csr")
    width = min(cfg.svd, *joined.shape)
    dense = np.zeros((len(rows), max(width, 1)), dtype=np.float32)
    if width:
        components = randomized_svd(joined, width, n_iter=4, random_state=seed)[2]
        edges = np.cumsum([part.shape[1] for part in parts])[:-1]
        for at in blocks(len(rows)):
            for (name, b), V in zip(made.items(), np.split(components, edges, axis=1), strict=True):
                dense[at] += bank.kinds[name](rows[at])[:, b.kept] @ (V * b.factor).T
    mean, scale = _scale(dense)
    return Embedding(dense, np.zeros(0, np.float32), np.zeros((len(mean), 0), np.float32), mean, scale)


def _sample(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """``rows``, or ``most`` of them at random, in order."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def _scale(dense: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre the rows and scale them to mean squared norm 1, in place; the mean and the factor."""
    mean = dense.mean(axis=0)
    dense -= mean
    parts = (dense[at : at + BLOCK] for at in range(0, len(dense), BLOCK))
    power = float(np.concatenate([np.square(part, dtype=np.float64).sum(axis=1) for part in parts]).mean())
    scale = power**-0.5 if power > 1e-12 else 1.0
    dense *= np.float32(scale)
    return mean, scale
