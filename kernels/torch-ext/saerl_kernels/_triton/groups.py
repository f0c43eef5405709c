"""Scoring: the encoder's matrix product, whose epilogue keeps the top T of every group of features.

Nothing of size [N, F] is written. A wgmma accumulator gives each thread, per row, the columns 8 j + 2 q + b
(q = lane % 4) of a tile, so those of one q are a group: its top T needs no exchange of data. Which features
are a group is free, since a tile may load any rows of the weight: those far apart (``group_column``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .finish import finish

INFINITY = tl.constexpr(0x7F800000)  # as bits; positive NaN lies above


@triton.jit
def group_column(group, position, G, F, SIZE: tl.constexpr):
    """The packed column of ``position`` (0 .. SIZE - 1) in ``group`` (0 .. G - 1); F where there is none.

    The groups are in two parts: one has the first columns, the other those behind. A position takes as many
    columns side by side as its part has groups, so that neighbours fall into different groups; that is four
    times an odd number (where G allows), so that copies of a block do too. The upper half of the positions
    ends at the part's last column and leaves out what the lower half has: so a tile's columns lie at fixed
    strides, and none behind the weight. The columns of a group ascend.
    """
    HALF: tl.constexpr = SIZE // 2
    start, near, end, first, _ = part_of(group, G, F, SIZE)
    upper = position >= HALF
    column = start + group - first + tl.where(upper, position - HALF, position) * near
    column += tl.where(upper, upper_half(start, near, end, SIZE), 0)
    return tl.where((upper & (column < start + HALF * near)) | (column >= F), F, column)


@triton.jit
def first_part(G):
    """Groups of the first part."""
    return tl.maximum((G // 8 - 1) | 1, 0) * 4


@triton.jit
def part_of(group, G, F, SIZE: tl.constexpr):
    """Of the part that ``group`` is in: its first column, how many groups it has, the column it ends before,
    its first group and the group it ends before."""
    near = first_part(G)
    late = group >= near
    start = tl.where(late, SIZE * near, 0)
    end = tl.where(late, F, SIZE * near)
    return start, tl.where(late, G - near, near), end, tl.where(late, near, 0), tl.where(late, G, near)


@triton.jit
def upper_half(start, near, end, SIZE: tl.constexpr):
    """From a column of the lower half of the positions to that of the upper."""
    return tl.maximum(end - start - SIZE // 2 * near, 0)


@triton.jit
def _merge(a1, a2, a3, a4, b1, b2, b3, b4, T: tl.constexpr):
    """The T <= 4 largest of two descending lists, descending.

    Of m, the smaller first, and M, the larger second, the larger is c2. The third is the smaller of them or a
    larger third: if M is larger, m heads the other list; if m is, the thirds rank below M anyway.
    """
    c1 = tl.maximum(a1, b1)
    c2, c3, c4 = c1, c1, c1
    if T > 1:
        m = tl.minimum(a1, b1)
        M = tl.maximum(a2, b2)
        c2 = tl.maximum(m, M)
    if T > 2:
        p = tl.minimum(m, M)
        q = tl.maximum(a3, b3)
        c3 = tl.maximum(p, q)
    if T > 3:
        c4 = tl.maximum(tl.maximum(tl.minimum(p, q), tl.minimum(a2, b2)), tl.maximum(a4, b4))
    return c1, c2, c3, c4


@triton.jit
def _halves(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    return tl.split(tl.reshape(x, (ROWS, GROUPS, SIZE // 2, 2)))


@triton.jit
def _top(keys, T: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """The T <= 4 largest of int32 keys [ROWS, GROUPS, SIZE] by a merging tree; SIZE is 32 or 64."""
    none = tl.full((ROWS, GROUPS, SIZE // 2), -0x80000000, tl.int32)  # as a constant it folds away
    a, b = _halves(keys, ROWS, GROUPS, SIZE)
    k1, k2, k3, k4 = _merge(a, none, none, none, b, none, none, none, T)
    for level in tl.static_range(4 if SIZE == 32 else 5):
        a1, b1 = _halves(k1, ROWS, GROUPS, SIZE // 2 >> level)
        a2, b2 = _halves(k2, ROWS, GROUPS, SIZE // 2 >> level)
        a3, b3 = _halves(k3, ROWS, GROUPS, SIZE // 2 >> level)
        a4, b4 = _halves(k4, ROWS, GROUPS, SIZE // 2 >> level)
        k1, k2, k3, k4 = _merge(a1, a2, a3, a4, b1, b2, b3, b4, T)
    SHAPE: tl.constexpr = (ROWS, GROUPS)
    return tl.reshape(k1, SHAPE), tl.reshape(k2, SHAPE), tl.reshape(k3, SHAPE), tl.reshape(k4, SHAPE)


@triton.jit
def _pick(x, where, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """``x[:, :, where]`` for x [ROWS, GROUPS, SIZE] and where [ROWS, GROUPS], by halving on its bits."""
    for level in tl.static_range(5 if SIZE == 32 else 6):
        even, odd = _halves(x, ROWS, GROUPS, SIZE >> level)
        x = tl.where(((where >> level) & 1)[:, :, None] == 1, odd, even)
    return tl.reshape(x, (ROWS, GROUPS))


@triton.jit
def tile_at(tile, N, n_cols, BM: tl.constexpr, BAND: tl.constexpr):
    """Row block and column block of a tile: down bands of BAND row blocks, so that a wave's x and w tiles are
    shared through L2."""
    band = tile // (BAND * n_cols)
    first = band * BAND
    height = tl.minimum(tl.cdiv(N, BM) - first, BAND)
    return first + (tile % (BAND * n_cols)) % height, (tile % (BAND * n_cols)) // height


@triton.jit
def tile_columns(first, end, G, F, SIZE: tl.constexpr, BN: tl.constexpr):
    """The packed columns int32 [BN] of the groups from ``first`` on, in the order of ``by_group``; F where
    there is none, as from group ``end`` on."""
    cols = tl.arange(0, BN)
    group = first + cols // (4 * SIZE) * 4 + cols // 2 % 4
    cols = group_column(group, cols % 2 * (SIZE // 2) + cols % (4 * SIZE) // 8, G, F, SIZE)
    return tl.where(group < end, cols, F)


@triton.jit
def tile_scores(
    x_ptr,  # [N, D]
    w_ptr,  # [F, D]
    bias_ptr,  # float32 [F]
    N,
    F,
    G,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """This program's scores float32 [BM, BN] (-inf in columns past F), its columns, row and column block.

    SIZE > 0: the columns of BN // SIZE groups of the G, in the order of ``by_group``; 0: BN side by side.
    """
    tl.static_assert(BN % (4 * SIZE if SIZE > 0 else 128) == 0)
    n_cols = tl.cdiv(G, BN // SIZE) if SIZE > 0 else tl.cdiv(F, BN)
    row_block, col_block = tile_at(tl.program_id(0), N, n_cols, BM, BAND)
    rows = row_block * BM + tl.arange(0, BM)
    if SIZE > 0:
        cols = tile_columns(col_block * (BN // SIZE), G, G, F, SIZE, BN)
    else:
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
    return acc, cols, row_block, col_block


@triton.jit
def by_group(x, BM: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr):
    """``x`` [BM, BN] as [BM, BN // SIZE, SIZE]: the columns 8 j + 2 q + b of every 4 SIZE, by q, b and j."""
    x = tl.reshape(x, (BM, BN // (4 * SIZE), SIZE // 2, 4, 2))
    return tl.reshape(tl.permute(x, (0, 1, 3, 4, 2)), (BM, BN // SIZE, SIZE))


@triton.jit
def keep_top(
    acc,
    row_block,
    first_group,
    end_group,
    bits_ptr,  # int32 [N, T + 1, G]: the T largest activations of each group, as float bits, and last a bound
    place_ptr,  # int8 [N, T, G]: their positions in the group
    N,
    G,
    HIGH,
    T: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TREE: tl.constexpr,
):
    """Writes the T largest of each group of a tile's scores float32 [BM, BN], and their bound: no other
    activation of the group is larger. Groups from ``end_group`` on are left out."""
    tl.static_assert(T <= 3)
    COUNT: tl.constexpr = BN // SIZE
    place = tl.arange(0, SIZE)[None, None, :]
    # Offsets inside a tile fit 32 bits: 64-bit ones would take registers beside the scores.
    row, group = tl.arange(0, BM), tl.arange(0, COUNT)
    keep = (row_block * BM + row < N)[:, None] & (first_group + group < end_group)[None, :]
    first = (row_block * BM).to(tl.int64) * G
    bits_at = bits_ptr + (first * (T + 1) + first_group) + (row[:, None] * ((T + 1) * G) + group[None, :])
    place_at = place_ptr + (first * T + first_group) + (row[:, None] * (T * G) + group[None, :])
    if TREE:
        # As signed integers negative floats rank below 0, and so need no ReLU before the end. Positive NaN
        # ranks above infinity: it is kept as 0, and where the bound is one the group is opened again.
        bits = by_group(acc.to(tl.int32, bitcast=True), BM, BN, SIZE)
        most = tl.max(bits, axis=2)
        # The low bits give way to the position, so that a maximum knows where it came from. Positions are
        # reversed: of two equal activations the first is larger. HIGH is -SIZE, kept from the compiler, which
        # would make two instructions of one if it knew.
        k1, k2, k3, k4 = _top((bits & HIGH) | (SIZE - 1 - place), T + 1, BM, COUNT, SIZE)
        # What was not kept shares all but the low bits with the next key, at most.
        key = k2 if T == 1 else (k3 if T == 2 else k4)
        tl.store(bits_at + T * G, tl.maximum(tl.minimum(key | (SIZE - 1), most), 0), mask=keep)
        for t in tl.static_range(T):
            key = k1 if t == 0 else (k2 if t == 1 else k3)
            where = SIZE - 1 - (key & (SIZE - 1))
            tl.store(place_at + t * G, where.to(tl.int8), mask=keep)
            value = _pick(bits, where, BM, COUNT, SIZE)
            tl.store(bits_at + t * G, tl.where(value > INFINITY, 0, tl.maximum(value, 0)), mask=keep)
    else:  # without tensor cores a group is spread over threads, where reductions are the better way
        acc = tl.where(acc > 0.0, acc, 0.0)  # NaN becomes 0 as well
        bits = by_group(acc.to(tl.int32, bitcast=True), BM, BN, SIZE)
        for t in tl.static_range(T):
            top = tl.max(bits, axis=2)
            where = tl.min(tl.where(bits == top[:, :, None], place, SIZE), axis=2)
            tl.store(bits_at + t * G, top, mask=keep)
            tl.store(place_at + t * G, where.to(tl.int8), mask=keep)
            bits = tl.where(place == where[:, :, None], -1, bits)
        tl.store(bits_at + T * G, tl.max(bits, axis=2), mask=keep)


@triton.jit
def _score_groups_kernel(
    x_ptr,  # [N, D]
    w_ptr,  # [F, D]
    bias_ptr,  # float32 [F]
    bits_ptr,  # int32 [N, T + 1, G]: the T largest activations of each group, as float bits, and last a bound
    place_ptr,  # int8 [N, T, G]: their positions in the group
    N,
    F,
    G,
    HIGH,
    D: tl.constexpr,
    T: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
    TREE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    acc, _, row_block, col_block = tile_scores(
        x_ptr, w_ptr, bias_ptr, N, F, G, D, SIZE, BM, BN, BK, BAND, UPCAST
    )
    keep_top(
        acc, row_block, col_block * (BN // SIZE), G, bits_ptr, place_ptr, N, G, HIGH, T, SIZE, BM, BN, TREE
    )


@triton.jit
def _reopen_kernel(
    x_ptr,  # [N, D]
    w_ptr,  # [F, D]
    bias_ptr,  # float32 [F]
    number_ptr,  # int32 [F]: original feature of a packed column (read when PERMUTED)
    bits_ptr,  # int32 [N, T + 1, G]: last, -1 for groups that may hide a winner
    place_ptr,  # int8 [N, T, G]
    keys_ptr,  # int64 [N, K]
    count_ptr,  # int32 [N]: valid keys
    open_ptr,  # int32 [N]: how many groups may hide one
    values_ptr,  # int32 [N, K] view of the float32 result, of the rows with such groups
    indices_ptr,  # int32 [N, K]
    F,
    G,
    K,
    D: tl.constexpr,
    T: tl.constexpr,
    SIZE: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BG: tl.constexpr,
    PERMUTED: tl.constexpr,
    UPCAST: tl.constexpr,
    COUNT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n_open = tl.load(open_ptr + row)
    if n_open == 0:
        return
    if n_open > 8:
        # A NaN in x makes one of every score, and so of every bound: nothing is hidden then.
        for d in range(0, D, 1024):
            depth = d + tl.arange(0, 1024)
            x = tl.load(x_ptr + row * D + depth, mask=depth < D, other=0.0)
            n_open = tl.where(tl.max((x != x).to(tl.int32)) > 0, 0, n_open)
    count = tl.load(count_ptr + row)
    slot = tl.arange(0, KP)
    keys = tl.load(keys_ptr + row * K + slot, mask=slot < count, other=-1)
    place = tl.arange(0, SIZE)
    first = 0
    while n_open > 0:
        near = first + tl.arange(0, BG)
        pending = tl.load(bits_ptr + (row * (T + 1) + T) * G + near, mask=near < G, other=0) < 0
        found = tl.sum(pending.to(tl.int32))
        n_open -= found
        after = -1
        while found > 0:
            after = tl.min(tl.where(pending & (near > after), near, 0x7FFFFFFF))
            found -= 1
            cols = group_column(after, place, G, F, SIZE)
            real = cols < F
            w_rows = tl.minimum(cols, F - 1).to(tl.int64)
            # The bias comes first and the depth in BK steps, as in scoring, so that both round alike.
            acc = tl.broadcast_to(tl.load(bias_ptr + w_rows)[None, :], (BM, SIZE))
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
    keys, count = keys[None, :], count + tl.zeros((1,), tl.int32)
    wide = row + tl.zeros((1, 1), tl.int64)
    finish(keys, count, wide, wide >= 0, keys_ptr + wide * K, values_ptr, indices_ptr, K, 1, KP, False, COUNT)
