"""Difficulty: predict each prompt's failure rate from its SAE features and a few labelled prompts.

An ElasticNet regression, as published for SAERL (arXiv 2605.27354); the label is 1 - pass rate.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saerl_fast.config import DifficultyConfig
from saerl_fast.errors import SaerlError
from saerl_fast.signals.features import ProbeMatrix, blocks

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

log = logging.getLogger(__name__)
MIN_LABELS = 10  # fewer cannot be split into folds that mean anything


class DifficultyResult(NamedTuple):
    """scores float32 [n] in [0, 1], higher is harder, NaN when there is no label at all; metrics."""

    scores: np.ndarray
    metrics: dict[str, Any]


def fit_difficulty(
    X: ProbeMatrix | csr_matrix, pass_rates: Any, cfg: DifficultyConfig, *, seed: int = 0
) -> DifficultyResult:
    """Difficulty of every row of ``X`` [n, columns], a ``ProbeMatrix``.

    ``pass_rates`` [n] in [0, 1], NaN where unknown. Unlabelled rows get the prediction of a fit on
    all labels, labelled rows that of the fold that did not see their label, so that the scores of
    both mean the same. The metrics compare those with the labels: ``spearman`` and ``r2`` are held
    out. With fewer than 10 labels, or all alike, every score is 0.5 and ``note`` says so.
    """
    rates = np.asarray(pass_rates, dtype=np.float64)
    if rates.shape != (X.shape[0],):
        raise SaerlError(f"{len(rates)} pass rates cannot belong to {X.shape[0]} prompts")
    known = ~np.isnan(rates)
    outside = known & ~((rates >= 0) & (rates <= 1))
    if outside.any():
        raise SaerlError(f"pass rate {rates[outside][0]} is not in [0, 1]; check difficulty.label_column")
    rows = np.flatnonzero(known)
    metrics: dict[str, Any] = {"n_labels": len(rows), "spearman": None, "r2": None, "note": None}
    if not len(rows):
        metrics["note"] = "no pass rates are known: difficulty was not scored"
        return DifficultyResult(np.full(len(rates), np.nan, dtype=np.float32), metrics)
    labels = 1.0 - rates[rows]
    metrics["mean_label"] = float(labels.mean())
    if len(rows) < MIN_LABELS or np.ptp(labels) == 0:
        why = (
            f"only {len(rows)} pass rates are known" if len(rows) < MIN_LABELS else "all pass rates are equal"
        )
        metrics["note"] = f"{why}: every prompt has the neutral difficulty 0.5"
        log.warning(metrics["note"])
        return DifficultyResult(np.full(len(rates), 0.5, dtype=np.float32), metrics)

    from scipy.stats import spearmanr
    from sklearn.model_selection import KFold

    scores, used = _fit_predict(X[rows], labels, map(X.__getitem__, blocks(len(rates))), cfg)
    held_out = np.empty(len(rows))
    for fit, test in KFold(min(cfg.folds, len(rows)), shuffle=True, random_state=seed).split(rows):
        held_out[test] = _fit_predict(X[rows[fit]], labels[fit], [X[rows[test]]], cfg)[0]
    scores[rows] = held_out
    varied = np.ptp(held_out) > 1e-12
    spread = float(np.square(labels - labels.mean()).sum())
    metrics.update(
        spearman=float(spearmanr(held_out, labels)[0]) if varied else 0.0,
        r2=1.0 - float(np.square(labels - held_out).sum()) / spread,
        features_used=used,
        folds=min(cfg.folds, len(rows)),
    )
    return DifficultyResult(np.clip(scores, 0.0, 1.0).astype(np.float32), metrics)


def _fit_predict(
    X: csr_matrix, labels: np.ndarray, target: Iterable[csr_matrix], cfg: DifficultyConfig
) -> tuple[np.ndarray, int]:
    """Predictions for the rows of all of ``target`` by a fit to ``X``, and how many features it uses."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import ElasticNet

    mean = labels.mean()
    # The smallest penalty under which all coefficients vanish; alpha is a share of it, so that the
    # same alpha suits features of any scale and number.
    correlation = np.abs(X.T @ (labels - mean)).max(initial=0.0) / len(labels)
    if correlation < 1e-12:
        return np.full(sum(part.shape[0] for part in target), mean), 0
    alpha = cfg.alpha * correlation / cfg.l1_ratio
    model = ElasticNet(alpha=alpha, l1_ratio=cfg.l1_ratio, max_iter=500, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the held-out figures judge the fit
        model.fit(X, labels)
    predicted = np.concatenate([model.predict(part) for part in target])
    return predicted, int(np.count_nonzero(model.coef_))
