"""Diversity: group prompts by what their pooled SAE features have in common.

idf weights and unit rows -> truncated SVD -> k-means on the dense rows -> a few exact iterations of
spherical k-means on the sparse rows themselves (``saerl_kernels.spherical_kmeans``), which with
``svd=0`` does the whole work. How much structure there is, is told by a silhouette next to that of
the same data with every feature's rows permuted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saerl_fast.config import DiversityConfig
from saerl_fast.errors import SaerlError
from saerl_fast.signals.features import l2_rows, svd_reduce, weighted

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from saerl_kernels import CSR, KMeans

log = logging.getLogger(__name__)
BACKENDS = ("auto", "sklearn", "numba", "cuml")
NULL_ROWS = 2000  # rows of a sample on which a large pool is compared with its null
NUMBA_WORK = 50_000_000  # multiply-adds of an assignment from which compiling numba's kernels pays


class ClusterResult(NamedTuple):
    """labels int32 [n], 0 ... K - 1, every label in use; metrics."""

    labels: np.ndarray
    metrics: dict[str, Any]


def cluster_prompts(
    X: CSR | csr_matrix,
    cfg: DiversityConfig,
    backend: str = "auto",
    *,
    tasks: Sequence[Any] | None = None,
) -> ClusterResult:
    """Cluster the rows of the pooled features ``X`` [n, d_sae], unweighted as pooled.

    ``backend``: cuml (dense k-means on the GPU, sparse iterations by Triton), or scikit-learn's dense
    k-means with sparse iterations by numba (numba) or torch (sklearn); auto takes cuML on a CUDA
    machine that has it, else numba when the data are large. The same seed gives the same labels,
    except with cuML, whose sums are not ordered. ``tasks`` [n] are only compared with the result
    (``purity``).

    Metrics: ``silhouette``, the simplified cosine silhouette in [-1, 1] (distances to centroids);
    ``null_silhouette``, its mean over ``cfg.null_rounds`` permutations of each feature's rows, and
    ``null_max``; both on the same ``silhouette_rows`` rows; ``sizes``; with tasks ``purity`` and
    ``purity_chance``, that of shuffled labels.
    """
    if backend not in BACKENDS:
        raise SaerlError(f"clustering backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    rows = weighted(X)
    n_rows = rows.shape[0]
    if n_rows == 0:
        raise SaerlError("there are no prompts to cluster; check data.train and data.limit")
    engine = _engine(backend)
    labels, centroids = _cluster(rows, cfg, engine, cfg.seed)
    sizes = np.bincount(labels)
    metrics: dict[str, Any] = {
        "n_clusters": len(sizes),
        "sizes": sizes.tolist(),
        "backend": engine,
        "note": None,
        "silhouette": None,
        "null_silhouette": None,
        "null_max": None,
    }
    if len(sizes) < cfg.n_clusters:
        metrics["note"] = f"{cfg.n_clusters} clusters were asked for, {n_rows} prompts gave {len(sizes)}"
    if len(sizes) > 1:
        rng = np.random.default_rng([cfg.seed, n_rows])
        sample = rows
        if n_rows > NULL_ROWS:
            sample = rows[np.sort(rng.choice(n_rows, NULL_ROWS, replace=False))]
            labels_s, centroids_s = _cluster(sample, cfg, engine, cfg.seed)
            metrics["silhouette"] = silhouette(sample, labels_s, centroids_s)
        else:
            metrics["silhouette"] = silhouette(rows, labels, centroids)
        metrics["silhouette_rows"] = sample.shape[0]
        null = []
        for _ in range(cfg.null_rounds):
            shuffled = permute_features(sample, rng)
            null.append(silhouette(shuffled, *_cluster(shuffled, cfg, engine, cfg.seed)))
        if null:
            metrics.update(null_silhouette=float(np.mean(null)), null_max=float(np.max(null)))
    if tasks is not None:
        names = np.unique(np.asarray([str(task) for task in tasks]), return_inverse=True)[1]
        chance = np.random.default_rng(cfg.seed).permutation(labels)
        metrics.update(purity=purity(labels, names), purity_chance=purity(chance, names))
    return ClusterResult(labels.astype(np.int32), metrics)


def silhouette(rows: csr_matrix, labels: np.ndarray, centroids: np.ndarray) -> float:
    """Mean of (b - a) / max(a, b) with a, b the cosine distances to the own and the next centroid.

    ``rows`` [n, d] of norm 1, ``labels`` [n], ``centroids`` float32 [K, d] of norm 1, K >= 2.
    """
    distance = 1.0 - np.asarray(rows @ centroids.T, dtype=np.float64)
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


def permute_features(rows: csr_matrix, rng: np.random.Generator) -> csr_matrix:
    """``rows`` with each column's values moved to random distinct rows, then of norm 1 again.

    Every feature keeps its values and its frequency; what is lost is which features occur together.
    """
    columns = rows.tocsc()
    n_rows = rows.shape[0]
    for start, end in zip(columns.indptr[:-1], columns.indptr[1:], strict=True):
        if end > start:
            columns.indices[start:end] = rng.permutation(n_rows)[: end - start]
    columns.has_sorted_indices = False
    return l2_rows(columns.tocsr())


def _cluster(rows: csr_matrix, cfg: DiversityConfig, engine: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] without gaps and unit centroids float32 [K, d] of weighted unit rows."""
    n_clusters = min(cfg.n_clusters, rows.shape[0])
    if n_clusters == 1:
        labels = np.zeros(rows.shape[0], dtype=np.int64)
        return labels, _centroids(rows, labels, 1, engine)
    if cfg.svd:
        dense = svd_reduce(rows, cfg.svd, seed)[0]
        dense = dense / np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-12)
        labels = _kmeans(dense, n_clusters, cfg.n_init, engine, seed)
        if cfg.polish:
            labels = _sparse_kmeans(rows, n_clusters, engine, init=labels, max_iter=cfg.polish, tol=0.0)
    else:
        labels = _sparse_kmeans(rows, n_clusters, engine, n_init=cfg.n_init, seed=seed)
    # Clusters that lost all rows are closed: labels without gaps, first come first.
    labels = np.unique(labels, return_inverse=True)[1]
    return labels, _centroids(rows, labels, int(labels.max()) + 1, engine)


