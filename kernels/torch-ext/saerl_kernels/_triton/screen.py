"""Exact float32 encoding on tensor cores: a bfloat16 product bounds every score, float32 settles the rest.

The product is the groups' (``groups.py``) on bfloat16 copies of x and the weight with three more columns,
so that it accumulates an upper bound U of each score. A row's k largest U are scored in float32: k
features reach L, the least of those scores, so only features with U >= L can still win. They are scored,
too, and the best k scores are the result, a tie to the lower feature. "Score" is what ``_rescore_kernel``
computes, in one order.

Why U is a bound. Write h(.) for rounding to bfloat16, n and r for norms of x and x - h(x), N and R for
those of w and w - h(w), b for the bias, c for (d_in + 64) 2^-22. By Cauchy-Schwarz, with n and N so large
that they bound h(x) and h(w) as well,

    |x.w - h(x).h(w)| <= |(x - h(x)).w| + |h(x).(w - h(w))| <= r N + n R

A sum of at most d_in + 4 numbers, S in absolute terms, is off by at most c S in any order: where additions
round to nearest (the score), where they truncate, and in a tensor core that aligns p >= 2 products and the
accumulator to the largest of them and keeps 24 bits of each, by (d_in / p) (p + 2) 2^-23 S. (Their units
as others found them: products exact, 24 bits or more kept, the rest truncated; V100, T4 and A100 in Fasi
et al., PeerJ CS 7:e330; H100 and B200, p = 16 and 26 bits, in Khattak and Mikaitis, arXiv 2512.07004.) x
has the columns r, n, 1, the weight in their places

    1.02 N,   1.02 (R + 2 c N),   1.02 (2 c |b| + d_in 2^-121)

all rounded up. With E for what they add, the exact sum is at least b + x.w + 2 c (n N + |b|) + d_in 2^-121
+ 0.019 E: enough for the error of U, c (n N + |b| + E) with c < 2^-7, for the score's, c (n N + |b|), and
for what underflows.

What is not finite, or too large for this, has U = +inf: a feature's for every row, a row's for every
feature. A row with NaN, which has no positive score, has U = -inf, or NaN. A row of zeros has U = b, its
score, so that ties in bulk are settled by the order of features. A row with more candidates than slots is
left open, and the caller encodes it in float32: nothing is lost without being counted.
"""

from __future__ import annotations

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreting
from ..pack import PackedEncoder
from .chunked import _reduce
from .device import registers
from .groups import group_column
from .tune import Plan

LARGEST = tl.constexpr(2.0**60)  # norms above it are not screened: no product of two can overflow
COLUMNS = 3  # of the margin
DEPTH = 64  # copies are padded to a multiple of it: what a step of the product takes
BLOCK = 16  # candidates scored together
LANES = 256  # partial sums of a score; these two fix the order in which it is summed


def accumulation(d_in: int) -> float:
    return (d_in + 64) * 2.0**-22


def slots(k: int) -> int:
    """Candidates a row may have. At d_in 2048 about twice k are expected."""
    return triton.next_power_of_2(3 * k + 256)


def screen_of(encoder: PackedEncoder) -> PackedEncoder:
    """The bfloat16 encoder whose pre-activations bound the float32 ``encoder``'s, made again when it changes.

    It holds d_sae x (d_in + 3, rounded up to 64) x 2 bytes, features in the packed order.
    """
    return encoder.derived("bounds", lambda: PackedEncoder(*_halves(encoder.weight, encoder.bias)))


def halve(x: Tensor) -> Tensor:
    """``x`` float32 [n, d_in] as ``screen_of`` takes it."""
    return _halves(x, None)[0]


