"""Exact encoding through bfloat16 units: a screen with a proven margin, then float32 scores of what it left.

The product runs in bfloat16, four to five times as fast as in float32 where the processor has such units. It
is not the result: it says which features cannot be among a row's k largest, and only the others are scored in
float32. Why nothing is lost is in README.md ("The CPU encoder").
"""

from __future__ import annotations

import functools
import time
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor

from ..dispatch import screening
from ..pack import PackedEncoder
from ..types import TopK
from . import screen_rows, select
from .threads import run

ROWS = 1024
BLOCK = 1 << 23  # scores of a block, 16 MB: the more columns the first bound sees, the fewer pass the gate
LARGEST = 2.0**100  # norms and products above it go to the float32 path: nothing here can overflow
WIDEST = 1 << 16  # d_in up to which the accumulation term of the margin is small
FASTER = 1.5  # between the rates of the processors that gain (2 and more) and those that do not (1)
OUT_ROUNDING = 2.0**-8 * (1 + 2.0**-5)  # a bfloat16 result, half an ulp, and float32 rounding of the bounds


class Screen(NamedTuple):
    """What the screen needs of a weight [F, D]."""

    half: Tensor  # bfloat16 [F, D]
    margin: np.ndarray  # float32 [4, F]: factors of |x - half(x)| and of |x|, a constant, the bias
    largest: float  # of the rows' norms


def bfloat16_rate() -> float:
    """How many times as fast as in float32 torch multiplies in bfloat16: the best of five turns of each.

    On one thread and in its CPU time, of which others on the machine take nothing.
    """
    times, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x, w = (torch.ones((rows, 768), dtype=dtype, device="cpu") for rows in (256, 1024))
            for _ in range(6):  # one more, in which oneDNN prepares
                begin = time.thread_time()
                torch.mm(x, w.t())
                times.setdefault(dtype, []).append(time.thread_time() - begin)
    finally:
        torch.set_num_threads(threads)
    return min(times[torch.float32]) / min(times[torch.bfloat16])


@functools.lru_cache(maxsize=None)
def has_units() -> bool:
    """Does this processor multiply bfloat16 much faster, and does torch's product keep the margin?

    torch runs bfloat16 products without such units as well, several times slower than float32 ones. AVX512's
    instruction has twice the rate of float32's on AMD and the same on Intel: there a product is timed.
    """
    amx, avx = (
        bool(getattr(torch.cpu, f"_is_{name}_supported", bool)()) for name in ("amx_tile", "avx512_bf16")
    )
    if not torch.backends.mkldnn.is_available() or not (amx or avx and bfloat16_rate() > FASTER):
        return False
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 768, generator=g, device="cpu").bfloat16() for rows in (64, 96))
    exact, size = x.double() @ w.double().t(), x.double().norm(dim=1)[:, None] * w.double().norm(dim=1)
    error = (torch.mm(x, w.t()).double() - exact).abs()
    return bool((error <= OUT_ROUNDING * exact.abs() + accumulation(768) * size).all())


def accumulation(d_in: int) -> float:
    """Bound of a sum's error over the product of norms: four times that of float32 rounding to nearest.

    So it holds for units that truncate or round to odd, in any order of summation.
    """
    return (d_in + 16) * 2.0**-22


def pays(x: Tensor, encoder: PackedEncoder, k: int) -> bool:
    """Is the screen faster here? Measured: NOTES.md."""
    return (
        screening()
        and encoder.dtype in (torch.float32, torch.bfloat16)
        and 16 * k <= encoder.d_sae
        and 128 <= encoder.d_in <= WIDEST
        and x.shape[0] >= 16
        and encoder.weight.is_contiguous()
        and has_units()
    )


def screen_of(encoder: PackedEncoder) -> Optional[Screen]:
    """The encoder's screen, made once and again when its weight or bias has been written to; None: none.

    It keeps d_sae x d_in x 2 bytes for a float32 weight, nothing of that size for a bfloat16 one. Tensors
    made in inference mode count no versions: do not write to such an encoder's weight.
    """
    return encoder.derived("screen", lambda: _make(encoder))


def _make(encoder: PackedEncoder) -> Optional[Screen]:
    half, norms, rests = _halves(encoder.weight)
    bias = encoder.bias.numpy()
    largest = float(norms.max())
    if not (largest < LARGEST and float(np.abs(bias).max()) < LARGEST):  # NaN fails too
        return None
    c = accumulation(encoder.d_in)
    margin = np.empty((4, len(norms)), dtype=np.float32)
    margin[0] = norms * (1 + c) * 1.001
    margin[1] = (rests * (1 + c) + 2 * c * norms) * 1.001  # sums of the screen and of the float32 scores
    margin[2] = encoder.d_in * 2.0**-122 + np.abs(bias) * 2.0**-21  # products that underflow; adding the bias
    margin[3] = bias
    return Screen(half, margin, largest)


