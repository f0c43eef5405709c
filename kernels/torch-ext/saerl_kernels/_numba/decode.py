"""Sums of bfloat16 decoder rows, which torch would widen into a copy first."""

from __future__ import annotations

import numpy as np

from .select import jit


@jit
def decode_rows(indptr, indices, values, bits, out, start, stop):
    """out float32 [n_rows, D], rows start .. stop: the sums of values times decoder rows, in entry order.

    bits uint16 [F, D]: bfloat16 is the upper half of a float32. Four entries at a time, so that the row being
    written is read once for four that are added.
    """
    half = np.uint32(16)
    for row in range(start, stop):
        total = out[row]
        total[:] = 0.0
        at, end = indptr[row], indptr[row + 1]
        while at + 4 <= end:
            a, b = bits[indices[at]], bits[indices[at + 1]]
            c, d = bits[indices[at + 2]], bits[indices[at + 3]]
            va, vb, vc, vd = values[at], values[at + 1], values[at + 2], values[at + 3]
            for j in range(total.shape[0]):
                total[j] = (
                    total[j]
                    + va * np.uint32(np.uint32(a[j]) << half).view(np.float32)
                    + vb * np.uint32(np.uint32(b[j]) << half).view(np.float32)
                    + vc * np.uint32(np.uint32(c[j]) << half).view(np.float32)
                    + vd * np.uint32(np.uint32(d[j]) << half).view(np.float32)
                )
            at += 4
        while at < end:
            a, va = bits[indices[at]], values[at]
            for j in range(total.shape[0]):
                total[j] += va * np.uint32(np.uint32(a[j]) << half).view(np.float32)
            at += 1
