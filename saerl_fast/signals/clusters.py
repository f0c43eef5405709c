"""Diversity: group prompts by what their pooled SAE features have in common.

idf weights and unit rows -> truncated SVD -> k-means on the dense rows -> a few exact iterations of
spherical k-means on the sparse rows themselves (``saerl_kernels.spherical_kmeans``), which with
``svd=0`` does the whole work. How much structure there is, is told by a silhouette next to that of
the same data with every feature's rows permuted.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from saerl_fast.config import DiversityConfig
from saerl_fast.errors import SaerlError
from saerl_fast.signals.features import SAMPLE, Features, block, blocks, rows_with, svd_reduce, weighted
from saerl_kernels import CSR, csr, kmeans_assign, kmeans_update, spherical_kmeans
from saerl_kernels.dispatch import has_numba

log = logging.getLogger(__name__)
NULL_ROWS = 2000  # rows of a sample on which a large pool is compared with its null
NUMBA_WORK = 50_000_000  # multiply-adds of an assignment from which compiling numba's kernels pays
_ABSENT = ("no CUDA device", "cuML is not installed")  # nothing to warn of


class ClusterResult(NamedTuple):
    """labels int32 [n], 0 ... K - 1, every label in use; metrics."""

    labels: np.ndarray
    metrics: dict[str, Any]


def cluster_prompts(
    X: Features, cfg: DiversityConfig, *, tasks: Sequence[Any] | None = None
) -> ClusterResult:
    """Cluster the rows of the pooled features ``X`` [n, d_sae], unweighted as pooled.

    ``cfg.backend``: cuml (dense k-means on the GPU, sparse iterations by Triton), or scikit-learn's dense
    k-means with sparse iterations by numba or torch; auto takes cuML on a CUDA machine that has it, else
    numba when the data are large, else torch. The same seed gives the same labels, by numba and torch
    alike, but not with cuML, whose sums are not ordered. Of more than ``SAMPLE`` rows a sample is clustered,
    and every row takes the nearest of its clusters (metric ``fitted_rows``). ``tasks`` [n] are only compared
    with the result (``purity``).

    Metrics: ``silhouette``, the simplified cosine silhouette in [-1, 1] (distances to centroids);
    ``null_silhouette``, its mean over ``cfg.null_rounds`` permutations of each feature's rows, and
    ``null_max``; both on the same ``silhouette_rows`` rows; ``sizes``; with tasks ``purity`` and
    ``purity_chance``, that of shuffled labels.
    """
    n_rows = X.n_rows
    if n_rows == 0:
        raise SaerlError("there are no prompts to cluster; check data.train and data.limit")
    idf = csr.idf(X, 0.0, rows_with(X))
    if n_rows > SAMPLE:
        chosen = np.random.default_rng([cfg.seed, n_rows]).choice(n_rows, SAMPLE, replace=False)
        rows = weighted(X.select_rows(torch.from_numpy(np.sort(chosen))), idf)
    else:
        rows = weighted(block(X, slice(0, n_rows)), idf)
    backend = _backend(cfg.backend, rows.nnz * cfg.n_clusters)
    labels, centroids = _cluster(rows, cfg, backend)
    if n_rows > SAMPLE:
        every = [_assign(weighted(block(X, at), idf), centroids, backend) for at in blocks(n_rows)]
        labels = np.unique(np.concatenate(every), return_inverse=True)[1]
    sizes = np.bincount(labels)
    metrics: dict[str, Any] = {
        "n_clusters": len(sizes),
        "sizes": sizes.tolist(),
        "backend": backend,
        "note": None,
        "silhouette": None,
        "null_silhouette": None,
        "null_max": None,
    }
    if len(sizes) < cfg.n_clusters:
        metrics["note"] = f"{cfg.n_clusters} clusters were asked for, {n_rows} prompts gave {len(sizes)}"
    if n_rows > SAMPLE:
        metrics["fitted_rows"] = SAMPLE
        log.info("clusters were fitted to a sample of %d of %d prompts, the others assigned", SAMPLE, n_rows)
    if len(sizes) > 1:
        rng = np.random.default_rng([cfg.seed, n_rows])
        sample = rows
        if n_rows > NULL_ROWS:
            chosen = np.sort(rng.choice(rows.n_rows, NULL_ROWS, replace=False))
            sample = rows.select_rows(torch.from_numpy(chosen))
            labels_s, centroids_s = _cluster(sample, cfg, backend)
            metrics["silhouette"] = silhouette(sample, labels_s, centroids_s)
        else:
            metrics["silhouette"] = silhouette(rows, labels, centroids)
        metrics["silhouette_rows"] = sample.n_rows
        null = []
        for _ in range(cfg.null_rounds):
            shuffled = permute_features(sample, rng)
            null.append(silhouette(shuffled, *_cluster(shuffled, cfg, backend)))
        if null:
            metrics.update(null_silhouette=float(np.mean(null)), null_max=float(np.max(null)))
    if tasks is not None:
        codes: dict[str, int] = {}
        named = (codes.setdefault(str(task), len(codes)) for task in tasks)
        names = np.fromiter(named, dtype=np.int64, count=n_rows)
        chance = np.random.default_rng(cfg.seed).permutation(labels)
        metrics.update(purity=purity(labels, names), purity_chance=purity(chance, names))
    return ClusterResult(labels.astype(np.int32), metrics)


def silhouette(rows: CSR, labels: np.ndarray, centroids: np.ndarray) -> float:
    """Mean of (b - a) / max(a, b) with a, b the cosine distances to the own and the next centroid.

    ``rows`` [n, d] of norm 1, ``labels`` [n], ``centroids`` float32 [K, d] of norm 1, K >= 2.
    """
    distance = 1.0 - np.asarray(rows.to_scipy() @ centroids.T, dtype=np.float64)
    index = np.arange(len(labels))
    own = distance[index, labels].copy()
    distance[index, labels] = np.inf
    other = distance.min(axis=1)
    return float(((other - own) / np.maximum(np.maximum(own, other), 1e-12)).mean())


def purity(labels: np.ndarray, names: np.ndarray) -> float:
    """Share of rows whose name (int codes [n]) is the most frequent one of their cluster."""
    table = np.zeros((labels.max() + 1, names.max() + 1), dtype=np.int64)
    np.add.at(table, (labels, names), 1)
    return float(table.max(axis=1).sum() / len(labels))


def permute_features(rows: CSR, rng: np.random.Generator) -> CSR:
    """``rows`` with each column's values moved to random distinct rows, then of norm 1 again.

    Every feature keeps its values and its frequency; what is lost is which features occur together.
    """
    columns = csr.transpose(rows)
    starts, moved = columns.indptr.tolist(), columns.indices.numpy()
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        if end > start:
            moved[start:end] = rng.permutation(rows.n_rows)[: end - start]
    return csr.l2_rows(csr.transpose(columns))


def _cluster(rows: CSR, cfg: DiversityConfig, backend: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] without gaps and unit centroids float32 [K, d] of weighted unit rows."""
    n_clusters = min(cfg.n_clusters, rows.n_rows)
    labels = np.zeros(rows.n_rows, dtype=np.int64)
    if cfg.svd and n_clusters > 1:
        dense = svd_reduce(rows, cfg.svd, cfg.seed)[0]
        dense = dense / np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-12)
        labels = _kmeans(dense, n_clusters, cfg.n_init, backend, cfg.seed)
        if cfg.polish:
            labels = _spherical(rows, n_clusters, backend, init=labels, max_iter=cfg.polish, tol=0.0)
    elif n_clusters > 1:
        labels = _spherical(rows, n_clusters, backend, n_init=cfg.n_init, seed=cfg.seed)
    # Clusters that lost all rows are closed: labels without gaps, first come first.
    labels = np.unique(labels, return_inverse=True)[1]
    return labels, _centroids(rows, labels, backend)


