"""Jitted row selection. A candidate is one int64 key: value bits above, reversed column below.

Non-negative floats order like their bits, so larger keys are larger values, and equal values put the
lower column first. All loops are sequential per row and release the GIL.
"""

from __future__ import annotations

import numpy as np
from numba import njit

INF_BITS = np.int32(0x7F800000)  # bits of +inf: anything above, as a signed integer, is a NaN
NEG_INF_RANK = np.int32(-0x7F800001)  # rank of -inf in the signed order below
LOWEST = np.int32(-0x80000000)
MAX_COLUMN = np.int64(0x7FFFFFFF)
BLOCK = 64
PART = 16


def jit(function, fastmath=False):
    """njit with an on-disk cache where the folder (or the user's cache) is writable."""
    try:
        return njit(nogil=True, cache=True, fastmath=fastmath)(function)
    except RuntimeError:
        return njit(nogil=True, fastmath=fastmath)(function)


def reassociating_jit(function):
    """``jit`` that may reorder sums, which SIMD needs; NaN and infinities keep their meaning."""
    return jit(function, {"reassoc", "contract"})


@reassociating_jit
def product(x, weight, bias, scores, start, stop):
    """scores[:, start:stop] of ``x @ weight.T + bias`` for a few rows; every feature is read once.

    Reading the weight is all that counts here, and BLAS takes one to three rows feature by row: this runs at
    the speed of memory.
    """
    for feature in range(start, stop):
        for row in range(x.shape[0]):
            total = np.float32(0.0)
            for i in range(x.shape[1]):
                total += weight[feature, i] * x[row, i]
            scores[row, feature] = total + bias[feature]