def _centroids(rows: csr_matrix, labels: np.ndarray, count: int, engine: str = "sklearn") -> np.ndarray:
    """float32 [count, d]: each cluster's direction, zeros for one without rows."""
    import torch

    from saerl_kernels import CSR, kmeans_update

    backend = _sparse_backend(rows, count, engine)
    return kmeans_update(CSR.from_scipy(rows), torch.from_numpy(labels), count, backend=backend).numpy()


def _sparse_kmeans(
    rows: csr_matrix, n_clusters: int, engine: str, *, init: np.ndarray | None = None, **settings: Any
) -> np.ndarray:
    """int64 [n]: labels of ``spherical_kmeans``, from the labels ``init`` or its own seeds."""
    import torch

    from saerl_kernels import CSR, spherical_kmeans

    backend = _sparse_backend(rows, n_clusters, engine)
    X = CSR.from_scipy(rows).to("cuda" if engine == "cuml" else "cpu")
    start = None if init is None else torch.from_numpy(init).to(X.device)
    found: KMeans = spherical_kmeans(X, n_clusters, init=start, backend=backend, **settings)
    return found.labels.cpu().numpy().astype(np.int64)


def _sparse_backend(rows: csr_matrix, n_clusters: int, engine: str) -> str:
    """The backend of saerl_kernels that stands for an engine."""
    small = rows.nnz * n_clusters < NUMBA_WORK
    by_size = "torch" if small else "numba"
    return {"cuml": "auto", "numba": "numba", "sklearn": "torch"}.get(engine, by_size)


def _kmeans(data: np.ndarray, n_clusters: int, n_init: int, engine: str, seed: int) -> np.ndarray:
    """k-means labels int64 [n] of dense rows."""
    import warnings

    from sklearn.cluster import KMeans, kmeans_plusplus
    from sklearn.exceptions import ConvergenceWarning

    if engine == "cuml":
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


def _engine(backend: str) -> str:
    """cuml, numba, sklearn or auto-cpu (numba or torch by size) for a requested backend."""
    import importlib.util

    if backend == "sklearn":
        return "sklearn"
    has_numba = importlib.util.find_spec("numba") is not None
    if backend == "numba":
        if not has_numba:
            raise SaerlError("clustering backend 'numba' is not installed; pip install numba, or use sklearn")
        return "numba"
    import torch

    # cuML imports without a GPU and fails only in fit, so the device is asked first.
    if torch.cuda.is_available() and importlib.util.find_spec("cuml") is not None:
        reason = _load_cuml()
        if reason is None:
            return "cuml"
        if backend == "auto":
            log.warning("cuML cannot be loaded (%s): clustering on the CPU", reason)
    elif backend == "cuml":
        reason = "no CUDA device" if not torch.cuda.is_available() else "cuML is not installed"
    if backend == "cuml":
        raise SaerlError(
            f"clustering backend 'cuml' cannot be used: {reason}; install the gpu extra on a CUDA machine "
            "or use backend auto"
        )
    return "auto-cpu" if has_numba else "sklearn"


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
