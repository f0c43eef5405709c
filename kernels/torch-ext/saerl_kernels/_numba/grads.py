"""Gradients of sparse codes on the CPU: a counting sort by feature, then one pass over every gradient row."""

from __future__ import annotations

from typing import Optional, Tuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .. import _grads
from .select import jit
from .threads import run

FAST = {"reassoc", "contract", "nsz"}  # lets a dot product use SIMD; the order of sums stays fixed


def _dot_rows(grad, indices, indptr, weight, out, start, stop):
    """out[e] = grad[row of e] . weight[indices[e]] for the entries of rows start .. stop."""
    for row in range(start, stop):
        left = grad[row]
        for entry in range(indptr[row], indptr[row + 1]):
            right = weight[indices[entry]]
            total = left[0] * right[0]
            for c in range(1, np.uint64(len(left))):
                total += left[c] * right[c]
            out[entry] = total


try:
    dot_rows = njit(nogil=True, cache=True, fastmath=FAST)(_dot_rows)
except RuntimeError:
    dot_rows = njit(nogil=True, fastmath=FAST)(_dot_rows)


@jit
def sort_by_feature(values, indices, indptr, starts, tokens, scales):
    """Entries other than 0 by feature, in token order: starts int64 [d_sae + 1], tokens, scales [nnz]."""
    for entry in range(len(indices)):
        if values[entry] != 0:
            starts[indices[entry] + 1] += 1
    for feature in range(1, len(starts)):
        starts[feature] += starts[feature - 1]
    cursor = starts[:-1].copy()
    for row in range(len(indptr) - 1):
        for entry in range(indptr[row], indptr[row + 1]):
            if values[entry] != 0:
                at = cursor[indices[entry]]
                tokens[at], scales[at] = row, values[entry]
                cursor[indices[entry]] = at + 1


@jit
def sum_segments(dense, tokens, scales, starts, out, sums, start, stop):
    """out[f] = sum scale * dense[token] and sums[f] = sum scale, for the features start .. stop."""
    width = np.uint64(dense.shape[1])
    for feature in range(start, stop):
        row, first, last = out[feature], starts[feature], starts[feature + 1]
        row[:] = 0
        sums[feature] = 0
        for at in range(first, last):
            source, scale = dense[tokens[at]], scales[at]
            sums[feature] += scale
            for c in range(width):
                row[c] += scale * source[c]


def value_grads(grad: Tensor, indices: Tensor, weight: Tensor, indptr: Optional[Tensor] = None) -> Tensor:
    """See ``_grads.value_grads``; other than plain weights of grad's dtype are left to it."""
    if weight.dtype != grad.dtype or not weight.is_contiguous() or weight.shape[1] == 0:
        return _grads.value_grads(grad, indices, weight, indptr)
    out = torch.empty(indices.shape, dtype=grad.dtype, device="cpu")
    flat = indices.contiguous().view(-1).numpy()
    grad, weight = grad.detach().contiguous(), weight.detach()
    args = (grad.numpy(), flat, _starts(indices, indptr), weight.numpy(), out.view(-1).numpy())
    run(dot_rows, grad.shape[0], *args)
    return out


def weight_grads(
    dense: Tensor, values: Tensor, indices: Tensor, d_sae: int, indptr: Optional[Tensor] = None
) -> Tuple[Tensor, Tensor]:
    """See ``_grads.weight_grads``."""
    dense = dense.detach().to(torch.float64 if dense.dtype == torch.float64 else torch.float32)
    flat, scales = indices.reshape(-1).numpy(), values.detach().to(dense.dtype).reshape(-1).numpy()
    starts, tokens = np.zeros(d_sae + 1, dtype=np.int64), np.empty(len(flat), dtype=np.int32)
    ordered = np.empty_like(scales)
    sort_by_feature(scales, flat, _starts(indices, indptr), starts, tokens, ordered)
    # NumPy asks for huge pages, torch does not: a fresh 38 MB gradient then costs 5 ms instead of 20
    out = np.empty((d_sae, dense.shape[1]), dtype=scales.dtype)
    sums = np.empty(d_sae, dtype=scales.dtype)
    run(sum_segments, d_sae, dense.contiguous().numpy(), tokens, ordered, starts, out, sums)
    return torch.from_numpy(out), torch.from_numpy(sums)


def _starts(indices: Tensor, indptr: Optional[Tensor]) -> np.ndarray:
    if indptr is not None:
        return indptr.numpy()
    n, k = indices.shape
    return np.arange(n + 1, dtype=np.int64) * k
