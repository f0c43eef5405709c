"""The end of a row: its keys in order, and the padding where there are fewer than K.

A key is value bits << 32 | (2^31 - 1 - feature): larger is better, equal values put the lower feature first.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finish(
    keys,  # int64 [ROWS, KP], of which the first ``count`` are ordered
    count,  # int32 [ROWS]
    rows,  # int64 [ROWS, 1]
    done,  # bool [ROWS, 1]: rows to write
    scratch,  # pointers [ROWS, 1] to int64 [K] that no other program looks at
    values_ptr,  # int32 [N, K] view of the float32 result
    indices_ptr,  # int32 [N, K]
    K,
    ROWS: tl.constexpr,
    KP: tl.constexpr,
    SIGNED: tl.constexpr,
    COUNT: tl.constexpr,
):
    slot = tl.arange(0, KP)[None, :]
    lowest = tl.full((ROWS, KP), -0x8000000000000000, tl.int64)
    keys = tl.where(slot < count[:, None], keys, lowest)
    place = slot
    if COUNT:  # the interpreter's sort takes seconds; there each key goes where its number of betters says
        place = tl.sum((keys[:, None, :] > keys[:, :, None]).to(tl.int32), axis=2)
    else:
        keys = tl.sort(keys, descending=True)
    rank = (keys >> 32).to(tl.int32)
    if SIGNED:
        rank = rank ^ ((rank >> 31) & 0x7FFFFFFF)
    feature = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
    real = (keys > lowest) & done
    tl.store(values_ptr + rows * K + place, rank, mask=real)
    tl.store(indices_ptr + rows * K + place, feature, mask=real)
    if not SIGNED:
        short = done & (count < K)[:, None]
        if tl.max(short.to(tl.int32)) > 0:
            # Fewer than K of the features 0 .. K-1 are taken, which leave a mark; the lowest free ones pad.
            near = short & (slot < K)
            tl.debug_barrier()  # every thread has loaded its keys, if they lie in the scratch
            tl.store(scratch + slot, tl.zeros((ROWS, KP), tl.int64), mask=near)
            tl.debug_barrier()
            tl.store(scratch + feature, tl.full((ROWS, KP), 1, tl.int64), mask=real & short & (feature < K))
            tl.debug_barrier()
            free = tl.load(scratch + slot, mask=near, other=1) == 0
            at = count[:, None] + tl.cumsum(free.to(tl.int32), 1) - 1
            free = free & (at < K)
            tl.store(values_ptr + rows * K + at, tl.zeros((ROWS, KP), tl.int32), mask=free)
            tl.store(indices_ptr + rows * K + at, slot + tl.zeros((ROWS, KP), tl.int32), mask=free)


@triton.jit
def _finish_kernel(
    keys_ptr,  # int64 [N, STRIDE], of which the first `count` are ordered; overwritten
    count_ptr,  # int32 [N]
    number_ptr,  # int32 [F]: original feature of a packed column (read when PERMUTED)
    values_ptr,  # int32 [N, K] view of the float32 result
    indices_ptr,  # int32 [N, K]
    N,
    K,
    STRIDE,
    ROWS: tl.constexpr,
    KP: tl.constexpr,
    PERMUTED: tl.constexpr,  # the keys hold packed columns
    COUNT: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    count = tl.load(count_ptr + rows, mask=rows < N, other=0)
    slot = tl.arange(0, KP)[None, :]
    rows = rows[:, None]
    mask = slot < count[:, None]
    keys = tl.load(keys_ptr + rows * STRIDE + slot, mask=mask, other=0)
    if PERMUTED:
        column = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
        number = tl.load(number_ptr + column, mask=mask, other=0)
        keys = ((keys >> 32) << 32) | (0x7FFFFFFF - number).to(tl.int64)
    scratch = keys_ptr + rows * STRIDE
    finish(keys, count, rows, rows < N, scratch, values_ptr, indices_ptr, K, ROWS, KP, False, COUNT)
