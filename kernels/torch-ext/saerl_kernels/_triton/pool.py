"""Pooling of codes: totals of runs of equal keys, each added up in order."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _torch
from ..types import CSR
from .device import on_device

BLOCK = 128


@triton.jit
def _pool_runs_kernel(
    keys_ptr,  # int32 or int64 [M], ascending
    totals_ptr,  # float64 [M]
    out_ptr,  # float64 [M]: the total where a run starts, else 0
    M,
    limit,  # keys from here on are left out
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + at, mask=at < M, other=limit)
    before = tl.load(keys_ptr + at - 1, mask=(at > 0) & (at < M), other=-1)
    live = (key < limit) & (key != before)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    # A lane walks its run alone, so the order of its sum is that of the entries on every device.
    while tl.max(live.to(tl.int32)) > 0:
        value = tl.load(totals_ptr + at, mask=live, other=0.0)
        total = total + value if ADD else tl.maximum(total, value)
        at += 1
        live = live & (tl.load(keys_ptr + at, mask=live & (at < M), other=-1) == key)
    start = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + start, total, mask=start < M)


@on_device
def pool_codes(
    codes: CSR,
    offsets: Tensor,
    kind: str,
    weights: Optional[Tensor],
    carry: Optional[Tuple[Tensor, Tensor]],
) -> Tuple[Tensor, Tensor, Tensor]:
    """See ``_torch.pool_codes``: its sort, with the runs added up in order."""
    return _torch.pool_codes(codes, offsets, kind, weights, carry, reduce_runs)


def reduce_runs(keys: Tensor, totals: Tensor, limit: int, add: bool) -> Tuple[Tensor, Tensor]:
    """See ``_torch._reduce_runs``; positive ``totals``."""
    out = torch.empty_like(totals)
    if out.numel():
        grid = (triton.cdiv(out.numel(), BLOCK),)
        _pool_runs_kernel[grid](keys, totals, out, out.numel(), limit, ADD=add, BLOCK=BLOCK, num_warps=4)
    starts = out.nonzero().squeeze(-1)
    return starts, out[starts]
