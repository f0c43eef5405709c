"""The definition of every op in plain torch: same names and arguments, no backend, no attention to speed.

Pre-activations are computed in float64 from the packed (possibly 16-bit) weight and rounded once to
float32, then ranked. Whole [n_rows, d_sae] matrices are formed, so keep inputs small.

The rule for odd values, on every backend: a pre-activation that is NaN, zero or negative counts as 0.0.
Ties go to the lower index, so a row with fewer than k positive pre-activations is filled up with value
0.0 at the lowest indices whose activation is 0. +inf ranks first. CSR results hold positive entries only.
"""

from __future__ import annotations

from typing import Optional, Sequence, Union

import torch
from torch import Tensor

from ._check import check_k, check_offsets, check_reduce, check_threshold, token_mask
from .pack import PackedEncoder
from .types import CSR, TopK


def pre_activations(x: Tensor, encoder: PackedEncoder) -> Tensor:
    """float32 [n, d_sae] for ``x`` [..., d_in] with its leading dimensions flattened."""
    encoder = encoder.natural()
    x = encoder.prepare(x)
    return (x.double() @ encoder.weight.double().t() + encoder.bias.double()).float()


def topk(scores: Tensor, k: int) -> TopK:
    """The k largest of ``scores`` [..., n] in float32; ties to the lower index, NaN counts as -inf."""
    check_k(k, scores.shape[-1] if scores.dim() else 0, "the row length")
    scores = scores.detach().float()
    scores = torch.where(scores.isnan(), -torch.inf, scores) + 0.0  # -0.0 and 0.0 are one value
    values, indices = scores.sort(dim=-1, descending=True, stable=True)
    return TopK(values[..., :k].contiguous(), indices[..., :k].int())


def encode_topk(x: Tensor, encoder: PackedEncoder, k: int) -> TopK:
    """Top-k of ReLU(pre-activations) for ``x`` [..., d_in]: values and indices [..., k]."""
    check_k(k, encoder.d_sae)
    pre = pre_activations(x, encoder)
    kept = topk(torch.where(pre > 0, pre, 0.0), k)
    shape = (*x.shape[:-1], k)
    return TopK(kept.values.reshape(shape), kept.indices.reshape(shape))


def encode_threshold(
    x: Tensor, encoder: PackedEncoder, *, threshold: Union[Tensor, float, None] = None
) -> CSR:
    """Positive pre-activations above ``threshold`` (the encoder's own by default), one row per row of x."""
    limit = check_threshold(encoder.natural(), threshold)
    pre = pre_activations(x, encoder)
    return CSR.from_dense(torch.where((pre > limit) & (pre > 0), pre, 0.0))


def encode_pool(
    x: Tensor,
    offsets: Union[Tensor, Sequence[int]],
    encoder: PackedEncoder,
    k: Optional[int],
    reduce: str = "max",
    *,
    mask: Optional[Tensor] = None,
) -> CSR:
    """Encode each token of ``x`` [n_tokens, d_in] and reduce over each sequence: CSR [n_seq, d_sae]."""
    check_reduce(reduce)
    bounds = check_offsets(x, offsets)
    kept = token_mask(x, mask)
    if k is None:
        tokens = encode_threshold(x, encoder).to_dense()
    else:
        tokens = encode_topk(x, encoder, k).to_dense(encoder.d_sae)
    pooled = tokens.new_zeros((len(bounds) - 1, encoder.d_sae))
    for row, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:])):
        rows = tokens[start:stop] if kept is None else tokens[start:stop][kept[start:stop]]
        if rows.shape[0] == 0:
            continue
        if reduce == "max":
            pooled[row] = rows.amax(0)
        elif reduce == "last":
            pooled[row] = rows[-1]
        elif reduce == "count":
            pooled[row] = (rows > 0).sum(0).float()
        else:
            total = rows.double().sum(0)
            pooled[row] = (total / rows.shape[0] if reduce == "mean" else total).float()
    return CSR.from_dense(pooled)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Optional[Tensor] = None) -> Tensor:
    """``sum_j values[..., j] * W_dec[indices[..., j]] + b_dec``: [..., d_in] in W_dec's dtype."""
    wide = torch.float64 if W_dec.dtype == torch.float64 else torch.float32
    out = (values.to(wide).unsqueeze(-1) * W_dec[indices.long()].to(wide)).sum(-2)
    if b_dec is not None:
        out = out + b_dec.to(wide)
    return out.to(W_dec.dtype)


def encode_topk_train(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Optional[Tensor],
    k: int,
    *,
    b_dec: Optional[Tensor] = None,
    features: Optional[Tensor] = None,
    relu: bool = True,
    dtype: Optional[torch.dtype] = None,
) -> TopK:
    """Top-k of ``relu((x - b_dec) @ W_enc + b_enc)`` among ``features``, differentiable in torch."""
    pre = _train_scores(x, W_enc, b_enc, b_dec, dtype)
    pre = pre if features is None else pre[..., features.long()]
    pre = torch.where(pre > 0, pre, 0.0) if relu else pre
    indices = topk(pre, k).indices
    values = pre.gather(-1, indices.long())
    return TopK(values, indices if features is None else features[indices.long()].int())


def encode_batch_topk_train(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Optional[Tensor],
    k: int,
    *,
    b_dec: Optional[Tensor] = None,
    dtype: Optional[torch.dtype] = None,
) -> TopK:
    """The n * k largest positive activations of ``x`` [n, d_in], rows padded with 0.0 at feature 0."""
    pre = _train_scores(x, W_enc, b_enc, b_dec, dtype)
    pre = torch.where(pre > 0, pre, 0.0)
    flat = pre.detach().float().reshape(-1)
    chosen = flat.sort(descending=True, stable=True).indices[: k * x.shape[0]]
    kept = torch.zeros_like(flat).index_fill_(0, chosen, 1.0).reshape(pre.shape) * (flat > 0).view(pre.shape)
    width = max(1, int(kept.sum(-1).max())) if x.shape[0] else 1
    found = topk(torch.where(kept > 0, pre.detach(), -1.0), width)
    indices = torch.where(found.values > 0, found.indices, 0)
    values = torch.where(found.values > 0, pre.gather(-1, indices.long()), 0.0)
    return TopK(values, indices)


def _train_scores(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Optional[Tensor],
    b_dec: Optional[Tensor],
    dtype: Optional[torch.dtype],
) -> Tensor:
    wide = torch.float64 if W_enc.dtype == torch.float64 else torch.float32
    dtype = dtype or W_enc.dtype
    x = x if b_dec is None else x.to(wide) - b_dec.to(wide)
    pre = x.to(dtype).to(wide) @ W_enc.to(dtype).to(wide)
    return pre if b_enc is None else pre + b_enc.to(wide)