def _halves(wide: Tensor, bias: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    n, d_in = wide.shape
    padded = -(-(d_in + COLUMNS) // DEPTH) * DEPTH
    half = torch.empty((n, padded), dtype=torch.bfloat16, device=wide.device)
    start = torch.empty(0 if bias is None else n, dtype=torch.float32, device=wide.device)
    rows = min(256, triton.next_power_of_2(n)) if interpreting() else 1
    _halve_kernel[(triton.cdiv(n, rows),)](
        wide,
        wide if bias is None else bias,
        half,
        start,
        n,
        accumulation(d_in),
        D=d_in,
        P=padded,
        ROWS=rows,
        BD=min(1024, triton.next_power_of_2(padded)),
        WEIGHT=bias is not None,
        num_warps=4,
    )
    return half, start


def launch_rescore(
    x: Tensor,
    encoder: PackedEncoder,
    numbers: Tensor,
    bits: Tensor,
    place: Tensor,
    chosen: Tensor,
    counts: Tensor,
    k: int,
    plan: Plan,
) -> Tuple[Tensor, Tensor]:
    """(keys int64 [n, slots] of packed columns, open int32 [n]); ``counts`` [n] become theirs.

    ``x`` [n, d_in], the rest as the scoring of ``screen_of(encoder)`` and its selection left it. ``open`` is
    1 for rows that have more candidates than slots: their keys mean nothing.
    """
    n, room, width = x.shape[0], slots(k), bits[0].numel()
    keys = torch.empty((n, room), dtype=torch.int64, device=x.device)
    left = torch.empty(n, dtype=torch.int32, device=x.device)
    warps = 4 if room <= 1024 else 8
    scanned = min(128 * warps, triton.next_power_of_2(width))
    _rescore_kernel[(n,)](
        x,
        encoder.weight,
        encoder.bias,
        numbers,
        bits,
        place,
        chosen,
        counts,
        keys,
        left,
        encoder.d_sae,
        bits.shape[-1],
        k,
        2,
        D=encoder.d_in,
        T=plan.T,
        SIZE=plan.size,
        KP=triton.next_power_of_2(k),
        SLOTS=room,
        BC=BLOCK,
        BK=LANES,
        BG=scanned,
        TILES=triton.cdiv(width, scanned),
        PERMUTED=encoder.permutation is not None,
        num_warps=warps,
        **registers(255),
    )
    return keys, left


@triton.jit
def _halve_kernel(
    wide_ptr,  # float32 [N, D]
    bias_ptr,  # float32 [N] (read where WEIGHT)
    half_ptr,  # bfloat16 [N, P]
    start_ptr,  # float32 [N]: the bias of the bounds (written where WEIGHT)
    N,
    C,
    D: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
    WEIGHT: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = rows < N
    inside = real[:, None]
    wide = wide_ptr + rows.to(tl.int64)[:, None] * D
    half = half_ptr + rows.to(tl.int64)[:, None] * P
    lane = tl.arange(0, BD)[None, :]
    total = tl.zeros((ROWS, BD), tl.float32)
    rest = tl.zeros((ROWS, BD), tl.float32)
    most = tl.zeros((ROWS, BD), tl.float32)
    for d in range(0, P, BD):
        at = d + lane
        value = tl.load(wide + at, mask=inside & (at < D), other=0.0)
        rounded = value.to(tl.bfloat16)
        lost = value - rounded.to(tl.float32)
        total += value * value
        rest += lost * lost
        most = tl.maximum(most, tl.abs(value))
        tl.store(half + at, rounded, mask=inside & ((at < D) | ((at >= D + 3) & (at < P))))
    # 1 %: the sums' own rounding and h(x) being longer than x; the constant: squares that underflow.
    slack: tl.constexpr = D**0.5 * 2.0**-62
    norm = tl.sqrt(tl.sum(total, axis=1)) * 1.01 + slack
    lost = tl.sqrt(tl.sum(rest, axis=1)) * 1.01 + slack
    usable = norm < LARGEST
    if WEIGHT:
        bias = tl.load(bias_ptr + rows, mask=real, other=0.0)
        usable = usable & (tl.abs(bias) < 2.0**100)
        start = tl.where(usable | (bias == float("-inf")), bias, float("inf"))
        tl.store(start_ptr + rows, start, mask=real)
        first = tl.where(usable, norm * 1.02, 0.0)
        second = tl.where(usable, (lost + 2 * C * norm) * 1.02, 0.0)
        third = tl.where(usable, (2 * C * tl.abs(bias) + D * 2.0**-121) * 1.02 * (1 + 2.0**-6), 1.0)
    else:
        live = usable & (tl.max(most, axis=1) > 0.0)
        first = tl.where(live, lost, 0.0)
        second = tl.where(live, norm, 0.0)
        third = tl.where(live, 1.0, 0.0)
        third = tl.where(usable, third, tl.where(norm == norm, float("inf"), float("-inf")))
    if tl.min(usable.to(tl.int32)) == 0:
        tl.debug_barrier()  # other threads may have written these
        for d in range(0, D, BD):
            at = d + lane
            nothing = tl.zeros((ROWS, BD), tl.bfloat16)
            tl.store(half + at, nothing, mask=inside & (at < D) & (usable == 0)[:, None])
    up: tl.constexpr = 1 + 2.0**-6  # whichever way the rounding goes
    half = half_ptr + rows.to(tl.int64) * P + D
    tl.store(half, (first * up).to(tl.bfloat16), mask=real)
    tl.store(half + 1, (second * up).to(tl.bfloat16), mask=real)
    tl.store(half + 2, third.to(tl.bfloat16), mask=real)


@triton.jit
def _collect(
    bounds,
    places,
    number_ptr,
    buffer,
    count,
    least,
    worst,
    F,
    G,
    T: tl.constexpr,
    SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    BG: tl.constexpr,
    TILES: tl.constexpr,
    PERMUTED: tl.constexpr,
):
    """Append every feature that may rank above the key ``worst`` and was not chosen; returns the new count.

    It may pass SLOTS, where nothing is written. Kept entries at or above the key ``least`` were chosen.
    """
    limit = (worst >> 32).to(tl.int32)
    member = tl.arange(0, SIZE)
    for tile in range(0, TILES):
        at = tile * BG + tl.arange(0, BG)
        bound = tl.load(bounds + at, mask=at < (T + 1) * G, other=0)
        hot = (bound < 0) | ((bound >= limit) & (bound > 0))
        if tl.max(hot.to(tl.int32)) > 0:
            group = at
            for _ in tl.static_range(T):
                group = tl.where(group >= G, group - G, group)
            hides = hot & (at >= T * G)
            # For a group, its last kept entry: behind one that equals the bound only higher features hide.
            entry = tl.where(hides, at - G, at)
            kept = tl.load(bounds + entry, mask=hot, other=0)
            place = tl.load(places + entry, mask=hot, other=0).to(tl.int32)
            column = group_column(group, place, G, F, SIZE)
            key = (kept.to(tl.int64) << 32) | (0x7FFFFFFF - column).to(tl.int64)
            rank = key
            if PERMUTED:
                number = tl.load(number_ptr + column, mask=hot, other=0)
                rank = (kept.to(tl.int64) << 32) | (0x7FFFFFFF - number).to(tl.int64)
            else:
                hides = hides & ((bound == limit) & (kept == bound) & (rank <= worst) == 0)
            takes = hot & (at < T * G) & (key < least) & (rank > worst)
            target = count + tl.cumsum(takes.to(tl.int32), 0) - 1
            tl.store(buffer + target, key, mask=takes & (target < SLOTS))
            count += tl.sum(takes.to(tl.int32))
            hiding = tl.sum(hides.to(tl.int32))
            after = -1
            while (hiding > 0) & (count <= SLOTS):
                after = tl.min(tl.where(hides & (group > after), group, 0x7FFFFFFF))
                hiding -= 1
                hidden = group_column(after, member, G, F, SIZE)
                fresh = hidden < F
                for t in tl.static_range(T):
                    fresh = fresh & (member != tl.load(places + t * G + after).to(tl.int32))
                free = count + tl.cumsum(fresh.to(tl.int32), 0) - 1
                tl.store(buffer + free, (0x7FFFFFFF - hidden).to(tl.int64), mask=fresh & (free < SLOTS))
                count += tl.sum(fresh.to(tl.int32))
    return count


@triton.jit
def _rescore_kernel(
    x_ptr,  # float32 [N, D]
    w_ptr,  # float32 [F, D]
    bias_ptr,  # float32 [F]
    number_ptr,  # int32 [F]: original feature of a packed column (read when PERMUTED)
    bits_ptr,  # int32 [N, T + 1, G]: upper bounds of the kept and, last, of the others; -1: above the K-th
    place_ptr,  # int8 [N, T, G]
    chosen_ptr,  # int64 [N, K]: the K largest kept bounds; packed columns
    count_ptr,  # int32 [N]: how many were chosen; then how many keys there are
    keys_ptr,  # int64 [N, SLOTS]
    open_ptr,  # int32 [N]
    F,
    G,
    K,
    PASSES,  # 2, kept from the compiler: both passes are the same instructions, and so round alike
    D: tl.constexpr,
    T: tl.constexpr,
    SIZE: tl.constexpr,
    KP: tl.constexpr,
    SLOTS: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BG: tl.constexpr,
    TILES: tl.constexpr,
    PERMUTED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    buffer = keys_ptr + row * SLOTS
    bounds = bits_ptr + row * ((T + 1) * G)
    places = place_ptr + row * (T * G)
    count = tl.load(count_ptr + row)
    slot = tl.arange(0, KP)
    keys = tl.load(chosen_ptr + row * K + slot, mask=slot < count, other=0x7FFFFFFFFFFFFFFF)
    least = tl.min(keys)  # of the kept, those at or above it were chosen
    tl.store(buffer + slot, keys, mask=slot < count)
    done = count * 0
    for step in range(0, PASSES):
        tl.debug_barrier()  # other threads of this program wrote some of the keys
        if step == 1:
            # The K-th best of the scores so far: what ranks above it by its bound may be better.
            keys = tl.load(buffer + slot, mask=slot < count, other=-1)
            if PERMUTED:
                column = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
                number = tl.load(number_ptr + column, mask=keys > 0, other=0)
                keys = tl.where(keys > 0, ((keys >> 32) << 32) | (0x7FFFFFFF - number).to(tl.int64), -1)
            worst = tl.maximum(tl.min(tl.where(slot < K, keys, 0x7FFFFFFFFFFFFFFF)), 0)
            tensors = (bounds, places, number_ptr, buffer)
            count = _collect(*tensors, count, least, worst, F, G, T, SIZE, SLOTS, BG, TILES, PERMUTED)
            tl.store(open_ptr + row, (count > SLOTS).to(tl.int32))
            count = tl.where(count > SLOTS, done, count)
            tl.debug_barrier()
        for first in range(done, count, BC):
            at = first + tl.arange(0, BC)
            here = at < count
            key = tl.load(buffer + at, mask=here, other=0)
            column = 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
            w_at = w_ptr + column.to(tl.int64)[:, None] * D
            acc = tl.zeros((BC, BK), tl.float32)
            for d in range(0, D, BK):
                depth = d + tl.arange(0, BK)
                x = tl.load(x_ptr + row * D + depth, mask=depth < D, other=0.0)
                w = tl.load(w_at + depth[None, :], mask=here[:, None] & (depth < D)[None, :], other=0.0)
                acc += w * x[None, :]
            score = tl.sum(acc, axis=1) + tl.load(bias_ptr + column, mask=here, other=0.0)
            value = tl.where(score > 0.0, score, 0.0).to(tl.int32, bitcast=True)
            key = tl.where(value > 0, (value.to(tl.int64) << 32) | (key & 0x7FFFFFFF), -1)
            tl.store(buffer + at, key, mask=here)
        done = count
    tl.debug_barrier()
    one = tl.zeros((1,), tl.int32)
    count, _, _ = _reduce(buffer + one[:, None], number_ptr, one + count, one, F, K, 1, SLOTS, PERMUTED, 0)
    tl.store(count_ptr + row + one, count)
