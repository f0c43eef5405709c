"""Weighting, reduction and files of pooled features."""

import numpy as np
import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.signals.features import (
    ProbeMatrix,
    checked,
    load_features,
    save_features,
    svd_reduce,
    weighted,
)
from saerl_kernels import CSR, csr


def random_csr(n: int = 30, d: int = 50, density: float = 0.2, seed: int = 0) -> CSR:
    rng = np.random.default_rng(seed)
    dense = rng.random((n, d)) * (rng.random((n, d)) < density)
    return CSR.from_dense(torch.tensor(dense, dtype=torch.float32))


def test_weighted_rows_have_norm_one_and_do_not_touch_the_input():
    X = random_csr()
    before = X.values.clone()
    idf = csr.idf(X)
    rows = weighted(X, idf).to_dense().numpy()
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)
    dense = (X.to_dense() * idf).numpy()
    np.testing.assert_allclose(rows, dense / np.linalg.norm(dense, axis=1, keepdims=True), atol=1e-6)
    assert torch.equal(X.values, before)
    with pytest.raises(SaerlError, match="50 columns but 49 were expected"):
        weighted(X, idf[:49])


def test_empty_rows_stay_zero():
    X = CSR.from_dense(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    rows = weighted(X, torch.ones(2)).to_dense().tolist()
    assert rows == [[0.0, 0.0], [pytest.approx(0.6), pytest.approx(0.8)]]


@pytest.mark.parametrize("dim", [1, 5, 200])
def test_svd_reduces_like_the_exact_one(dim):
    X = random_csr()
    dense, components = svd_reduce(X, dim, seed=0)
    d = min(dim, 30)
    assert dense.shape == (30, d) and components.shape == (d, 50)
    np.testing.assert_allclose(components @ components.T, np.eye(d), atol=1e-4)
    exact = np.linalg.svd(X.to_dense().numpy(), compute_uv=False)[:d]
    np.testing.assert_allclose(np.linalg.norm(dense, axis=0), exact, rtol=0.02)
    again = svd_reduce(X, dim, seed=0)
    assert np.array_equal(dense, again[0]) and np.array_equal(components, again[1])


def test_another_seed_gives_another_approximation():
    X = random_csr(120, 200)
    assert not np.array_equal(svd_reduce(X, 5, seed=0)[0], svd_reduce(X, 5, seed=1)[0])


def test_one_row_and_no_features_can_be_reduced():
    for X in (random_csr(1), CSR.from_dense(torch.zeros(4, 6))):
        dense, _ = svd_reduce(weighted(X, csr.idf(X)), 8, seed=0)
        assert np.isfinite(dense).all()


def test_probe_matrix_leaves_rare_features_out():
    X = random_csr(d=20, density=0.05, seed=2)
    common = ((X.to_dense() > 0).sum(dim=0) >= 3).numpy()
    probe = ProbeMatrix(X, min_rows=3)
    assert 0 < probe.shape[1] == common.sum() < 20
    expected = weighted(X, csr.idf(X, 1.0)).to_dense().numpy()[:, common]
    for rows in (slice(0, 30), slice(7, 7), slice(3, 20), np.array([4, 29, 0])):
        assert probe[rows].dtype == np.float64
        np.testing.assert_array_equal(probe[rows].toarray(), expected[rows])


def test_features_are_checked_without_a_copy():
    X = random_csr()
    assert checked(X).values.data_ptr() == X.values.data_ptr()
    zeros = CSR(torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1]).int(), torch.tensor([1.0, 0.0, 2.0]), 3)
    assert [part.tolist() for part in checked(zeros)[:3]] == [[0, 1, 2], [0, 1], [1.0, 2.0]]
    dense = torch.rand(4, 5)
    dense[2, 3] = float("nan")
    with pytest.raises(SaerlError, match="prompt number 2"):
        checked(CSR.from_dense(dense))


def test_files_give_the_same_back_and_know_their_prompts(tmp_path):
    X, ids = random_csr(), [f"p{i}" for i in range(30)]
    path = save_features(tmp_path / "features.safetensors", X, ids)
    back = load_features(path, ids)
    assert back.n_cols == 50 and all(torch.equal(getattr(X, k), getattr(back, k)) for k in X._fields[:3])
    with pytest.raises(SaerlError, match="other prompts"):
        load_features(path, ids[::-1])
    with pytest.raises(SaerlError, match="29 prompts"):
        save_features(path, X, ids[1:])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(SaerlError, match="damaged"):
        load_features(path)
    with pytest.raises(SaerlError, match="does not exist"):
        load_features(tmp_path / "none.safetensors")
