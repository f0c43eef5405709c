"""Spherical k-means on sparse rows: the whole algorithm, and its two steps as ops of their own.

Dhillon and Modha, "Concept decompositions for large sparse text data using clustering" (2001). Seeding is
greedy k-means++ (Arthur and Vassilvitskii, 2007; the greedy form as in scikit-learn) on cosine distances.
"""

from __future__ import annotations

import math
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from . import reference
from ._check import check_count, check_rows
from .csr import l2_rows
from .dispatch import kmeans_steps, resolve
from .types import CSR

SAME = 2.0**-16  # cosine distance below which rows count as equal: float32 sums are no finer


class KMeans(NamedTuple):
    """``labels`` are those of ``kmeans_assign(unit rows, centroids)``."""

    labels: Tensor  # int32 [n_rows]
    centroids: Tensor  # float32 [n_clusters, n_cols], norm 1, or 0 for a cluster without rows
    inertia: float  # sum of 1 - cosine(row, its centroid) over the rows with entries
    n_iter: int  # pairs of update and assignment that were run


def kmeans_assign(
    X: CSR, centroids: Tensor, *, backend: str = "auto", check: bool = True
) -> Tuple[Tensor, Tensor]:
    """The centroid with the largest inner product, for each row of ``X`` [n_rows, n_cols].

    ``centroids`` [n_clusters, n_cols], floating point, are used in float32 as they are; so are the rows.
    Returns labels int32 [n_rows] and similarity float32 [n_rows], that inner product. Among equals the first
    centroid is taken; a row without entries has similarity 0 to all, so it gets label 0. Sums run in
    float32 in an order of the backend's own: labels agree between backends where the two largest products
    differ by more than their rounding, and repeat bit for bit on each. ``check=False`` skips the passes over
    ``X`` and ``centroids`` that look for entries out of range or not finite.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for what ``check`` finds.
    """
    check_rows(X, check)
    _check_centroids(X, centroids, check)
    name = resolve(backend, X.device)
    if name == "reference":
        return reference.kmeans_assign(X, centroids)
    return kmeans_steps(name).assign(_detached(X), centroids.detach().resolve_neg().float().t().contiguous())


def kmeans_update(
    X: CSR,
    labels: Tensor,
    n_clusters: int,
    *,
    transposed: Optional[CSR] = None,
    backend: str = "auto",
    check: bool = True,
) -> Tensor:
    """Unit centroids float32 [n_clusters, n_cols]: each cluster's sum of rows, divided by its norm.

    ``labels`` [n_rows] integers in 0 .. n_clusters - 1. ``transposed`` is X's CSC copy, that is the CSR of
    its transpose, where the caller keeps one (``csr.transpose``). A cluster without rows, or whose rows
    cancel, gets zeros. Every entry is summed by one worker in the order of rows, without atomics, so the
    result repeats bit for bit. The tensor is a transposed view, which ``kmeans_assign`` reads without a copy.

    Raises ValueError for shapes, dtypes or devices that do not fit, and for what ``check`` finds.
    """
    check_rows(X, check)
    check_count(n_clusters, "n_clusters")
    labels = _check_labels(X, labels, n_clusters, check)
    name = resolve(backend, X.device)
    if name == "reference":
        return reference.kmeans_update(X, labels, n_clusters)
    steps = kmeans_steps(name)
    if transposed is None:
        return steps.update(steps.transpose(_detached(X)), labels, n_clusters).t()
    if (transposed.n_rows, transposed.n_cols, transposed.nnz) != (X.n_cols, X.n_rows, X.nnz):
        raise ValueError(
            f"transposed is {transposed.n_rows} x {transposed.n_cols} with {transposed.nnz} entries, "
            f"expected {X.n_cols} x {X.n_rows} with {X.nnz}"
        )
    check_rows(transposed, check)
    return steps.update(_detached(transposed), labels, n_clusters).t()


