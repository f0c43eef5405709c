"""Jitted row selection. A candidate is one int64 key: value bits above, reversed column below.

Non-negative floats order like their bits, so larger keys are larger values, and equal values put the
lower column first. All loops are sequential per row and release the GIL.
"""

from __future__ import annotations

import numpy as np
from numba import njit

INF_BITS = np.int32(0x7F800000)  # bits of +inf: anything above, as a signed integer, is a NaN
NEG_INF_RANK = np.int32(-0x7F800001)  # rank of -inf in the signed order below
MAX_COLUMN = np.int64(0x7FFFFFFF)
BLOCK = 64


def jit(function):
    """njit with an on-disk cache where the folder (or the user's cache) is writable."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


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
def gate_rows(bits, first_column, keys, counts, floor, k, start, stop):
    """Add to each row's candidates what may still be among its k largest positive entries.

    bits [rows, C] int32 view of float32 scores of columns first_column ..; keys [rows, room] int64, counts
    [rows], floor [rows] int32: bits of the k-th value so far. Columns come in ascending order, so an equal
    value can never displace one that is kept.
    """
    width, room = bits.shape[1], keys.shape[1]
    for row in range(start, stop):
        limit, count = floor[row], counts[row]
        line, kept = bits[row], keys[row]
        for left in range(0, width, BLOCK):
            right = min(left + BLOCK, width)
            top = np.int32(0)
            if right - left == BLOCK:
                for c in range(BLOCK):
                    top = max(top, line[left + c])
            else:
                for c in range(left, right):
                    top = max(top, line[c])
            if top <= limit:
                continue
            for c in range(left, right):
                value = line[c]
                if value > limit and value <= INF_BITS:
                    kept[count] = (np.int64(value) << 32) | (MAX_COLUMN - first_column - c)
                    count += 1
                    if count == room:
                        limit = np.int32(keep_largest(kept, count, k) >> 32)
                        count = k
        floor[row], counts[row] = limit, count


@jit
def rank_rows(bits, keys, start, stop, k):
    """The k largest of each row of any-sign scores (float32 viewed as int32) into keys [rows, room]."""
    width, room = bits.shape[1], keys.shape[1]
    for row in range(start, stop):
        limit, count = np.int32(-0x80000000), 0
        line, kept = bits[row], keys[row]
        for c in range(width):
            value = line[c]
            rank = value ^ ((value >> 31) & np.int32(0x7FFFFFFF))  # signed integers that order like floats
            if rank <= limit:
                continue
            if rank > INF_BITS or rank < NEG_INF_RANK:
                rank = NEG_INF_RANK
                if rank <= limit:
                    continue
            if rank == -1:  # -0.0 is 0.0
                rank = np.int32(0)
            kept[count] = (np.int64(rank) << 32) | (MAX_COLUMN - c)
            count += 1
            if count == room:
                limit = np.int32(keep_largest(kept, count, k) >> 32)
                count = k
        keep_largest(kept, count, k)


@jit
def finish_rows(keys, counts, k, values, indices, start, stop):
    """Sort each row's candidates; fill up with 0.0 at the lowest columns not taken."""
    for row in range(start, stop):
        count = counts[row]
        kept = keys[row]
        if count > k:
            keep_largest(kept, count, k)
            count = k
        ordered = np.sort(kept[:count])
        for j in range(count):
            key = ordered[count - 1 - j]
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
def sort_ranked(keys, k, values, indices, start, stop):
    """Sorted values (float32 bits) and columns from ``rank_rows``."""
    for row in range(start, stop):
        ordered = np.sort(keys[row, :k])
        for j in range(k):
            key = ordered[k - 1 - j]
            rank = np.int32(key >> 32)
            values[row, j] = rank ^ ((rank >> 31) & np.int32(0x7FFFFFFF))
            indices[row, j] = MAX_COLUMN - (key & MAX_COLUMN)


@jit
def count_above(scores, limit, counts, start, stop):
    """Add to counts [rows] how many scores [rows, C] exceed limit [C]."""
    for row in range(start, stop):
        line, total = scores[row], 0
        for c in range(line.shape[0]):
            total += line[c] > limit[c]
        counts[row] += total


@jit
def place_above(scores, limit, first_column, cursor, columns, values, start, stop):
    """Append the entries that ``count_above`` counted at cursor [rows], which advances."""
    width = scores.shape[1]
    for row in range(start, stop):
        line, at = scores[row], cursor[row]
        for left in range(0, width, BLOCK):
            right = min(left + BLOCK, width)
            hits = 0
            for c in range(left, right):
                hits += line[c] > limit[c]
            if hits == 0:
                continue
            for c in range(left, right):
                if line[c] > limit[c]:
                    columns[at] = first_column + c
                    values[at] = line[c]
                    at += 1
        cursor[row] = at


@jit
def pool_rows(offsets, starts, columns, values, n_cols, kind, out_columns, out_values, out_counts):
    """Reduce token codes to sequence rows; returns the number of entries written.

    Token t holds entries starts[t] .. starts[t + 1]; zero values are skipped. kind: 0 max, 1 sum, 2 mean,
    3 count. Sums are float64.
    """
    total = np.zeros(n_cols, dtype=np.float64)
    touched = np.empty(n_cols, dtype=np.int32)
    written = 0
    for seq in range(offsets.shape[0] - 1):
        first, stop = offsets[seq], offsets[seq + 1]
        n = 0
        for entry in range(starts[first], starts[stop]):
            value = np.float64(values[entry])
            if value <= 0.0:
                continue
            column = columns[entry]
            if total[column] == 0.0:
                touched[n] = column
                n += 1
            if kind == 0:
                total[column] = max(total[column], value)
            elif kind == 3:
                total[column] += 1.0
            else:
                total[column] += value
        order = np.sort(touched[:n])
        for j in range(n):
            column = order[j]
            pooled = total[column]
            if kind == 2:
                pooled /= stop - first
            out_columns[written] = column
            out_values[written] = np.float32(pooled)
            written += 1
            total[column] = 0.0
        out_counts[seq] = n
    return written
