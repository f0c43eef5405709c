"""Threshold encoding: the encoder's matrix product, whose epilogue writes only what is above the threshold.

A tile stores its hits where they would lie in the score matrix [N, F], whose other entries are never written
or read, and one bit for each score. Reading the bits gives the rows' lengths, and the hits in order. There is
no buffer to overflow and no atomic; beside the hits, 4 bytes are written for 32 scores.
"""

from __future__ import annotations

from typing import List, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _torch
from ..dispatch import interpreting
from ..pack import PackedEncoder
from ..types import CSR, _indptr
from .codes import _count_above_kernel, _place_above_kernel
from .device import on_device, tried
from .groups import by_group, tile_scores
from .tune import Plan, plan_above

SCORES = 1 << 26  # float32 places of one block of rows


@on_device
def encode_threshold(x: Tensor, encoder: PackedEncoder, threshold: Tensor) -> CSR:
    """``x`` [n, d_in] prepared; ``threshold`` float32 [d_sae] in the original numbering."""
    return _above(x, encoder.natural(), threshold.clamp(min=0.0).contiguous())


@on_device
def score_survivors(x: Tensor, encoder: PackedEncoder, edge: int) -> Tuple[Tensor, Tensor]:
    """``_batch.gather_survivors`` of the scores of ``x`` [n, d_in]; ``encoder`` in natural order."""
    edges = torch.full((encoder.d_sae,), edge - 1, dtype=torch.int32, device=x.device)
    found = _above(x, encoder, edges.view(torch.float32))
    return found.row_ids() * encoder.d_sae + found.indices, found.values.view(torch.int32)


def _above(x: Tensor, encoder: PackedEncoder, limit: Tensor) -> CSR:
    """The scores above ``limit``: in one kernel with the product, or of torch's where no plan launches."""
    encoder, plan = encoder.contiguous(), plan_above(encoder)
    parts = None if plan is None else fused(x, encoder, limit, plan)
    return CSR.concat(above_in_blocks(x, encoder, limit) if parts is None else parts)


def fused(x: Tensor, encoder: PackedEncoder, limit: Tensor, plan: Plan) -> Optional[List[CSR]]:
    """The scores above ``limit``, a CSR for each block of rows; None where ``plan`` does not launch."""
    rows = rows_at_once(x.shape[0], encoder.d_sae, plan)
    places = torch.empty(rows * encoder.d_sae, dtype=torch.float32, device=x.device)
    parts = []
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows]
        key = (x.device, x.dtype, encoder.d_in, plan)
        found = tried(key, plan, launch_above, part, encoder, limit, places, plan)
        if found is None:
            return None
        indptr, columns, values = found
        parts.append(CSR(indptr, columns, values, encoder.d_sae))
    return parts


def above_in_blocks(x: Tensor, encoder: PackedEncoder, limit: Tensor) -> List[CSR]:
    """The same of torch's product, block by block."""
    d_sae = encoder.d_sae
    block = min(4096, triton.next_power_of_2(d_sae))
    shape = {"BLOCK": block, "TILES": triton.cdiv(d_sae, block)}
    parts = []
    for _, scores in _torch.score_chunks(x, encoder):
        n = scores.shape[0]
        counts = torch.empty(n, dtype=torch.int32, device=x.device)
        _count_above_kernel[(n,)](scores, limit, counts, d_sae, **shape)
        indptr = _indptr(counts)
        nnz = int(indptr[-1])
        columns = torch.empty(nnz, dtype=torch.int32, device=x.device)
        values = torch.empty(nnz, dtype=torch.float32, device=x.device)
        _place_above_kernel[(n,)](scores, limit, indptr, columns, values, d_sae, **shape)
        parts.append(CSR(indptr, columns, values, d_sae))
    return parts


