"""Diversity: group prompts by what their pooled SAE features have in common.

idf weights and unit rows -> truncated SVD -> k-means on the dense rows -> a few exact iterations of
spherical k-means on the sparse rows themselves (``saerl_kernels.spherical_kmeans``), which with
``svd=0`` does the whole work. Features that the look of a text explains (its LaTeX, its length) weigh less,
so that clusters are of subjects. How much structure there is, is told by a silhouette next to that of the
same data with every feature's rows permuted; the number of clusters can be chosen by it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from saerl_fast.config import DiversityConfig
from saerl_fast.errors import SaerlError
from saerl_fast.records.spilled import by_block, counted, empty, from_iter, permutation, slices
from saerl_fast.signals.features import SAMPLE, Features, block, blocks, rows_with, svd_reduce, weighted
from saerl_fast.signals.text import look
from saerl_kernels import CSR, csr, kmeans_assign, kmeans_update, spherical_kmeans
from saerl_kernels.dispatch import has_numba

log = logging.getLogger(__name__)
NULL_ROWS = 2000  # rows of a sample on which a large pool is compared with its null
NUMBA_WORK = 50_000_000  # multiply-adds of an assignment from which compiling numba's kernels pays
LOOK_ROWS = 1 << 13  # rows on which the look of the texts is compared with the features
COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # numbers of clusters that are tried
LEAD = 0.02  # by which a silhouette has to be above the null's: the best of many is so by chance
_ABSENT = ("no CUDA device", "cuML is not installed")  # nothing to warn of


Texts = Callable[[np.ndarray], list[str]]  # of these rows


class ClusterResult(NamedTuple):
    """labels int32 [n], 0 ... K - 1, every label in use; metrics; the features' weights float32 [d_sae]."""

    labels: np.ndarray
    metrics: dict[str, Any]
    weights: torch.Tensor


def cluster_prompts(
    X: Features,
    cfg: DiversityConfig,
    *,
    tasks: Sequence[Any] | None = None,
    texts: Texts | None = None,
) -> ClusterResult:
    """Cluster the rows of the pooled features ``X`` [n, d_sae], unweighted as pooled.

    ``cfg.backend``: cuml (dense k-means on the GPU, sparse iterations by Triton), or scikit-learn's dense
    k-means with sparse iterations by numba, torch or scikit-learn's own k-means; auto takes cuML on a CUDA
    machine that has it, else torch, or numba (without it, scikit-learn) when the data are large. The same
    seed gives the same labels, by numba and torch alike, but not with cuML, whose sums are not ordered. Of
    more than ``SAMPLE`` rows a sample is clustered, and every row takes the nearest of its clusters (metric
    ``fitted_rows``). ``tasks`` [n] are only compared with the result (``purity``). ``texts`` gives the texts
    of some rows: a feature whose variance their look (`text.look`) explains to a share of r weighs
    ``cfg.look + (1 - cfg.look) (1 - r)^2``. ``cfg.n_clusters="auto"`` takes the number in ``COUNTS`` whose
    silhouette is furthest above the null's, or one cluster where none is above all of its rounds and by
    ``LEAD`` (metric ``tried``); Tibshirani, Walther and Hastie choose so by inertia (2001).

    Metrics: ``silhouette``, the simplified cosine silhouette in [-1, 1] (distances to centroids);
    ``null_silhouette``, its mean over ``cfg.null_rounds`` permutations of each feature's rows, and
    ``null_max``; both on the same ``silhouette_rows`` rows; ``sizes``; with tasks ``purity`` and
    ``purity_chance``, that of shuffled labels.
    """
    n_rows = X.n_rows
    if n_rows == 0:
        raise SaerlError("there are no prompts to cluster; check data.train and data.limit")
    weights = csr.idf(X, 0.0, rows_with(X))
    if texts is not None and cfg.look < 1:
        weights = weights * _plain(X, weights, texts, cfg)
    some = _sample(X, SAMPLE, cfg.seed)
    rows = weighted(block(some, slice(0, some.n_rows)), weights)
    backend = _backend(cfg.backend, rows.nnz * (COUNTS[-1] if cfg.n_clusters == "auto" else cfg.n_clusters))
    tried: list[list[float]] = []
    wanted = cfg.n_clusters if cfg.n_clusters != "auto" else _choose(rows, cfg, backend, tried)
    labels, centroids = _cluster(rows, wanted, cfg, backend)
    if n_rows > SAMPLE:
        labels = empty(n_rows, np.int32)
        for at in blocks(n_rows):
            labels[at] = _assign(weighted(block(X, at), weights), centroids, backend)
        number = np.cumsum(counted(labels) > 0) - 1  # without gaps
        for at in slices(n_rows):
            labels[at] = number[labels[at]]
    sizes = counted(labels)
    metrics: dict[str, Any] = {
        "n_clusters": len(sizes),
        "sizes": sizes.tolist(),
        "backend": backend,
        "note": None,
        "silhouette": None,
        "null_silhouette": None,
        "null_max": None,
    }
    if tried:
        metrics["tried"] = tried
    if len(sizes) < wanted:
        metrics["note"] = f"{wanted} clusters were asked for, {n_rows} prompts gave {len(sizes)}"
    elif cfg.n_clusters == "auto" and wanted == 1:
        metrics["note"] = (
            "no number of clusters stands out from permuted features: all prompts are one cluster"
        )
    if n_rows > SAMPLE:
        metrics["fitted_rows"] = SAMPLE
        log.info("clusters were fitted to a sample of %d of %d prompts, the others assigned", SAMPLE, n_rows)
    if len(sizes) > 1:
        sample = _sample(rows, NULL_ROWS, cfg.seed)
        found = (labels, centroids) if sample is rows else _cluster(sample, wanted, cfg, backend)
        metrics.update(silhouette=silhouette(sample, *found), silhouette_rows=sample.n_rows)
        rng = np.random.default_rng([cfg.seed, n_rows])
        null = []
        for _ in range(cfg.null_rounds):
            shuffled = permute_features(sample, rng)
            null.append(silhouette(shuffled, *_cluster(shuffled, wanted, cfg, backend)))
        if null:
            metrics.update(null_silhouette=float(np.mean(null)), null_max=float(np.max(null)))
    if tasks is not None:
        codes: dict[str, int] = {}
        named = (codes.setdefault(str(task), len(codes)) for task in tasks)
        names = from_iter(named, n_rows, np.int32)
        chance = by_block(labels.__getitem__, n_rows, np.int32)
        np.random.default_rng(cfg.seed).shuffle(chance)
        metrics.update(purity=purity(labels, names), purity_chance=purity(chance, names))
    return ClusterResult(labels.astype(np.int32, copy=False), metrics, weights)


