"""Clustering: finds planted topics, knows when there are none, and takes any pool."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from saerl_fast.config import DiversityConfig
from saerl_fast.errors import SaerlError
from saerl_fast.signals import clusters, features
from saerl_fast.signals.clusters import (
    _backend,
    _centroids,
    check_backend,
    cluster_prompts,
    permute_features,
    purity,
)
from saerl_fast.signals.features import weighted
from saerl_kernels import CSR, csr


def topics(n: int = 300, k: int = 6, d: int = 256, strength: float = 0.8, seed: int = 0):
    """Each topic makes 12 features of its own likely, on top of a background; [CSR, topic]."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, k, n)
    chance = np.full((n, d), 0.08)
    for name in range(k):
        chance[topic == name, 12 * name : 12 * (name + 1)] = strength
    chance[:, -20:] = 0.95  # features active almost everywhere
    dense = (rng.random((n, d)) < chance) * rng.gamma(3.0, 1.0, (n, d))
    dense[:, -20:] *= 5
    return CSR.from_dense(torch.tensor(dense, dtype=torch.float32)), topic


@pytest.mark.parametrize("svd", [32, 0])
def test_planted_topics_are_found_and_beat_the_null(svd):
    X, topic = topics()
    result = cluster_prompts(X, DiversityConfig(n_clusters=6, svd=svd), tasks=topic.tolist())
    assert result.labels.dtype == np.int32
    assert adjusted_rand_score(topic, result.labels) > 0.9
    metrics = result.metrics
    assert metrics["silhouette"] > metrics["null_max"] + 0.05
    assert metrics["purity"] > 0.95 and metrics["purity_chance"] < 0.4
    assert metrics["sizes"] == np.bincount(result.labels).tolist() and metrics["n_clusters"] == 6


def test_a_large_pool_is_clustered_by_a_sample_of_its_prompts(monkeypatch):
    X, topic = topics(900)
    cfg = DiversityConfig(n_clusters=6, svd=32)
    monkeypatch.setattr(clusters, "SAMPLE", 899)
    monkeypatch.setattr(features, "BLOCK", 100)
    monkeypatch.setattr(clusters, "NULL_ROWS", 200)
    most = cluster_prompts(X, cfg)
    monkeypatch.setattr(clusters, "SAMPLE", 300)
    fitted = []
    svd = clusters.svd_reduce
    monkeypatch.setattr(
        clusters, "svd_reduce", lambda rows, *rest: fitted.append(rows.n_rows) or svd(rows, *rest)
    )
    result = cluster_prompts(X, cfg, tasks=topic.tolist())
    assert max(fitted) == 300 == result.metrics["fitted_rows"] and sum(result.metrics["sizes"]) == 900
    assert adjusted_rand_score(topic, result.labels) > 0.9 and result.metrics["purity"] > 0.95
    assert adjusted_rand_score(most.labels, result.labels) > 0.95
    monkeypatch.setattr(clusters, "SAMPLE", 900)
    assert "fitted_rows" not in cluster_prompts(X, cfg).metrics


def test_structureless_features_do_not_beat_the_null():
    X, _ = topics(strength=0.08)
    metrics = cluster_prompts(X, DiversityConfig(n_clusters=6, svd=32, null_rounds=5)).metrics
    assert abs(metrics["silhouette"] - metrics["null_silhouette"]) < 0.01


def test_polish_raises_the_within_cluster_cosine():
    X, _ = topics(strength=0.3)
    rows = weighted(X, csr.idf(X))

    def cohesion(polish: int) -> float:
        labels = cluster_prompts(X, DiversityConfig(n_clusters=6, svd=4, polish=polish)).labels
        centroids = _centroids(rows, labels, "torch")
        return float(np.asarray(rows.to_scipy() @ centroids.T)[np.arange(300), labels].mean())

    assert cohesion(5) > cohesion(0)


def test_same_seed_same_labels():
    X, _ = topics()
    cfg = DiversityConfig(n_clusters=9, seed=4)
    first, second = cluster_prompts(X, cfg), cluster_prompts(X, cfg)
    assert np.array_equal(first.labels, second.labels) and first.metrics == second.metrics


