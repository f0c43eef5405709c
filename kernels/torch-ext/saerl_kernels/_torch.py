"""The ops in torch alone, in row chunks of bounded size: any device, and the fallback of every backend."""

from __future__ import annotations

import functools
from typing import Callable, Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._grads import value_grads, weight_grads
from .pack import PackedEncoder
from .types import CSR, TopK, _indptr, _row_ids

__all__ = [
    "decode_csr",
    "encode_threshold",
    "encode_topk",
    "pool_codes",
    "sparse_decode",
    "topk",
    "value_grads",
    "weight_grads",
]

CPU_CHUNK = 1 << 23  # float32 entries of one block of scores: 32 MB, reused, so it is mapped only once
GPU_CHUNK = 1 << 26


def score_chunks(x: Tensor, encoder: PackedEncoder) -> Iterator[Tuple[int, Tensor]]:
    """(first row, float32 pre-activations [rows, d_sae]) of ``x`` [n, d_in]; the block is reused."""
    if x.device.type == "cpu":  # enough rows for an efficient product, few enough to stay in cache
        rows = min(max(1, CPU_CHUNK // encoder.d_sae), max(256, (1 << 19) // encoder.d_sae))
    else:
        rows = max(1, GPU_CHUNK // encoder.d_sae)
    rows = min(x.shape[0], rows)
    block = torch.empty((rows, encoder.d_sae), dtype=torch.float32, device=x.device)
    if rows == x.shape[0]:
        yield 0, linear(x, encoder.weight, encoder.bias, block)
        return
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows]
        yield start, linear(part, encoder.weight, encoder.bias, block[: part.shape[0]])


def linear(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """``x @ weight.T + bias`` into float32 ``out``, with float32 accumulation and no 16-bit rounding."""
    if x.dtype == torch.float32:
        return torch.addmm(bias, x, weight.t(), out=out)  # with out=, autocast leaves it alone
    if widening_mm(x.device):
        return torch.mm(x, weight.t(), out_dtype=torch.float32, out=out).add_(bias)
    x = x.float()
    columns = 2048  # a float32 copy of part of the weight that stays in cache
    for start in range(0, weight.shape[0], columns):
        stop = start + columns
        torch.addmm(bias[start:stop], x, weight[start:stop].float().t(), out=out[:, start:stop])
    return out


@functools.lru_cache(maxsize=None)  # asked for every chunk
def widening_mm(device: torch.device) -> bool:
    """Can torch.mm give the float32 sums of 16-bit matrices there? (CUDA, from torch 2.8.)"""
    overloads = torch.ops.aten.mm.overloads()
    return device.type == "cuda" and torch.version.hip is None and "dtype_out" in overloads


def exact_topk(scores: Tensor, k: int, relu: bool = False) -> TopK:
    """Top-k of float32 ``scores`` [n, F], which may be overwritten; ties go to the lower index.

    ``relu`` ranks max(scores, 0) with NaN as 0; without it scores must hold no NaN.
    """
    # The entry after the k-th shows whether a tie there leaves a choice. Where asking torch.topk for k + 1
    # entries changes its algorithm (64 k > F on a CPU, twice the time), a pass over the rest finds it.
    n, width = scores.shape
    slower = scores.device.type == "cpu" and 64 * k <= width < 64 * (k + 1) and n > 8
    spare = int(k < width and not slower)
    values, indices = torch.topk(scores, k + spare, dim=-1, sorted=True)
    if not spare:
        after = scores.scatter_(-1, indices, -torch.inf).amax(-1, keepdim=True)
        values = torch.cat([values, after], dim=-1)
    if relu:  # what is clipped is a tie as well
        values[:, k:].clamp_(min=0.0)
    falls = values[:, :k] > values[:, 1:]  # false beside a NaN, which torch ranks first
    values, indices = values[:, :k], indices[:, :k]
    if bool(falls.all()):
        return TopK(values.contiguous(), indices.int())
    rows = (~falls.all(-1)).nonzero().squeeze(-1)  # the few where order is a matter of index
    tight = scores[rows]
    if not spare:
        tight.scatter_(-1, indices[rows], values[rows])
    if relu:
        tight = torch.fmax(tight, tight.new_zeros(()))  # of NaN and 0 it takes 0
    limit = tight.topk(k, dim=-1, sorted=True).values[:, k - 1 :]
    above, equal = tight > limit, tight == limit
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    columns = chosen.nonzero()[:, 1].view(-1, k)
    values, indices = values.contiguous(), indices.int()
    values[rows], order = tight.gather(-1, columns).sort(dim=-1, descending=True, stable=True)
    indices[rows] = columns.gather(-1, order).int()
    return TopK(values, indices)


def topk(scores: Tensor, k: int) -> TopK:
    """``scores`` [n, F]: see the public op."""
    scores = scores.float()
    return exact_topk(torch.where(scores.isnan(), -torch.inf, scores) + 0.0, k)


def encode_topk(x: Tensor, encoder: PackedEncoder, k: int) -> TopK:
    """``x`` [n, d_in] as ``PackedEncoder.prepare`` returns it."""
    kept = [exact_topk(scores, k, relu=True) for _, scores in score_chunks(x, encoder.natural())]
    if len(kept) == 1:
        return kept[0]
    return TopK(torch.cat([part.values for part in kept]), torch.cat([part.indices for part in kept]))


def encode_threshold(x: Tensor, encoder: PackedEncoder, threshold: Tensor) -> CSR:
    """``x`` [n, d_in] prepared; ``threshold`` float32 [d_sae] in the original numbering."""
    encoder = encoder.natural()
    limit = threshold.clamp(min=0.0)
    parts = []
    for _, scores in score_chunks(x, encoder):
        rows, cols = (scores > limit).nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(scores))
        parts.append(CSR(_indptr(counts), cols.int(), scores[rows, cols], encoder.d_sae))
    return CSR.concat(parts)


def pool_codes(
    codes: CSR,
    offsets: Tensor,
    kind: str,
    weights: Optional[Tensor],
    carry: Optional[Tuple[Tensor, Tensor]],
    reduce_runs: Optional[Callable[[Tensor, Tensor, int, bool], Tuple[Tensor, Tensor]]] = None,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Reduce the codes of tokens over sequences: indptr, columns and float64 totals of sequence rows.

    codes: one row per token; columns in any order, entries that are not positive are left out. offsets int64
    [n_seq + 1] over the tokens, on their device. kind: "max", "sum" or "count". weights float32 [n_tokens] or
    None multiply a token's entries. carry: columns and totals of the first sequence from tokens before these.

    Entries are sorted by (sequence, column), stably, so a total is added up in token order, the carry first.
    Waits for the device once, to learn how many entries there are.
    """
    n_seq, n_cols = offsets.shape[0] - 1, codes.n_cols
    limit = n_seq * n_cols  # the key of what is left out: it sorts last
    tokens = codes.row_ids()
    owner = _row_ids(offsets, codes.n_rows)
    keys = torch.where(codes.values > 0, owner[tokens] * n_cols + codes.indices, limit)
    totals = torch.ones_like(codes.values, dtype=torch.float64) if kind == "count" else codes.values.double()
    if weights is not None:
        totals = totals * weights.double()[tokens]  # exact: 24 bits times 24 bits
    if carry is not None:
        keys, totals = torch.cat([carry[0].long(), keys]), torch.cat([carry[1], totals])
    if limit < 1 << 31:
        keys = keys.int()  # halves the passes of a radix sort
    keys, order = keys.sort(stable=True)
    at, totals = (reduce_runs or _reduce_runs)(keys, totals[order], limit, kind != "max")
    keys = keys[at].long()
    indptr = torch.searchsorted(keys, torch.arange(n_seq + 1, device=keys.device) * n_cols)
    return indptr, (keys % n_cols).int(), totals


def _reduce_runs(keys: Tensor, totals: Tensor, limit: int, add: bool) -> Tuple[Tensor, Tensor]:
    """Where each run of equal ``keys`` below ``limit`` starts, and its sum or maximum (sorted keys [m])."""
    first = keys < limit
    first[1:] &= keys[1:] != keys[:-1]
    starts = first.nonzero().squeeze(-1)
    if starts.numel() == 0:
        return starts, totals[:0]
    stop = torch.searchsorted(keys, torch.full_like(keys[:1], limit))
    edges = torch.cat([starts, stop])
    return starts, torch.segment_reduce(totals, "sum" if add else "max", offsets=edges, unsafe=True)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """values, indices [n, k]; returns [n, d_in] accumulated in float32 (float64 for float64 weights)."""
    n, k = indices.shape
    indptr = torch.arange(n + 1, device=indices.device) * k
    return decode_csr(indptr, indices.reshape(-1), values.reshape(-1), W_dec)


def decode_csr(indptr: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """indptr [n + 1], indices and values [nnz]; returns [n, d_in] as ``sparse_decode`` does."""
    wide = torch.float64 if W_dec.dtype == torch.float64 else torch.float32
    if W_dec.dtype != wide and W_dec.device.type == "cpu":
        # Only rows that are used are widened: a float32 copy of the whole decoder may not fit.
        used, indices = torch.unique(indices, return_inverse=True)
        W_dec = W_dec[used]
    if indices.numel() == 0:  # embedding_bag wants at least one row of weights
        return torch.zeros((indptr.shape[0] - 1, W_dec.shape[1]), dtype=wide, device=W_dec.device)
    size = torch.int32 if indices.numel() < 1 << 31 else torch.int64
    return F.embedding_bag(
        indices.to(size),
        W_dec.to(wide),
        indptr.to(size),
        mode="sum",
        per_sample_weights=values.to(wide),
        include_last_offset=True,
    )
