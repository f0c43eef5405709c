"""The steps of spherical k-means on the CPU; ``table`` is float32 [n_cols, n_clusters].

Rows, and in the update features, are split over torch's threads; each is summed by one of them in order, so
the number of threads does not change a bit.
"""

from __future__ import annotations

from typing import Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from .._torch_kmeans import table_of
from ..types import CSR
from .grads import sort_by_feature
from .select import jit
from .threads import run

__all__ = ["assign", "reassign", "row_similarity", "table_of", "transpose", "update"]

BLOCK = 64  # features whose squares are summed before the blocks are
MOVED = 0.5  # share of centroids that changed, above which all are compared again


def transpose(X: CSR) -> CSR:
    """CSR of X's transpose, columns (X's rows) ascending, without stored zeros."""
    starts, rows = np.zeros(X.n_cols + 1, dtype=np.int64), np.empty(X.nnz, dtype=np.int32)
    values = np.empty(X.nnz, dtype=np.float32)
    indptr, columns, entries = _arrays(X)
    sort_by_feature(entries, columns, indptr, starts, rows, values)
    rows, values = rows[: starts[-1]], values[: starts[-1]]
    return CSR(torch.from_numpy(starts), torch.from_numpy(rows), torch.from_numpy(values), X.n_rows)


def assign(X: CSR, table: Tensor) -> Tuple[Tensor, Tensor]:
    """labels int32 and similarity float32 [n_rows]: the largest of each row times ``table``."""
    labels = torch.empty(X.n_rows, dtype=torch.int32, device="cpu")
    similarity = torch.empty(X.n_rows, dtype=torch.float32, device="cpu")
    run(_assign_rows, X.n_rows, *_arrays(X), table.numpy(), labels.numpy(), similarity.numpy())
    return labels, similarity


def reassign(
    X: CSR, table: Tensor, labels: Tensor, similarity: Tensor, moved: Tensor
) -> Tuple[Tensor, Tensor]:
    """``assign(X, table)``, bit for bit, from its result before the columns ``moved`` bool [K] changed.

    Centroids that stayed are no nearer than the row's own was. So where that one stayed too, or came nearer,
    only the moved ones can win; elsewhere the row is compared with all of them.
    """
    ids = moved.nonzero().squeeze(-1)
    if len(ids) > MOVED * len(moved):
        return assign(X, table)
    if not len(ids):
        return labels.clone(), similarity.clone()
    place = torch.full((len(moved),), -1, dtype=torch.int32, device="cpu")
    place[ids] = torch.arange(len(ids), dtype=torch.int32, device="cpu")
    part = table[:, ids].contiguous()
    labels, similarity = labels.clone(), similarity.clone()
    args = (table.numpy(), part.numpy(), ids.numpy(), place.numpy(), labels.numpy(), similarity.numpy())
    run(_reassign_rows, X.n_rows, *_arrays(X), *args)
    return labels, similarity


def update(flipped: CSR, labels: Tensor, n_clusters: int) -> Tensor:
    """Table of unit centroids from the transpose of X and labels int32 [n_rows]."""
    table = torch.empty((flipped.n_rows, n_clusters), dtype=torch.float32, device="cpu")
    blocks = -(-flipped.n_rows // BLOCK)
    squares = np.zeros((blocks, n_clusters), dtype=np.float64)
    run(_sum_features, blocks, *_arrays(flipped), labels.numpy(), table.numpy(), squares)
    norm = np.sqrt(squares.sum(axis=0))
    scale = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)
    return table.mul_(torch.from_numpy(scale.astype(np.float32)))


def row_similarity(X: CSR, flipped: CSR, picks: Sequence[int]) -> Tensor:
    """float32 [len(picks), n_rows]: inner products of the rows ``picks`` with every row of X.

    Only the columns of a row's own entries are read, a small part of X.
    """
    out = torch.zeros((len(picks), X.n_rows), dtype=torch.float32, device="cpu")
    for line, row in zip(out, picks):
        _scatter_row(*_arrays(X), *_arrays(flipped), row, line.numpy())
    return out


def _arrays(X: CSR) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    return X.indptr.numpy(), X.indices.numpy(), X.values.detach().numpy()


@jit
def _nearest(indices, values, table, at, end, total):
    """The first largest of the products of entries at .. end - 1 with ``table``, which ``total`` receives."""
    count = table.shape[1]
    total[:count] = 0
    while at + 8 <= end:  # eight lines at once, so that the sums are loaded and stored an eighth as often
        v0, v1, v2, v3 = values[at], values[at + 1], values[at + 2], values[at + 3]
        v4, v5, v6, v7 = values[at + 4], values[at + 5], values[at + 6], values[at + 7]
        l0, l1 = table[indices[at]], table[indices[at + 1]]
        l2, l3 = table[indices[at + 2]], table[indices[at + 3]]
        l4, l5 = table[indices[at + 4]], table[indices[at + 5]]
        l6, l7 = table[indices[at + 6]], table[indices[at + 7]]
        for k in range(count):
            low = v0 * l0[k] + v1 * l1[k] + v2 * l2[k] + v3 * l3[k]
            total[k] += low + (v4 * l4[k] + v5 * l5[k] + v6 * l6[k] + v7 * l7[k])
        at += 8
    while at < end:
        value, line = values[at], table[indices[at]]
        for k in range(count):
            total[k] += value * line[k]
        at += 1
    best = 0
    for k in range(1, count):
        if total[k] > total[best]:
            best = k
    return best


@jit
def _assign_rows(indptr, indices, values, table, labels, similarity, start, stop):
    total = np.empty(table.shape[1], dtype=np.float32)
    for row in range(start, stop):
        best = _nearest(indices, values, table, indptr[row], indptr[row + 1], total)
        labels[row], similarity[row] = best, total[best]


@jit
def _reassign_rows(indptr, indices, values, table, part, ids, place, labels, similarity, start, stop):
    """Rows against ``part``, the columns ``ids`` of ``table``; place [K]: a column's in part, or -1."""
    total = np.empty(table.shape[1], dtype=np.float32)
    for row in range(start, stop):
        best = _nearest(indices, values, part, indptr[row], indptr[row + 1], total)
        own, before = place[labels[row]], similarity[row]
        if own < 0:
            if total[best] < before or (total[best] == before and ids[best] > labels[row]):
                continue
        elif total[own] < before:
            best = _nearest(indices, values, table, indptr[row], indptr[row + 1], total)
            labels[row], similarity[row] = best, total[best]
            continue
        labels[row], similarity[row] = ids[best], total[best]


@jit
def _sum_features(indptr, rows, values, labels, table, squares, start, stop):
    for block in range(start, stop):
        square = squares[block]
        for feature in range(block * BLOCK, min((block + 1) * BLOCK, len(table))):
            line = table[feature]
            line[:] = 0
            for at in range(indptr[feature], indptr[feature + 1]):
                line[labels[rows[at]]] += values[at]
            for k in range(len(line)):
                square[k] += np.float64(line[k]) * np.float64(line[k])


@jit
def _scatter_row(indptr, indices, values, starts, rows, weights, row, line):
    """Add to line [n_rows] the products of row ``row`` with all rows, from the transpose (starts ...)."""
    for at in range(indptr[row], indptr[row + 1]):
        value, column = values[at], indices[at]
        for entry in range(starts[column], starts[column + 1]):
            line[rows[entry]] += value * weights[entry]
