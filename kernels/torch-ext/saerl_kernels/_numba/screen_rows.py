"""Jitted loops of the bfloat16 screen (``screen.py``): rounding with norms, the gate, and exact scores."""

from __future__ import annotations

import numpy as np

from .select import BLOCK, INF_BITS, MAX_COLUMN, PART, jit, keep_largest, reassociating_jit

LEAST = np.float32(2.0**-125)  # below every upper bound of a positive score: the margin holds 2^-124
HALF = np.uint32(16)  # bfloat16 is the upper half of a float32


@reassociating_jit
def halve_rows(wide, half, norms, rests, start, stop):
    """half = bits of bfloat16(wide) [n, D], nearest even; norms of the rows and of what rounding took.

    Squares below the normal range may be lost: the caller adds sqrt(D) 2^-63. NaN and inf end in a norm that
    is not finite.
    """
    for row in range(start, stop):
        total, rest = np.float32(0.0), np.float32(0.0)
        for i in range(np.uint64(wide.shape[1])):
            value = wide[row, i]
            bits = np.float32(value).view(np.uint32)
            upper = np.uint32((bits + np.uint32(0x7FFF) + ((bits >> HALF) & np.uint32(1))) >> HALF)
            half[row, i] = np.uint16(upper)
            lost = value - np.uint32(upper << HALF).view(np.float32)
            total += value * value
            rest += lost * lost
        norms[row], rests[row] = np.sqrt(total), np.sqrt(rest)


@reassociating_jit
def half_norms(half, norms, start, stop):
    """norms [n] of rows given as bfloat16 bits [n, D]."""
    for row in range(start, stop):
        total = np.float32(0.0)
        for i in range(np.uint64(half.shape[1])):
            value = np.uint32(np.uint32(half[row, i]) << HALF).view(np.float32)
            total += value * value
        norms[row] = np.sqrt(total)