def _centroids(rows: CSR, labels: np.ndarray, backend: str) -> np.ndarray:
    """float32 [K, d]: the direction of each cluster of labels 0 .. K - 1."""
    count = int(labels.max()) + 1
    sparse = "auto" if backend == "cuml" else backend
    return kmeans_update(rows, torch.from_numpy(labels), count, backend=sparse).numpy()


def _assign(rows: CSR, centroids: np.ndarray, backend: str) -> np.ndarray:
    """int32 [n]: the nearest centroid of each row."""
    sparse = "torch" if backend == "cuml" else backend
    return kmeans_assign(rows, torch.from_numpy(centroids), backend=sparse, check=False)[0].numpy()


def _spherical(
    rows: CSR, n_clusters: int, backend: str, *, init: np.ndarray | None = None, **settings: Any
) -> np.ndarray:
    """int64 [n]: labels of ``spherical_kmeans``, from the labels ``init`` or its own seeds."""
    X, sparse = (rows.to("cuda"), "auto") if backend == "cuml" else (rows, backend)
    start = None if init is None else torch.from_numpy(init).to(X.device)
    found = spherical_kmeans(X, n_clusters, init=start, backend=sparse, **settings)
    return found.labels.cpu().numpy().astype(np.int64)


def _kmeans(data: np.ndarray, n_clusters: int, n_init: int, backend: str, seed: int) -> np.ndarray:
    """k-means labels int64 [n] of dense rows."""
    import warnings

    from sklearn.cluster import KMeans, kmeans_plusplus
    from sklearn.exceptions import ConvergenceWarning

    if backend == "cuml":
        from cuml.cluster import KMeans as GpuKMeans

        best, labels = np.inf, np.zeros(len(data), dtype=np.int64)
        for trial in range(n_init):  # its own seeding costs some 70 passes over the data: bring ours
            start = kmeans_plusplus(data, n_clusters, random_state=seed + trial)[0]
            model = GpuKMeans(n_clusters=n_clusters, init=start, n_init=1, output_type="numpy").fit(data)
            if float(model.inertia_) < best:
                best, labels = float(model.inertia_), np.asarray(model.labels_, dtype=np.int64)
        return labels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
        return KMeans(n_clusters, n_init=n_init, random_state=seed).fit(data).labels_.astype(np.int64)


