"""Nearest centroid of sparse rows, compiled by numba; imported only when it is installed and pays."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit
def assign(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """int64 [n]: argmax over K of CSR rows [n, d] times ``table`` float32 [d, K]; first among equals."""
    n_rows, count = len(indptr) - 1, table.shape[1]
    labels = np.empty(n_rows, dtype=np.int64)
    total = np.empty(count, dtype=np.float32)
    for row in range(n_rows):
        total[:] = 0
        for at in range(indptr[row], indptr[row + 1]):
            value = values[at]
            line = table[indices[at]]
            for k in range(count):
                total[k] += value * line[k]
        best = 0
        for k in range(1, count):
            if total[k] > total[best]:
                best = k
        labels[row] = best
    return labels