def _halves(wide: Tensor) -> Any:
    """(bfloat16 rows, norms, norms of what rounding took), the norms rounded up."""
    n, d = wide.shape
    norms, rests = np.empty(n, dtype=np.float32), np.zeros(n, dtype=np.float32)
    if wide.dtype == torch.bfloat16:
        half = wide.detach()
        run(screen_rows.half_norms, n, bits_of(half), norms)
    else:
        half = _memory(n, d)
        run(screen_rows.halve_rows, n, wide.detach().numpy(), bits_of(half), norms, rests)
    slack = np.float32(d**0.5 * 2.0**-63)
    return half, norms * np.float32(1.01) + slack, rests * np.float32(1.01) + slack


def _memory(*shape: int) -> Tensor:
    """bfloat16 from NumPy, which asks for huge pages: fresh memory costs a tenth of torch's page faults."""
    return torch.from_numpy(np.empty(shape, dtype=np.int16)).view(torch.bfloat16)


def bits_of(half: Tensor) -> np.ndarray:
    return half.view(torch.int16).numpy().view(np.uint16)


def encode_topk(x: Tensor, encoder: PackedEncoder, k: int, whole: Callable[..., TopK]) -> TopK:
    """``x`` [n, d_in] prepared, encoder in natural order; ``whole`` encodes what the margin leaves open."""
    screen = screen_of(encoder)
    if screen is None:
        return whole(x, encoder, k)
    values, indices = TopK.empty((x.shape[0], k), "cpu")
    for top in range(0, x.shape[0], ROWS):
        band = x[top : top + ROWS]
        open_rows = _encode_band(
            band, encoder, screen, k, values[top : top + ROWS], indices[top : top + ROWS]
        )
        if len(open_rows):
            at = torch.from_numpy(open_rows)
            values[top + at], indices[top + at] = whole(band[at], encoder, k)
    return TopK(values, indices)


def _encode_band(
    x: Tensor, encoder: PackedEncoder, screen: Screen, k: int, values: Tensor, indices: Tensor
) -> np.ndarray:
    """Fill values and indices [n, k]; returns the rows that are not settled."""
    n, d_sae, room = x.shape[0], encoder.d_sae, 4 * k + 256
    half, norms, rests = _halves(x)
    counts = np.where(norms * np.float64(screen.largest) < LARGEST, 0, -1)
    limits = np.full(n, screen_rows.LEAST)
    low, high = np.empty((n, room), dtype=np.float32), np.empty((n, room), dtype=np.float32)
    columns = np.empty((n, room), dtype=np.int32)
    width = min(d_sae, max(1024, BLOCK // n))
    memory = _memory(n * width)
    for left in range(0, d_sae, width):
        right = min(left + width, d_sae)
        block = memory[: n * (right - left)].view(n, right - left)
        torch.mm(half, screen.half[left:right].t(), out=block)
        margin = np.ascontiguousarray(screen.margin[:, left:right])
        lanes = select.lanes_for(2 * k, right - left) if left == 0 else 0
        run(
            screen_rows.screen_rows, n, bits_of(block), left, margin, rests, norms, np.float32(OUT_ROUNDING),
            low, high, columns, counts, limits, k, lanes, right == d_sae,
        )  # fmt: skip
    open_rows = np.flatnonzero(counts < 0)
    counts[open_rows] = 0
    starts, total = np.zeros(d_sae + 1, dtype=np.int64), int(counts.sum())
    rows, slots = np.empty(total, dtype=np.int32), np.empty(total, dtype=np.int32)
    screen_rows.sort_candidates(columns, counts, starts, rows, slots)
    wide = x.float().numpy()
    entries = (encoder.bias.numpy(), starts, rows, slots, low)  # the lower bounds give way to the scores
    if encoder.dtype == torch.bfloat16:
        run(screen_rows.score_half, d_sae, wide, bits_of(screen.half), *entries)
    else:
        run(screen_rows.score_wide, d_sae, wide, encoder.weight.numpy(), *entries)
    keys = np.empty((n, room), dtype=np.int64)
    run(screen_rows.rank_candidates, n, low.view(np.int32), columns, counts, keys)
    run(select.finish_rows, n, keys, counts, k, values.numpy().view(np.int32), indices.numpy())
    return open_rows
