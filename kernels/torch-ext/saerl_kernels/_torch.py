"""The ops in torch alone, in row chunks of bounded size: any device, and the fallback of every backend."""

from __future__ import annotations

from typing import Iterator, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._grads import value_grads, weight_grads
from .pack import PackedEncoder
from .types import CSR, TopK, _indptr

__all__ = ["encode_threshold", "encode_topk", "sparse_decode", "topk", "value_grads", "weight_grads"]

CPU_CHUNK = 1 << 23  # float32 entries of one block of scores: 32 MB, reused, so it is mapped only once
GPU_CHUNK = 1 << 26


def score_chunks(x: Tensor, encoder: PackedEncoder) -> Iterator[Tuple[int, Tensor]]:
    """(first row, float32 pre-activations [rows, d_sae]) of ``x`` [n, d_in]; the block is reused."""
    limit = CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK
    rows = min(x.shape[0], max(1, limit // encoder.d_sae))
    block = torch.empty((rows, encoder.d_sae), dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[0], rows):
        part = x[start : start + rows]
        yield start, linear(part, encoder.weight, encoder.bias, block[: part.shape[0]])


def linear(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """``x @ weight.T + bias`` into float32 ``out``, with float32 accumulation and no 16-bit rounding."""
    if x.dtype == torch.float32:
        return torch.addmm(bias, x, weight.t(), out=out)
    if x.device.type == "cuda":
        try:
            return torch.add(torch.mm(x, weight.t(), out_dtype=torch.float32), bias, out=out)
        except (TypeError, RuntimeError):  # before torch 2.8
            pass
    x = x.float()
    columns = 2048  # a float32 copy of part of the weight that stays in cache
    for start in range(0, weight.shape[0], columns):
        stop = start + columns
        torch.addmm(bias[start:stop], x, weight[start:stop].float().t(), out=out[:, start:stop])
    return out


def exact_topk(scores: Tensor, k: int, relu: bool = False) -> TopK:
    """Top-k of float32 ``scores`` [n, F] with ties to the lower index, which torch.topk does not promise.

    ``relu`` ranks max(scores, 0) with NaN as 0; without it scores must hold no NaN.
    """
    # One entry more than asked for shows whether a tie at the k-th place leaves a choice.
    values, indices = torch.topk(scores, min(k + 1, scores.shape[-1]), dim=-1, sorted=True)
    redo = (values[:, 1:] == values[:, :-1]).any(-1)
    if relu:  # clipped entries are ties too, and torch ranks NaN first
        redo = redo | ~(values[:, k - 1] > 0) | values[:, 0].isnan()
    values, indices = values[:, :k].contiguous(), indices[:, :k].int()
    rows = redo.nonzero().squeeze(-1)
    if rows.numel():  # the few rows where order is a matter of index
        tight = scores[rows]
        if relu:
            tight = torch.fmax(tight, tight.new_zeros(()))  # of NaN and 0 it takes 0
        limit = tight.topk(k, dim=-1, sorted=True).values[:, k - 1 :]
        above, equal = tight > limit, tight == limit
        room = k - above.sum(-1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(-1) <= room))
        columns = chosen.nonzero()[:, 1].view(-1, k)
        values[rows], order = tight.gather(-1, columns).sort(dim=-1, descending=True, stable=True)
        indices[rows] = columns.gather(-1, order).int()
    return TopK(values, indices)


def topk(scores: Tensor, k: int) -> TopK:
    """``scores`` [n, F]: see the public op."""
    scores = scores.float()
    return exact_topk(torch.where(scores.isnan(), -torch.inf, scores) + 0.0, k)


def encode_topk(x: Tensor, encoder: PackedEncoder, k: int) -> TopK:
    """``x`` [n, d_in] as ``PackedEncoder.prepare`` returns it."""
    encoder = encoder.natural()
    values, indices = TopK.empty((x.shape[0], k), x.device)
    for start, scores in score_chunks(x, encoder):
        kept = exact_topk(scores, k, relu=True)
        values[start : start + len(scores)] = kept.values
        indices[start : start + len(scores)] = kept.indices
    return TopK(values, indices)


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


def pool_entries(
    sequences: Tensor, columns: Tensor, values: Tensor, tokens: Tensor, n_cols: int, reduce: str
) -> CSR:
    """Reduce token entries to sequence rows.

    sequences, columns int64 [nnz] and positive values float32 [nnz] in token order; ``tokens`` int64
    [n_seq] is how many tokens each sequence averages over. Sums run in float64 in token order, so the
    result does not depend on the device.
    """
    n_seq = tokens.shape[0]
    keys, order = (sequences * n_cols + columns).sort(stable=True)
    keys, lengths = torch.unique_consecutive(keys, return_counts=True)
    rows = torch.div(keys, n_cols, rounding_mode="floor")
    if reduce == "count":
        pooled = lengths.float()
    elif keys.numel() == 0:
        pooled = values.new_empty(0)
    elif reduce in ("max", "last"):
        pooled = torch.segment_reduce(values[order], "max", lengths=lengths)
    else:
        total = torch.segment_reduce(values[order].double(), "sum", lengths=lengths)
        pooled = (total / tokens[rows] if reduce == "mean" else total).float()
    indptr = _indptr(torch.bincount(rows, minlength=n_seq))
    return CSR(indptr, (keys - rows * n_cols).int(), pooled, n_cols)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """values, indices [n, k]; returns [n, d_in] accumulated in float32 (float64 for float64 weights)."""
    wide = torch.float64 if W_dec.dtype == torch.float64 else torch.float32
    if W_dec.dtype != wide and W_dec.device.type == "cpu":
        # Only rows that are used are widened: a float32 copy of the whole decoder may not fit.
        used, inverse = torch.unique(indices, return_inverse=True)
        return F.embedding_bag(inverse, W_dec[used].to(wide), mode="sum", per_sample_weights=values.to(wide))
    return F.embedding_bag(indices.long(), W_dec.to(wide), mode="sum", per_sample_weights=values.to(wide))
