"""Spherical k-means on sparse rows against scikit-learn, sparsekmeans and (on a GPU) cuML.

    pytest benchmarks/bench_kmeans.py --benchmark-json=benchmarks/results/cpu/kmeans.json

All start from the same centroids, rows of the data, and run the same number of Lloyd iterations on the same
unit rows. The peers minimise Euclidean distances to means, we cosine distances to directions, so each result
is judged by both objectives of its labels, in float64, and ours may be worse in neither by more than 2 %.
SAERL_BENCH_GRID=tiny is a smoke run. How time is taken: harness.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import saerl_kernels as sk
from benchmarks.harness import DEVICE, Contender, bench_threads, environment, grid, measure
from saerl_kernels import csr

TOLERANCE = 1.02  # our objective over the base's: different paths end in different local optima


class Shape(NamedTuple):
    n_rows: int
    nnz: int  # entries a row
    d_sae: int
    n_clusters: int
    n_iter: int


TINY = [Shape(300, 12, 256, 5, 3)]
CPU_GRID = [Shape(20_000, 200, 16384, 64, 10), Shape(20_000, 200, 16384, 256, 10)]
GPU_GRID = [Shape(103_000, 500, 65536, n_clusters, 10) for n_clusters in (64, 256, 1000)]


def pooled_rows(shape: Shape, seed: int = 0) -> sk.CSR:
    """Rows like pooled SAE features: frequencies fall as a power law, 2 K topics prefer some features each.

    idf-weighted, of norm 1. Half of a row's draws come from its topic's 4 nnz features, half from all.
    """
    rng = np.random.default_rng(seed)
    n, d, draws = shape.n_rows, shape.d_sae, shape.nnz
    frequency = 1 / (np.arange(d) + 50.0) ** 0.7
    edges = np.cumsum(frequency / frequency.sum())
    edges[-1] = 1.0
    topics = rng.integers(0, d, (2 * shape.n_clusters, 4 * shape.nnz))
    topic = rng.integers(0, len(topics), n)
    common = np.searchsorted(edges, rng.random((n, draws)))
    own = topics[topic[:, None], rng.integers(0, topics.shape[1], (n, draws))]
    columns = np.where(rng.random((n, draws)) < 0.5, own, common)
    columns.sort(axis=1)
    kept = np.ones_like(columns, dtype=bool)
    kept[:, 1:] = columns[:, 1:] != columns[:, :-1]
    indptr = torch.from_numpy(np.concatenate([[0], kept.sum(axis=1).cumsum()]))
    values = rng.gamma(3.0, 1.0, int(indptr[-1])).astype(np.float32)
    X = sk.CSR(indptr, torch.from_numpy(columns[kept].astype(np.int32)), torch.from_numpy(values), d)
    return csr.l2_rows(csr.scale_columns(X, csr.idf(X)))


class Problem:
    """One shape's rows and first centroids; every contender returns labels [n_rows]."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.host = pooled_rows(shape)
        self.X = self.host.to(device)
        picks = np.random.default_rng(1).choice(shape.n_rows, shape.n_clusters, replace=False)
        self.init = self.host.select_rows(torch.from_numpy(picks)).to_dense()
        self.scipy = self.host.to_scipy()
        self.found: dict[str, dict[str, float]] = {}

    def ours(self, backend: str) -> torch.Tensor:
        K, n_iter = self.shape.n_clusters, self.shape.n_iter
        init = self.init.to(self.device)
        return sk.spherical_kmeans(self.X, K, init=init, max_iter=n_iter, tol=0, backend=backend).labels

    def sklearn(self, algorithm: str) -> np.ndarray:
        from sklearn.cluster import KMeans

        model = KMeans(
            self.shape.n_clusters,
            init=self.init.numpy(),
            n_init=1,
            max_iter=self.shape.n_iter,
            tol=0,
            algorithm=algorithm,
        )
        return model.fit(self.scipy).labels_

    def sparsekmeans(self) -> np.ndarray:
        import graphblas
        from scipy.sparse import csr_matrix
        from sparsekmeans import LloydKmeans

        model = LloydKmeans(n_clusters=self.shape.n_clusters, n_threads=1, max_iter=self.shape.n_iter, tol=0)
        start = graphblas.io.from_scipy_sparse(csr_matrix(self.init.numpy().astype(np.float64)))
        model._initialize_centroids = lambda X: start
        with contextlib.redirect_stdout(io.StringIO()):
            return model.fit(self.scipy)

    def cuml(self, dense: torch.Tensor) -> torch.Tensor:
        import cupy
        from cuml.cluster import KMeans

        K, n_iter = self.shape.n_clusters, self.shape.n_iter
        init = cupy.asarray(self.init.to(self.device))
        model = KMeans(n_clusters=K, init=init, n_init=1, max_iter=n_iter, tol=0, output_type="cupy")
        return torch.as_tensor(model.fit(cupy.asarray(dense)).labels_, device=self.device)

    def dense_fits(self) -> bool:
        """Do the rows as a float32 matrix, a copy of them and as much again fit on the GPU?"""
        return 12 * self.shape.n_rows * self.shape.d_sae < torch.cuda.mem_get_info()[0]

    def contenders(self) -> dict[str, Contender]:
        """Name -> call; "scikit-learn" (Lloyd), where it runs, is what every ratio is taken to."""
        found: dict[str, Contender] = {}
        if self.device.type == "cpu":
            found["scikit-learn"] = lambda: self.sklearn("lloyd")
            found["scikit-learn elkan"] = lambda: self.sklearn("elkan")
            if importlib.util.find_spec("sparsekmeans"):
                found["sparsekmeans"] = self.sparsekmeans
        elif importlib.util.find_spec("cuml") and self.dense_fits():
            found["cuml, densified"] = lambda: self.cuml(self.X.to_dense())
        for name in ["torch", "triton"] if self.device.type == "cuda" else ["torch", "numba"]:
            found[f"saerl_kernels {name}"] = lambda name=name: self.ours(name)  # type: ignore[misc]
        return found

    def objectives(self, labels: np.ndarray) -> dict[str, float]:
        """``inertia``: sum of 1 - cosine to the cluster's direction; ``euclidean``: to its mean, squared."""
        from scipy.sparse import csr_matrix

        n, K = self.shape.n_rows, self.shape.n_clusters
        member = csr_matrix((np.ones(n), (labels, np.arange(n))), shape=(K, n))
        total = (member @ self.scipy.astype(np.float64)).power(2).sum(axis=1)
        squared, sizes = np.asarray(total).ravel(), np.bincount(labels, minlength=K)
        euclidean = n - float((squared / np.maximum(sizes, 1)).sum())
        return {"inertia": n - float(np.sqrt(squared).sum()), "euclidean": euclidean}

    def check(self, name: str, result: Any) -> None:
        """Note both objectives; ours may not be worse than any peer's checked before."""
        labels = torch.as_tensor(result).cpu().numpy().astype(np.int64)
        assert labels.shape == (self.shape.n_rows,) and labels.max() < self.shape.n_clusters
        mine = self.objectives(labels)
        for peer, theirs in self.found.items() if name.startswith("saerl_kernels") else ():
            for objective, value in theirs.items():
                ratio = mine[objective] / value
                assert ratio <= TOLERANCE, f"{name}: {objective} is {ratio:.3f} times that of {peer}"
        self.found[name] = mine


@pytest.mark.parametrize("shape", grid(TINY, CPU_GRID, GPU_GRID), ids=lambda s: "x".join(map(str, s)))
def test_spherical_kmeans(benchmark: Any, shape: Shape) -> None:
    from threadpoolctl import threadpool_limits

    problem = Problem(shape, DEVICE)
    with bench_threads(), threadpool_limits(torch.get_num_threads() if DEVICE.type == "cpu" else None):
        contenders = problem.contenders()
        rounds = 2 if benchmark.disabled else 3
        table = measure(contenders, DEVICE, rounds, base="scikit-learn", check=problem.check)
        for name, row in table.items():
            row.update(problem.found[name])
        benchmark.extra_info.update(
            shape._asdict(), base="scikit-learn", contenders=table, environment=environment(DEVICE)
        )
        backend = "triton" if DEVICE.type == "cuda" else "auto"
        benchmark.pedantic(problem.ours, (backend,), rounds=3, warmup_rounds=1)
