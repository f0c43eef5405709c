"""Scoring: the encoder's matrix product, whose epilogue keeps the top T of every 32 features.

Nothing of size [N, F] is written. A wgmma accumulator of 128 columns gives each thread, per row, the 32
columns 8 j + 2 q + b (q = lane % 4), so that set is the group: its top T needs no exchange of data.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = 32


@triton.jit
def group_column(group, position):
    """The packed column of ``position`` (0 .. 31) in ``group``."""
    return (group // 4) * 128 + (position // 2) * 8 + (group % 4) * 2 + position % 2


@triton.jit
def _merge(a1, a2, a3, a4, b1, b2, b3, b4, T: tl.constexpr):
    """The T largest of two descending lists: the i-th is the largest min(a_j, b_(i-j)), or a_i, or b_i."""
    c1 = tl.maximum(a1, b1)
    c2, c3, c4 = c1, c1, c1
    if T > 1:
        c2 = tl.maximum(tl.maximum(a2, b2), tl.minimum(a1, b1))
    if T > 2:
        c3 = tl.maximum(tl.maximum(a3, b3), tl.maximum(tl.minimum(a1, b2), tl.minimum(a2, b1)))
    if T > 3:
        c4 = tl.maximum(tl.minimum(a1, b3), tl.maximum(tl.minimum(a2, b2), tl.minimum(a3, b1)))
        c4 = tl.maximum(tl.maximum(a4, b4), c4)
    return c1, c2, c3, c4


@triton.jit
def _halves(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    return tl.split(tl.reshape(x, (ROWS, GROUPS, SIZE // 2, 2)))


@triton.jit
def _top_of_32(keys, T: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """The T <= 4 largest of keys [ROWS, GROUPS, 32] (unsigned, all different) by a merging tree."""
    none = tl.zeros((ROWS, GROUPS, 16), tl.uint32)  # below every key; as a constant it folds away
    a, b = _halves(keys, ROWS, GROUPS, 32)
    k1, k2, k3, k4 = _merge(a, none, none, none, b, none, none, none, T)
    for level in tl.static_range(4):
        a1, b1 = _halves(k1, ROWS, GROUPS, 16 >> level)
        a2, b2 = _halves(k2, ROWS, GROUPS, 16 >> level)
        a3, b3 = _halves(k3, ROWS, GROUPS, 16 >> level)
        a4, b4 = _halves(k4, ROWS, GROUPS, 16 >> level)
        k1, k2, k3, k4 = _merge(a1, a2, a3, a4, b1, b2, b3, b4, T)
    SHAPE: tl.constexpr = (ROWS, GROUPS)
    return tl.reshape(k1, SHAPE), tl.reshape(k2, SHAPE), tl.reshape(k3, SHAPE), tl.reshape(k4, SHAPE)


@triton.jit
def _pick(x, where, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """``x[:, :, where]`` for x [ROWS, GROUPS, 32] and where [ROWS, GROUPS], by halving on its bits."""
    for level in tl.static_range(5):
        even, odd = _halves(x, ROWS, GROUPS, 32 >> level)
        x = tl.where(((where >> level) & 1)[:, :, None] == 1, odd, even)
    return tl.reshape(x, (ROWS, GROUPS))


@triton.jit
def tile_scores(
    x_ptr,  # [N, D]
    w_ptr,  # [F, D]
    bias_ptr,  # float32 [F]
    N,
    F,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """This program's scores float32 [BM, BN] (-inf in columns past F), its rows, columns and column block."""
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
    bias = tl.load(bias_ptr + cols, mask=cols < F, other=float("-inf"))
    acc = tl.broadcast_to(bias[None, :], (BM, BN))
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
    return acc, rows, cols, col_block


@triton.jit
def by_group(x, BM: tl.constexpr, BN: tl.constexpr):
    """``x`` [BM, BN] as [BM, BN // 32, 32]: the groups, and the positions of ``group_column`` in each."""
    x = tl.reshape(x, (BM, BN // 128, 16, 4, 2))
    return tl.reshape(tl.permute(x, (0, 1, 3, 2, 4)), (BM, BN // 32, 32))


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
    HIGH,
    D: tl.constexpr,
    T: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
    TREE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tl.static_assert(T <= 4)
    acc, rows, cols, col_block = tile_scores(x_ptr, w_ptr, bias_ptr, N, F, D, BM, BN, BK, BAND, UPCAST)
    acc = tl.where(acc > 0.0, acc, 0.0)  # NaN becomes 0 as well
    bits = by_group(acc.to(tl.int32, bitcast=True), BM, BN)
    place = tl.arange(0, 32)[None, None, :]
    groups = col_block * (BN // 32) + tl.arange(0, BN // 32)
    out = rows.to(tl.int64)[:, None] * (T * G) + groups[None, :]
    keep = (rows < N)[:, None] & (groups < G)[None, :]
    if TREE:
        # The low five bits give way to the position, so that a maximum knows where it came from. Positions
        # are reversed: of two equal activations the first is larger. HIGH is -32, kept from the compiler,
        # which would make two instructions of one if it knew.
        packed = (bits & HIGH) | (31 - place)
        k1, k2, k3, k4 = _top_of_32(packed.to(tl.uint32, bitcast=True), T, BM, BN // 32)
        for t in tl.static_range(T):
            key = k1 if t == 0 else (k2 if t == 1 else (k3 if t == 2 else k4))
            where = 31 - (key & 31).to(tl.int32)
            tl.store(bits_ptr + out + t * G, _pick(bits, where, BM, BN // 32), mask=keep)
            tl.store(place_ptr + out + t * G, where.to(tl.int8), mask=keep)
    else:  # without tensor cores a group is spread over threads, where reductions are the better way
        for t in tl.static_range(T):
            top = tl.max(bits, axis=2)
            where = tl.min(tl.where(bits == top[:, :, None], place, 32), axis=2)
            tl.store(bits_ptr + out + t * G, top, mask=keep)
            tl.store(place_ptr + out + t * G, where.to(tl.int8), mask=keep)
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
    floor = tl.maximum(tl.load(limit_ptr + row), 32)
    count = tl.load(count_ptr + row)
    slot = tl.arange(0, KP)
    keys = tl.load(keys_ptr + row * K + slot, mask=slot < count, other=-1)
    place = tl.arange(0, 32)
    first = 0
    while n_open > 0:
        near = first + tl.arange(0, BG)
        last = tl.load(bits_ptr + (row * T + T - 1) * G + near, mask=near < G, other=-1)
        pending = (last | 31) >= floor
        found = tl.sum(pending.to(tl.int32))
        n_open -= found
        after = -1
        while found > 0:
            after = tl.min(tl.where(pending & (near > after), near, 0x7FFFFFFF))
            found -= 1
            cols = group_column(after, place)
            real = cols < F
            w_rows = tl.minimum(cols, F - 1).to(tl.int64)
            # The bias comes first and the depth in BK steps, as in scoring, so that both round alike.
            acc = tl.broadcast_to(tl.load(bias_ptr + w_rows)[None, :], (BM, 32))
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
