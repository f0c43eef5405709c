"""Gradients of sparse codes in torch alone, and what the backends share.

Codes are values and indices [n, k], or flat [nnz] with ``indptr`` int64 [n + 1] as in a CSR matrix.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import _row_ids

CPU_CHUNK = 1 << 17  # entries x d_in gathered at once: half a megabyte, which stays in cache
GPU_CHUNK = 1 << 24


class Segments(NamedTuple):
    """Entries sorted by feature, in token order within a feature."""

    tokens: Tensor  # int64 [nnz]
    scales: Tensor  # [nnz]
    starts: Tensor  # int64 [d_sae + 1]


def owners(indices: Tensor, indptr: Optional[Tensor]) -> Tensor:
    """int64 [nnz]: the row of every entry."""
    if indptr is not None:
        return _row_ids(indptr, indices.shape[0])
    n, k = indices.shape
    return torch.arange(n, device=indices.device).unsqueeze(1).expand(n, k).reshape(-1)


def segments(values: Tensor, indices: Tensor, d_sae: int, indptr: Optional[Tensor]) -> Segments:
    """The entries by feature; a stable sort, so sums over a segment are reproducible.

    Entries of value 0 (fillers) come last and belong to no feature: 0 times the NaN of one token is NaN.
    """
    flat = indices.reshape(-1)
    ordered, order = torch.where(values.reshape(-1) == 0, d_sae, flat).sort(stable=True)
    features = torch.arange(d_sae + 1, device=indices.device, dtype=ordered.dtype)
    starts = torch.searchsorted(ordered, features)
    return Segments(owners(indices, indptr)[order], values.reshape(-1)[order], starts)


def value_grads(grad: Tensor, indices: Tensor, weight: Tensor, indptr: Optional[Tensor] = None) -> Tensor:
    """``grad[row] . weight[index]`` for every entry, shaped like indices; grad [n, d], weight [d_sae, d]."""
    flat, rows = indices.reshape(-1).long(), owners(indices, indptr)
    out = torch.empty(flat.shape, dtype=grad.dtype, device=grad.device)
    step = max(1, (CPU_CHUNK if grad.device.type == "cpu" else GPU_CHUNK) // max(1, weight.shape[1]))
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        out[part] = (weight[flat[part]].to(grad.dtype) * grad[rows[part]]).sum(-1)
    return out.view(indices.shape)


def weight_grads(
    dense: Tensor, values: Tensor, indices: Tensor, d_sae: int, indptr: Optional[Tensor] = None
) -> Tuple[Tensor, Tensor]:
    """``sum value * dense[row]`` and ``sum value`` over the entries of every feature.

    dense [n, d] floating; returns [d_sae, d] and [d_sae], float32 (float64 for float64). Deterministic.
    """
    dense = dense if dense.dtype == torch.float64 else dense.float()
    tokens, scales, starts = segments(values.to(dense.dtype), indices, d_sae, indptr)
    if tokens.numel() == 0:
        return dense.new_zeros((d_sae, dense.shape[1])), dense.new_zeros(d_sae)
    # one bag more, for the entries of no feature
    total = F.embedding_bag(tokens, dense, starts, mode="sum", per_sample_weights=scales)[:-1]
    return total, torch.segment_reduce(scales, "sum", lengths=starts.diff(), unsafe=True)