@jit
def keep_largest(keys, count, k):
    """Reorder ``keys[:count]`` so that its k largest come first (quickselect); returns the least of them."""
    low, high, target = 0, count - 1, k - 1
    while low < high:
        pivot = keys[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if target <= j:
            high = j
        elif target >= i:
            low = i
        else:
            break
    return keys[target]


@jit
def any_above(flat, at, limit):
    """Does any of the BLOCK values from ``at`` exceed ``limit``? Written so that LLVM makes it SIMD."""
    hit = np.int32(0)
    for c in range(np.uint64(BLOCK)):
        hit |= np.int32(flat[at + c] > limit)
    return hit != 0


@jit
def part_above(flat, at, limit):
    """``any_above`` for PART values."""
    hit = np.int32(0)
    for c in range(np.uint64(PART)):
        hit |= np.int32(flat[at + c] > limit)
    return hit != 0


@jit
def lane_bound(flat, at, width, lanes, k):
    """Bits just below a value that at least k of the ``width`` values from ``at`` reach.

    The maxima over ``len(lanes)`` interleaved lanes are that many different values, so the k-th largest of
    them bounds the row's k-th largest from below; NaN counts as 0.
    """
    n = np.uint64(len(lanes))
    lanes[:] = 0
    for line in range(np.uint64(width) // n):
        for c in range(n):
            value = flat[at + line * n + c]
            value = np.int32(0) if value > INF_BITS else value
            lanes[c] = value if value > lanes[c] else lanes[c]
    return np.int32(max(np.int32(0), keep_largest(lanes, len(lanes), k) - 1))


@jit
def gate_rows(bits, first_column, lanes, keys, counts, floor, k, start, stop):
    """Add to each row's candidates what may still be among its k largest positive entries.

    bits [rows, C] int32 view of float32 scores of columns first_column ..; keys [rows, room] int64 with room
    at least k + 1 + BLOCK, counts [rows], floor [rows] int32: bits that a candidate must exceed. Columns come
    in ascending order, so an equal value can never displace one that is kept. Unless ``lanes`` is empty it is
    scratch for a first bound (``lane_bound``).
    """
    width, room = bits.shape[1], keys.shape[1]
    flat = bits.reshape(-1)
    for row in range(start, stop):
        limit, count = floor[row], counts[row]
        kept = keys[row]
        base = np.uint64(row) * np.uint64(width)
        if len(lanes) > 0:
            limit = lane_bound(flat, base, width, lanes, k)
        for left in range(0, width, BLOCK):
            right = min(left + BLOCK, width)
            at = base + np.uint64(left)
            if right - left == BLOCK and not any_above(flat, at, limit):
                continue
            if count > room - BLOCK:
                limit = np.int32(keep_largest(kept, count, k) >> 32)
                count = k
            for first in range(left, right, PART):
                size = np.uint64(min(PART, right - first))
                at = base + np.uint64(first)
                if size == PART and not part_above(flat, at, limit):
                    continue
                for c in range(size):
                    value = flat[at + c]
                    if value > limit and value <= INF_BITS:
                        kept[count] = (np.int64(value) << 32) | (
                            MAX_COLUMN - first_column - first - np.int64(c)
                        )
                        count += 1
        floor[row], counts[row] = limit, count


@jit
def rank_rows(bits, keys, start, stop, k):
    """The k largest of each row of any-sign scores (float32 viewed as int32) into keys [rows, room]."""
    width, room = bits.shape[1], keys.shape[1]
    flat = bits.reshape(-1)
    for row in range(start, stop):
        limit, count = LOWEST, 0
        kept = keys[row]
        base = np.uint64(row) * np.uint64(width)
        for left in range(0, width, BLOCK):
            right = min(left + BLOCK, width)
            at = base + np.uint64(left)
            hit = np.int32(limit == LOWEST)  # nothing may be dropped yet, not even a NaN of that rank
            for c in range(np.uint64(right - left)):
                value = flat[at + c]
                hit |= np.int32((value ^ ((value >> 31) & np.int32(0x7FFFFFFF))) > limit)
            if hit == 0:
                continue
            if count > room - BLOCK:
                limit = np.int32(keep_largest(kept, count, k) >> 32)
                count = k
            for c in range(np.uint64(right - left)):
                value = flat[at + c]
                rank = value ^ ((value >> 31) & np.int32(0x7FFFFFFF))  # signed integers in float order
                if rank <= limit and limit != LOWEST:
                    continue
                if rank > INF_BITS or rank < NEG_INF_RANK:
                    rank = NEG_INF_RANK
                if rank == -1:  # -0.0 is 0.0
                    rank = np.int32(0)
                if rank > limit:
                    kept[count] = (np.int64(rank) << 32) | (MAX_COLUMN - left - np.int64(c))
                    count += 1
        keep_largest(kept, count, k)


@jit
def sort_descending(keys, count):
    """Sort ``keys[:count]`` in place: insertion for the usual short rows."""
    if count > 96:
        keys[:count] = np.sort(keys[:count])[::-1]
        return
    for i in range(1, count):
        key = keys[i]
        j = i - 1
        while j >= 0 and keys[j] < key:
            keys[j + 1] = keys[j]
            j -= 1
        keys[j + 1] = key


@jit
def finish_rows(keys, counts, k, values, indices, start, stop):
    """Sort each row's candidates; fill up with 0.0 at the lowest columns not taken."""
    for row in range(start, stop):
        count = counts[row]
        kept = keys[row]
        if count > k:
            keep_largest(kept, count, k)
            count = k
        sort_descending(kept, count)
        for j in range(count):
            key = kept[j]
            values[row, j] = np.int32(key >> 32)
            indices[row, j] = MAX_COLUMN - (key & MAX_COLUMN)
        if count < k:
            taken = np.zeros(k, dtype=np.bool_)  # fewer than k are taken, so k columns hold enough free ones
            for j in range(count):
                if indices[row, j] < k:
                    taken[indices[row, j]] = True
            column = 0
            for j in range(count, k):
                while taken[column]:
                    column += 1
                values[row, j] = 0
                indices[row, j] = column
                column += 1


@jit
def room_for(k):
    """Candidates a row may hold: k, as many again before the next selection, and one block."""
    return k + max(k, 64) + BLOCK


@jit
def lanes_for(k, width):
    """Lanes of a first bound for rows of ``width``; of too few values each, they bound badly: then none."""
    lanes = 64 * ((2 * k + 63) // 64)
    return lanes if width >= 4 * lanes else 0


@jit
def select_few(scores, k, values, indices):
    """Top-k of ReLU(scores) [n, F] of a few rows, in one call; values [n, k] are float32 bits."""
    n, width = scores.shape
    keys = np.empty((n, room_for(k)), dtype=np.int64)
    counts = np.zeros(n, dtype=np.int64)
    floor = np.zeros(n, dtype=np.int32)
    lanes = np.empty(lanes_for(k, width), dtype=np.int32)
    gate_rows(scores.view(np.int32), 0, lanes, keys, counts, floor, k, 0, n)
    finish_rows(keys, counts, k, values, indices, 0, n)


@jit
def encode_few(x, weight, bias, k, values, indices):
    """``product`` and ``select_few`` in one call."""
    scores = np.empty((x.shape[0], weight.shape[0]), dtype=np.float32)
    product(x, weight, bias, scores, 0, weight.shape[0])
    select_few(scores, k, values, indices)


@jit
def sort_ranked(keys, k, values, indices, start, stop):
    """Sorted values (float32 bits) and columns from ``rank_rows``."""
    for row in range(start, stop):
        sort_descending(keys[row], k)
        for j in range(k):
            key = keys[row, j]
            rank = np.int32(key >> 32)
            values[row, j] = rank ^ ((rank >> 31) & np.int32(0x7FFFFFFF))
            indices[row, j] = MAX_COLUMN - (key & MAX_COLUMN)


@jit
def count_above(scores, limit, counts, start, stop):
    """Add to counts [rows] how many scores [rows, C] exceed limit [C]."""
    width = np.uint64(scores.shape[1])
    flat = scores.reshape(-1)
    for row in range(start, stop):
        base, total = np.uint64(row) * width, np.int32(0)
        for c in range(width):
            total += np.int32(flat[base + c] > limit[c])
        counts[row] += total


@jit
def place_above(scores, limit, first_column, cursor, columns, values, start, stop):
    """Append the entries that ``count_above`` counted at cursor [rows], which advances."""
    width = scores.shape[1]
    flat = scores.reshape(-1)
    for row in range(start, stop):
        at = cursor[row]
        for left in range(0, width, BLOCK):
            base, first = np.uint64(row * width + left), np.uint64(left)
            size = np.uint64(min(BLOCK, width - left))
            hit = np.int32(0)
            for c in range(size):
                hit |= np.int32(flat[base + c] > limit[first + c])
            if hit == 0:
                continue
            for c in range(size):
                if flat[base + c] > limit[first + c]:
                    columns[at] = first_column + left + np.int64(c)
                    values[at] = flat[base + c]
                    at += 1
        cursor[row] = at


@jit
def pool_rows(
    offsets, starts, columns, values, weights, carry_columns, carry, n_cols, kind, indptr, out_columns, out
):
    """Reduce token codes to sequence rows, in token order: indptr, columns ascending, float64 totals.

    Token t holds entries starts[t] .. starts[t + 1]; values that are not positive are skipped. weights
    [n_tokens] or of length 0. The first sequence starts from ``carry``. kind: 0 max, 1 sum, 2 count.
    """
    total = np.zeros(n_cols, dtype=np.float64)
    touched = np.empty(n_cols, dtype=np.int32)
    written = 0
    for seq in range(offsets.shape[0] - 1):
        n = 0
        if seq == 0:
            for entry in range(carry_columns.shape[0]):
                total[carry_columns[entry]] = carry[entry]
                touched[n] = carry_columns[entry]
                n += 1
        for token in range(offsets[seq], offsets[seq + 1]):
            weight = np.float64(weights[token]) if weights.shape[0] > 0 else 1.0
            for entry in range(starts[token], starts[token + 1]):
                if not values[entry] > 0.0:
                    continue
                value = weight if kind == 2 else weight * np.float64(values[entry])
                column = columns[entry]
                before = total[column]
                if before == 0.0:
                    touched[n] = column
                    n += 1
                total[column] = max(before, value) if kind == 0 else before + value
        if n * 64 > n_cols:  # a walk over all columns is then cheaper than a sort
            for column in range(n_cols):
                if total[column] != 0.0:
                    out_columns[written], out[written] = column, total[column]
                    total[column] = 0.0
                    written += 1
        else:
            for column in np.sort(touched[:n]):
                out_columns[written], out[written] = column, total[column]
                total[column] = 0.0
                written += 1
        indptr[seq + 1] = written
