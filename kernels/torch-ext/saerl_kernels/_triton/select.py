"""Selection: the k largest of a row's candidates, then their order and the padding.

A key is value bits << 32 | (2^31 - 1 - feature): larger is better, equal values put the lower feature first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .groups import group_column


@triton.jit
def _load_bits(source_ptr, at, mask, MODE: tl.constexpr):
    """Candidates as int32 that order like their values; masked lanes rank below everything."""
    if MODE == "groups":
        return tl.load(source_ptr + at, mask=mask, other=-1)
    value = tl.load(source_ptr + at, mask=mask, other=0.0)
    value = tl.where(value != value, float("-inf"), value)
    value = tl.where(value == 0.0, 0.0, value)  # -0.0 is 0.0
    bits = value.to(tl.int32, bitcast=True)
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(mask, rank, -0x7FFFFFFF - 1)


@triton.jit
def _feature(
    number_ptr,
    place,
    at,
    mask,
    G,
    F,
    T: tl.constexpr,
    SIZE: tl.constexpr,
    MODE: tl.constexpr,
    PERMUTED: tl.constexpr,
):
    """Original feature numbers of candidates ``at`` (where ``mask``) of the rows that ``place`` points to."""
    if MODE == "groups":
        group = at
        for _ in tl.static_range(T - 1):
            group = tl.where(group >= G, group - G, group)
        column = group_column(group, tl.load(place + at, mask=mask, other=0).to(tl.int32), G, F, SIZE)
    else:
        column = at
    if PERMUTED:
        column = tl.load(number_ptr + column, mask=mask, other=0)
    return column


@triton.jit
def _select_kernel(
    source_ptr,  # groups: int32 [N, T + 1, G] of _score_groups_kernel; otherwise float32 [N, M]
    place_ptr,  # groups: int8 [N, T, G]
    number_ptr,  # int32 [F]
    keys_ptr,  # int64 [N, K]
    count_ptr,  # int32 [N]
    open_ptr,  # int32 [N]: groups that may hide a winner: -1 takes the place of their bounds
    N,
    M,  # candidates a row
    STRIDE,  # from row to row of source
    G,
    F,
    K,
    T: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,
    KP: tl.constexpr,
    MODE: tl.constexpr,
    PERMUTED: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < N
    lane = tl.arange(0, BLOCK)[None, :]
    source = source_ptr + rows.to(tl.int64)[:, None] * STRIDE
    place = place_ptr + rows.to(tl.int64)[:, None] * M

    # The k-th largest, by bisection on the bits: `low` always has at least K candidates at or above it. The
    # first cuts go down from the maximum, half an octave, then twice as far each; it ends as soon as a cut
    # leaves exactly K.
    low = tl.full((ROWS,), 0, tl.int64)
    if MODE == "signed":
        low = tl.full((ROWS,), -0x80000000, tl.int64)
    start = low
    bits = _load_bits(source, lane, (lane < M) & live[:, None], MODE)
    top = tl.max(bits, axis=1)
    for tile in range(1, TILES):
        at = tile * BLOCK + lane
        top = tl.maximum(top, tl.max(_load_bits(source, at, (at < M) & live[:, None], MODE), axis=1))
    high = top.to(tl.int64) + 1
    jump = tl.full((ROWS,), 1 << 22, tl.int64)
    reached = tl.full((ROWS,), 0, tl.int32) + K + 1
    while tl.max(tl.where(reached == K, 0, high - low)) > 1:
        middle = (low + high) >> 1
        middle = tl.where(low > start, middle, tl.maximum(middle, high - jump))
        jump += jump
        cut = middle.to(tl.int32)[:, None]
        above = tl.sum((bits >= cut).to(tl.int32), axis=1)
        for tile in range(1, TILES):
            at = tile * BLOCK + lane
            more = _load_bits(source, at, (at < M) & live[:, None], MODE)
            above += tl.sum((more >= cut).to(tl.int32), axis=1)
        low = tl.where(above >= K, middle, low)
        reached = tl.where(above >= K, above, reached)
        high = tl.where(above >= K, high, middle)
    floor = low.to(tl.int32)
    limit = tl.min(tl.where(bits >= floor[:, None], bits, 0x7FFFFFFF), axis=1)
    for tile in range(1, TILES):
        at = tile * BLOCK + lane
        more = _load_bits(source, at, (at < M) & live[:, None], MODE)
        limit = tl.minimum(limit, tl.min(tl.where(more >= floor[:, None], more, 0x7FFFFFFF), axis=1))
    limit = tl.where(low > start, limit, floor)

    above = tl.sum((bits > limit[:, None]).to(tl.int32), axis=1)
    equal = tl.sum((bits == limit[:, None]).to(tl.int32), axis=1)
    for tile in range(1, TILES):
        at = tile * BLOCK + lane
        more = _load_bits(source, at, (at < M) & live[:, None], MODE)
        above += tl.sum((more > limit[:, None]).to(tl.int32), axis=1)
        equal += tl.sum((more == limit[:, None]).to(tl.int32), axis=1)
    room = K - above
    crowded = live & (equal > room)
    if MODE != "signed":
        crowded = crowded & (limit > 0)  # at 0 there are fewer than K positive candidates: keep them all
    near = tl.arange(0, STEP)[None, :]
    # Of the candidates equal to the k-th value the lowest features win: bisect on the feature number.
    last = tl.full((ROWS,), 0x7FFFFFFF, tl.int32)
    if tl.max(crowded.to(tl.int32)) > 0:
        low_f = tl.full((ROWS,), -1, tl.int32)
        high_f = tl.full((ROWS,), 0, tl.int32) + (G * SIZE if MODE == "groups" else M)
        while tl.max(high_f - low_f) > 1:
            cut = low_f + (high_f - low_f) // 2
            within = tl.full((ROWS,), 0, tl.int32)
            for tile in range(0, STEPS):
                at = tile * STEP + near
                mask = (at < M) & crowded[:, None]
                tied = (_load_bits(source, at, mask, MODE) == limit[:, None]) & mask
                feature = _feature(number_ptr, place, at, tied, G, F, T, SIZE, MODE, PERMUTED)
                within += tl.sum((tied & (feature <= cut[:, None])).to(tl.int32), axis=1)
            low_f = tl.where(within >= room, low_f, cut)
            high_f = tl.where(within >= room, cut, high_f)
        last = tl.where(crowded, high_f, last)

    keys_at = keys_ptr + rows.to(tl.int64)[:, None] * K
    written = tl.full((ROWS,), 0, tl.int32)
    for tile in range(0, STEPS):
        at = tile * STEP + near
        mask = (at < M) & live[:, None]
        here = _load_bits(source, at, mask, MODE)
        chosen = (here >= limit[:, None]) & mask
        if MODE != "signed":
            chosen = chosen & (here > 0)
        if tl.max(crowded.to(tl.int32)) > 0:
            tied = chosen & (here == limit[:, None])
            feature = _feature(number_ptr, place, at, tied, G, F, T, SIZE, MODE, PERMUTED)
            chosen = chosen & ((tied & (feature > last[:, None])) == 0)
        slot = written[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
        key = (here.to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)
        tl.store(keys_at + slot, key, mask=chosen)
        written += tl.sum(chosen.to(tl.int32), axis=1)
    tl.store(count_ptr + rows, written, mask=live)
    if MODE == "groups":
        tl.debug_barrier()  # other threads of this program wrote some of the keys
        slot = tl.arange(0, KP)[None, :]
        mask = (slot < written[:, None]) & live[:, None]
        key = tl.load(keys_at + slot, mask=mask, other=0)
        candidate = 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
        feature = _feature(number_ptr, place, candidate, mask, G, F, T, SIZE, MODE, PERMUTED)
        tl.store(keys_at + slot, ((key >> 32) << 32) | (0x7FFFFFFF - feature).to(tl.int64), mask=mask)

        # Certificate: a group can hide a winner only if its bound is above the k-th value, or equals it while
        # a lower feature may be hidden. Columns ascend in a group, and of equal activations the first are
        # kept: behind a kept one that equals the bound, only higher features hide.
        least = tl.maximum(limit, SIZE - 1)[:, None]  # 2^-143 at least: a hidden one below may be lost
        hiding = tl.full((ROWS,), 0, tl.int32)
        for tile in range(0, tl.cdiv(G, GROUPS)):
            group = tile * GROUPS + tl.arange(0, GROUPS)[None, :]
            real = (group < G) & live[:, None]
            bound = tl.load(source + T * G + group, mask=real, other=-1)
            hides = (bound > least) & real
            even = (bound == least) & (bound == limit[:, None])
            if tl.max(even.to(tl.int32)) > 0:
                hides = hides | even
                if not PERMUTED:
                    last_kept = (T - 1) * G + group
                    behind = even & (_load_bits(source, last_kept, even, MODE) == bound)
                    column = _feature(number_ptr, place, last_kept, behind, G, F, T, SIZE, MODE, PERMUTED)
                    hides = hides & ((behind & (column >= last[:, None])) == 0)
            tl.store(source + T * G + group, hides.to(tl.int32) * -1, mask=hides)
            hiding += tl.sum(hides.to(tl.int32), axis=1)
        tl.store(open_ptr + rows, hiding, mask=live)


@triton.jit
def _order_kernel(
    keys_ptr,  # int64 [N, STRIDE], of which the first `count` are ordered
    count_ptr,  # int32 [N]
    number_ptr,  # int32 [F]: original feature of a packed column (read when PERMUTED)
    values_ptr,  # int32 [N, K] view of the float32 result
    indices_ptr,  # int32 [N, K]
    N,
    K,
    STRIDE,
    ROWS: tl.constexpr,
    KP: tl.constexpr,
    SIGNED: tl.constexpr,
    PERMUTED: tl.constexpr,  # the keys hold packed columns
    COUNT: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = tl.load(count_ptr + rows, mask=rows < N, other=0)[:, None]
    slot = tl.arange(0, KP)[None, :]
    wide = rows.to(tl.int64)[:, None]
    lowest = tl.full((ROWS, KP), -0x8000000000000000, tl.int64)
    keys = tl.load(keys_ptr + wide * STRIDE + slot, mask=slot < count, other=0)
    if PERMUTED:
        column = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
        number = tl.load(number_ptr + column, mask=slot < count, other=0)
        keys = ((keys >> 32) << 32) | (0x7FFFFFFF - number).to(tl.int64)
    keys = tl.where(slot < count, keys, lowest)
    if COUNT:  # the interpreter's sort takes seconds; there each key goes where its number of betters says
        slot = tl.sum((keys[:, None, :] > keys[:, :, None]).to(tl.int32), axis=2)
    else:
        keys = tl.sort(keys, descending=True)
    rank = (keys >> 32).to(tl.int32)
    if SIGNED:
        rank = rank ^ ((rank >> 31) & 0x7FFFFFFF)
    feature = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
    real = keys > lowest
    tl.store(values_ptr + wide * K + slot, rank, mask=real)
    tl.store(indices_ptr + wide * K + slot, feature, mask=real)


@triton.jit
def _pad_kernel(count_ptr, values_ptr, indices_ptr, K, KP: tl.constexpr):
    # count int32 [N], values int32 (float32 bits) and indices int32 [N, K], filled up to count
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + row)
    if count == K:
        return
    # Fewer than K of the features 0 .. K-1 are taken; the lowest free ones pad the row.
    slot = tl.arange(0, KP)
    feature = tl.load(indices_ptr + row * K + slot, mask=slot < count, other=KP)
    taken = tl.histogram(tl.minimum(feature, KP), 2 * KP)
    taken = tl.sum(tl.where(tl.arange(0, 2)[:, None] == 0, tl.reshape(taken, (2, KP)), 0), axis=0)
    free = (taken == 0) & (slot < K)
    at = count + tl.cumsum(free.to(tl.int32), 0) - 1
    tl.store(values_ptr + row * K + at, tl.zeros((KP,), tl.int32), mask=free & (at < K))
    tl.store(indices_ptr + row * K + at, slot, mask=free & (at < K))