@jit
def first_bound(flat, at, margin, rest, norm, out_rounding, lanes, k):
    """A value that the scores of at least k of these columns reach, or 0: lane maxima of lower bounds."""
    by_rest, by_norm, constant, bias = margin[0], margin[1], margin[2], margin[3]
    n = np.uint64(len(lanes))
    lanes[:] = np.float32(0.0)
    for line in range(np.uint64(margin.shape[1]) // n):
        for lane in range(n):
            c = line * n + lane
            t = np.uint32(np.uint32(flat[at + c]) << HALF).view(np.float32)
            low = t - out_rounding * abs(t) - rest * by_rest[c] - norm * by_norm[c] - constant[c] + bias[c]
            lanes[lane] = low if low > lanes[lane] else lanes[lane]
    return keep_largest(lanes, len(lanes), k)


@jit
def tighten(low, high, columns, count, k, limit, scratch):
    """Raise ``limit`` to the k-th largest lower bound and drop what cannot reach it: (limit, count)."""
    if count >= k:
        scratch[:count] = low[:count]
        limit = max(limit, keep_largest(scratch, count, k))
    kept = 0
    for j in range(count):
        if high[j] >= limit:
            low[kept], high[kept], columns[kept] = low[j], high[j], columns[j]
            kept += 1
    return limit, kept


@jit
def screen_rows(
    half, first_column, margin, rests, norms, out_rounding, low, high, columns, counts, limits, k, lanes_of,
    last, start, stop,
):  # fmt: skip
    """Keep of each row the columns whose score may be among its k largest positive ones.

    half [rows, C]: bits of x @ W.T in bfloat16 for the columns first_column ... A score lies within
    ``rests * margin[0] + norms * margin[1] + margin[2] + out_rounding |t|`` of ``t + margin[3]``, margin
    [4, C]. low, high, columns [rows, room]: what is kept, counts [rows] of them, -1 once they did not fit.
    limits [rows]: k columns are known to reach it. ``last``: these are the last columns.
    """
    width, room = half.shape[1], low.shape[1]
    flat = half.reshape(-1)
    by_rest, by_norm, constant, bias = margin[0], margin[1], margin[2], margin[3]
    scratch = np.empty(room, dtype=np.float32)
    lanes = np.empty(lanes_of, dtype=np.float32)
    for row in range(start, stop):
        count, limit, rest, norm = counts[row], limits[row], rests[row], norms[row]
        if count < 0:
            continue
        base, full = np.uint64(row) * np.uint64(width), min(np.int64(2 * k + BLOCK), room - BLOCK)
        if lanes_of > 0:
            limit = max(limit, first_bound(flat, base, margin, rest, norm, out_rounding, lanes, k))
        for left in range(0, width, BLOCK):
            right = min(left + BLOCK, width)
            if right - left == BLOCK:
                hit, first = np.int32(0), np.uint64(left)
                for c in range(np.uint64(BLOCK)):
                    t = np.uint32(np.uint32(flat[base + first + c]) << HALF).view(np.float32)
                    e = rest * by_rest[first + c] + norm * by_norm[first + c] + constant[first + c]
                    hit |= np.int32(t + bias[first + c] + (e + out_rounding * abs(t)) >= limit)
                if hit == 0:
                    continue
            if count > full:
                limit, count = tighten(low[row], high[row], columns[row], count, k, limit, scratch)
                full = min(count + max(k, BLOCK), room - BLOCK)
                if count > full:
                    count = -1
                    break
            for part in range(left, right, PART):
                first, mask = np.uint64(part), np.int32(0)
                if right - part >= PART:
                    for c in range(np.uint64(PART)):
                        t = np.uint32(np.uint32(flat[base + first + c]) << HALF).view(np.float32)
                        e = rest * by_rest[first + c] + norm * by_norm[first + c] + constant[first + c]
                        above = t + bias[first + c] + (e + out_rounding * abs(t)) >= limit
                        mask |= np.int32(above) << np.int32(c)
                else:
                    mask = np.int32((1 << (right - part)) - 1)
                c = first
                while mask != 0:
                    if mask & 1:
                        t = np.uint32(np.uint32(flat[base + c]) << HALF).view(np.float32)
                        e = rest * by_rest[c] + norm * by_norm[c] + constant[c] + out_rounding * abs(t)
                        if t + bias[c] + e >= limit:
                            low[row, count], high[row, count] = t + bias[c] - e, t + bias[c] + e
                            columns[row, count] = first_column + np.int32(c)
                            count += 1
                    mask >>= 1
                    c += np.uint64(1)
        if last and count > 0:
            limit, count = tighten(low[row], high[row], columns[row], count, k, limit, scratch)
        counts[row], limits[row] = count, limit


@jit
def sort_candidates(columns, counts, starts, rows, slots):
    """Candidates by column, in row order: starts int64 [F + 1], their row and place in ``columns``."""
    for row in range(len(counts)):
        for j in range(counts[row]):
            starts[columns[row, j] + 1] += 1
    for column in range(1, len(starts)):
        starts[column] += starts[column - 1]
    cursor = starts[:-1].copy()
    for row in range(len(counts)):
        for j in range(counts[row]):
            at = cursor[columns[row, j]]
            rows[at], slots[at] = row, j
            cursor[columns[row, j]] = at + 1


@reassociating_jit
def score_wide(x, weight, bias, starts, rows, slots, scores, start, stop):
    """scores[row, slot] = x[row] . weight[column] + bias[column] for candidates in columns start .. stop."""
    for column in range(start, stop):
        for at in range(starts[column], starts[column + 1]):
            row, total = rows[at], np.float32(0.0)
            for i in range(np.uint64(x.shape[1])):
                total += weight[column, i] * x[row, i]
            scores[row, slots[at]] = total + bias[column]


@reassociating_jit
def score_half(x, weight, bias, starts, rows, slots, scores, start, stop):
    """``score_wide`` of a weight given as bfloat16 bits."""
    for column in range(start, stop):
        for at in range(starts[column], starts[column + 1]):
            row, total = rows[at], np.float32(0.0)
            for i in range(np.uint64(x.shape[1])):
                total += np.uint32(np.uint32(weight[column, i]) << HALF).view(np.float32) * x[row, i]
            scores[row, slots[at]] = total + bias[column]


@jit
def rank_candidates(bits, columns, counts, keys, start, stop):
    """Keys of the positive scores (float32 bits [rows, room]); counts become their number."""
    for row in range(start, stop):
        kept = 0
        for j in range(counts[row]):
            value = bits[row, j]
            if value > 0 and value <= INF_BITS:
                keys[row, kept] = (np.int64(value) << 32) | (MAX_COLUMN - np.int64(columns[row, j]))
                kept += 1
        counts[row] = kept
