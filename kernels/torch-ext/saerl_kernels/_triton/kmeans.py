"""Spherical k-means on a GPU: assignment by gathered lines with a fused arg-max, update per feature.

``table`` is float32 [n_cols, n_clusters]. Nothing is added atomically, so results repeat bit for bit.
"""

from __future__ import annotations

from typing import Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._torch_kmeans import normalise_, row_similarity, table_of
from ..csr import transpose
from ..types import CSR
from .device import on_device, registers

__all__ = ["assign", "row_similarity", "table_of", "transpose", "update"]

TILE = 4096  # products a program of four warps holds in registers


@on_device
def assign(X: CSR, table: Tensor) -> Tuple[Tensor, Tensor]:
    """labels int32 and similarity float32 [n_rows]: the largest of each row times ``table``."""
    labels = torch.empty(X.n_rows, dtype=torch.int32, device=X.device)
    similarity = torch.empty(X.n_rows, dtype=torch.float32, device=X.device)
    if X.n_rows:
        args = (X.indptr, X.indices, X.values, table, labels, similarity, table.shape[1])
        shape = blocks(table.shape[1], 256)
        _assign_kernel[(X.n_rows,)](*args, **shape, num_warps=4, **registers(255))
    return labels, similarity


@on_device
def update(flipped: CSR, labels: Tensor, n_clusters: int) -> Tensor:
    """Table of unit centroids from the transpose of X and labels int32 [n_rows]."""
    table = torch.empty((flipped.n_rows, n_clusters), dtype=torch.float32, device=labels.device)
    shape = blocks(n_clusters, 64)
    # Looked up here, so that the kernel's loop has no load that waits for another.
    owners = labels[flipped.indices.long()]
    if flipped.n_rows:
        grid = (flipped.n_rows, triton.cdiv(n_clusters, shape["BK"]))
        args = (flipped.indptr, owners, flipped.values, table, n_clusters)
        _update_kernel[grid](*args, **shape, num_warps=4)
    return normalise_(table)


def blocks(n_clusters: int, widest: int) -> dict:
    """BK centroids and BE entries of a tile."""
    width = min(widest, max(16, triton.next_power_of_2(n_clusters)))
    return {"BK": width, "BE": min(64, TILE // width)}


@triton.jit
def _assign_kernel(
    indptr_ptr,  # int64 [N + 1]
    indices_ptr,  # int32 [nnz]
    values_ptr,  # float32 [nnz]
    table_ptr,  # float32 [F, K]
    labels_ptr,  # int32 [N]
    similarity_ptr,  # float32 [N]
    K,
    BK: tl.constexpr,
    BE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(indptr_ptr + row)
    stop = tl.load(indptr_ptr + row + 1)
    best = float("-inf")
    label = 0
    first = 0
    while first < K:
        k = first + tl.arange(0, BK)
        acc = tl.zeros((BE, BK), dtype=tl.float32)
        here = start
        while here < stop:
            at = here + tl.arange(0, BE)
            live = at < stop
            column = tl.load(indices_ptr + at, mask=live, other=0).to(tl.int64)
            value = tl.load(values_ptr + at, mask=live, other=0.0)
            mask = live[:, None] & (k < K)[None, :]
            line = tl.load(table_ptr + column[:, None] * K + k[None, :], mask=mask, other=0.0)
            acc += value[:, None] * line
            here += BE
        total = tl.where(k < K, tl.sum(acc, 0), float("-inf"))
        top = tl.max(total, 0)
        where = tl.min(tl.where(total == top, k, 0x7FFFFFFF), 0)
        label = tl.where(top > best, where, label)
        best = tl.maximum(top, best)
        first += BK
    tl.store(labels_ptr + row, label)
    tl.store(similarity_ptr + row, best)


@triton.jit
def _update_kernel(
    indptr_ptr,  # int64 [F + 1]
    owners_ptr,  # int32 [nnz], the cluster of an entry's row
    values_ptr,  # float32 [nnz]
    table_ptr,  # float32 [F, K]
    K,
    BK: tl.constexpr,
    BE: tl.constexpr,
):
    feature = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    here = tl.load(indptr_ptr + feature)
    stop = tl.load(indptr_ptr + feature + 1)
    acc = tl.zeros((BE, BK), dtype=tl.float32)
    while here < stop:
        at = here + tl.arange(0, BE)
        owner = tl.load(owners_ptr + at, mask=at < stop, other=-1)
        value = tl.load(values_ptr + at, mask=at < stop, other=0.0)
        acc += tl.where(owner[:, None] == k[None, :], value[:, None], 0.0)
        here += BE
    tl.store(table_ptr + feature * K + k, tl.sum(acc, 0), mask=k < K)
