"""Selection: the k largest of a row's candidates, and the result where no group may hide a better one."""

from __future__ import annotations

import triton
import triton.language as tl

from .finish import finish
from .groups import group_column


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
    PERMUTED: tl.constexpr,
):
    """Original feature numbers of candidates ``at`` (where ``mask``) of the rows that ``place`` points to."""
    group = at
    for _ in tl.static_range(T - 1):
        group = tl.where(group >= G, group - G, group)
    column = group_column(group, tl.load(place + at, mask=mask, other=0).to(tl.int32), G, F, SIZE)
    if PERMUTED:
        column = tl.load(number_ptr + column, mask=mask, other=0)
    return column


@triton.jit
def _select_kernel(
    bits_ptr,  # int32 [N, T + 1, G] of _score_groups_kernel
    place_ptr,  # int8 [N, T, G]
    number_ptr,  # int32 [F]
    keys_ptr,  # int64 [N, K]: those of rows in which a group may hide a winner
    count_ptr,  # int32 [N]
    open_ptr,  # int32 [N]: how many groups may: -1 takes the place of their bounds
    values_ptr,  # int32 [N, K] view of the float32 result, of the other rows
    indices_ptr,  # int32 [N, K]
    N,
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
    PERMUTED: tl.constexpr,
    FINISH: tl.constexpr,  # rows in which nothing can hide; otherwise all rows have keys
    COUNT: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < N
    lane = tl.arange(0, BLOCK)[None, :]
    M = T * G  # candidates a row
    source = bits_ptr + rows.to(tl.int64)[:, None] * ((T + 1) * G)
    place = place_ptr + rows.to(tl.int64)[:, None] * M

    # The k-th largest, by bisection on the bits: `low` always has at least K candidates at or above it. The
    # first cuts go down from the maximum, half an octave, then twice as far each; it ends as soon as a cut
    # leaves exactly K.
    low = tl.full((ROWS,), 0, tl.int64)
    bits = tl.load(source + lane, mask=(lane < M) & live[:, None], other=-1)
    top = tl.max(bits, axis=1)
    for tile in range(1, TILES):
        at = tile * BLOCK + lane
        top = tl.maximum(top, tl.max(tl.load(source + at, mask=(at < M) & live[:, None], other=-1), axis=1))
    high = top.to(tl.int64) + 1
    jump = tl.full((ROWS,), 1 << 22, tl.int64)
    reached = tl.full((ROWS,), 0, tl.int32) + K + 1
    while tl.max(tl.where(reached == K, 0, high - low)) > 1:
        middle = (low + high) >> 1
        middle = tl.where(low > 0, middle, tl.maximum(middle, high - jump))
        jump += jump
        cut = middle.to(tl.int32)[:, None]
        above = tl.sum((bits >= cut).to(tl.int32), axis=1)
        for tile in range(1, TILES):
            at = tile * BLOCK + lane
            more = tl.load(source + at, mask=(at < M) & live[:, None], other=-1)
            above += tl.sum((more >= cut).to(tl.int32), axis=1)
        low = tl.where(above >= K, middle, low)
        reached = tl.where(above >= K, above, reached)
        high = tl.where(above >= K, high, middle)
    floor = low.to(tl.int32)
    limit = tl.min(tl.where(bits >= floor[:, None], bits, 0x7FFFFFFF), axis=1)
    for tile in range(1, TILES):
        at = tile * BLOCK + lane
        more = tl.load(source + at, mask=(at < M) & live[:, None], other=-1)
        limit = tl.minimum(limit, tl.min(tl.where(more >= floor[:, None], more, 0x7FFFFFFF), axis=1))
    limit = tl.where(low > 0, limit, floor)

    above = tl.sum((bits > limit[:, None]).to(tl.int32), axis=1)
    equal = tl.sum((bits == limit[:, None]).to(tl.int32), axis=1)
    for tile in range(1, TILES):
        at = tile * BLOCK + lane
        more = tl.load(source + at, mask=(at < M) & live[:, None], other=-1)
        above += tl.sum((more > limit[:, None]).to(tl.int32), axis=1)
        equal += tl.sum((more == limit[:, None]).to(tl.int32), axis=1)
    room = K - above
    crowded = live & (equal > room) & (limit > 0)  # at 0 fewer than K candidates are positive: all are kept
    near = tl.arange(0, STEP)[None, :]
    # Of the candidates equal to the k-th value the lowest features win: bisect on the feature number.
    last = tl.full((ROWS,), 0x7FFFFFFF, tl.int32)
    if tl.max(crowded.to(tl.int32)) > 0:
        low_f = tl.full((ROWS,), -1, tl.int32)
        high_f = tl.full((ROWS,), 0, tl.int32) + G * SIZE
        while tl.max(high_f - low_f) > 1:
            cut = low_f + (high_f - low_f) // 2
            within = tl.full((ROWS,), 0, tl.int32)
            for tile in range(0, STEPS):
                at = tile * STEP + near
                mask = (at < M) & crowded[:, None]
                tied = (tl.load(source + at, mask=mask, other=-1) == limit[:, None]) & mask
                feature = _feature(number_ptr, place, at, tied, G, F, T, SIZE, PERMUTED)
                within += tl.sum((tied & (feature <= cut[:, None])).to(tl.int32), axis=1)
            low_f = tl.where(within >= room, low_f, cut)
            high_f = tl.where(within >= room, cut, high_f)
        last = tl.where(crowded, high_f, last)

    keys_at = keys_ptr + rows.to(tl.int64)[:, None] * K
    written = tl.full((ROWS,), 0, tl.int32)
    for tile in range(0, STEPS):
        at = tile * STEP + near
        mask = (at < M) & live[:, None]
        here = tl.load(source + at, mask=mask, other=-1)
        chosen = (here >= limit[:, None]) & (here > 0) & mask
        if tl.max(crowded.to(tl.int32)) > 0:
            tied = chosen & (here == limit[:, None])
            feature = _feature(number_ptr, place, at, tied, G, F, T, SIZE, PERMUTED)
            chosen = chosen & ((tied & (feature > last[:, None])) == 0)
        slot = written[:, None] + tl.cumsum(chosen.to(tl.int32), 1) - 1
        key = (here.to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)
        tl.store(keys_at + slot, key, mask=chosen)
        written += tl.sum(chosen.to(tl.int32), axis=1)
    tl.store(count_ptr + rows, written, mask=live)
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
                behind = even & (tl.load(source + last_kept, mask=even, other=-1) == bound)
                column = _feature(number_ptr, place, last_kept, behind, G, F, T, SIZE, PERMUTED)
                hides = hides & ((behind & (column >= last[:, None])) == 0)
        tl.store(source + T * G + group, hides.to(tl.int32) * -1, mask=hides)
        hiding += tl.sum(hides.to(tl.int32), axis=1)
    tl.store(open_ptr + rows, hiding, mask=live)

    tl.debug_barrier()  # other threads of this program wrote some of the keys
    slot = tl.arange(0, KP)[None, :]
    mask = (slot < written[:, None]) & live[:, None]
    key = tl.load(keys_at + slot, mask=mask, other=0)
    candidate = 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
    feature = _feature(number_ptr, place, candidate, mask, G, F, T, SIZE, PERMUTED)
    key = ((key >> 32) << 32) | (0x7FFFFFFF - feature).to(tl.int64)
    if FINISH:
        opened = (hiding > 0)[:, None]
        tl.store(keys_at + slot, key, mask=mask & opened)
        done = live[:, None] & (opened == 0)
        wide = rows.to(tl.int64)[:, None]
        finish(key, written, wide, done, keys_at, values_ptr, indices_ptr, K, ROWS, KP, False, COUNT)
    else:
        tl.store(keys_at + slot, key, mask=mask)
