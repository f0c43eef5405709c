"""The k-means benchmark: every contender runs on the tiny shape, and a worse clustering is refused."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_kmeans as bench
from benchmarks import harness
from benchmarks.harness import measure
from saerl_kernels import csr


@pytest.fixture(scope="module")
def problem():
    return bench.Problem(bench.TINY[0], torch.device("cpu"))


def test_measures_every_contender(problem):
    contenders = problem.contenders()
    assert {"scikit-learn", "saerl_kernels torch", "saerl_kernels numba"} <= set(contenders)
    contenders.pop("sparsekmeans", None)  # starting GraphBLAS takes longer than all of this
    table = measure(contenders, torch.device("cpu"), 2, base="scikit-learn", check=problem.check)
    assert set(table) == set(problem.found) and table["scikit-learn"]["ratio"] == 1.0
    assert all(found["inertia"] < problem.shape.n_rows for found in problem.found.values())


def test_refuses_a_worse_clustering(problem):
    problem.check("scikit-learn", problem.sklearn("lloyd"))
    with pytest.raises(AssertionError, match="saerl_kernels numba: inertia is"):
        problem.check("saerl_kernels numba", torch.arange(problem.shape.n_rows) % problem.shape.n_clusters)


def test_objectives_by_hand(problem):
    labels = torch.arange(problem.shape.n_rows).numpy() % 2
    dense = problem.host.to_dense().double()
    both = problem.objectives(labels)
    means = torch.stack([dense[0::2].mean(0), dense[1::2].mean(0)])[labels]
    assert both["euclidean"] == pytest.approx(float((dense - means).square().sum()), rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(dense, means)
    assert both["inertia"] == pytest.approx(float((1 - cosine).sum()), rel=1e-6)


def test_rows_are_canonical(problem):
    X = problem.host
    torch.testing.assert_close(csr.l2_rows(X).values, X.values)
    steps = X.indices.diff()
    inner = torch.ones(X.nnz - 1, dtype=torch.bool)
    inner[X.indptr[1:-1] - 1] = False
    assert bool((steps[inner] > 0).all()) and int(X.indptr.diff().min()) > 0
    assert len(set(bench.CPU_GRID)) == 2 and {s.n_clusters for s in bench.GPU_GRID} == {64, 256, 1000}


def test_memory_is_noticed():
    grown = harness.peak_memory(lambda: torch.ones(8_000_000).sum(), torch.device("cpu"))
    if grown is None:
        pytest.skip("not on Linux")
    assert 20 < grown < 200
