"""Launching the scoring pass, and its persistent loops: a program a multiprocessor takes tile after tile.

They load by tensor descriptors. One box holds all that a tile needs of the weight for a step, as positions
lie a fixed number of rows apart (``group_column``). A score is summed in the same order as in the plain loop.
"""

from __future__ import annotations

import contextvars
import functools
from typing import Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreting
from ..pack import PackedEncoder
from .groups import _score_groups_kernel, first_part, keep_top, part_of, tile_at, tile_columns, upper_half
from .tune import Plan, with_loop


@triton.jit
def _bias_tile(bias_ptr, first, end, G, F, SIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """What the sums of a tile's scores start with; -inf where there is no feature."""
    cols = tile_columns(first, end, G, F, SIZE, BN)
    bias = tl.load(bias_ptr + cols, mask=cols < F, other=float("-inf"))
    return tl.broadcast_to(bias[None, :], (BM, BN))


@triton.jit
def _add_step(acc, x_rows, w_rows, row, chunk, d, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr):
    x = x_rows.load([row, d])
    w = tl.reshape(w_rows.load([chunk, 0, 0, 0, d]), (BN, BK))
    if UPCAST:  # the interpreter's bfloat16 dot is wrong
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w.T, acc, input_precision="ieee")


@triton.jit
def _score_tiles_kernel(
    x_ptr,  # [N, D]
    w_ptr,  # [F, D]
    bias_ptr,  # float32 [F]
    bits_ptr,  # int32 [N, T + 1, G], as of _score_groups_kernel
    place_ptr,  # int8 [N, T, G]
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
    FUSED: tl.constexpr,
    SPECIAL: tl.constexpr,
):
    COUNT: tl.constexpr = BN // SIZE
    # The part of the groups that this program works on: their strides make its descriptor.
    early = tl.maximum(tl.num_programs(0) * first_part(G) // G, tl.minimum(first_part(G), 1))
    late = tl.program_id(0) >= early
    start, near, end, first, after = part_of(tl.where(late, G - 1, 0), G, F, SIZE)
    program = tl.program_id(0) - tl.where(late, early, 0)
    programs = tl.where(late, tl.num_programs(0) - early, early)
    x_rows = tl.make_tensor_descriptor(x_ptr, [N, D], [D, 1], [BM, BK])
    # Column 8 j + 2 q + b of a chunk is the group q of its four at position j of half b.
    w_rows = tl.make_tensor_descriptor(
        w_ptr + start.to(tl.int64) * D,
        [near // 4, SIZE // 2, 4, 2, D],
        [4 * D, near.to(tl.int64) * D, D, upper_half(start, near, end, SIZE).to(tl.int64) * D, 1],
        [COUNT // 4, SIZE // 2, 4, 2, BK],
    )
    n_cols = tl.cdiv(near, COUNT)
    n_tiles = tl.cdiv(N, BM) * n_cols
    if FUSED:
        # One loop over the steps of all tiles: the next tile's first loads run under the epilogue. The tile
        # that is loaded and the one that is multiplied are counted apart, else no load runs ahead.
        STEPS: tl.constexpr = (D + BK - 1) // BK
        row_block, col_block = tile_at(tl.minimum(program, n_tiles - 1), N, n_cols, BM, BAND)
        acc = _bias_tile(bias_ptr, first + col_block * COUNT, after, G, F, SIZE, BM, BN)
        row, chunk, step = 0, 0, -1
        load, tile = program, program
        for _ in range(0, tl.cdiv(n_tiles - program, programs) * STEPS):
            step = tl.where(step == STEPS - 1, 0, step + 1)
            if step == 0:
                row_block, col_block = tile_at(load, N, n_cols, BM, BAND)
                row, chunk = row_block * BM, col_block * (COUNT // 4)
                load += programs
            acc = _add_step(acc, x_rows, w_rows, row, chunk, step * BK, BN, BK, UPCAST)
            if step == STEPS - 1:
                row_block, col_block = tile_at(tile, N, n_cols, BM, BAND)
                group = first + col_block * COUNT
                keep_top(acc, row_block, group, after, bits_ptr, place_ptr, N, G, HIGH, T, SIZE, BM, BN, TREE)
                tile += programs
                row_block, col_block = tile_at(tl.minimum(tile, n_tiles - 1), N, n_cols, BM, BAND)
                acc = _bias_tile(bias_ptr, first + col_block * COUNT, after, G, F, SIZE, BM, BN)
    else:  # with SPECIAL one warp group loads, two multiply and keep, half of the rows each
        for tile in tl.range(program, n_tiles, programs, warp_specialize=SPECIAL):
            row_block, col_block = tile_at(tile, N, n_cols, BM, BAND)
            group = first + col_block * COUNT
            row, chunk = row_block * BM, col_block * (COUNT // 4)
            acc = _bias_tile(bias_ptr, group, after, G, F, SIZE, BM, BN)
            for d in range(0, D, BK):
                acc = _add_step(acc, x_rows, w_rows, row, chunk, d, BN, BK, UPCAST)
            keep_top(acc, row_block, group, after, bits_ptr, place_ptr, N, G, HIGH, T, SIZE, BM, BN, TREE)


def score_groups(x: Tensor, encoder: PackedEncoder, bits: Tensor, place: Tensor, plan: Plan) -> None:
    """Fill ``bits`` int32 [n, T + 1, G] and ``place`` int8 [n, T, G] for the rows ``x`` [n, d_in].

    Where descriptors cannot hold these tensors, the plain loop runs in place of the plan's.
    """
    n, n_groups, rows = x.shape[0], bits.shape[2], triton.cdiv(x.shape[0], plan.BM)
    if plan.loop != "plain" and not described(x, encoder, n_groups, plan.size):
        plan = with_loop(plan, "plain")
    args = (x, encoder.weight, encoder.bias, bits, place, n, encoder.d_sae, n_groups, -plan.size)
    options = {
        "D": encoder.d_in, "T": plan.T, "SIZE": plan.size, "BM": plan.BM, "BN": plan.BN, "BK": plan.BK,
        "BAND": plan.BAND, "TREE": plan.tree, "UPCAST": interpreting(),
        "num_warps": plan.warps, "num_stages": plan.stages,
    }  # fmt: skip
    if plan.loop == "plain":
        _score_groups_kernel[(rows * triton.cdiv(n_groups, plan.BN // plan.size),)](*args, **options)
        return
    tiles = rows * sum(triton.cdiv(part, plan.BN // plan.size) for part in parts(n_groups))
    grid = (min(tiles, processors(x.device)),)
    options["FUSED"], options["SPECIAL"] = plan.loop == "fused", plan.loop == "specialised"
    contextvars.copy_context().run(_with_allocator, _score_tiles_kernel[grid], *args, **options)


def described(x: Tensor, encoder: PackedEncoder, n_groups: int, size: int) -> bool:
    """Rows and bases at multiples of 16 bytes, and no box past the weight's end."""
    aligned = x.data_ptr() | encoder.weight.data_ptr() | encoder.d_in * encoder.weight.element_size()
    first, last = parts(n_groups)
    return aligned % 16 == 0 and encoder.d_sae - size * first >= size // 2 * last


def parts(n_groups: int) -> Tuple[int, int]:
    """The groups of either part, as ``first_part`` has them."""
    first = max((n_groups // 8 - 1) | 1, 0) * 4
    return first, n_groups - first


@functools.lru_cache(maxsize=None)
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # some programs of several tiles in the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def _with_allocator(launch, *args, **options) -> None:  # type: ignore[no-untyped-def]
    """In a context of its own, so that an allocator which a program has set for its kernels stays."""
    triton.set_allocator(_allocate)
    launch(*args, **options)


def _allocate(size: int, alignment: int, stream: object) -> Tensor:
    """Memory for descriptors: torch's is aligned to 512 bytes, and freed in the order of the stream."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