def rows_at_once(n: int, d_sae: int, plan: Plan) -> int:
    """Rows whose places are held at once: what SCORES allows, in whole tiles."""
    return min(n, max(plan.BM, SCORES // d_sae // plan.BM * plan.BM))


def launch_above(
    x: Tensor, encoder: PackedEncoder, limit: Tensor, places: Tensor, plan: Plan
) -> Tuple[Tensor, Tensor, Tensor]:
    """Scores of ``x`` [n, d_in] above ``limit`` float32 [d_sae], of an encoder in natural order.

    places: float32, at least n x d_sae, of any content. Returns indptr int64 [n + 1], columns int32 and
    values float32 [nnz], columns ascending in a row; waits for the device to learn nnz.
    """
    n, d_sae, device = x.shape[0], encoder.d_sae, x.device
    n_words = triton.cdiv(d_sae, 128) * 4
    words = torch.empty((n, n_words), dtype=torch.int32, device=device)
    counts = torch.empty(n, dtype=torch.int32, device=device)
    aligned = encoder.d_in * encoder.weight.element_size() % 16 == 0
    grid = (triton.cdiv(n, plan.BM) * triton.cdiv(d_sae, plan.BN),)
    _score_above_kernel[grid](
        x,
        encoder.weight,
        encoder.bias,
        limit,
        places,
        words,
        n,
        d_sae,
        n_words,
        D=encoder.d_in,
        BM=plan.BM,
        BN=plan.BN,
        BK=plan.BK if aligned else min(plan.BK, 32),  # others pass through registers, here half as many
        BAND=plan.BAND,
        UPCAST=interpreting(),
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    block = min(2048, triton.next_power_of_2(n_words))
    _count_bits_kernel[(n,)](words, counts, n_words, BLOCK=block, TILES=triton.cdiv(n_words, block))
    indptr = _indptr(counts)
    nnz = int(indptr[-1])
    columns = torch.empty(nnz, dtype=torch.int32, device=device)
    values = torch.empty(nnz, dtype=torch.float32, device=device)
    if nnz:
        block = min(1024, triton.next_power_of_2(d_sae))
        tiles = triton.cdiv(d_sae, block)
        _place_bits_kernel[(n,)](
            words, places, indptr, columns, values, d_sae, n_words, BLOCK=block, TILES=tiles
        )
    return indptr, columns, values


@triton.jit
def _score_above_kernel(
    x_ptr,  # [N, D]
    w_ptr,  # [F, D]
    bias_ptr,  # float32 [F]
    limit_ptr,  # float32 [F]
    places_ptr,  # float32 [N, F]: written where a score is above its limit
    words_ptr,  # int32 [N, G]: a bit for each score, in the order of groups.by_group
    N,
    F,
    G,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BAND: tl.constexpr,
    UPCAST: tl.constexpr,
):
    acc, cols, row_block, col_block = tile_scores(
        x_ptr, w_ptr, bias_ptr, N, F, G, D, 0, BM, BN, BK, BAND, UPCAST
    )
    rows = row_block * BM + tl.arange(0, BM)
    limit = tl.load(limit_ptr + cols, mask=cols < F, other=float("inf"))
    above = (acc > limit[None, :]) & (cols < F)[None, :]  # never of NaN
    # Offsets inside a tile fit 32 bits: 64-bit ones would not fit registers beside the accumulator.
    top, left = tl.min(rows), col_block * BN  # of row_block alone more would go to the stack on sm_100
    near = (rows - top)[:, None] * F + (cols - left)[None, :]
    tl.store(places_ptr + (top.to(tl.int64) * F + left) + near, acc, mask=above & (rows < N)[:, None])
    bits = by_group(above.to(tl.int32), BM, BN, 32) << tl.arange(0, 32)[None, None, :]
    groups = col_block * (BN // 32) + tl.arange(0, BN // 32)
    keep = (rows < N)[:, None] & (groups < G)[None, :]
    tl.store(words_ptr + rows.to(tl.int64)[:, None] * G + groups[None, :], tl.sum(bits, axis=2), mask=keep)


@triton.jit
def _count_bits_kernel(words_ptr, count_ptr, G, BLOCK: tl.constexpr, TILES: tl.constexpr):
    # words int32 [N, G]; count int32 [N]: bits set in a row
    row = tl.program_id(0).to(tl.int64)
    total = 0
    for tile in range(0, TILES):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        word = tl.load(words_ptr + row * G + at, mask=at < G, other=0).to(tl.uint32, bitcast=True)
        word = word - ((word >> 1) & 0x55555555)  # sums of 2, 4, 8 and then all bits, side by side
        word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
        word = (word + (word >> 4)) & 0x0F0F0F0F
        word = word + (word >> 8)
        total += tl.sum(((word + (word >> 16)) & 0x3F).to(tl.int32))
    tl.store(count_ptr + row, total)


@triton.jit
def _place_bits_kernel(
    words_ptr,  # int32 [N, G]
    places_ptr,  # float32 [N, F]
    indptr_ptr,  # int64 [N + 1]
    columns_ptr,  # int32 [nnz]
    values_ptr,  # float32 [nnz]
    F,
    G,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(indptr_ptr + row)
    for tile in range(0, TILES):
        column = tile * BLOCK + tl.arange(0, BLOCK)
        group = column // 128 * 4 + column % 8 // 2  # as by_group puts them together
        word = tl.load(words_ptr + row * G + group, mask=column < F, other=0)
        hit = (word >> (column % 2 * 16 + column % 128 // 8)) & 1
        found = tl.sum(hit)
        if found > 0:
            slot = start + tl.cumsum(hit, 0) - 1
            value = tl.load(places_ptr + row * F + column, mask=hit == 1, other=0.0)
            tl.store(columns_ptr + slot, column, mask=hit == 1)
            tl.store(values_ptr + slot, value, mask=hit == 1)
            start += found
