"""Threshold compaction of materialised scores, and decoding of sparse codes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _count_above_kernel(scores_ptr, limit_ptr, count_ptr, F, BLOCK: tl.constexpr, TILES: tl.constexpr):
    # scores float32 [N, F], limit float32 [F], count int32 [N]
    row = tl.program_id(0).to(tl.int64)
    total = 0
    for tile in range(0, TILES):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        score = tl.load(scores_ptr + row * F + at, mask=at < F, other=float("-inf"))
        limit = tl.load(limit_ptr + at, mask=at < F, other=0.0)
        total += tl.sum((score > limit).to(tl.int32))
    tl.store(count_ptr + row, total)


@triton.jit
def _place_above_kernel(
    scores_ptr,  # float32 [N, F]
    limit_ptr,  # float32 [F]
    indptr_ptr,  # int64 [N + 1]
    columns_ptr,  # int32 [nnz]
    values_ptr,  # float32 [nnz]
    F,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(indptr_ptr + row)
    for tile in range(0, TILES):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        score = tl.load(scores_ptr + row * F + at, mask=at < F, other=float("-inf"))
        limit = tl.load(limit_ptr + at, mask=at < F, other=0.0)
        hit = score > limit
        slot = start + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(columns_ptr + slot, at, mask=hit)
        tl.store(values_ptr + slot, score, mask=hit)
        start += tl.sum(hit.to(tl.int32))


@triton.jit
def _decode_kernel(
    values_ptr,  # [M]
    indices_ptr,  # int [M]
    indptr_ptr,  # int64 [N + 1]; any integers, not read, where K > 0: every row then holds K entries
    w_ptr,  # [F, D]
    out_ptr,  # [N, D], float32 or float64
    M,
    K,
    F,
    D,
    BE: tl.constexpr,
    BD: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BD + tl.arange(0, BD)
    here = row * K
    stop = here + K
    if K == 0:
        here = tl.maximum(tl.load(indptr_ptr + row).to(tl.int64), 0)
        stop = tl.minimum(tl.load(indptr_ptr + row + 1).to(tl.int64), M)
    acc = tl.zeros((BD,), dtype=WIDE)
    while here < stop:  # BE rows of weights are in flight at once
        entry = here + tl.arange(0, BE)
        feature = tl.load(indices_ptr + entry, mask=entry < stop, other=-1).to(tl.int64)
        # An index outside 0 .. F - 1 is never followed, and contributes nothing.
        inside = (feature >= 0) & (feature < F)
        value = tl.load(values_ptr + entry, mask=inside, other=0.0).to(WIDE)
        mask = inside[:, None] & (at < D)[None, :]
        weight = tl.load(w_ptr + feature[:, None] * D + at[None, :], mask=mask, other=0.0).to(WIDE)
        acc += tl.sum(value[:, None] * weight, 0)
        here += BE
    tl.store(out_ptr + row * D + at, acc, mask=at < D)