def _sample(X: Any, most: int, seed: int) -> Any:
    """``X`` itself, or ``most`` random rows of it as CSR, in order."""
    if X.n_rows <= most:
        return X
    chosen = np.random.default_rng([seed, X.n_rows]).choice(X.n_rows, most, replace=False)
    return X.select_rows(torch.from_numpy(np.sort(chosen)))


def _choose(rows: CSR, cfg: DiversityConfig, backend: str, tried: list[list[float]]) -> int:
    """The number of clusters; ``tried`` takes each number, its silhouette and that of the null."""
    sample = _sample(rows, NULL_ROWS, cfg.seed)
    rng = np.random.default_rng([cfg.seed, rows.n_rows, 2])
    nulls = [permute_features(sample, rng) for _ in range(max(cfg.null_rounds, 2))]
    best, lead = 1, LEAD
    for count in COUNTS:
        if 4 * count > sample.n_rows:
            break
        found, *null = [silhouette(some, *_cluster(some, count, cfg, backend)) for some in (sample, *nulls)]
        tried.append([count, found, float(np.mean(null))])
        if found > max(null) and found - np.mean(null) > lead:
            best, lead = count, float(found - np.mean(null))
    return best


def _plain(X: Features, idf: torch.Tensor, texts: Texts, cfg: DiversityConfig) -> torch.Tensor:
    """Factors float32 [n_cols] by which features that the look of the texts explains weigh less."""
    some = np.sort(permutation(np.random.default_rng([cfg.seed, 7]), X.n_rows)[:LOOK_ROWS])
    marks = look(texts(some))
    marks = marks[:, np.ptp(marks, axis=0) > 0]
    if len(some) < 10 * marks.shape[1]:  # too few rows to tell
        return torch.ones(X.n_cols)
    basis = np.linalg.qr((marks - marks.mean(axis=0)) / marks.std(axis=0))[0]
    rows = weighted(X.select_rows(torch.from_numpy(some)), idf).to_scipy()
    total = np.asarray(rows.multiply(rows).sum(axis=0) - len(some) * np.square(rows.mean(axis=0))).ravel()
    share = np.square(rows.T @ basis).sum(axis=1) / np.maximum(total, 1e-12)
    chance = basis.shape[1] / len(some)
    share = np.clip((share - chance) / (1 - chance), 0.0, 1.0)
    return torch.from_numpy(cfg.look + (1 - cfg.look) * (1 - share) ** 2).float()