def spherical_kmeans(
    X: CSR,
    n_clusters: int,
    *,
    init: Optional[Tensor] = None,
    n_init: int = 1,
    max_iter: int = 50,
    tol: float = 1e-5,
    seed: int = 0,
    backend: str = "auto",
    check: bool = True,
) -> KMeans:
    """Cluster the directions of the rows of ``X`` [n_rows, n_cols] by Lloyd's iterations.

    Args:
        X: any finite values; every row is divided by its norm first (X is not changed). Rows without
            entries have no direction: they get label 0 and count nowhere else.
        n_clusters: 1 .. n_rows.
        init: integer labels [n_rows] or floating-point centroids [n_clusters, n_cols], which are divided by
            their norms; None seeds by k-means++.
        n_init: seedings tried; the run with the smallest inertia is returned, the first among equals.
        max_iter: iterations at most; 0 only assigns. Up to n_clusters more are run while a cluster is empty
            that some row could fill.
        tol: stop when an iteration raises the mean cosine by less; 0 goes on until no label changes.
        seed: of the seedings. The same seed repeats bit for bit on a backend; on another one the result
            is the same as long as no decision is closer than float32 rounding.

    Empty clusters: in ascending order each takes the row with the smallest similarity to its centroid (the
    first among equals), with all rows equal to it, unless that would empty another cluster. A cluster stays
    empty, with a zero centroid, only when fewer than n_clusters rows differ (cosine distance over 2^-16).

    Raises ValueError for what cannot be clustered, naming the value.
    """
    check_rows(X, check)
    check_count(n_clusters, "n_clusters")
    check_count(n_init, "n_init")
    if n_clusters > X.n_rows:
        raise ValueError(f"n_clusters={n_clusters} is larger than the number of rows, {X.n_rows}")
    if max_iter < 0 or not tol >= 0:
        raise ValueError(f"max_iter={max_iter}, tol={tol}: both must be at least 0")
    labels, table = None, None
    if init is not None:
        if n_init > 1:
            raise ValueError(f"n_init={n_init} runs from one init would all be the same; use n_init=1")
        if init.is_floating_point():
            _check_centroids(X, init, check)
            if len(init) != n_clusters:
                raise ValueError(f"init has {len(init)} centroids, expected n_clusters={n_clusters}")
            norm = torch.linalg.vector_norm(init.detach(), dim=1, keepdim=True, dtype=torch.float64)
            table = (init.detach() / torch.where(norm > 0, norm, 1.0)).float().t().contiguous()
        else:
            labels = _check_labels(X, init, n_clusters, check)
    name = resolve(backend, X.device)
    rows = l2_rows(_detached(X))
    if name == "reference":
        start = None if init is None else (labels if table is None else table.t())
        found = reference.spherical_kmeans(
            rows, n_clusters, init=start, n_init=n_init, max_iter=max_iter, tol=tol, seed=seed
        )
        return KMeans(*found)
    steps = kmeans_steps(name)
    flipped = steps.transpose(rows)
    best: Optional[KMeans] = None
    for trial in range(n_init):
        start = table
        if labels is not None:
            start = steps.update(flipped, labels, n_clusters)
        elif start is None:
            start = _seed(steps, rows, flipped, n_clusters, seed + trial)
        found = _lloyd(steps, rows, flipped, start, max_iter, tol)
        if best is None or found.inertia < best.inertia:
            best = found
    assert best is not None
    return best


def _lloyd(steps: Any, rows: CSR, flipped: CSR, table: Tensor, max_iter: int, tol: float) -> KMeans:
    """Iterate from ``table`` float32 [n_cols, n_clusters], the centroids as columns."""
    n_clusters = table.shape[1]
    active = _active(rows)
    n_active = int(active.sum())
    labels, similarity = steps.assign(rows, table)
    total, n_iter = float(similarity.double().sum()), 0
    source: Optional[Tensor] = None  # the labels that the table was made from
    while n_iter < max_iter + n_clusters:
        filled = _fill_empty(steps, rows, flipped, labels, similarity, active, n_clusters)
        if n_iter >= max_iter and filled is labels:
            break
        table = steps.update(flipped, filled, n_clusters)
        if source is None or not hasattr(steps, "reassign"):
            nearest, similarity = steps.assign(rows, table)
        else:  # a cluster that kept its rows kept its centroid, bit for bit
            changed = source != filled
            moved = torch.zeros(n_clusters, dtype=torch.bool, device=rows.device)
            moved[torch.cat([source[changed], filled[changed]]).long()] = True
            nearest, similarity = steps.reassign(rows, table, labels, similarity, moved)
        source = filled
        before, total = total, float(similarity.double().sum())
        n_iter += 1
        same = bool(torch.equal(nearest, filled))
        close = total - before < tol * n_active and filled is labels
        labels = nearest
        if same or close:
            break
    return KMeans(labels, table.t().contiguous(), max(0.0, n_active - total), n_iter)


