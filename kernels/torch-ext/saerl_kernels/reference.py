"""The definition of every op in plain torch: same names and arguments, no backend, no attention to speed.

Pre-activations are computed in float64 from the packed (possibly 16-bit) weight and rounded once to
float32, then ranked. Whole [n_rows, d_sae] matrices are formed, so keep inputs small.

The rule for odd values, on every backend: a pre-activation that is NaN, zero or negative counts as 0.0.
Ties go to the lower index, so a row with fewer than k positive pre-activations is filled up with value
0.0 at the lowest indices whose activation is 0. +inf ranks first. CSR results hold positive entries only.
"""

from __future__ import annotations

import math
from typing import Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from ._check import check_k, check_offsets, check_reduce, check_threshold, token_mask, token_weights
from .pack import PackedEncoder
from .types import CSR, TopK

# Of the weighted activations float64 [n, d_sae] of a sequence's n >= 1 tokens, and their weights [n, 1].
REDUCE: Dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "max": lambda rows, share: rows.amax(0),
    "mean": lambda rows, share: rows.sum(0) / share.sum(),
    "sum": lambda rows, share: rows.sum(0),
    "count": lambda rows, share: ((rows > 0) * share).sum(0),
    "last": lambda rows, share: rows[-1],
}
SMALLEST = 2.0**-149  # float32's smallest positive number: what a smaller positive total becomes


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
    weights: Optional[Tensor] = None,
) -> CSR:
    """Encode each token of ``x`` [n_tokens, d_in] and reduce over each sequence: CSR [n_seq, d_sae]."""
    check_reduce(reduce)
    bounds = check_offsets(x, offsets).tolist()
    weight = token_weights(x, weights)
    kept = token_mask(x, mask)
    if weight is None:
        weight = torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
    kept = weight > 0 if kept is None else kept & (weight > 0)
    if k is None:
        tokens = encode_threshold(x, encoder).to_dense()
    else:
        tokens = encode_topk(x, encoder, k).to_dense(encoder.d_sae)
    pooled = tokens.new_zeros((len(bounds) - 1, encoder.d_sae))
    for row, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:])):
        here = kept[start:stop]
        share = weight[start:stop][here].double().unsqueeze(-1)
        rows = tokens[start:stop][here].double() * share
        if rows.shape[0] == 0:
            continue
        total = REDUCE[reduce](rows, share)
        pooled[row] = torch.where(total > 0, total.float().clamp(min=SMALLEST), 0.0)
    return CSR.from_dense(pooled)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Optional[Tensor] = None) -> Tensor:
    """``sum_j values[..., j] * W_dec[indices[..., j]] + b_dec``: [..., d_in] in W_dec's dtype."""
    wide = torch.float64 if W_dec.dtype == torch.float64 else torch.float32
    out = (values.to(wide).unsqueeze(-1) * W_dec[indices.long()].to(wide)).sum(-2)
    if b_dec is not None:
        out = out + b_dec.to(wide)
    return out.to(W_dec.dtype)


def decode_csr(csr: CSR, W_dec: Tensor, b_dec: Optional[Tensor] = None) -> Tensor:
    """Row i: the sum of value * W_dec[column] over its entries, + b_dec: [n_rows, d_in] in W_dec's dtype."""
    wide = torch.float64 if W_dec.dtype == torch.float64 else torch.float32
    scaled = csr.values.to(wide).unsqueeze(-1) * W_dec[csr.indices.long()].to(wide)
    out = torch.zeros((csr.n_rows, W_dec.shape[1]), dtype=wide, device=W_dec.device)
    out = out.index_add(0, csr.row_ids(), scaled)
    if b_dec is not None:
        out = out + b_dec.to(wide)
    return out.to(W_dec.dtype)


def kmeans_assign(X: CSR, centroids: Tensor) -> Tuple[Tensor, Tensor]:
    """labels int32 and similarity float32 [n_rows]: the first largest inner product with the centroids."""
    products = X.to_dense().double() @ centroids.double().t()
    similarity = products.amax(1)
    first = (products == similarity.unsqueeze(1)).int().argmax(1)
    return first.int(), similarity.float()


