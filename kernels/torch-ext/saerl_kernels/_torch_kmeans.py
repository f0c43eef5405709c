"""The steps of spherical k-means in torch alone: gathered sums by embedding_bag, which repeat on any device.

``table`` is float32 [n_cols, n_clusters]: a column holds a centroid, so that an entry of a row meets all
centroids in one contiguous line.
"""

from __future__ import annotations

from typing import Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .csr import transpose
from .types import CSR

__all__ = ["assign", "row_similarity", "table_of", "transpose", "update"]

CHUNK = 1 << 22  # products held at once


def assign(X: CSR, table: Tensor) -> Tuple[Tensor, Tensor]:
    """labels int32 and similarity float32 [n_rows]: the largest of each row times ``table``."""
    labels = torch.empty(X.n_rows, dtype=torch.int32, device=X.device)
    similarity = torch.empty(X.n_rows, dtype=torch.float32, device=X.device)
    step = max(1, CHUNK // table.shape[1])
    for start in range(0, X.n_rows, step):
        part = slice(start, min(start + step, X.n_rows))
        similarity[part], best = products(X, table, part.start, part.stop).max(dim=1)
        labels[part] = best.int()
    return labels, similarity


def products(X: CSR, table: Tensor, start: int, stop: int) -> Tensor:
    """float32 [stop - start, n_clusters]: these rows of X times ``table``."""
    first, last = int(X.indptr[start]), int(X.indptr[stop])
    if first == last:
        return table.new_zeros((stop - start, table.shape[1]))
    return F.embedding_bag(
        X.indices[first:last].long(),
        table,
        X.indptr[start:stop] - first,
        mode="sum",
        per_sample_weights=X.values[first:last],
    )


def update(flipped: CSR, labels: Tensor, n_clusters: int) -> Tensor:
    """Table of unit centroids from the transpose of X and labels int32 [n_rows]."""
    table = torch.zeros((flipped.n_rows, n_clusters), dtype=torch.float32, device=labels.device)
    # A label looked up in the identity is its one-hot line: the same gathered sum as in `assign`.
    owners = CSR(flipped.indptr, labels[flipped.indices.long()], flipped.values, n_clusters)
    one_hot = torch.eye(n_clusters, dtype=torch.float32, device=labels.device)
    step = max(1, CHUNK // n_clusters)
    for start in range(0, flipped.n_rows, step):
        stop = min(start + step, flipped.n_rows)
        table[start:stop] = products(owners, one_hot, start, stop)
    return normalise_(table)


def normalise_(table: Tensor) -> Tensor:
    """Divide the columns by their norms (in float64) in place; zero columns stay."""
    norm = torch.linalg.vector_norm(table, dim=0, dtype=torch.float64)
    return table.mul_(torch.where(norm > 0, 1 / norm, 0.0).float())


def row_similarity(X: CSR, flipped: CSR, picks: Sequence[int]) -> Tensor:
    """float32 [len(picks), n_rows]: inner products of the rows ``picks`` with every row of X."""
    table = table_of(X, picks, len(picks))
    out = torch.empty((len(picks), X.n_rows), dtype=torch.float32, device=X.device)
    step = max(1, CHUNK // len(picks))
    for start in range(0, X.n_rows, step):
        stop = min(start + step, X.n_rows)
        out[:, start:stop] = products(X, table, start, stop).t()
    return out


def table_of(X: CSR, picks: Sequence[int], width: int) -> Tensor:
    """float32 [n_cols, width]: the rows ``picks`` as its first columns, zeros after them."""
    rows = X.select_rows(torch.tensor(picks, dtype=torch.int64, device=X.device))
    table = torch.zeros((X.n_cols, width), dtype=torch.float32, device=X.device)
    table[rows.indices.long(), rows.row_ids()] = rows.values
    return table
