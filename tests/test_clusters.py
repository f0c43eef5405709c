"""Clustering: finds planted topics, knows when there are none, and takes any pool."""

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from saerl_fast.config import DiversityConfig
from saerl_fast.errors import SaerlError
from saerl_fast.signals.clusters import _centroids, cluster_prompts, permute_features, purity
from saerl_fast.signals.features import as_scipy, weighted
from saerl_kernels import CSR


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


def test_structureless_features_do_not_beat_the_null():
    X, _ = topics(strength=0.08)
    metrics = cluster_prompts(X, DiversityConfig(n_clusters=6, svd=32, null_rounds=5)).metrics
    assert abs(metrics["silhouette"] - metrics["null_silhouette"]) < 0.01


def test_polish_raises_the_within_cluster_cosine():
    X, _ = topics(strength=0.3)
    rows = weighted(X)

    def cohesion(polish: int) -> float:
        labels = cluster_prompts(X, DiversityConfig(n_clusters=6, svd=4, polish=polish)).labels
        centroids = _centroids(rows, labels, 6)
        return float(np.asarray(rows @ centroids.T)[np.arange(300), labels].mean())

    assert cohesion(5) > cohesion(0)


def test_same_seed_same_labels():
    X, _ = topics()
    cfg = DiversityConfig(n_clusters=9, seed=4)
    first, second = cluster_prompts(X, cfg), cluster_prompts(X, cfg)
    assert np.array_equal(first.labels, second.labels) and first.metrics == second.metrics


@pytest.mark.parametrize("svd", [32, 0])
def test_numba_and_torch_agree(svd):
    pytest.importorskip("numba")
    X, _ = topics()
    cfg = DiversityConfig(n_clusters=7, svd=svd)
    by_numba, by_torch = cluster_prompts(X, cfg, "numba"), cluster_prompts(X, cfg, "sklearn")
    assert np.array_equal(by_numba.labels, by_torch.labels)
    assert by_numba.metrics["silhouette"] == pytest.approx(by_torch.metrics["silhouette"], abs=1e-6)


def test_permutation_keeps_every_features_values_and_frequency():
    X, _ = topics(50)
    rows = as_scipy(X)
    shuffled = permute_features(rows, np.random.default_rng(0))
    before, after = rows.toarray(), shuffled.toarray()
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


def test_purity_by_hand():
    assert purity(np.array([0, 0, 0, 1, 1]), np.array([2, 2, 1, 0, 1])) == pytest.approx(3 / 5)


def test_bad_settings_are_refused():
    X, _ = topics(20)
    with pytest.raises(SaerlError, match="'fastest'"):
        cluster_prompts(X, DiversityConfig(), "fastest")
    with pytest.raises(SaerlError, match="no prompts"):
        cluster_prompts(CSR.empty(0, 4), DiversityConfig())
    if not torch.cuda.is_available():
        with pytest.raises(SaerlError, match="no CUDA device"):
            cluster_prompts(X, DiversityConfig(), "cuml")