def kmeans_update(X: CSR, labels: Tensor, n_clusters: int) -> Tensor:
    """float32 [n_clusters, n_cols]: each cluster's sum of rows over its norm, zeros for a sum of zero."""
    owner = torch.nn.functional.one_hot(labels.long(), n_clusters).double()
    total = owner.t() @ X.to_dense().double()
    norm = total.norm(dim=1, keepdim=True)
    return (total / torch.where(norm > 0, norm, 1.0)).float()


def spherical_kmeans(
    X: CSR,
    n_clusters: int,
    *,
    init: Optional[Tensor] = None,
    n_init: int = 1,
    max_iter: int = 50,
    tol: float = 1e-5,
    seed: int = 0,
) -> Tuple[Tensor, Tensor, float, int]:
    """labels, centroids, inertia and iterations for rows of norm 1 (or 0); ``init`` likewise."""
    dense = X.to_dense().double()
    found = []
    for trial in range(n_init):
        if init is None:
            centroids = _kmeans_seeds(dense, n_clusters, seed + trial).float()
        else:
            centroids = init if init.is_floating_point() else kmeans_update(X, init, n_clusters)
        labels, similarity = kmeans_assign(X, centroids)
        n_iter, done = 0, False
        while not done and n_iter < max_iter + n_clusters:
            filled = _kmeans_fill(dense, labels, similarity, n_clusters)
            if n_iter >= max_iter and bool((filled == labels).all()):
                break
            centroids = kmeans_update(X, filled, n_clusters)
            before, (nearest, similarity) = similarity, kmeans_assign(X, centroids)
            gain = float((similarity.double() - before.double()).sum()) / max(1, int(dense.any(1).sum()))
            done = bool((nearest == filled).all()) or (gain < tol and bool((filled == labels).all()))
            labels = nearest
            n_iter += 1
        inertia = float((1 - similarity.double())[dense.any(1)].sum())
        found.append((labels, centroids, max(0.0, inertia), n_iter))
    return min(found, key=lambda run: run[2])


def _kmeans_seeds(dense: Tensor, n_clusters: int, seed: int) -> Tensor:
    """Greedy k-means++: of 2 + ln(n_clusters) rows drawn by distance, the one that leaves least distance."""
    trials = 2 + int(math.log(n_clusters))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand((n_clusters, trials), dtype=torch.float64, generator=generator, device="cpu")
    seeds = torch.zeros((n_clusters, dense.shape[1]), dtype=torch.float64, device=dense.device)
    far = dense.any(1).double()
    for step in range(n_clusters):
        if not bool(far.any()):
            break
        at = (far.cumsum(0) <= draws[step, :, None] * far.sum()).sum(1).clamp(max=int(far.nonzero()[-1]))
        options: List[Tuple[float, int, Tensor]] = []
        for place, row in enumerate(at.tolist() if step else at[:1].tolist()):
            distance = 1 - dense @ dense[row]
            left = torch.minimum(far, torch.where(distance < 2**-16, 0.0, distance))
            options.append((float(left.sum()), place, dense[row]))
            if min(options)[1] == place:
                nearest = left
        far, seeds[step] = nearest, min(options)[2]
    return seeds


def _kmeans_fill(dense: Tensor, labels: Tensor, similarity: Tensor, n_clusters: int) -> Tensor:
    """Every empty cluster takes the row least like its centroid, with its equals, unless that empties one."""
    labels, active = labels.clone(), dense.any(1)
    order = sorted((s, row) for row, s in enumerate(similarity.tolist()) if active[row] and s < 1 - 2**-16)
    for cluster in range(n_clusters):
        if bool((labels[active] == cluster).any()):
            continue
        while order:
            row = order[0][1]
            equal = dense @ dense[row] >= 1 - 2**-16
            order = [pair for pair in order if not equal[pair[1]]]
            if set(labels[equal].tolist()) <= set(labels[active & ~equal].tolist()):
                labels[equal] = cluster
                break
    return labels


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
    k: Union[int, float],
    *,
    b_dec: Optional[Tensor] = None,
    dtype: Optional[torch.dtype] = None,
) -> TopK:
    """The n * k largest positive activations of ``x`` [n, d_in], rows padded with 0.0 at feature 0."""
    pre = _train_scores(x, W_enc, b_enc, b_dec, dtype)
    pre = torch.where(pre > 0, pre, 0.0)
    flat = pre.detach().float().reshape(-1)
    chosen = flat.sort(descending=True, stable=True).indices[: int(k * x.shape[0])]
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