def test_another_seed_starts_k_means_elsewhere():
    data = np.random.default_rng(0).normal(size=(120, 8))
    labels = [clusters._kmeans(data, 9, 1, "torch", seed).tolist() for seed in (3, 3, 4)]
    assert labels[0] == labels[1] != labels[2]


@pytest.mark.parametrize("svd", [32, 0])
def test_numba_and_torch_agree(svd):
    pytest.importorskip("numba")
    X, _ = topics()
    by_numba, by_torch = (
        cluster_prompts(X, DiversityConfig(n_clusters=7, svd=svd, backend=name))
        for name in ("numba", "torch")
    )
    assert (by_numba.metrics["backend"], by_torch.metrics["backend"]) == ("numba", "torch")
    assert np.array_equal(by_numba.labels, by_torch.labels)
    assert by_numba.metrics["silhouette"] == pytest.approx(by_torch.metrics["silhouette"], abs=1e-6)


def pretend_cuml(monkeypatch, reason: str | None = None):
    """A CUDA machine that has cuML, which loads unless there is a ``reason``."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "cuml" or find_spec(name))
    monkeypatch.setattr(clusters, "_load_cuml", lambda: reason)


def test_cuml_clusters_the_dense_rows(monkeypatch):
    """With scikit-learn's k-means in cuML's place, and the CPU in the GPU's."""
    X, topic = topics()
    calls = []

    def dense_kmeans(n_clusters, init, n_init, output_type):
        calls.append((init.shape, n_init, output_type))
        return KMeans(n_clusters, init=init, n_init=n_init)

    pretend_cuml(monkeypatch)
    monkeypatch.setitem(sys.modules, "cuml", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuml.cluster", SimpleNamespace(KMeans=dense_kmeans))
    monkeypatch.setattr(CSR, "to", lambda self, device: self)
    result = cluster_prompts(X, DiversityConfig(n_clusters=6, svd=32, backend="cuml", null_rounds=0))
    assert calls == [((6, 32), 1, "numpy")] * 4 and result.metrics["backend"] == "cuml"
    assert adjusted_rand_score(topic, result.labels) > 0.9


def test_features_of_the_look_do_not_make_the_clusters():
    """Each text is in one of two looks and of one of three subjects; the look has the stronger features."""
    rng = np.random.default_rng(0)
    subject, style = rng.integers(0, 3, 900), rng.integers(0, 2, 900)
    chance = np.full((900, 200), 0.05)
    for name in range(3):
        chance[subject == name, 10 * name : 10 * name + 10] = 0.6
    for name in range(2):
        chance[style == name, 100 + 40 * name : 140 + 40 * name] = 0.9
    X = CSR.from_dense(torch.tensor((rng.random((900, 200)) < chance) * 2.0, dtype=torch.float32))
    texts = ["$x$" if look else "\\(x\\) \\begin" for look in style]
    read = {"texts": lambda rows: [texts[i] for i in rows]}
    plain, told = (
        cluster_prompts(X, DiversityConfig(n_clusters=3, svd=16, look=look, null_rounds=0), **read)
        for look in (1.0, 0.0)
    )
    assert adjusted_rand_score(subject, plain.labels) < 0.5 < 0.9 < adjusted_rand_score(subject, told.labels)
    assert told.weights[100:180].max() < 0.2 * told.weights[:30].min()
    few = cluster_prompts(X.select_rows(torch.arange(30)), DiversityConfig(n_clusters=2), **read)
    assert torch.equal(few.weights, csr.idf(X.select_rows(torch.arange(30))))  # too few to tell


def test_the_number_of_clusters_is_chosen_against_the_null(monkeypatch):
    monkeypatch.setattr(clusters, "COUNTS", (3, 6, 12, 24))
    X, topic = topics(300, k=12)
    result, again = (
        cluster_prompts(X, DiversityConfig(n_clusters="auto", svd=32, n_init=2, null_rounds=2))
        for _ in range(2)
    )
    assert result.metrics["n_clusters"] == 12 and adjusted_rand_score(topic, result.labels) > 0.9
    assert [row[0] for row in result.metrics["tried"]] == [3, 6, 12, 24]
    assert np.array_equal(again.labels, result.labels)


def test_without_structure_there_is_one_cluster(monkeypatch):
    monkeypatch.setattr(clusters, "COUNTS", (2, 4, 8))
    X, _ = topics(300, strength=0.08)
    metrics = cluster_prompts(X, DiversityConfig(n_clusters="auto", svd=32, n_init=1)).metrics
    assert metrics["n_clusters"] == 1 and "one cluster" in metrics["note"]


@pytest.mark.parametrize("svd", [32, 0])
def test_scikit_learn_clusters_alone(svd):
    X, topic = topics()
    result = cluster_prompts(X, DiversityConfig(n_clusters=6, svd=svd, backend="sklearn"))
    assert result.metrics["backend"] == "sklearn" and adjusted_rand_score(topic, result.labels) > 0.9


def test_auto_takes_cuml_then_numba_by_size_then_torch(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for numba in (True, False):
        monkeypatch.setattr(clusters, "has_numba", lambda numba=numba: numba)
        assert _backend("auto", clusters.NUMBA_WORK - 1) == "torch"
        assert _backend("auto", clusters.NUMBA_WORK) == ("numba" if numba else "sklearn")
    assert not caplog.messages
    pretend_cuml(monkeypatch)
    assert _backend("auto", 1) == "cuml" and _backend("torch", 1) == "torch"
    pretend_cuml(monkeypatch, "libcudart is too old")
    assert _backend("auto", 1) == "torch" and "libcudart is too old" in caplog.text


def test_a_backend_that_cannot_run_is_one_sentence(monkeypatch):
    pretend_cuml(monkeypatch, "libcudart is too old")
    with pytest.raises(SaerlError, match="cuml cannot be used: libcudart is too old; install the gpu extra"):
        check_backend("cuml")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SaerlError, match="diversity.backend=cuml cannot be used: no CUDA device"):
        check_backend("cuml")
    monkeypatch.setattr(clusters, "has_numba", lambda: False)
    with pytest.raises(SaerlError, match="diversity.backend=numba needs numba; run `pip install numba`"):
        cluster_prompts(topics(20)[0], DiversityConfig(backend="numba"))
    check_backend("torch")


def test_permutation_keeps_every_features_values_and_frequency():
    X, _ = topics(50)
    shuffled = permute_features(X, np.random.default_rng(0))
    before, after = X.to_dense().numpy(), shuffled.to_dense().numpy()
    assert ((before > 0).sum(axis=0) == (after > 0).sum(axis=0)).all()
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1.0, atol=1e-5)
    assert ((before > 0) != (after > 0)).any()


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("svd", [64, 0])
def test_fewer_prompts_than_clusters(n, svd):
    X, _ = topics(n)
    result = cluster_prompts(X, DiversityConfig(n_clusters=16, svd=svd))
    assert len(result.labels) == n and result.labels.max() + 1 == len(result.metrics["sizes"]) <= n
    assert "16 clusters were asked for" in result.metrics["note"]