def silhouette(rows: CSR, labels: np.ndarray, centroids: np.ndarray) -> float:
    """Mean of (b - a) / max(a, b) with a, b the cosine distances to the own and the next centroid.

    ``rows`` [n, d] of norm 1, ``labels`` [n], ``centroids`` float32 [K, d] of norm 1. Of one cluster, all
    that equal rows give, 0: nothing is apart.
    """
    if len(centroids) < 2:
        return 0.0
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


def _cluster(rows: CSR, n_clusters: int, cfg: DiversityConfig, backend: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] without gaps and unit centroids float32 [K, d] of weighted unit rows."""
    n_clusters = min(n_clusters, rows.n_rows)
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
    sparse = "auto" if backend == "cuml" else _kernels(backend)
    return kmeans_update(rows, torch.from_numpy(labels), count, backend=sparse).numpy()


def _assign(rows: CSR, centroids: np.ndarray, backend: str) -> np.ndarray:
    """int32 [n]: the nearest centroid of each row."""
    sparse = "torch" if backend == "cuml" else _kernels(backend)
    return kmeans_assign(rows, torch.from_numpy(centroids), backend=sparse, check=False)[0].numpy()


def _spherical(
    rows: CSR, n_clusters: int, backend: str, *, init: np.ndarray | None = None, **settings: Any
) -> np.ndarray:
    """int64 [n]: labels of ``spherical_kmeans``, from the labels ``init`` or its own seeds."""
    if backend == "sklearn":
        seeds = "k-means++" if init is None else _centroids(rows, init, backend)
        kept = {"n_init": settings.get("n_init", 1), "random_state": settings.get("seed", 0)}
        return _fit(rows.to_scipy(), n_clusters, init=seeds, max_iter=settings.get("max_iter", 300), **kept)
    X, sparse = (rows.to("cuda"), "auto") if backend == "cuml" else (rows, backend)
    start = None if init is None else torch.from_numpy(init).to(X.device)
    found = spherical_kmeans(X, n_clusters, init=start, backend=sparse, **settings)
    return found.labels.cpu().numpy().astype(np.int64)


def _kmeans(data: np.ndarray, n_clusters: int, n_init: int, backend: str, seed: int) -> np.ndarray:
    """k-means labels int64 [n] of dense rows."""
    if backend == "cuml":
        from cuml.cluster import KMeans as GpuKMeans
        from sklearn.cluster import kmeans_plusplus

        best, labels = np.inf, np.zeros(len(data), dtype=np.int64)
        for trial in range(n_init):  # its own seeding costs some 70 passes over the data: bring ours
            start = kmeans_plusplus(data, n_clusters, random_state=seed + trial)[0]
            model = GpuKMeans(n_clusters=n_clusters, init=start, n_init=1, output_type="numpy").fit(data)
            if float(model.inertia_) < best:
                best, labels = float(model.inertia_), np.asarray(model.labels_, dtype=np.int64)
        return labels
    return _fit(data, n_clusters, n_init=n_init, random_state=seed)


def _fit(data: Any, n_clusters: int, **settings: Any) -> np.ndarray:
    """Labels int64 [n] of scikit-learn's k-means."""
    import warnings

    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
        return KMeans(n_clusters, **settings).fit(data).labels_.astype(np.int64)


def _kernels(backend: str) -> str:
    """Of ``saerl_kernels``; scikit-learn has no k-means of unit rows."""
    return "torch" if backend == "sklearn" else backend


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
    """cuml, numba, sklearn or torch, for ``work`` multiply-adds of an assignment."""
    check_backend(wanted)
    if wanted != "auto":
        return wanted
    reason = _why_not_cuml()
    if reason is None:
        return "cuml"
    if reason not in _ABSENT:
        log.warning("cuML cannot be loaded (%s): clustering on the CPU", reason)
    return "torch" if work < NUMBA_WORK else "numba" if has_numba() else "sklearn"


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
