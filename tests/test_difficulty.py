"""The difficulty probe: predicts what it was not told, and says when it cannot."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from saerl_fast.config import DifficultyConfig
from saerl_fast.errors import SaerlError
from saerl_fast.signals import bank as module
from saerl_fast.signals import ridge
from saerl_fast.signals.bank import Bank
from saerl_fast.signals.difficulty import fit_difficulty
from saerl_kernels import CSR


def planted(n: int, d: int, per_row: int, seed: int = 0) -> tuple[Bank, np.ndarray]:
    """Features of which a tenth carry difficulty, and the pass rates of 4 rollouts a prompt."""
    rng = np.random.default_rng(seed)
    popularity = rng.zipf(1.5, d).clip(max=50).astype(float)
    popularity /= popularity.sum()
    dense = np.zeros((n, d), dtype=np.float32)
    for row in dense:
        row[rng.choice(d, per_row, replace=False, p=popularity)] = rng.gamma(2.0, 1.0, per_row)
    weights = rng.normal(size=d) * (rng.random(d) < 0.1)
    hidden = dense @ weights
    hidden = 1.5 * (hidden - hidden.mean()) / hidden.std()
    X = Bank(CSR.from_dense(torch.tensor(dense)), ["what is it?"] * n)
    return X, rng.binomial(4, 1 / (1 + np.exp(hidden))) / 4


@pytest.mark.parametrize("probe", ["ridge", "elasticnet"])
def test_unlabelled_prompts_are_ranked_and_the_held_out_figure_is_honest(probe):
    X, rates = planted(500, 200, 20)
    labels = rates.copy()
    labels[200:] = np.nan
    result = fit_difficulty(X, labels, DifficultyConfig(probe=probe))
    assert result.scores.shape == (500,) and result.scores.dtype == np.float32
    assert result.scores.min() >= 0 and result.scores.max() <= 1
    true = spearmanr(result.scores[200:], 1 - rates[200:])[0]
    assert true > 0.45
    assert abs(result.metrics["spearman"] - true) < 0.15
    assert result.metrics["n_labels"] == 200 and 0 < result.metrics["r2"] < 1


def test_labels_do_not_leak_into_their_own_scores():
    X, rates = planted(150, 300, 20)
    noise = np.random.default_rng(1).permutation(rates)
    for cfg in (DifficultyConfig(), DifficultyConfig(probe="elasticnet", alpha=0.001)):  # that memorises
        result = fit_difficulty(X, noise, cfg)
        assert abs(spearmanr(result.scores, 1 - noise)[0]) < 0.2
        assert abs(result.metrics["spearman"]) < 0.2


def test_features_that_say_nothing_rank_nothing():
    X, rates = planted(60, 30, 5)
    for cfg in (DifficultyConfig(features=["none"]), DifficultyConfig(probe="elasticnet", alpha=2)):
        result = fit_difficulty(X, rates, cfg)
        assert result.metrics["spearman"] == 0 and np.ptp(result.scores) < 1e-6


@pytest.mark.parametrize("rates", [[0.0, 1e-200], [0.0, 1e-17]])
def test_pass_rates_that_differ_by_rounding_are_equal(rates):
    X, _ = planted(40, 30, 5)
    assert "all pass rates are equal" in fit_difficulty(X, rates * 20, DifficultyConfig()).metrics["note"]


@pytest.mark.parametrize("l1_ratio", [0.2, 0.9])
def test_alpha_is_a_share_of_the_penalty_that_leaves_no_feature(l1_ratio):
    X, rates = planted(150, 100, 15)
    used = {}
    for alpha in (1.001, 0.95):
        cfg = DifficultyConfig(probe="elasticnet", alpha=alpha, l1_ratio=l1_ratio)
        used[alpha] = fit_difficulty(X, rates, cfg).metrics["features_used"]
    assert used[1.001] == 0 < used[0.95] < 20


def test_same_input_same_scores():
    X, rates = planted(100, 100, 15)
    assert np.array_equal(
        fit_difficulty(X, rates, DifficultyConfig()).scores,
        fit_difficulty(X, rates, DifficultyConfig()).scores,
    )


@pytest.mark.parametrize("rates, words", [([0.5] * 40, "equal"), ([0, 1, 0.5] + [np.nan] * 37, "only 3")])
def test_labels_that_teach_nothing_give_neutral_scores_and_a_note(rates, words):
    X, _ = planted(40, 60, 10)
    result = fit_difficulty(X, rates, DifficultyConfig())
    assert (result.scores == 0.5).all() and words in result.metrics["note"]
    assert result.metrics["spearman"] is None


def test_no_labels_give_no_scores():
    X, _ = planted(40, 60, 10)
    result = fit_difficulty(X, np.full(40, np.nan), DifficultyConfig())
    assert np.isnan(result.scores).all() and "no pass rates" in result.metrics["note"]


def test_bad_labels_are_refused():
    X, rates = planted(40, 60, 10)
    with pytest.raises(SaerlError, match="39 pass rates"):
        fit_difficulty(X, rates[1:], DifficultyConfig())
    with pytest.raises(SaerlError, match=r"pass rate 7\.0"):
        fit_difficulty(X, np.where(np.arange(40) == 3, 7.0, rates), DifficultyConfig())


def test_a_large_subset_takes_one_short_fit_for_each_fold(monkeypatch):
    """Coordinate descent costs (features x passes): rare features are left out, and passes are few."""
    from sklearn.linear_model import ElasticNet

    X, rates = planted(1200, 2048, 60)
    fits, real = [], ElasticNet.fit

    def counted(self, matrix, labels):
        fits.append((matrix.shape, real(self, matrix, labels).n_iter_))
        return self

    monkeypatch.setattr(ElasticNet, "fit", counted)
    monkeypatch.setattr(ridge, "SEARCHED", 50)
    cfg = DifficultyConfig(probe="elasticnet")
    fit_difficulty(X, rates, cfg)
    assert len(fits) == cfg.folds + 1
    assert all(shape[1] <= 2048 and passes <= 100 for shape, passes in fits)


WORDS = [f"word{chr(97 + i)}{chr(97 + j)}" for i in range(10) for j in range(10)]


def knowing(kind: str, n: int = 900, seed: int = 0) -> tuple[Bank, np.ndarray]:
    """A pool in which only features of ``kind`` know the pass rate, and not all of it."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=n)
    on = rng.random((n, 150)) < 0.15
    chosen = [rng.choice(WORDS[20:], 12, replace=False).tolist() for _ in range(n)]
    length = rng.integers(0, 30, n)
    if kind == "sae":
        on[:, :8] = rng.random((n, 8)) < 1 / (1 + np.exp(-1.5 * hidden))[:, None]
    if kind == "tfidf":
        for i in range(n):
            chosen[i][:4] = rng.choice(
                WORDS[:10] if hidden[i] + rng.normal() > 0 else WORDS[10:20], 4
            ).tolist()
    if kind == "text":
        length = np.exp(2 + 0.5 * hidden).astype(int)
    texts = [" ".join(words) + "." * int(dots) for words, dots in zip(chosen, length, strict=True)]
    activations = torch.tensor(on * rng.gamma(4.0, 0.5, on.shape), dtype=torch.float32)
    return Bank(CSR.from_dense(activations), texts), rng.binomial(8, 1 / (1 + np.exp(hidden))) / 8