def _fill_empty(
    steps: Any, rows: CSR, flipped: CSR, labels: Tensor, similarity: Tensor, active: Tensor, n_clusters: int
) -> Tensor:
    """``labels`` itself, or a copy in which clusters without rows got some; the rule is the public op's."""
    counts = torch.bincount(labels[active].long(), minlength=n_clusters)
    empty = (counts == 0).nonzero().squeeze(-1).tolist()
    if not empty:
        return labels
    filled = labels
    room = torch.where(active, similarity, torch.inf)
    for cluster in empty:
        while True:
            row = int(room.argmin())
            if float(room[row]) >= 1 - SAME:
                return filled
            equal = steps.row_similarity(rows, flipped, [row])[0] >= 1 - SAME
            equal[row] = True
            room[equal] = torch.inf
            leaving = torch.bincount(filled[equal].long(), minlength=n_clusters)
            if bool(((leaving == 0) | (leaving < counts)).all()):
                break  # else it has a cluster to itself, as yet with an old centroid
        if filled is labels:
            filled = labels.clone()
        filled[equal] = cluster
        counts -= leaving
        counts[cluster] = leaving.sum()
    return filled


def _seed(steps: Any, rows: CSR, flipped: CSR, n_clusters: int, seed: int) -> Tensor:
    """k-means++ rows as a table float32 [n_cols, n_clusters]; columns stay zero once all rows are covered."""
    trials = 2 + int(math.log(n_clusters))
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand((n_clusters, trials), dtype=torch.float64, generator=generator, device="cpu")
    active = _active(rows)
    far = active.float()  # [n_rows], the distance to the nearest seed, 1 before there is one
    chosen: List[int] = []
    for step in range(n_clusters):
        reach = far.cpu().double().cumsum(0)  # on the CPU: CUDA's cumsum does not repeat bit for bit
        if float(reach[-1]) == 0:
            break
        # right=True, so that a draw of 0 passes over rows at distance 0.
        at = torch.searchsorted(reach, draws[step, : trials if step else 1] * reach[-1], right=True)
        last = int((reach < reach[-1]).sum())  # the last row at a distance, were a product rounded up
        picks = at.clamp(max=last).tolist()
        distance = 1 - steps.row_similarity(rows, flipped, picks)
        distance = torch.where(distance < SAME, 0.0, distance)
        left = torch.minimum(far, distance)
        best = int(left.double().sum(1).argmin())
        far = left[best]
        chosen.append(picks[best])
    return steps.table_of(rows, chosen, n_clusters)


def _active(rows: CSR) -> Tensor:
    """bool [n_rows]: rows with a direction, that is with an entry that is not zero."""
    filled = torch.zeros(rows.n_rows, dtype=torch.bool, device=rows.device)
    filled[rows.row_ids()[rows.values != 0]] = True
    return filled


def _detached(X: CSR) -> CSR:
    """X without gradients or gaps between entries, as the kernels read it."""
    values = X.values.detach().resolve_neg().contiguous()
    return CSR(X.indptr.contiguous(), X.indices.contiguous(), values, X.n_cols)


def _check_centroids(X: CSR, centroids: Tensor, check: bool) -> None:
    if centroids.dim() != 2 or centroids.shape[0] < 1 or centroids.shape[1] != X.n_cols:
        raise ValueError(f"centroids must be [n_clusters, {X.n_cols}], got shape {tuple(centroids.shape)}")
    if not centroids.is_floating_point():
        raise ValueError(f"centroids must be floating point, got {centroids.dtype}")
    if centroids.device != X.device:
        raise ValueError(f"X is on {X.device}, centroids on {centroids.device}; move them to one device")
    if check and not bool(torch.isfinite(centroids).all()):
        raise ValueError("centroids hold NaN or infinite values")


def _check_labels(X: CSR, labels: Tensor, n_clusters: int, check: bool) -> Tensor:
    """``labels`` as int32."""
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != (X.n_rows,):
        raise ValueError(
            f"labels must be integers [{X.n_rows}], got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if labels.device != X.device:
        raise ValueError(f"X is on {X.device}, labels on {labels.device}; move them to one device")
    if check and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= n_clusters:
            raise ValueError(f"labels reach {low}..{high}, outside 0..{n_clusters - 1}")
    return labels.int().contiguous()
