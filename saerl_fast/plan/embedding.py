"""Dense features of the prompts, small enough to be read in every step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from saerl_fast.config import AdaptiveConfig
from saerl_fast.signals.features import SAMPLE, block, blocks, checked, svd_reduce, weighted
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


def embed(X: CSR, rows: np.ndarray, cfg: AdaptiveConfig, *, seed: int) -> Embedding:
    """The embedding of the given rows of ``X``, in ascending order, fitted to them.

    With more than ``SAMPLE`` rows, frequencies and components are those of a sample of as many.
    """
    X, fitted = checked(X), rows
    if len(rows) > SAMPLE:
        fitted = np.sort(np.random.default_rng(seed).choice(rows, SAMPLE, replace=False))
    near = X.select_rows(torch.from_numpy(fitted))
    idf = csr.idf(near, floor=1.0)
    dense, components = svd_reduce(weighted(near, idf), cfg.svd, seed)
    if len(rows) > SAMPLE:
        del near
        dense = np.empty((len(rows), len(components)), dtype=np.float32)
        for at in blocks(len(rows)):
            first, last = int(rows[at][0]), int(rows[at][-1]) + 1
            part = block(X, slice(first, last)).select_rows(torch.from_numpy(rows[at] - first))
            dense[at] = weighted(part, idf).to_scipy() @ components.T
    mean = dense.mean(axis=0)
    dense -= mean
    parts = (dense[at : at + BLOCK] for at in range(0, len(dense), BLOCK))
    power = float(np.concatenate([np.square(part, dtype=np.float64).sum(axis=1) for part in parts]).mean())
    scale = power**-0.5 if power > 1e-12 else 1.0
    dense *= np.float32(scale)
    return Embedding(dense, idf.numpy(), components, mean, scale)