@pytest.mark.parametrize("kind", ["sae", "text", "tfidf", "nothing"])
def test_the_default_hears_whichever_kind_knows_and_is_not_below_it(kind):
    bank, rates = knowing(kind)
    labels = np.where(np.arange(900) < 160, rates, np.nan)
    result = fit_difficulty(bank, labels, DifficultyConfig())
    metrics = result.metrics
    assert set(metrics["baselines"]) == {"length", "text", "tfidf", "sae"}
    true = spearmanr(result.scores[160:], 1 - rates[160:])[0]
    if kind == "nothing":
        assert abs(true) < 0.15 and metrics["note"] is None
        return
    assert max(metrics["baselines"], key=metrics["baselines"].get) in (kind, "length")[: 1 + (kind == "text")]
    alone = fit_difficulty(bank, labels, DifficultyConfig(features=[kind])).scores
    assert metrics["note"] is None and true > 0.3
    assert true > spearmanr(alone[160:], 1 - rates[160:])[0] - 0.06


def test_a_probe_below_its_baselines_is_named():
    bank, rates = knowing("text", 300)
    result = fit_difficulty(bank, rates, DifficultyConfig(features=["sae"]))
    best = max(result.metrics["baselines"].values())
    assert best - result.metrics["spearman"] > 2.5 * result.metrics["spearman_error"] > 0
    assert "by more than noise" in result.metrics["note"] and "difficulty.features=" in result.metrics["note"]
    assert fit_difficulty(bank, rates, DifficultyConfig()).metrics["note"] is None


def test_scores_are_failure_rates_and_the_interval_holds_what_it_says():
    bank, rates = knowing("sae")
    result = fit_difficulty(bank, np.where(np.arange(900) < 300, rates, np.nan), DifficultyConfig())
    scores, failed = result.scores[300:], 1 - rates[300:]
    low, high = (scores < np.median(scores)), (scores >= np.median(scores))
    for half in (low, high):
        assert abs(scores[half].mean() - failed[half].mean()) < 0.05
    covered = (np.abs(scores - failed) <= result.metrics["interval"]).mean()
    assert 0.74 < covered < 0.86


def test_many_labels_are_solved_without_their_kernel(monkeypatch):
    monkeypatch.setattr(ridge, "SEARCHED", 60)
    pool, rates = knowing("sae", 400)
    direct = fit_difficulty(pool, rates, DifficultyConfig()).scores
    monkeypatch.setattr(ridge, "DIRECT", 10)
    np.testing.assert_allclose(fit_difficulty(pool, rates, DifficultyConfig()).scores, direct, atol=1e-4)
    monkeypatch.setattr(module, "MOST", 200)
    monkeypatch.setattr(module, "SAMPLE", 300)
    some = fit_difficulty(pool, rates, DifficultyConfig())
    assert some.metrics["n_labels"] == 400 and spearmanr(some.scores, 1 - rates)[0] > 0.3
