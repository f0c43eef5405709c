"""BatchTopK: the largest activations of a whole batch, without ranking or holding the whole matrix."""

from __future__ import annotations

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor

from ._torch import CPU_CHUNK, GPU_CHUNK, linear
from .pack import PackedEncoder
from .types import TopK, _indptr

INF_BITS = 0x7F800000
BINS = 1 << 15  # of the upper 16 bits of a non-negative float32
FIRST_ROWS = 64

Gather = Callable[[Tensor, int], Tuple[Tensor, Tensor]]
Score = Callable[[Tensor, PackedEncoder, int], Tuple[Tensor, Tensor]]


def gather_survivors(scores: Tensor, edge: int) -> Tuple[Tensor, Tensor]:
    """(flat positions int64, bits int32) of float32 ``scores`` [n, F] whose bits are in edge .. INF_BITS."""
    bits = scores.reshape(-1).view(torch.int32)
    found = ((bits >= edge) & (bits <= INF_BITS)).nonzero().squeeze(-1)
    return found, bits[found]


def batch_topk(
    x: Tensor,
    encoder: PackedEncoder,
    count: int,
    gather: Gather = gather_survivors,
    score: Optional[Score] = None,
) -> TopK:
    """The ``count`` largest positive activations of ``x`` [n, d_in] as ``PackedEncoder.prepare`` returns it.

    A row holds what it won, padded with 0.0 at feature 0 to the longest row (at least 1). Equal values: the
    earlier row first, then the lower feature.

    Rows are scored block by block. A histogram of the survivors' upper bits says which bin holds the count-th
    largest activation so far; what lies below that bin can not be among the final ones and is dropped, so
    each block adds about ``count`` entries at most. The last bin is ranked exactly. Waits for the device
    twice a block. ``score`` multiplies and gathers in one, and so without the scores.
    """
    encoder = encoder.natural()
    n, d_sae, device = x.shape[0], encoder.d_sae, x.device
    limit = max(1, (CPU_CHUNK if device.type == "cpu" else GPU_CHUNK) // d_sae)
    size = min(limit, n, max(FIRST_ROWS, 2 * count // d_sae))
    block = None
    if score is None:
        block = torch.empty((min(limit, n), d_sae), dtype=torch.float32, device=device)
    histogram = torch.zeros(BINS, dtype=torch.int64, device=device)
    places, ranks = histogram[:0], histogram[:0].int()
    edge, start = 1, 0
    while start < n:
        part = x[start : start + size]
        if block is None:
            assert score is not None
            place, rank = score(part, encoder, edge)
        else:
            place, rank = gather(linear(part, encoder.weight, encoder.bias, block[: part.shape[0]]), edge)
        histogram += torch.bincount(rank >> 16, minlength=BINS)
        reached = histogram.flip(0).cumsum(0)
        edge = max(1, (BINS - 1 - int((reached < count).sum())) << 16)
        place += start * d_sae
        places, ranks = torch.cat([places, place]), torch.cat([ranks, rank])
        keep = ranks >= edge
        places, ranks = places[keep], ranks[keep]
        start += size
        size = min(limit, start)  # as many as were seen: as many survivors again
    if ranks.shape[0] > count:
        inside = ranks < edge + (1 << 16)
        room = count - (ranks.shape[0] - int(inside.sum()))
        last = ranks[inside].topk(room, sorted=False).values.amin()
        above, equal = ranks > last, ranks == last
        keep = above | (equal & (equal.cumsum(0) <= count - above.sum()))
        places, ranks = places[keep], ranks[keep]
    return _padded(places, ranks.view(torch.float32), n, d_sae)


def _padded(places: Tensor, values: Tensor, n: int, d_sae: int) -> TopK:
    rows = torch.div(places, d_sae, rounding_mode="floor")
    counts = torch.bincount(rows, minlength=n)
    width = max(1, int(counts.max())) if n else 1
    slots = torch.arange(len(rows), device=rows.device) - _indptr(counts)[rows]
    wide = values.new_zeros((n, width))
    indices = torch.zeros((n, width), dtype=torch.int32, device=rows.device)
    wide[rows, slots] = values
    indices[rows, slots] = (places - rows * d_sae).int()
    wide, order = wide.sort(dim=-1, descending=True, stable=True)
    return TopK(wide, indices.gather(-1, order))
