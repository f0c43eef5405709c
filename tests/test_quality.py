"""The quality probe: finds bad rows it was not told about, and says when it cannot."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from saerl_fast.config import QualityConfig
from saerl_fast.errors import SaerlError
from saerl_fast.signals.bank import Bank
from saerl_fast.signals.quality import _calibrate, fit_quality
from saerl_kernels import CSR


def planted(n: int = 400, d: int = 200, bad: float = 0.25, seed: int = 0) -> tuple[Bank, np.ndarray]:
    """Sparse features and good/bad (1/0); bad rows have some of ten features more often."""
    rng = np.random.default_rng(seed)
    good = (rng.random(n) >= bad).astype(float)
    on = rng.random((n, d)) < 0.1
    on[:, :10] = rng.random((n, 10)) < np.where(good[:, None] == 1, 0.05, 0.5)
    dense = torch.tensor(on * rng.gamma(2.0, 1.0, (n, d)), dtype=torch.float32)
    return Bank(CSR.from_dense(dense), ["what is it?"] * n), good


def test_held_out_auc_agrees_with_the_unlabelled_rows():
    X, good = planted()
    labels = good.copy()
    labels[200:] = np.nan
    result = fit_quality(X, labels, QualityConfig())
    true = roc_auc_score(good[200:], result.scores[200:])
    assert true > 0.85 and abs(result.metrics["auc"] - true) < 0.08
    assert result.metrics["n_labels"] == 200 and result.metrics["note"] is None


def test_threshold_one_half_means_probability_one_half():
    X, good = planted(800)
    labels = good.copy()
    labels[400:] = np.nan
    scores = fit_quality(X, labels, QualityConfig()).scores[400:]
    kept = scores >= 0.5
    assert np.mean(good[400:][kept]) > 0.85 and np.mean(good[400:][~kept]) < 0.4
    assert abs(scores.mean() - good[400:].mean()) < 0.08


def test_a_probe_that_learns_nothing_drops_nothing():
    X, good = planted()
    noise = np.random.default_rng(3).permutation(good)
    result = fit_quality(X, noise, QualityConfig())
    assert 0.35 < result.metrics["auc"] < 0.65
    assert (result.scores < 0.5).mean() < 0.05


def test_labels_do_not_leak_into_their_own_scores():
    X, good = planted(120, 600)
    noise = np.random.default_rng(5).permutation(good)
    result = fit_quality(X, noise, QualityConfig())
    assert result.metrics["auc"] < 0.7
    told = fit_quality(X, good, QualityConfig())
    assert roc_auc_score(good, told.scores) < 0.95  # nor do true labels: the folds decide, not the whole fit


def test_a_curve_that_falls_gives_every_row_the_same():
    held_out = np.linspace(-1, 1, 40)
    falling = (held_out < 0).astype(float)
    assert (_calibrate(held_out, falling, np.array([-2.0, 0.0, 2.0])) == 0.5).all()
    rising = _calibrate(held_out, 1 - falling, np.array([-2.0, 0.0, 2.0]))
    assert rising[0] < 0.1 and rising[2] > 0.9


def test_answers_show_what_prompts_cannot():
    blank, good = planted(bad=0.5)
    dense = torch.rand(400, 50) * (torch.rand(400, 50, generator=torch.manual_seed(0)) < 0.2)
    X = CSR.from_dense(dense)
    blind = fit_quality(Bank(X, blank.prompts), good, QualityConfig())
    seeing = fit_quality(Bank(X, blank.prompts, {"answer": blank.X}), good, QualityConfig())
    assert blind.metrics["auc"] < 0.65 and seeing.metrics["auc"] > 0.85
    assert seeing.metrics["reads_answers"] and not blind.metrics["reads_answers"]


def test_ridge_head_ranks_a_score():
    X, good = planted(bad=0.5)
    score = 10 * good + np.random.default_rng(0).normal(size=len(good))
    labels = np.where(np.arange(400) < 200, score, np.nan)
    result = fit_quality(X, labels, QualityConfig(head="ridge"))
    assert result.metrics["spearman"] > 0.4 and result.metrics["auc"] is None
    assert result.scores[200:][good[200:] == 1].mean() > result.scores[200:][good[200:] == 0].mean() + 2


@pytest.mark.parametrize(
    "labels, cfg, words",
    [
        ([np.nan] * 40, QualityConfig(), "0 quality labels"),
        ([1.0] * 5 + [np.nan] * 35, QualityConfig(), "5 quality labels"),
        ([1.0] * 40, QualityConfig(), "40 good and 0 bad"),
        ([1.0] * 38 + [0.0] * 2, QualityConfig(), "38 good and 2 bad"),
        ([3.0] * 40, QualityConfig(head="ridge"), "equal"),
        ([1e-300, 0.0] * 20, QualityConfig(head="ridge"), "equal"),  # their variance is no number
        ([1.0, 0.0] * 20, QualityConfig(head="none"), "none"),
    ],
)
def test_too_little_to_learn_from_is_a_note(labels, cfg, words):
    result = fit_quality(planted(40)[0], labels, cfg)
    assert np.isnan(result.scores).all() and words in result.metrics["note"]


@pytest.mark.parametrize(
    "labels, cfg, words",
    [
        ([1.0, 0.0] * 19, QualityConfig(), "38 quality labels"),
        ([1.0, 0.5] * 20, QualityConfig(), "quality.head=ridge"),
    ],
)
def test_wrong_input_is_refused(labels, cfg, words):
    with pytest.raises(SaerlError, match=words):
        fit_quality(planted(40)[0], labels, cfg)


def test_accuracy_is_measured_on_rows_the_calibration_did_not_see(monkeypatch):
    X, good = planted(200)

    def memorise(held_out, labels, scores):
        seen = dict(zip(held_out, labels, strict=True))
        return np.array([seen.get(score, 0.0) for score in scores])

    monkeypatch.setattr("saerl_fast.signals.quality._calibrate", memorise)
    accuracy = fit_quality(X, good, QualityConfig()).metrics["accuracy"]
    assert accuracy == pytest.approx(1 - good.mean(), abs=0.02)


def test_baselines_stand_beside_the_probe_and_text_alone_can_carry_it():
    X, good = planted(300)
    noise = np.random.default_rng(1).permutation(good)
    texts = ["what is it" + "? because the answer" * int(flag) for flag in noise]
    bank = Bank(X.X, texts)
    by_features, by_text = (fit_quality(bank, labels, QualityConfig()).metrics for labels in (good, noise))
    assert by_features["baselines"]["sae"] > 0.85 > 0.6 > by_features["baselines"]["tfidf"]
    assert by_text["baselines"]["tfidf"] > 0.99 and by_text["auc"] > 0.97
    assert by_features["auc"] > by_features["baselines"]["sae"] - 0.03
    ridge = fit_quality(bank, good, QualityConfig(head="ridge", features=["sae"])).metrics
    assert set(ridge["baselines"]) == set(by_text["baselines"]) and set(ridge["share"]) == {"sae", "noise"}


def test_each_kind_of_defect_has_its_own_figure():
    X, good = planted(300)
    kinds = np.where(good == 1, "", np.where(np.arange(300) % 2, "seen", "unseen"))
    hidden = (good == 0) & (kinds == "unseen")
    dense = X.X.to_dense()
    dense[torch.from_numpy(hidden), :10] = dense[torch.from_numpy(good == 1)][: int(hidden.sum()), :10]
    bank = Bank(CSR.from_dense(dense), X.prompts)
    found = fit_quality(bank, good, QualityConfig(), kinds=kinds.tolist()).metrics["by_kind"]
    assert set(found) == {"seen", "unseen"} and found["seen"] > 0.85 and 0.3 < found["unseen"] < 0.7
