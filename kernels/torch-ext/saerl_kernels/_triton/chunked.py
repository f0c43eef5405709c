"""Chunked scoring: torch's matrix product a few thousand columns at a time, gated while they lie in L2.

Each row owns a buffer of SLOTS >= K keys and a bound: K entries seen so far rank at or above it. The gate
appends what ranks above the bound; where that does not fit, it first reduces buffer and newcomers to their K
best and raises the bound. So the buffer cannot overflow, and nothing that could still win is dropped.
"""

from __future__ import annotations

from typing import Iterator, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreting
from ..pack import PackedEncoder
from .tune import Plan

TILE = 2048  # columns a program gates at once


def slots(k: int) -> int:
    """Keys a row's buffer holds: with more of them buffers are reduced less often."""
    return max(256, 2 * triton.next_power_of_2(k))


def launch_chunked(
    x: Tensor, encoder: PackedEncoder, numbers: Tensor, k: int, plan: Plan
) -> Iterator[Tuple[int, Tensor, Tensor]]:
    """(first row, keys int64 [n, SLOTS], counts int32 [n]) for blocks of ``plan.BM`` rows of ``x``.

    The first ``counts`` keys of a row, in no order, are its min(k, positive) largest activations. The memory
    is used again for the next block.
    """
    rows, columns = min(plan.BM, x.shape[0]), min(plan.BN, encoder.d_sae)
    room, block = slots(k), min(TILE, triton.next_power_of_2(columns))
    height = max(1, min(triton.next_power_of_2(rows), (1 << 16) // block)) if interpreting() else 1
    scratch = torch.empty(rows * columns, dtype=torch.float32, device=x.device)
    keys = torch.empty((rows, room), dtype=torch.int64, device=x.device)
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows]
        n = part.shape[0]
        state = torch.zeros((3, n), dtype=torch.int32, device=x.device)
        for first in range(0, encoder.d_sae, columns):
            weight = encoder.weight[first : first + columns]
            scores = product(part, weight, scratch)
            _gate_kernel[(triton.cdiv(n, height),)](
                scores,
                encoder.bias,
                numbers,
                keys,
                *state,
                n,
                encoder.d_sae,
                first,
                weight.shape[0],
                scores.stride(0),
                k,
                k if first + columns >= encoder.d_sae else room,
                ROWS=height,
                BLOCK=block,
                TILES=triton.cdiv(columns, block),
                SLOTS=room,
                PERMUTED=encoder.permutation is not None,
                num_warps=plan.warps,
            )
        yield start, keys[:n], state[0]


def product(x: Tensor, weight: Tensor, scratch: Tensor) -> Tensor:
    """``x @ weight.T`` as float32 [n, columns] in the first entries of the flat ``scratch``."""
    n, columns = x.shape[0], weight.shape[0]
    out = scratch[: n * columns].view(n, columns)
    if x.dtype == torch.float32:
        return torch.mm(x, weight.t(), out=out)
    if x.is_cuda and torch.version.hip is None and "dtype_out" in torch.ops.aten.mm.overloads():
        return torch.mm(x, weight.t(), out_dtype=torch.float32, out=out)
    return torch.mm(x.float(), weight.float().t(), out=out)  # a 16-bit result would be ranked rounded


@triton.jit
def _bisect_value(bits, held, low, K):
    """The K-th largest of ``bits`` and ``held`` together [ROWS]; 0 where fewer than K are positive.

    ``low`` is a bound that K of them reach, or 0. Ends as soon as a cut leaves exactly K.
    """
    high = tl.maximum(tl.max(bits, axis=1), tl.max(held, axis=1)) + 1
    reached = low * 0 + K + 1
    while tl.max(tl.where(reached == K, 0, high - low)) > 1:
        middle = low + (high - low) // 2
        cut = middle[:, None]
        above = tl.sum((bits >= cut).to(tl.int32), axis=1) + tl.sum((held >= cut).to(tl.int32), axis=1)
        up = above >= K
        low = tl.where(up, middle, low)
        reached = tl.where(up, above, reached)
        high = tl.where(up, high, middle)
    cut = low[:, None]
    least = tl.minimum(
        tl.min(tl.where(bits >= cut, bits, 0x7FFFFFFF), axis=1),
        tl.min(tl.where(held >= cut, held, 0x7FFFFFFF), axis=1),
    )
    return tl.where(low > 0, least, 0)


@triton.jit
def _gate_kernel(
    score_ptr,  # float32 [N, STRIDE]: x @ weight.T of the columns FIRST .. FIRST + WIDTH - 1
    bias_ptr,  # float32 [F]
    number_ptr,  # int32 [F]: original feature of a packed column (read when PERMUTED)
    keys_ptr,  # int64 [N, SLOTS]: value bits << 32 | 2^31 - 1 - feature
    count_ptr,  # int32 [N]: keys in the buffer
    limit_ptr,  # int32 [N]: K entries seen have bits at or above it; 0 before K are known
    last_ptr,  # int32 [N]: of those equal to the limit, features at or above it have lost
    N,
    F,
    FIRST,
    WIDTH,
    STRIDE,
    K,
    ROOM,  # how many keys may be left behind: SLOTS, or K at the last columns
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    SLOTS: tl.constexpr,
    PERMUTED: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < N
    wide = rows.to(tl.int64)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    slot = tl.arange(0, SLOTS)[None, :]
    buffer = keys_ptr + wide * SLOTS
    count = tl.load(count_ptr + rows, mask=live, other=0)
    limit = tl.load(limit_ptr + rows, mask=live, other=0)
    last = tl.load(last_ptr + rows, mask=live, other=0)
    for tile in range(0, TILES):
        at = tile * BLOCK + lane
        real = at < WIDTH
        score = tl.load(score_ptr + wide * STRIDE + at, mask=real & live[:, None], other=float("-inf"))
        score += tl.load(bias_ptr + FIRST + at, mask=real, other=0.0)
        score = tl.where(score > 0.0, score, 0.0)  # NaN becomes 0 as well
        bits = score.to(tl.int32, bitcast=True)
        near = (bits >= limit[:, None]) & (bits > 0)
        feature = FIRST + at + tl.zeros((ROWS, BLOCK), tl.int32)
        if PERMUTED:
            feature = tl.load(number_ptr + FIRST + at + tl.zeros((ROWS, BLOCK), tl.int32), mask=near, other=0)
        chosen = near & ((bits > limit[:, None]) | (feature < last[:, None]))
        fresh = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - feature).to(tl.int64)
        more = tl.sum(chosen.to(tl.int32), axis=1)
        room = tl.where(tile == TILES - 1, ROOM, SLOTS)
        if tl.max(count + more) > room:
            tl.debug_barrier()  # other threads of this program wrote the keys that are read now
            held = tl.load(buffer + slot, mask=(slot < count[:, None]) & live[:, None], other=-1)
            held_bits = (held >> 32).to(tl.int32)
            held_feature = 0x7FFFFFFF - (held & 0x7FFFFFFF).to(tl.int32)
            bits = tl.where(chosen, bits, -1)
            limit = _bisect_value(bits, held_bits, limit, K)
            cut = limit[:, None]
            above = tl.sum((bits > cut).to(tl.int32), axis=1) + tl.sum((held_bits > cut).to(tl.int32), axis=1)
            equal = tl.sum((bits == cut).to(tl.int32), axis=1)
            equal += tl.sum((held_bits == cut).to(tl.int32), axis=1)
            crowded = above + equal > K
            last = tl.full((ROWS,), 0x7FFFFFFF, tl.int32)
            if tl.max(crowded.to(tl.int32)) > 0:  # of equal values the lowest features win
                low = tl.full((ROWS,), -1, tl.int32)
                high = low + F
                while tl.max(high - low) > 1:
                    middle = low + (high - low) // 2
                    reach = middle[:, None]
                    within = tl.sum(((bits == cut) & (feature <= reach)).to(tl.int32), axis=1)
                    within += tl.sum(((held_bits == cut) & (held_feature <= reach)).to(tl.int32), axis=1)
                    up = above + within >= K
                    low = tl.where(up, low, middle)
                    high = tl.where(up, middle, high)
                last = tl.where(crowded, high, last)
            stays = (held_bits > cut) | ((held_bits == cut) & (held_feature <= last[:, None]))
            stays = stays & (held_bits > 0)
            enters = (bits > cut) | ((bits == cut) & (feature <= last[:, None]))
            enters = enters & (bits > 0)
            count = tl.sum(stays.to(tl.int32), axis=1)
            # In place: a key moves to a slot at or before its own, and a scan has waited for all of those.
            tl.store(buffer + tl.cumsum(stays.to(tl.int32), 1) - 1, held, mask=stays)
            tl.store(buffer + count[:, None] + tl.cumsum(enters.to(tl.int32), 1) - 1, fresh, mask=enters)
            count += tl.sum(enters.to(tl.int32), axis=1)
        else:
            tl.store(buffer + count[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1, fresh, mask=chosen)
            count += more
    tl.store(count_ptr + rows, count, mask=live)
    tl.store(limit_ptr + rows, limit, mask=live)
    tl.store(last_ptr + rows, last, mask=live)
