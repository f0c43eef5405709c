"""The regression over blocks: against its own formulas, and on what it must and must not find."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import spearmanr
from sklearn.model_selection import KFold

from saerl_fast.errors import SaerlError
from saerl_fast.signals.ridge import Block, _of_one, _of_several, fit, held_out


def rows_of(n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.gamma(2.0, size=(n, d)) * (rng.random((n, d)) < 0.3)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("d", [1, 7, 60])
def test_sparse_is_dense(d: int, scale: bool) -> None:
    X = rows_of(40, d)
    dense, sparse, rows = Block(X, scale=scale), Block(csr_matrix(X), scale=scale), np.arange(3, 30)
    plain = X - X.mean(0)
    plain = plain / X.std(0) if scale else plain
    plain /= np.sqrt(np.square(plain).sum(1).mean())
    for block in (dense, sparse):
        np.testing.assert_allclose(block.kernel(rows), plain[rows] @ plain[rows].T, atol=1e-12)
        dual = np.random.default_rng(0).normal(size=len(rows))
        np.testing.assert_allclose(block.predict(rows, dual), plain @ plain[rows].T @ dual, atol=1e-12)
        weights, offset = block.linear(rows, dual)
        np.testing.assert_allclose(X @ weights + offset, block.predict(rows, dual), atol=1e-12)
        np.testing.assert_allclose(block.effects(rows, dual), weights * X.std(0), atol=1e-12)


def test_is_ridge_with_a_penalty_for_each_block() -> None:
    from sklearn.linear_model import Ridge

    X, Z = rows_of(60, 8), rows_of(60, 5, seed=1)
    y = X[:, 0] - Z[:, 1] + np.random.default_rng(2).normal(size=60)
    blocks = {"x": Block(X), "z": Block(Z)}
    found = fit(blocks, np.arange(40), y[:40])
    scaled = [b.X - b.mean for b in blocks.values()]
    joined = np.hstack(
        [np.sqrt(found.share[n] / found.share["noise"]) * b for n, b in zip("xz", scaled, strict=True)]
    )
    ridge = Ridge(alpha=1.0, fit_intercept=False).fit(joined[:40], y[:40] - y[:40].mean())
    np.testing.assert_allclose(found.predict(blocks), y[:40].mean() + ridge.predict(joined), atol=1e-8)


def test_a_block_that_says_nothing_fades_and_one_that_says_all_is_heard() -> None:
    X, noise = rows_of(400, 20), rows_of(400, 300, seed=1)
    y = X[:, :4].sum(1) + 0.5 * np.random.default_rng(2).normal(size=400)
    blocks = {"x": Block(X), "noise rows": Block(csr_matrix(noise))}
    some = np.arange(100)
    found = fit(blocks, some, y[:100])
    alone = fit({"x": blocks["x"]}, some, y[:100])
    both, one = (spearmanr(f.predict(blocks)[100:], y[100:])[0] for f in (found, alone))
    assert found.share["x"] > 3 * found.share["noise rows"]
    assert one > 0.8 and both > one - 0.05


def test_held_out_sees_no_label_of_its_own() -> None:
    X = rows_of(120, 200)
    y = np.random.default_rng(3).random(120)
    splits = list(KFold(5).split(y))
    assert abs(spearmanr(held_out({"x": Block(X)}, np.arange(120), y, splits), y)[0]) < 0.25


def test_features_that_say_nothing_rank_nothing() -> None:
    found = {"random": [], "none": []}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        y, splits = rng.random(60), list(KFold(5).split(np.arange(60)))
        noise = held_out({"random": Block(rng.normal(size=(60, 32)))}, np.arange(60), y, splits)
        found["random"].append(spearmanr(noise, y)[0])
        found["none"].append(np.ptp(held_out({"none": Block(np.zeros((60, 0)))}, np.arange(60), y, splits)))
    assert np.max(found["none"]) < 1e-12
    assert abs(np.mean(found["random"])) < 0.07  # about the folds' own means: -0.12


def test_columns_without_variance_and_rows_without_features() -> None:
    X = np.hstack([rows_of(50, 6), np.full((50, 1), 7.0), np.zeros((50, 1))])
    X[:5] = 0.0
    X[:, 6] = 7.0
    y = X[:, 0] + np.random.default_rng(0).normal(size=50)
    found, plain = (fit({"x": Block(part)}, np.arange(50), y) for part in (X, X[:, :6]))
    np.testing.assert_allclose(found.dual["x"], plain.dual["x"], rtol=1e-6)
    nothing = Block(np.ones((50, 3)))
    assert np.allclose(fit({"n": nothing}, np.arange(50), y).predict({"n": nothing}), y.mean())


def test_nan_is_refused() -> None:
    with pytest.raises(SaerlError, match="NaN or infinite"):
        Block(np.array([[1.0], [np.nan]]))


def test_one_block_is_the_general_case() -> None:
    X = rows_of(60, 9)
    y = X[:, 0] + np.random.default_rng(0).normal(size=60)
    kernel, y = Block(X).kernel(np.arange(60)), (y - y.mean()) / y.std()
    for s in ([0.3, 0.8], [2.0, 0.01], [1e-4, 1.0]):
        one, several = (made(np.array(s)) for made in (_of_one(kernel, y), _of_several([kernel], y)))
        np.testing.assert_allclose(one[0], several[0], rtol=1e-9)
        np.testing.assert_allclose(one[1], several[1], rtol=1e-6, atol=1e-9)


def test_the_slope_is_that_of_the_evidence() -> None:
    X, Z = rows_of(40, 6), rows_of(40, 5, seed=1)
    y = X[:, 0] + np.random.default_rng(0).normal(size=40)
    evidence = _of_several([Block(part).kernel(np.arange(40)) for part in (X, Z)], (y - y.mean()) / y.std())
    s, step = np.array([0.3, 0.1, 0.7]), 1e-6
    for i, slope in enumerate(evidence(s)[1]):
        ahead, behind = (evidence(s + sign * step * np.eye(3)[i])[0] for sign in (1, -1))
        assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-5)


def test_a_start_elsewhere_finds_the_same() -> None:
    X, Z = rows_of(80, 8), rows_of(80, 5, seed=1)
    y = X[:, 0] + np.random.default_rng(0).normal(size=80)
    blocks = {"x": Block(X), "z": Block(Z)}
    fits = [fit(blocks, np.arange(80), y, start=s) for s in (None, np.array([1.0, 0.01, 0.2]))]
    np.testing.assert_allclose(fits[0].predict(blocks), fits[1].predict(blocks), atol=1e-3)