def test_equal_and_empty_rows_can_be_clustered():
    same = CSR.from_dense(torch.ones(8, 5))  # weigh nothing: every feature is in every row
    pairs = CSR.from_dense(torch.eye(2).repeat(6, 3))
    assert cluster_prompts(same, DiversityConfig(n_clusters=3)).metrics["sizes"] == [8]
    labels = cluster_prompts(pairs, DiversityConfig(n_clusters=5)).labels
    assert adjusted_rand_score(labels, np.arange(12) % 2) == 1.0


@pytest.mark.parametrize("svd", [16, 0])
def test_equal_rows_are_one_cluster_and_every_figure_is_finite(svd):
    X = CSR.from_dense(torch.tensor([[1.0, 0.0, 2.0, 0.5]] * 29 + [[1.0, 0.0, 2.0, 0.5000001]]))
    for wanted in ("auto", 4):
        metrics = cluster_prompts(X, DiversityConfig(n_clusters=wanted, svd=svd)).metrics
        json.dumps(metrics, allow_nan=False)
        assert wanted == 4 or metrics["n_clusters"] == 1


def test_purity_by_hand():
    assert purity(np.array([0, 0, 0, 1, 1]), np.array([2, 2, 1, 0, 1])) == pytest.approx(3 / 5)


def test_bad_settings_are_refused():
    X, _ = topics(20)
    with pytest.raises(SaerlError, match="no prompts"):
        cluster_prompts(CSR.empty(0, 4), DiversityConfig())
