"""Plain functions on CSR matrices: transposing, weighting, normalising, ranking. Any device, deterministic.

Stacking shards and picking rows are ``CSR.concat`` and ``CSR.select_rows``. All of them take a matrix as the
ops return it: columns ascend within a row and come once. They wait for the device only where said.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from ._check import check_k
from ._grads import segments
from .types import CSR, TopK


def transpose(csr: CSR) -> CSR:
    """Columns as rows, CSR [n_cols, n_rows]: the CSC form of ``csr`` [n_rows, n_cols].

    A stable sort by column, so columns (the old rows) ascend within a row of the result.
    """
    if csr.n_rows > 1 << 31:
        raise ValueError(
            f"n_rows={csr.n_rows} does not fit the int32 columns of the transpose; split the rows"
        )
    rows, values, indptr = segments(csr.values, csr.indices, csr.n_cols, csr.indptr)
    return CSR(indptr, rows.int(), values, csr.n_rows)


def idf(csr: Any, floor: float = 0.0, counts: Optional[Tensor] = None) -> Tensor:
    """Inverse document frequency, float32 [n_cols]: floor + ln((1 + n_rows) / (1 + rows with the feature)).

    Smoothed as if one more row held every feature (scikit-learn's ``smooth_idf``, which has floor 1): one
    that all rows store weighs ``floor``. A stored zero counts as present. ``counts``: ``rows_with(csr)``, if
    known; ``csr`` may then be anything with ``n_rows``.
    """
    counts = rows_with(csr) if counts is None else counts
    return (floor + torch.log((1.0 + csr.n_rows) / (1.0 + counts.double()))).float()


def rows_with(csr: CSR) -> Tensor:
    """Rows that store an entry of each column, int64 [n_cols]; counted in parts, since each takes a copy."""
    counts = csr.indptr.new_zeros(csr.n_cols)
    for part in csr.indices.split(1 << 24):
        counts += torch.bincount(part, minlength=csr.n_cols)
    return counts


def scale_columns(csr: CSR, weights: Tensor) -> CSR:
    """Every entry times ``weights`` [n_cols] of its column; entries that become 0 are dropped.

    What is left depends on the data: one synchronisation on a GPU. Raises ValueError for another shape.
    """
    if weights.shape != (csr.n_cols,):
        raise ValueError(f"weights have shape {tuple(weights.shape)}, expected ({csr.n_cols},)")
    values = csr.values * weights.to(csr.device, csr.values.dtype)[csr.indices.long()]
    kept = values.nonzero().squeeze(-1)
    return CSR(torch.searchsorted(kept, csr.indptr), csr.indices[kept], values[kept], csr.n_cols)


def l2_rows(csr: CSR) -> CSR:
    """Rows of Euclidean norm 1; a row without entries stays empty. Squares are summed in float64."""
    squares = csr.values.double().square()
    norms = torch.segment_reduce(squares, "sum", offsets=csr.indptr, unsafe=True, initial=0.0).sqrt()
    scale = torch.where(norms > 0, norms, 1.0)[csr.row_ids()]
    return CSR(csr.indptr, csr.indices, (csr.values / scale).to(csr.values.dtype), csr.n_cols)


def top_features(csr: CSR, k: int) -> TopK:
    """The k largest positive entries of each row, as ``encode_topk`` would give them: TopK [n_rows, k].

    Descending; equal values: lower column first; a row with fewer than k positive entries ends in 0.0 at the
    lowest columns without one. Raises ValueError for a k outside 1 .. n_cols.
    """
    check_k(k, csr.n_cols, "n_cols")
    values = torch.where(csr.values > 0, csr.values, 0.0)
    _, order = values.sort(descending=True, stable=True)
    rows, by_row = csr.row_ids()[order].sort(stable=True)
    order = order[by_row]
    values, columns = values[order], csr.indices[order]
    rank = torch.arange(csr.nnz, device=csr.device) - csr.indptr[rows]
    # One column more than asked for takes what does not belong in the result.
    slot = torch.where(values > 0, rank.clamp(max=k), k)
    out_values = values.new_zeros((csr.n_rows, k + 1))
    out_indices = columns.new_zeros((csr.n_rows, k + 1))
    out_values[rows, slot] = values
    out_indices[rows, slot] = columns
    taken = torch.zeros((csr.n_rows, k + 1), dtype=torch.bool, device=csr.device)
    taken[rows, torch.where(values > 0, columns.clamp(max=k), k).long()] = True
    free = ~taken[:, :k]
    filled = torch.zeros_like(csr.indptr).index_add_(0, rows, (values > 0).long())[: csr.n_rows]
    slot = (filled.unsqueeze(-1) + free.cumsum(-1) - 1).clamp(max=k)
    low = torch.arange(k, device=csr.device, dtype=columns.dtype).expand(csr.n_rows, k)
    out_indices.scatter_(1, torch.where(free, slot, k), low)
    return TopK(out_values[:, :k].contiguous(), out_indices[:, :k].contiguous())
