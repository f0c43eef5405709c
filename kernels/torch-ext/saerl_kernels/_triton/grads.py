"""Gradients of sparse codes: dot products per entry, and sums over the entries of every feature."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._grads import segments
from ..dispatch import interpreting
from .device import on_device

CHUNK = 128  # entries of a feature that one program sums: a feature of every token must not run alone


@triton.jit
def _grad_values_kernel(
    grad_ptr,  # [N, D]
    indices_ptr,  # int [nnz]
    indptr_ptr,  # int64 [N + 1], read unless FIXED
    w_ptr,  # [F, D]
    out_ptr,  # [nnz]
    K,
    D,
    R: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
    FIXED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if FIXED:
        here = row * K
        stop = here + K
    else:
        here = tl.load(indptr_ptr + row)
        stop = tl.load(indptr_ptr + row + 1)
    while here < stop:
        entry = here + tl.arange(0, R)
        feature = tl.load(indices_ptr + entry, mask=entry < stop, other=0).to(tl.int64)
        acc = tl.zeros((R, BD), dtype=WIDE)
        first = 0
        while first < D:
            at = first + tl.arange(0, BD)
            g = tl.load(grad_ptr + row * D + at, mask=at < D, other=0.0).to(WIDE)
            inside = (entry < stop)[:, None] & (at < D)[None, :]
            w = tl.load(w_ptr + feature[:, None] * D + at[None, :], mask=inside, other=0.0)
            acc += g[None, :] * w.to(WIDE)
            first += BD
        tl.store(out_ptr + entry, tl.sum(acc, 1), mask=entry < stop)
        here += R


@triton.jit
def _grad_weight_kernel(
    dense_ptr,  # [N, D]
    tokens_ptr,  # int64 [nnz], by feature
    scales_ptr,  # [nnz], by feature
    starts_ptr,  # int64 [F + 1]
    first_ptr,  # int64 [F + 1]: chunks of the features before
    owner_ptr,  # int64 [programs]: the feature of each chunk, F past the last
    out_ptr,  # [F, D]: a feature's first chunk
    sums_ptr,  # [F]
    rest_ptr,  # [nnz // CHUNK, D]: the chunks after it
    rest_sums_ptr,  # [nnz // CHUNK]
    F,
    D,
    R: tl.constexpr,
    BD: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    feature = tl.load(owner_ptr + chunk)
    if feature < F:
        at = tl.program_id(1) * BD + tl.arange(0, BD)
        before = tl.load(first_ptr + feature)
        here = tl.load(starts_ptr + feature) + (chunk - before) * CHUNK
        stop = tl.minimum(here + CHUNK, tl.load(starts_ptr + feature + 1))
        acc = tl.zeros((R, BD), dtype=WIDE)
        total = tl.zeros((R,), dtype=WIDE)
        while here < stop:
            entry = here + tl.arange(0, R)
            token = tl.load(tokens_ptr + entry, mask=entry < stop, other=0)
            scale = tl.load(scales_ptr + entry, mask=entry < stop, other=0.0).to(WIDE)
            inside = (entry < stop)[:, None] & (at < D)[None, :]
            part = tl.load(dense_ptr + token[:, None] * D + at[None, :], mask=inside, other=0.0)
            acc += scale[:, None] * part.to(WIDE)
            total += scale
            here += R
        row = tl.sum(acc, 0)
        if chunk == before:
            tl.store(out_ptr + feature * D + at, row, mask=at < D)
            if tl.program_id(1) == 0:
                tl.store(sums_ptr + feature, tl.sum(total))
        else:
            slot = chunk - feature - 1  # every feature before this one, and this one, has a first chunk
            tl.store(rest_ptr + slot * D + at, row, mask=at < D)
            if tl.program_id(1) == 0:
                tl.store(rest_sums_ptr + slot, tl.sum(total))


@triton.jit
def _add_rest_kernel(
    first_ptr,  # int64 [F + 1]
    owner_ptr,  # int64 [slots]: the feature of each slot, F past the last
    rest_ptr,  # [slots, D]
    rest_sums_ptr,  # [slots]
    out_ptr,  # [F, D]
    sums_ptr,  # [F]
    F,
    D,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    feature = tl.load(owner_ptr + slot)
    if feature < F:
        first = tl.load(first_ptr + feature) - feature
        stop = tl.load(first_ptr + feature + 1) - feature - 1
        if slot == first:  # the first slot's program adds all of the feature's, in order
            at = tl.program_id(1) * BD + tl.arange(0, BD)
            acc = tl.load(out_ptr + feature * D + at, mask=at < D, other=0.0)
            total = tl.load(sums_ptr + feature)
            here = first
            while here < stop:
                acc += tl.load(rest_ptr + here * D + at, mask=at < D, other=0.0)
                total += tl.load(rest_sums_ptr + here)
                here += 1
            tl.store(out_ptr + feature * D + at, acc, mask=at < D)
            if tl.program_id(1) == 0:
                tl.store(sums_ptr + feature, total)


@on_device
def value_grads(grad: Tensor, indices: Tensor, weight: Tensor, indptr: Optional[Tensor] = None) -> Tensor:
    """See ``_grads.value_grads``."""
    out = torch.empty(indices.shape, dtype=grad.dtype, device=grad.device)
    n, d_in = grad.shape
    if out.numel():
        k = 0 if indptr is not None else indices.shape[1]
        starts = indices if indptr is None else indptr.contiguous()
        args = (grad.contiguous(), indices.contiguous(), starts, weight.contiguous(), out, k, d_in)
        tile = {"R": 8, "BD": _columns(d_in), "WIDE": _wide(grad)}
        _grad_values_kernel[(n,)](*args, **tile, FIXED=indptr is None)
    return out


@on_device
def weight_grads(
    dense: Tensor,
    values: Tensor,
    indices: Tensor,
    d_sae: int,
    indptr: Optional[Tensor] = None,
    chunk: int = CHUNK,
) -> Tuple[Tensor, Tensor]:
    """See ``_grads.weight_grads``. No atomics: long segments are summed in chunks, then over chunks."""
    device, d_in = dense.device, dense.shape[1]
    wide = torch.float64 if dense.dtype == torch.float64 else torch.float32
    tokens, scales, starts = segments(values, indices, d_sae, indptr)
    chunks = (starts.diff() + chunk - 1).div(chunk, rounding_mode="floor").clamp(min=1)
    first = torch.zeros(d_sae + 1, dtype=torch.int64, device=device)
    torch.cumsum(chunks, 0, out=first[1:])
    slots = tokens.shape[0] // chunk  # an upper bound that needs no synchronisation
    owner = torch.searchsorted(first[1:], torch.arange(d_sae + slots, device=device), right=True)
    out = torch.empty((d_sae, d_in), dtype=wide, device=device)
    sums = torch.empty(d_sae, dtype=wide, device=device)
    rest = torch.empty((slots, d_in), dtype=wide, device=device)
    rest_sums = torch.empty(slots, dtype=wide, device=device)
    block, kind = _columns(d_in), _wide(out)
    blocks = triton.cdiv(d_in, block)
    _grad_weight_kernel[(d_sae + slots, blocks)](
        dense.contiguous(),
        tokens,
        scales,
        starts,
        first,
        owner,
        out,
        sums,
        rest,
        rest_sums,
        d_sae,
        d_in,
        R=8,
        BD=block,
        CHUNK=chunk,
        WIDE=kind,
    )
    if slots:
        later = (first - torch.arange(d_sae + 1, device=device))[1:].contiguous()
        owner = torch.searchsorted(later, torch.arange(slots, device=device), right=True)
        args = (first, owner, rest, rest_sums, out, sums, d_sae, d_in)
        _add_rest_kernel[(slots, blocks)](*args, BD=block, WIDE=kind)
    return out, sums


def _columns(d_in: int) -> int:
    return min(4096 if interpreting() else 512, triton.next_power_of_2(max(1, d_in)))


def _wide(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