def check_backend(backend: str) -> None:
    """SaerlError when ``diversity.backend`` asks for what is not here."""
    if backend == "numba" and not has_numba():
        raise SaerlError(
            "diversity.backend=numba needs numba; run `pip install numba`, or set diversity.backend=auto"
        )
    reason = _why_not_cuml() if backend == "cuml" else None
    if reason:
        raise SaerlError(
            f"diversity.backend=cuml cannot be used: {reason}; install the gpu extra on a CUDA machine, "
            "or set diversity.backend=auto"
        )


def _backend(wanted: str, work: int) -> str:
    """cuml, numba or torch, for ``work`` multiply-adds of an assignment."""
    check_backend(wanted)
    if wanted != "auto":
        return wanted
    reason = _why_not_cuml()
    if reason is None:
        return "cuml"
    if reason not in _ABSENT:
        log.warning("cuML cannot be loaded (%s): clustering on the CPU", reason)
    return "numba" if has_numba() and work >= NUMBA_WORK else "torch"


def _why_not_cuml() -> str | None:
    """Why cuML cannot run here; None when it can."""
    # cuML imports without a GPU and fails only in fit, so the device is asked first.
    if not torch.cuda.is_available():
        return _ABSENT[0]
    return _load_cuml() if importlib.util.find_spec("cuml") else _ABSENT[1]


def _load_cuml() -> str | None:
    """Import cuML; None on success, else why not.

    torch may have loaded an older libnvJitLink than cuML needs; loading the newer one for all
    libraries first lets both work.
    """
    import ctypes
    import glob
    import sysconfig

    for path in glob.glob(f"{sysconfig.get_path('purelib')}/nvidia/*/lib/libnvJitLink.so.*"):
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError as err:
            log.debug("%s was not loaded: %s", path, err)
    try:
        import cuml.cluster  # noqa: F401
    except Exception as err:  # ImportError, or whatever a half-installed CUDA stack raises
        return " ".join(str(err).split())
    return None
