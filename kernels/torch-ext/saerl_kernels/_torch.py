"""The ops in torch alone, in row chunks of bounded size: any device, and the fallback of every backend."""

from __future__ import annotations

from typing import Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .pack import PackedEncoder
from .types import CSR, TopK, _indptr

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


def decode_grads(
    grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, need_values: bool, need_weight: bool
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """Gradients of ``sparse_decode`` for ``grad`` [n, d_in]: [n, k] and [d_sae, d_in]; deterministic."""
    grad_values = grad_weight = None
    if need_values:
        grad_values = torch.empty_like(values, dtype=grad.dtype)
        step = max(1, (1 << 22) // max(1, indices.shape[1] * W_dec.shape[1]))  # bounds the gathered rows
        for start in range(0, len(grad), step):
            rows = W_dec[indices[start : start + step].long()].to(grad.dtype)
            part = torch.bmm(rows, grad[start : start + step].unsqueeze(-1))
            grad_values[start : start + step] = part.squeeze(-1)
    if need_weight:
        flat = indices.reshape(-1).long()
        order = flat.argsort(stable=True)
        used, lengths = torch.unique_consecutive(flat[order], return_counts=True)
        tokens = torch.div(order, indices.shape[1], rounding_mode="floor")
        starts = _indptr(lengths)[:-1]
        scale = values.reshape(-1)[order].to(grad.dtype)
        grad_weight = torch.zeros(W_dec.shape, dtype=grad.dtype, device=grad.device)
        if flat.numel():
            sums = F.embedding_bag(tokens, grad, starts, mode="sum", per_sample_weights=scale)
            grad_weight[used] = sums
    return grad_values, grad_weight
