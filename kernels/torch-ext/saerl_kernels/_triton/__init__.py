"""Triton launchers. Without a GPU they run in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _torch
from ..dispatch import interpreting
from ..library import LARGEST_K
from ..pack import PackedEncoder
from ..types import TopK
from .above import encode_threshold, score_survivors
from .chunked import _topk_kernel, launch_chunked, slots
from .codes import _decode_kernel
from .device import cdiv, next_power_of_2, on_device, registers, tried
from .finish import _finish_kernel
from .grads import value_grads, weight_grads
from .groups import _reopen_kernel
from .persistent import score_groups
from .pool import pool_codes
from .screen import halve, launch_rescore, screen_of
from .select import _select_kernel
from .tune import Plan, chunked_plan, groups_plan, plan_encode, with_loop

__all__ = [
    "decode_csr",
    "encode_threshold",
    "encode_topk",
    "encode_topk_invariant",
    "pool_codes",
    "score_survivors",
    "sparse_decode",
    "topk",
    "value_grads",
    "weight_grads",
]

SCRATCH = 1 << 28  # bytes of group maxima held at once
TILE = 8192  # candidates a program ranks in registers
WARP = 1024  # of them in a warp
GATED = 512  # scores of a row that topk looks at together
STEP = 1024  # candidates looked at together when writing: more is kept for each


@on_device
def encode_topk(x: Tensor, encoder: PackedEncoder, k: int, plan: Optional[Plan] = None) -> TopK:
    """``x`` [n, d_in] as ``PackedEncoder.prepare`` returns it; ``plan`` overrides the table's choice.

    Where the table's plan does not launch on this GPU or Triton, it runs with the plain loop, where that does
    not, the chunked one, and then torch; a warning says so once. A plan that was given raises.
    """
    if k > LARGEST_K:
        return _torch.encode_topk(x, encoder, k)
    encoder = encoder.contiguous()
    if plan is not None:
        return _run(x, encoder, k, plan)
    chosen = plan_encode(x.shape[0], encoder, k)
    for plan in dict.fromkeys((chosen, with_loop(chosen, "plain"), chunked_plan(x.shape[0], encoder.d_sae))):
        kept = tried((x.device, x.dtype, encoder.d_in, k, plan), plan, _run, x, encoder, k, plan)
        if kept is not None:
            return kept
    return _torch.encode_topk(x, encoder, k)


@on_device
def encode_topk_invariant(x: Tensor, encoder: PackedEncoder, k: int) -> TopK:
    """One plan for any number of rows: a tile sums every score in the same order. It launches or raises."""
    if k > LARGEST_K:
        raise ValueError(f"k={k} is above {LARGEST_K}, where no kernel is batch-invariant; use a smaller k")
    plan = groups_plan(encoder, k, least=(3, 32))
    assert plan is not None
    return _run(x, encoder.contiguous(), k, with_loop(plan, "plain"))


def _run(x: Tensor, encoder: PackedEncoder, k: int, plan: Plan) -> TopK:
    kept = TopK.empty((x.shape[0], k), x.device)
    if plan.algorithm == "chunked":
        for start, keys, counts in launch_chunked(x, encoder, _numbers(encoder), k, plan):
            _finish(keys, counts, kept, start, keys.shape[0], k, encoder.permutation)
        return kept
    screened = plan.algorithm == "screen"
    scored, left = screen_of(encoder) if screened else encoder, []
    n_groups = triton.cdiv(encoder.d_sae, 4 * plan.size) * 4
    rows = max(plan.BM, SCRATCH // ((5 * plan.T + 4) * n_groups) // plan.BM * plan.BM)
    rows = min(rows, x.shape[0])
    bits = torch.empty((rows, plan.T + 1, n_groups), dtype=torch.int32, device=x.device)
    place = torch.empty((rows, plan.T, n_groups), dtype=torch.int8, device=x.device)
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows]
        n = part.shape[0]
        score_groups(halve(part) if screened else part, scored, bits, place, plan)
        done = kept.values[start : start + n].view(torch.int32), kept.indices[start : start + n]
        keys, counts, opened = _select(bits, place, scored, n, k, plan, done)
        if screened:
            given = (part, encoder, _numbers(encoder), bits, place, keys, counts)
            keys, opened = launch_rescore(*given, k, plan)
            left.append(opened)
            _finish(keys, counts, kept, start, n, k, encoder.permutation)
            continue
        _reopen_kernel[(n,)](
            part,
            encoder.weight,
            encoder.bias,
            _numbers(encoder),
            bits,
            place,
            keys,
            counts,
            opened,
            *done,
            encoder.d_sae,
            n_groups,
            k,
            D=encoder.d_in,
            T=plan.T,
            SIZE=plan.size,
            KP=_width(k),
            BM=16 if interpreting() else 64,  # 64 rows are what wgmma, and so the scoring pass, takes
            BK=plan.BK,
            BG=512,
            PERMUTED=encoder.permutation is not None,
            UPCAST=interpreting(),
            COUNT=interpreting(),
            num_warps=4 if k <= 512 else 8,
            **registers(255),
        )
    rest = torch.cat(left).nonzero().squeeze(-1) if screened else ()  # waits for the device
    if len(rest):
        whole = _run(x[rest], encoder, k, chunked_plan(len(rest), encoder.d_sae))
        kept.values[rest], kept.indices[rest] = whole
    return kept


@on_device
def topk(scores: Tensor, k: int) -> TopK:
    """``scores`` [n, F]: see the public op. They are read once."""
    if k > LARGEST_K:
        return _torch.topk(scores, k)
    scores = scores.float().contiguous()
    n, width = scores.shape
    kept = TopK.empty((n, k), scores.device)
    block = min(GATED, next_power_of_2(width))
    room = min(slots(k, block), next_power_of_2(width))
    many = min(n, max(1, SCRATCH // (8 * room)))
    keys = torch.empty((many, room), dtype=torch.int64, device=scores.device)
    rows = _rows(many, 2 * room, k)
    for start in range(0, n, many):
        part = slice(start, min(n, start + many))
        _topk_kernel[(cdiv(part.stop - start, rows),)](
            scores[part],
            keys,
            kept.values[part].view(torch.int32),
            kept.indices[part],
            part.stop - start,
            width,
            k,
            ROWS=rows,
            BLOCK=block,
            SLOTS=room,
            KP=_width(k),
            COUNT=interpreting(),
            num_warps=4,
        )
    return kept


def _select(
    bits: Tensor,
    place: Tensor,
    encoder: PackedEncoder,
    n: int,
    k: int,
    plan: Plan,
    done: Tuple[Tensor, Tensor],
) -> Tuple[Tensor, Tensor, Tensor]:
    keys = torch.empty((n, k), dtype=torch.int64, device=bits.device)
    counts, opened = torch.empty((2, n), dtype=torch.int32, device=bits.device)
    n_groups = bits.shape[-1]
    width = plan.T * n_groups
    block = min(TILE, next_power_of_2(width))
    rows = _rows(n, 2 * block, k)
    step = block if interpreting() else min(block, max(32, STEP // rows))
    # A row's keys are sorted in registers as well: 256 of them in a warp.
    warps = max(4, rows * block // 512) if rows > 1 else max(1, block // WARP, _width(k) // 256)
    _select_kernel[(cdiv(n, rows),)](
        bits,
        place,
        _numbers(encoder),
        keys,
        counts,
        opened,
        *done,
        n,
        n_groups,
        encoder.d_sae,
        k,
        T=plan.T,
        SIZE=plan.size,
        ROWS=rows,
        BLOCK=block,
        TILES=cdiv(width, block),
        STEP=step,
        STEPS=cdiv(width, step),
        GROUPS=min(max(32, step // 2), next_power_of_2(n_groups)),
        KP=_width(k),
        PERMUTED=encoder.permutation is not None,
        FINISH=plan.algorithm != "screen",
        COUNT=interpreting(),
        num_warps=min(16, warps),  # on a GPU at most 8
        **registers(168),
    )
    return keys, counts, opened


def _finish(
    keys: Tensor,
    counts: Tensor,
    kept: TopK,
    start: int,
    n: int,
    k: int,
    numbers: Optional[Tensor],
) -> None:
    rows = _rows(n, 0, k)
    _finish_kernel[(cdiv(n, rows),)](
        keys,
        counts,
        counts if numbers is None else numbers,
        kept.values[start : start + n].view(torch.int32),
        kept.indices[start : start + n],
        n,
        k,
        keys.stride(0),
        ROWS=rows,
        KP=_width(k),
        PERMUTED=numbers is not None,
        COUNT=interpreting(),
        num_warps=4,
    )


def _rows(n: int, width: int, k: int) -> int:
    """Rows a program takes: enough to fill it on a GPU, many in the interpreter, which counts operations.

    Each has ``width`` entries and k keys to order: on a GPU more rows take 228 registers, in the interpreter
    keys are compared in pairs.
    """
    entries, ordered = (1 << 17, _width(k) ** 2) if interpreting() else (2048, 4 * _width(k))
    return max(1, min(next_power_of_2(n), entries // max(width, ordered)))


def _width(k: int) -> int:
    return max(32, next_power_of_2(k))


def _numbers(encoder: PackedEncoder) -> Tensor:
    """The permutation, or any int32 tensor where there is none (the kernel then does not read it)."""
    return encoder.bias if encoder.permutation is None else encoder.permutation


@on_device
def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """values, indices [n, k]; returns [n, d_in] accumulated in float32 (float64 for float64 weights)."""
    n, k = values.shape
    return _decode(indices, indices, values, W_dec, n, k)


@on_device
def decode_csr(indptr: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """indptr [n + 1], indices and values [nnz]; returns [n, d_in] as ``sparse_decode`` does."""
    return _decode(indptr, indices, values, W_dec, indptr.shape[0] - 1, 0)


def _decode(indptr: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor, n: int, k: int) -> Tensor:
    d_sae, d_in = W_dec.shape
    wide, wide_tl = _wide(W_dec)
    out = torch.empty((n, d_in), dtype=wide, device=values.device)
    if out.numel():
        block = min(1024, next_power_of_2(d_in))
        parts = (values.contiguous(), indices.contiguous(), indptr.contiguous(), W_dec.contiguous())
        sizes = (values.numel(), k, d_sae, d_in)
        grid = (n, cdiv(d_in, block))
        _decode_kernel[grid](*parts, out, *sizes, BE=4, BD=block, WIDE=wide_tl)
    return out


def _wide(W_dec: Tensor) -> Tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if W_dec.dtype == torch.float64 else (torch.float32, tl.float32)
