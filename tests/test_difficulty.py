"""The difficulty probe: predicts what it was not told, and says when it cannot."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from scipy.stats import spearmanr

from saerl_fast.config import DifficultyConfig
from saerl_fast.errors import SaerlError
from saerl_fast.signals.difficulty import fit_difficulty
from saerl_fast.signals.features import ProbeMatrix
from saerl_kernels import CSR


def planted(n: int, d: int, per_row: int, seed: int = 0) -> tuple[csr_matrix, np.ndarray]:
    """Weighted features of which a tenth carry difficulty, and the pass rates of 4 rollouts a prompt."""
    rng = np.random.default_rng(seed)
    popularity = rng.zipf(1.5, d).clip(max=50).astype(float)
    popularity /= popularity.sum()
    dense = np.zeros((n, d), dtype=np.float32)
    for row in dense:
        row[rng.choice(d, per_row, replace=False, p=popularity)] = rng.gamma(2.0, 1.0, per_row)
    weights = rng.normal(size=d) * (rng.random(d) < 0.1)
    hidden = dense @ weights
    hidden = 1.5 * (hidden - hidden.mean()) / hidden.std()
    X = ProbeMatrix(CSR.from_dense(torch.tensor(dense)))
    return X, rng.binomial(4, 1 / (1 + np.exp(hidden))) / 4


def test_unlabelled_prompts_are_ranked_and_the_held_out_figure_is_honest():
    X, rates = planted(500, 200, 20)
    labels = rates.copy()
    labels[200:] = np.nan
    result = fit_difficulty(X, labels, DifficultyConfig())
    assert result.scores.shape == (500,) and result.scores.dtype == np.float32
    assert result.scores.min() >= 0 and result.scores.max() <= 1
    true = spearmanr(result.scores[200:], 1 - rates[200:])[0]
    assert true > 0.45
    assert abs(result.metrics["spearman"] - true) < 0.15
    assert result.metrics["n_labels"] == 200 and 0 < result.metrics["r2"] < 1


def test_labels_do_not_leak_into_their_own_scores():
    X, rates = planted(150, 300, 20)
    noise = np.random.default_rng(1).permutation(rates)
    result = fit_difficulty(X, noise, DifficultyConfig(alpha=0.001))  # a fit that memorises
    assert abs(spearmanr(result.scores, 1 - noise)[0]) < 0.25
    assert abs(result.metrics["spearman"]) < 0.25


@pytest.mark.parametrize("l1_ratio", [0.2, 0.9])
def test_alpha_is_a_share_of_the_penalty_that_leaves_no_feature(l1_ratio):
    X, rates = planted(150, 100, 15)
    used = {
        alpha: fit_difficulty(X, rates, DifficultyConfig(alpha=alpha, l1_ratio=l1_ratio)).metrics[
            "features_used"
        ]
        for alpha in (1.001, 0.95)
    }
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
    cfg = DifficultyConfig()
    fit_difficulty(X, rates, cfg)
    assert len(fits) == cfg.folds + 1
    assert all(shape[1] <= 2048 and passes <= 100 for shape, passes in fits)
