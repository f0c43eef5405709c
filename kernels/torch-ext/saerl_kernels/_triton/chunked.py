"""Chunked scoring: torch's matrix product a few thousand columns at a time, gated while they lie in L2.

Each row owns a buffer of SLOTS >= K + BLOCK keys and a bound that K of the entries seen reach. The gate
looks at BLOCK columns at a time and appends what ranks above the bound; once fewer than BLOCK slots are free
it reduces the buffer to its K best, which raises the bound. So the buffer cannot overflow, and nothing that
could still win is dropped. ``topk`` gates the rows of a matrix in the same way, and so reads them once.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from .._torch import widening_mm
from ..dispatch import interpreting
from ..pack import PackedEncoder
from .device import cdiv, next_power_of_2
from .finish import finish
from .tune import Plan


def slots(k: int, block: int) -> int:
    """Keys a row's buffer holds: K that stay, a block that comes, and K more so that reducing is rare."""
    return next_power_of_2(2 * k + block)


def launch_chunked(
    x: Tensor, encoder: PackedEncoder, numbers: Tensor, k: int, plan: Plan
) -> Iterator[Tuple[int, Tensor, Tensor]]:
    """(first row, keys int64 [n, SLOTS], counts int32 [n]) for blocks of ``plan.BM`` rows of ``x``.

    The first ``counts`` keys of a row, in no order, are its min(k, positive) largest activations, with
    packed columns for features. The memory of both is used again for the next block.
    """
    rows, columns = min(plan.BM, x.shape[0]), min(plan.BN, encoder.d_sae)
    block = min(plan.BK, next_power_of_2(columns))
    room = slots(k, block)
    height = max(1, min(next_power_of_2(rows), (1 << 17) // room)) if interpreting() else 1
    scratch = torch.empty(rows * columns, dtype=torch.float32, device=x.device)
    keys = torch.empty((rows, room), dtype=torch.int64, device=x.device)
    state = torch.empty((3, rows), dtype=torch.int32, device=x.device)
    weights = encoder.weight.t().split(columns, 1)
    options = {
        "ROWS": height,
        "BLOCK": block,
        "TILES": cdiv(columns, block),
        "SLOTS": room,
        "PERMUTED": encoder.permutation is not None,
    }
    compiled: Dict[Tuple[int, bool], Any] = {}
    # The host's time for a chunk counts in every batch: what can be made before the loop is.
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows]
        n, d_sae = part.shape[0], encoder.d_sae
        counts, limits, lasts = state[:, :n].zero_()
        sizes = {columns, weights[-1].shape[1]}
        blocks = {width: scratch[: n * width].view(n, width) for width in sizes}
        grid = (cdiv(n, height), 1, 1)
        gate = _gate_kernel[grid]
        tensors = encoder.bias, numbers, keys, counts, limits, lasts
        first = 0
        for weight in weights:
            width = weight.shape[1]
            scores = product(part, weight, blocks[width])
            last = first + width == d_sae
            numbered = n, d_sae, first, width, width, k, k if last else room - block
            again = compiled.get((n, last))
            if again is not None:
                again(scores, *tensors, *numbered, *options.values())
            else:
                launched = gate(scores, *tensors, *numbered, **options, num_warps=plan.warps)
                # Chunks of the same (n, last) take the same memory and differ in ``first`` alone, of which
                # the JIT asks whether it is 1, a multiple of 16 and below 2^31: what it compiled for one of
                # them fits all, and is launched without asking it. The interpreter compiles nothing.
                if columns % 16 == 0 and isinstance(launched, CompiledKernel):
                    compiled[n, last] = launched[grid]
            first += width
        yield start, keys[:n], counts


def product(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``x @ weight``, weight [d_in, columns], into ``out`` float32 [n, columns]."""
    if x.dtype == torch.float32:
        return torch.mm(x, weight, out=out)
    if widening_mm(x.device):
        return torch.mm(x, weight, out_dtype=torch.float32, out=out)
    return torch.mm(x.float(), weight.float(), out=out)  # a 16-bit result would be ranked rounded


@triton.jit
def _kth(bits, low, K, NONE: tl.constexpr):
    """The K-th largest of ``bits`` [ROWS, SLOTS] per row, NONE where fewer than K are above that.

    ``low`` is NONE or a bound that K of them reach. Bisection ends as soon as a cut leaves exactly K.
    """
    high = tl.max(bits, axis=1) + 1
    reached = low * 0 + K + 1
    while tl.max(((reached != K) & (low + 1 < high)).to(tl.int32)) > 0:
        middle = (low & high) + ((low ^ high) >> 1)  # the mean rounded down; the sum may overflow
        above = tl.sum((bits >= middle[:, None]).to(tl.int32), axis=1)
        up = above >= K
        low = tl.where(up, middle, low)
        reached = tl.where(up, above, reached)
        high = tl.where(up, high, middle)
    least = tl.min(tl.where(bits >= low[:, None], bits, 0x7FFFFFFF), axis=1)
    return tl.where(low > NONE, least, NONE)


@triton.jit
def _reduce(
    buffer,
    number_ptr,
    count,
    limit,
    F,
    K,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PERMUTED: tl.constexpr,
    NONE: tl.constexpr,
):
    """Leave each row's K best keys in its buffer; returns the new count, limit and last."""
    slot = tl.arange(0, SLOTS)[None, :]
    keys = tl.load(buffer + slot, mask=slot < count[:, None], other=NONE << 32)
    bits = (keys >> 32).to(tl.int32)
    limit = _kth(bits, limit, K, NONE)
    above = tl.sum((bits > limit[:, None]).to(tl.int32), axis=1)
    tied = (bits == limit[:, None]) & (bits > NONE)
    crowded = above + tl.sum(tied.to(tl.int32), axis=1) > K
    last = tl.full((ROWS,), 0x7FFFFFFF, tl.int32)
    if tl.max(crowded.to(tl.int32)) > 0:  # of equal values the lowest features win
        feature = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
        if PERMUTED:
            feature = tl.load(number_ptr + feature, mask=tied, other=0)
        low = tl.full((ROWS,), -1, tl.int32)
        high = low + F
        while tl.max(high - low) > 1:
            middle = low + (high - low) // 2
            within = tl.sum((tied & (feature <= middle[:, None])).to(tl.int32), axis=1)
            low = tl.where(above + within >= K, low, middle)
            high = tl.where(above + within >= K, middle, high)
        last = tl.where(crowded, high, last)
        tied = tied & (feature <= last[:, None])
    stays = (bits > limit[:, None]) | tied
    slot = tl.cumsum(stays.to(tl.int32), 1) - 1
    tl.debug_barrier()  # in place, at or before a key's own slot: every thread must have loaded its keys
    tl.store(buffer + slot, keys, mask=stays)
    return tl.sum(stays.to(tl.int32), axis=1), limit, last


@triton.jit
def _gate(
    scores,  # pointers [ROWS, 1] to float32 [WIDTH]
    bias_ptr,  # float32 [F]; not read when SIGNED
    number_ptr,  # int32 [F]: original feature of a packed column (read when PERMUTED)
    buffer,  # pointers [ROWS, 1] to int64 [SLOTS]: value bits << 32 | 2^31 - 1 - packed column
    count,  # int32 [ROWS]: keys in the buffer
    limit,  # int32 [ROWS]: K of the entries seen have bits at or above it; NONE before K are known
    last,  # int32 [ROWS]: of entries equal to the limit, features at or above it have lost
    live,  # bool [ROWS]
    F,
    FIRST,
    WIDTH,
    K,
    ROOM,  # keys that may be left at the end
    TILES,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    PERMUTED: tl.constexpr,
    SIGNED: tl.constexpr,  # every score competes, not the positive ones only
):
    """Append what may still win; returns the new count, limit and last. Stored keys need a barrier."""
    NONE: tl.constexpr = -0x80000000 if SIGNED else 0
    at = tl.arange(0, BLOCK)[None, :]
    ahead = tl.load(scores + at, mask=(at < WIDTH) & live[:, None], other=float("-inf"))
    for tile in range(0, TILES):
        at = tile * BLOCK + tl.arange(0, BLOCK)[None, :]
        column = FIRST + at + tl.zeros((ROWS, BLOCK), tl.int32)
        score = ahead
        if not SIGNED:
            score += tl.load(bias_ptr + FIRST + at, mask=at < WIDTH, other=0.0)
        # The next scores travel while these are gated.
        near = at + BLOCK
        ahead = tl.load(scores + near, mask=(near < WIDTH) & live[:, None], other=float("-inf"))
        if SIGNED:
            score = tl.where(score != score, float("-inf"), score)
            score = tl.where(score == 0.0, 0.0, score)  # -0.0 is 0.0
            bits = score.to(tl.int32, bitcast=True)
            bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            bits = tl.where((at < WIDTH) & live[:, None], bits, NONE)  # below -inf
        else:
            score = tl.where(score > 0.0, score, -1.0)  # its bits are negative, and so are NaN's then
            bits = score.to(tl.int32, bitcast=True)
        tied = (bits == limit[:, None]) & (bits > NONE)
        feature = column
        if PERMUTED:
            feature = tl.load(number_ptr + column, mask=tied, other=0)
        chosen = (bits > limit[:, None]) | (tied & (feature < last[:, None]))
        more = tl.sum(chosen.to(tl.int32), axis=1)
        if tl.max(more) > 0:
            slot = count[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
            key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
            tl.store(buffer + slot, key, mask=chosen)
            count += more
        if tl.max(count) > tl.where(tile == TILES - 1, ROOM, SLOTS - BLOCK):
            tl.debug_barrier()  # other threads of this program wrote some of the keys
            count, limit, last = _reduce(buffer, number_ptr, count, limit, F, K, ROWS, SLOTS, PERMUTED, NONE)
    return count, limit, last


@triton.jit
def _gate_kernel(
    score_ptr,  # float32 [N, STRIDE]: x @ weight.T of the columns FIRST .. FIRST + WIDTH - 1
    bias_ptr,
    number_ptr,
    keys_ptr,  # int64 [N, SLOTS]
    count_ptr,  # int32 [N], as are the next two: see _gate
    limit_ptr,
    last_ptr,
    N,
    F,
    FIRST,
    WIDTH,
    STRIDE,
    K,
    ROOM,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    SLOTS: tl.constexpr,
    PERMUTED: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < N
    wide = rows.to(tl.int64)[:, None]
    count = tl.load(count_ptr + rows, mask=live, other=0)
    limit = tl.load(limit_ptr + rows, mask=live, other=0)
    last = tl.load(last_ptr + rows, mask=live, other=0)
    count, limit, last = _gate(
        score_ptr + wide * STRIDE,
        bias_ptr,
        number_ptr,
        keys_ptr + wide * SLOTS,
        count,
        limit,
        last,
        live,
        F,
        FIRST,
        WIDTH,
        K,
        ROOM,
        TILES,
        ROWS,
        BLOCK,
        SLOTS,
        PERMUTED,
        False,
    )
    tl.store(count_ptr + rows, count, mask=live)
    tl.store(limit_ptr + rows, limit, mask=live)
    tl.store(last_ptr + rows, last, mask=live)


@triton.jit
def _topk_kernel(
    score_ptr,  # float32 [N, M]
    keys_ptr,  # int64 [N, SLOTS]
    values_ptr,  # int32 [N, K] view of the float32 result
    indices_ptr,  # int32 [N, K]
    N,
    M,
    K,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    KP: tl.constexpr,
    COUNT: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < N
    wide = rows.to(tl.int64)[:, None]
    buffer = keys_ptr + wide * SLOTS
    none = tl.zeros((ROWS,), tl.int32)
    count, _, _ = _gate(
        score_ptr + wide * M,
        score_ptr,
        score_ptr,
        buffer,
        none,
        tl.full((ROWS,), -0x80000000, tl.int32),
        none,
        live,
        M,
        0,
        M,
        K,
        K,
        tl.cdiv(M, BLOCK),
        ROWS,
        BLOCK,
        SLOTS,
        False,
        True,
    )
    tl.debug_barrier()  # other threads of this program wrote some of the keys
    slot = tl.arange(0, KP)[None, :]
    keys = tl.load(buffer + slot, mask=slot < count[:, None], other=0)
    finish(keys, count, wide, live[:, None], buffer, values_ptr, indices_ptr, K, ROWS, KP, True, COUNT)
