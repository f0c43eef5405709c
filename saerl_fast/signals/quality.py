"""Quality: a probe on SAE features that tells sound rows from noisy, wrong or off-task ones.

Public reports on SAERL (arXiv 2605.27354) name two heads, a linear classifier and a ridge regression
of a score; both are here. The features are those of the prompt and, when given, of its reference
answer: a wrong answer cannot be seen in the prompt alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saerl_fast.config import QualityConfig
from saerl_fast.errors import SaerlError
from saerl_fast.signals.features import ProbeMatrix, blocks

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

log = logging.getLogger(__name__)
MIN_LABELS = 10  # of them, for the logistic head, at least MIN_CLASS good and MIN_CLASS bad
MIN_CLASS = 3


class QualityResult(NamedTuple):
    """scores float32 [n], higher is better, NaN when no probe could be fitted; metrics."""

    scores: np.ndarray
    metrics: dict[str, Any]


def fit_quality(
    X: ProbeMatrix | csr_matrix,
    labels: Any,
    cfg: QualityConfig,
    *,
    answers: ProbeMatrix | csr_matrix | None = None,
    seed: int = 0,
) -> QualityResult:
    """Quality of every row of ``X`` [n, columns] and ``answers``, each a ``ProbeMatrix``.

    ``labels`` [n], NaN where unlabelled: 1 good and 0 bad for the logistic head, any score for the
    ridge head. Unlabelled rows are scored by a fit on all labels, labelled rows by the fold that
    did not see their label. Held out are ``auc`` (logistic) and ``spearman`` (ridge). Logistic
    scores are probabilities of a good row, calibrated on the held-out ones (Platt, 1999), so that
    a threshold of 0.5 means what it says; a probe no better than chance gives every row the same.
    ``accuracy``, at that threshold, takes each row's curve from the other folds.

    Too few labels are no error: the scores are NaN, ``metrics["note"]`` says why, and plans filter
    nothing (unless told to: then they refuse).
    """
    n_rows = X.shape[0]
    values = np.asarray(labels, dtype=np.float64)
    if values.shape != (n_rows,):
        raise SaerlError(f"{len(values)} quality labels cannot belong to {n_rows} prompts")
    rows = np.flatnonzero(np.isfinite(values))
    known = values[rows]
    metrics: dict[str, Any] = {
        "head": cfg.head,
        "n_labels": len(rows),
        "auc": None,
        "spearman": None,
        "note": None,
        "threshold": cfg.threshold,
        "filter_ratio": cfg.filter_ratio,
        "reads_answers": answers is not None,
    }
    metrics["note"] = _why_not(cfg, known)
    if metrics["note"]:
        if len(rows):
            log.warning(metrics["note"])
        return QualityResult(np.full(n_rows, np.nan, dtype=np.float32), metrics)

    from scipy.sparse import hstack

    def pick(at: Any) -> csr_matrix:
        return X[at] if answers is None else hstack([X[at], answers[at]], format="csr")

    fit = _logistic if cfg.head == "logistic" else _ridge
    scores = fit(pick(rows), known, map(pick, blocks(n_rows)), cfg.c)
    held_out = np.empty(len(rows))
    folds = list(_folds(cfg, known, seed))
    for train, test in folds:
        held_out[test] = fit(pick(rows[train]), known[train], [pick(rows[test])], cfg.c)
    scores[rows] = held_out
    if cfg.head == "logistic":
        from sklearn.metrics import roc_auc_score

        metrics["auc"] = float(roc_auc_score(known, held_out))
        metrics["good_share"] = float(known.mean())
        scores = _calibrate(held_out, known, scores)
        calibrated = np.empty(len(rows))
        for train, test in folds:
            calibrated[test] = _calibrate(held_out[train], known[train], held_out[test])
        metrics["accuracy"] = float(((calibrated >= 0.5) == (known == 1)).mean())
    else:
        from scipy.stats import spearmanr

        metrics["spearman"] = float(spearmanr(known, held_out)[0]) if np.ptp(held_out) > 0 else 0.0
    metrics["folds"] = cfg.folds
    return QualityResult(scores.astype(np.float32), metrics)


def _why_not(cfg: QualityConfig, labels: np.ndarray) -> str | None:
    """Why no probe can be fitted to these labels, or None."""
    if cfg.head == "none":
        return "quality.head is none: quality was not scored"
    if len(labels) < MIN_LABELS:
        return f"{len(labels)} quality labels are too few (10 needed): quality was not scored"
    if cfg.head == "ridge":
        return "all quality labels are equal: quality was not scored" if np.ptp(labels) == 0 else None
    other = labels[(labels != 0) & (labels != 1)]
    if len(other):
        raise SaerlError(f"quality label {other[0]} is neither 0 nor 1; set quality.head=ridge for a score")
    good, bad = int(labels.sum()), int(len(labels) - labels.sum())
    if min(good, bad) < MIN_CLASS:
        return f"{good} good and {bad} bad labels are too few (3 of each needed): quality was not scored"
    return None


def _folds(cfg: QualityConfig, labels: np.ndarray, seed: int) -> Any:
    from sklearn.model_selection import KFold, StratifiedKFold

    if cfg.head == "ridge":
        return KFold(min(cfg.folds, len(labels)), shuffle=True, random_state=seed).split(labels)
    count = min(cfg.folds, int(min(labels.sum(), len(labels) - labels.sum())))
    return StratifiedKFold(count, shuffle=True, random_state=seed).split(labels, labels)


def _logistic(X: csr_matrix, labels: np.ndarray, target: Iterable[csr_matrix], c: float) -> np.ndarray:
    """Log-odds of a good row for the rows of all of ``target``."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=500).fit(X, labels)
    return np.concatenate([model.decision_function(part) for part in target])


def _ridge(X: csr_matrix, labels: np.ndarray, target: Iterable[csr_matrix], c: float) -> np.ndarray:
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=1.0 / c, solver="sparse_cg", tol=1e-6).fit(X, labels)
    return np.concatenate([model.predict(part) for part in target])


def _calibrate(held_out: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Probabilities for ``scores`` (log-odds) by a logistic curve through the held-out log-odds.

    A curve that falls means the probe is no better than chance: all rows get the share of good ones.
    """
    from sklearn.linear_model import LogisticRegression

    scale = held_out.std() or 1.0
    model = LogisticRegression(C=1e3, max_iter=500).fit(held_out[:, None] / scale, labels)
    if model.coef_[0, 0] <= 0:
        return np.full(len(scores), labels.mean())
    return np.asarray(model.predict_proba(scores[:, None] / scale)[:, 1])
