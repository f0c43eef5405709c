"""Scoring: the encoder's matrix product, whose epilogue keeps the top T of every 32 features.

Nothing of size [N, F] is written. A wgmma accumulator of 128 columns gives each thread, per row, the 32
columns 8 j + 2 q + b (q = lane % 4), so that set is the group: its top T needs no exchange of data.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = 32
SPAN = 128  # columns that hold four interleaved groups


@triton.jit
def group_column(group, position):
    """The packed column of ``position`` (0 .. 31) in ``group``."""
    return (group // 4) * 128 + (position // 2) * 8 + (group % 4) * 2 + position % 2


@triton.jit
def _score_groups_kernel(
    x_ptr,  # [N, D]
    w_ptr,  # [F, D]
    bias_ptr,  # float32 [F]
    bits_ptr,  # int32 [N, T, G]: the T largest activations of each group, descending, as float bits
    place_ptr,  # int8 [N, T, G]: their positions in the group
    N,
    F,
    G,
    D: tl.constexpr,
    T: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tl.static_assert(BN % 128 == 0)
    # Tiles go down bands of BAND row blocks, so that a wave's x and w tiles are shared through L2.
    tile = tl.program_id(0)
    n_rows, n_cols = tl.cdiv(N, BM), tl.cdiv(F, BN)
    band = tile // (BAND * n_cols)
    first = band * BAND
    height = tl.minimum(n_rows - first, BAND)
    row_block = first + (tile % (BAND * n_cols)) % height
    col_block = (tile % (BAND * n_cols)) // height

    rows = row_block * BM + tl.arange(0, BM)
    cols = col_block * BN + tl.arange(0, BN)
    # Out-of-range rows and columns repeat the last one; the bias mask and the store mask drop them.
    x_rows = tl.minimum(rows, N - 1).to(tl.int64)
    w_rows = tl.minimum(cols, F - 1).to(tl.int64)
    depth = tl.arange(0, BK)
    x_at = x_ptr + x_rows[:, None] * D + depth[None, :]
    w_at = w_ptr + w_rows[None, :] * D + depth[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for d in range(0, D, BK):
        if D % BK == 0:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=depth[None, :] < D - d, other=0.0)
            w = tl.load(w_at, mask=depth[:, None] < D - d, other=0.0)
        if UPCAST:  # the interpreter's bfloat16 dot is wrong
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_at += BK
        w_at += BK

    bias = tl.load(bias_ptr + cols, mask=cols < F, other=float("-inf"))
    acc += bias[None, :]
    acc = tl.where(acc > 0.0, acc, 0.0)  # NaN becomes 0 as well
    bits = acc.to(tl.int32, bitcast=True)
    bits = tl.reshape(bits, (BM, BN // 128, 16, 4, 2))
    bits = tl.permute(bits, (0, 1, 3, 2, 4))
    bits = tl.reshape(bits, (BM, BN // 32, 32))
    place = tl.arange(0, 32)[None, None, :]
    groups = col_block * (BN // 32) + tl.arange(0, BN // 32)
    out = rows.to(tl.int64)[:, None] * (T * G) + groups[None, :]
    keep = (rows < N)[:, None] & (groups < G)[None, :]
    for t in tl.static_range(T):
        top = tl.max(bits, axis=2)
        where = tl.min(tl.where(bits == top[:, :, None], place, 32), axis=2)
        tl.store(bits_ptr + out + t * G, top, mask=keep)
        tl.store(place_ptr + out + t * G, where.to(tl.int8), mask=keep)
        if t < T - 1:
            bits = tl.where(place == where[:, :, None], -1, bits)


@triton.jit
def _reopen_kernel(
    x_ptr,  # [N, D]
    w_ptr,  # [F, D]
    bias_ptr,  # float32 [F]
    number_ptr,  # int32 [F]: original feature of a packed column (read when PERMUTED)
    bits_ptr,  # int32 [N, T, G]
    place_ptr,  # int8 [N, T, G]
    keys_ptr,  # int64 [N, K]
    count_ptr,  # int32 [N]: valid keys
    limit_ptr,  # int32 [N]: bits of the k-th value among the kept entries, 0 when there are fewer
    open_ptr,  # int32 [N]: groups whose T-th entry does not rule out a hidden one
    F,
    G,
    K,
    D: tl.constexpr,
    T: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BG: tl.constexpr,
    PERMUTED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n_open = tl.load(open_ptr + row)
    if n_open == 0:
        return
    floor = tl.maximum(tl.load(limit_ptr + row), 1)
    count = tl.load(count_ptr + row)
    slot = tl.arange(0, KP)
    keys = tl.load(keys_ptr + row * K + slot, mask=slot < count, other=-1)
    place = tl.arange(0, 32)
    first = 0
    while n_open > 0:
        near = first + tl.arange(0, BG)
        last = tl.load(bits_ptr + (row * T + T - 1) * G + near, mask=near < G, other=-1)
        pending = last >= floor
        found = tl.sum(pending.to(tl.int32))
        n_open -= found
        after = -1
        while found > 0:
            after = tl.min(tl.where(pending & (near > after), near, 0x7FFFFFFF))
            found -= 1
            cols = group_column(after, place)
            real = cols < F
            w_rows = tl.minimum(cols, F - 1).to(tl.int64)
            acc = tl.zeros((BM, 32), dtype=tl.float32)
            lane = tl.arange(0, BM)
            for d in range(0, D, BK):
                depth = d + tl.arange(0, BK)
                x_at = x_ptr + row * D + depth[None, :] + lane[:, None] * 0
                x = tl.load(x_at, mask=(depth[None, :] < D) & (lane[:, None] == 0), other=0.0)
                w_at = w_ptr + w_rows[None, :] * D + depth[:, None]
                w = tl.load(w_at, mask=depth[:, None] < D, other=0.0)
                if UPCAST:
                    x = x.to(tl.float32)
                    w = w.to(tl.float32)
                acc = tl.dot(x, w, acc, input_precision="ieee")
            score = tl.sum(tl.where(lane[:, None] == 0, acc, 0.0), axis=0)
            score += tl.load(bias_ptr + w_rows)
            score = tl.where((score > 0.0) & real, score, 0.0)
            value = score.to(tl.int32, bitcast=True)
            for t in tl.static_range(T):
                seen = tl.load(place_ptr + (row * T + t) * G + after)
                value = tl.where(place == seen.to(tl.int32), 0, value)  # kept before, ranked already
            number = cols
            if PERMUTED:
                number = tl.load(number_ptr + w_rows)
            fresh = (value.to(tl.int64) << 32) | (0x7FFFFFFF - number).to(tl.int64)
            fresh = tl.where(value > 0, fresh, -1)
            best = tl.max(fresh)
            worst = tl.min(tl.where(slot < count, keys, 0x7FFFFFFFFFFFFFFF))
            while (best >= 0) & ((count < K) | (best > worst)):
                free = tl.where(keys == worst, slot, KP)
                target = tl.where(count < K, count, tl.min(free))
                keys = tl.where(slot == target, best, keys)
                count = tl.minimum(count + 1, K)
                fresh = tl.where(fresh == best, -1, fresh)
                best = tl.max(fresh)
                worst = tl.min(tl.where(slot < count, keys, 0x7FFFFFFFFFFFFFFF))
        first += BG
    tl.store(keys_ptr + row * K + slot, keys, mask=slot < count)
    tl.store(count_ptr + row, count)
