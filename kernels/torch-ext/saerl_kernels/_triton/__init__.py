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
from .chunked import launch_chunked
from .codes import _decode_kernel
from .device import on_device, tried
from .grads import value_grads, weight_grads
from .groups import _reopen_kernel, _score_groups_kernel
from .pool import pool_codes
from .screen import halve, launch_rescore, screen_of
from .select import _order_kernel, _pad_kernel, _select_kernel
from .tune import Plan, chunked_plan, groups_plan, plan_encode

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
STEP = 1024  # candidates looked at together when writing: more is kept for each


@on_device
def encode_topk(x: Tensor, encoder: PackedEncoder, k: int, plan: Optional[Plan] = None) -> TopK:
    """``x`` [n, d_in] as ``PackedEncoder.prepare`` returns it; ``plan`` overrides the table's choice.

    Where the table's plan does not launch on this GPU or Triton, the chunked one runs, and where that does
    not, torch; a warning says so once. A plan that was given raises.
    """
    if k > LARGEST_K:
        return _torch.encode_topk(x, encoder, k)
    if plan is not None:
        return _run(x, encoder, k, plan)
    for plan in (plan_encode(x.shape[0], encoder, k), chunked_plan(x.shape[0], encoder.d_sae)):
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
    return _run(x, encoder, k, plan)


def _run(x: Tensor, encoder: PackedEncoder, k: int, plan: Plan) -> TopK:
    kept = TopK.empty((x.shape[0], k), x.device)
    if plan.algorithm == "chunked":
        for start, keys, counts in launch_chunked(x, encoder, _numbers(encoder), k, plan):
            _finish(keys, counts, kept, start, keys.shape[0], k, numbers=encoder.permutation)
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
        grid = (triton.cdiv(n, plan.BM) * triton.cdiv(n_groups, plan.BN // plan.size),)
        _score_groups_kernel[grid](
            halve(part) if screened else part,
            scored.weight,
            scored.bias,
            bits,
            place,
            n,
            encoder.d_sae,
            n_groups,
            -plan.size,
            D=scored.d_in,
            T=plan.T,
            SIZE=plan.size,
            BM=plan.BM,
            BN=plan.BN,
            BK=plan.BK,
            BAND=plan.BAND,
            TREE=plan.tree,
            UPCAST=interpreting(),
            num_warps=plan.warps,
            num_stages=plan.stages,
        )
        keys, counts, opened = _select(bits, place, scored, n, k, plan, "groups")
        if screened:
            given = (part, encoder, _numbers(encoder), bits, place, keys, counts)
            keys, opened = launch_rescore(*given, k, plan)
            left.append(opened)
            _finish(keys, counts, kept, start, n, k, numbers=encoder.permutation)
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
            num_warps=4,
        )
        _finish(keys, counts, kept, start, n, k)
    rest = torch.cat(left).nonzero().squeeze(-1) if screened else ()  # waits for the device
    if len(rest):
        whole = _run(x[rest], encoder, k, chunked_plan(len(rest), encoder.d_sae))
        kept.values[rest], kept.indices[rest] = whole
    return kept


@on_device
def topk(scores: Tensor, k: int) -> TopK:
    """``scores`` [n, F]: see the public op."""
    if k > LARGEST_K:
        return _torch.topk(scores, k)
    scores = scores.float().contiguous()
    n = scores.shape[0]
    kept = TopK.empty((n, k), scores.device)
    keys, counts, _ = _select(scores, scores, None, n, k, Plan("signed", 1), "signed")
    _finish(keys, counts, kept, 0, n, k, signed=True)
    return kept


def _select(
    source: Tensor, place: Tensor, encoder: Optional[PackedEncoder], n: int, k: int, plan: Plan, mode: str
) -> Tuple[Tensor, Tensor, Tensor]:
    device = source.device
    keys = torch.empty((n, k), dtype=torch.int64, device=device)
    counts, opened = torch.empty((2, n), dtype=torch.int32, device=device)
    width = place[0].numel()
    block = min(TILE, triton.next_power_of_2(width))
    rows = _rows(n, 2 * block)
    step = block if interpreting() else min(block, max(32, STEP // rows))
    warps = max(4, rows * block // 512) if mode == "signed" or rows > 1 else max(1, block // WARP)
    _select_kernel[(triton.cdiv(n, rows),)](
        source,
        place,
        counts if encoder is None else _numbers(encoder),
        keys,
        counts,
        opened,
        n,
        width,
        source.stride(0),
        source.shape[-1],
        k,
        T=plan.T,
        SIZE=plan.size,
        ROWS=rows,
        BLOCK=block,
        TILES=triton.cdiv(width, block),
        STEP=step,
        STEPS=triton.cdiv(width, step),
        GROUPS=min(max(32, step // 2), triton.next_power_of_2(source.shape[-1])),
        KP=_width(k),
        MODE=mode,
        PERMUTED=encoder is not None and encoder.permutation is not None,
        num_warps=min(16, warps),
    )
    return keys, counts, opened


def _finish(
    keys: Tensor,
    counts: Tensor,
    kept: TopK,
    start: int,
    n: int,
    k: int,
    signed: bool = False,
    numbers: Optional[Tensor] = None,
) -> None:
    values, indices = kept.values[start : start + n].view(torch.int32), kept.indices[start : start + n]
    rows = _rows(n, _width(k) ** 2 if interpreting() else _width(k))
    grid = (triton.cdiv(n, rows),)
    shape = {"ROWS": rows, "KP": _width(k), "SIGNED": signed, "PERMUTED": numbers is not None}
    columns = counts if numbers is None else numbers
    _order_kernel[grid](
        keys,
        counts,
        columns,
        values,
        indices,
        n,
        k,
        keys.stride(0),
        **shape,
        COUNT=interpreting() and k <= 1024,
        num_warps=4,
    )
    if not signed:
        _pad_kernel[(n,)](counts, values, indices, k, KP=_width(k), num_warps=1)


def _rows(n: int, width: int) -> int:
    """Rows a program takes: enough to fill it on a GPU, many in the interpreter, which counts operations."""
    entries = 1 << 17 if interpreting() else 2048
    return max(1, min(triton.next_power_of_2(n), entries // width))


def _width(k: int) -> int:
    return max(32, triton.next_power_of_2(k))


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
        block = min(1024, triton.next_power_of_2(d_in))
        parts = (values.contiguous(), indices.contiguous(), indptr.contiguous(), W_dec.contiguous())
        sizes = (values.numel(), k, d_sae, d_in)
        grid = (n, triton.cdiv(d_in, block))
        _decode_kernel[grid](*parts, out, *sizes, BE=4, BD=block, WIDE=wide_tl)
    return out


def _wide(W_dec: Tensor) -> Tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if W_dec.dtype == torch.float64 else (torch.float32, tl.float32)
