"""Quality: a probe that tells sound rows from noisy or off-task ones, beside what is cheaper.

Public reports on SAERL (arXiv 2605.27354) name two heads, a linear classifier and a ridge regression of a
score; both are here, as the regression of `ridge`, whose penalties the evidence chooses. It reads the prompt
alone: where defects were planted, features of the reference answer (``score.include_answer``) made it worse,
and neither found wrong answers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from saerl_fast.config import QualityConfig
from saerl_fast.errors import SaerlError
from saerl_fast.records.spilled import by_block, full, rows_where, slices, taken
from saerl_fast.signals import ridge
from saerl_fast.signals.bank import OF_ANSWER, Bank, spearman

log = logging.getLogger(__name__)
MIN_LABELS = 10  # of them, for the logistic head, at least MIN_CLASS good and MIN_CLASS bad
MIN_CLASS = 3
MOST = 1e30  # of a score: its square is still a number


class QualityResult(NamedTuple):
    """scores float32 [n], higher is better, NaN when no probe could be fitted; metrics; what a standard
    deviation more of each SAE feature adds to the regression, float64 [d_sae]."""

    scores: np.ndarray
    metrics: dict[str, Any]
    effects: np.ndarray | None = None


def check_labels(cfg: QualityConfig, labels: np.ndarray) -> None:
    """SaerlError for ``labels``, NaN where unknown, which ``cfg.head`` cannot be fitted to."""
    for part in slices(len(labels)):
        some = labels[part][~np.isnan(labels[part])]
        huge, other = some[np.abs(some) > MOST], some[(some != 0) & (some != 1)]
        if cfg.head == "ridge" and len(huge):
            raise SaerlError(
                f"quality label {huge[0]} is no score; use numbers up to {MOST:g}, or null where unknown"
            )
        if cfg.head == "logistic" and len(other):
            raise SaerlError(
                f"quality label {other[0]} is neither 0 nor 1; set quality.head=ridge for a score"
            )


def fit_quality(
    bank: Bank, labels: Any, cfg: QualityConfig, *, seed: int = 0, kinds: Sequence[Any] | None = None
) -> QualityResult:
    """Quality of every row of ``bank``, from the kinds of features in ``cfg`` and, if it has any, answers.

    ``labels`` [n], NaN where unlabelled: 1 good and 0 bad for the logistic head, any score for the
    ridge head. Unlabelled rows are scored by a fit on all labels, labelled rows by the fold that
    did not see their label. Held out are ``auc`` (logistic) and ``spearman`` (ridge), and the same of each
    of ``baselines``. Logistic scores are probabilities of a good row, calibrated on the held-out ones (Platt,
    1999), so that a threshold of 0.5 means what it says; a probe no better than chance gives every row the
    same. ``accuracy``, at that threshold, takes each row's curve from the other folds. ``kinds`` [n] name
    what is wrong with bad rows, None or empty where unknown: ``by_kind`` has the held-out AUC of each kind
    against all good rows.

    Too few labels are no error: the scores are NaN, ``metrics["note"]`` says why, and plans filter
    nothing (unless told to: then they refuse).
    """
    values = np.asarray(labels, dtype=np.float64)
    if values.shape != (bank.n_rows,):
        raise SaerlError(f"{len(values)} quality labels cannot belong to {bank.n_rows} prompts")
    known = ~np.isnan(values)
    check_labels(cfg, values)
    told = taken(values, rows_where(known.__getitem__, len(values)))
    metrics: dict[str, Any] = {
        "head": cfg.head,
        "n_labels": len(told),
        "auc": None,
        "spearman": None,
        "note": None,
        "threshold": cfg.threshold,
        "filter_ratio": cfg.filter_ratio,
        "reads_answers": "answer" in bank.kinds,
    }
    single = [name for name in bank.names(None, "") if name not in OF_ANSWER]
    names = single if cfg.features is None else bank.names(cfg.features, "quality.features")
    names = [*names, *["answer"] * ("answer" in bank.kinds)]
    at = bank.fitted(known, seed)
    metrics["note"] = why_not(cfg, told)
    if not metrics["note"]:
        made = bank.blocks([*names, *single], at)
        if not any(len(made[name].mean) for name in names):
            metrics["note"] = "no feature is active, and all texts are equal: quality was not scored"
    if metrics["note"]:
        if len(told):
            log.warning(metrics["note"])
        return QualityResult(full(bank.n_rows, np.nan, np.float32), metrics)

    rows = np.flatnonzero(known[at])
    y = values[at[rows]]
    splits = list(_folds(cfg, y, seed))
    alone = {name: ridge.held_out({name: made[name]}, rows, y, splits, seed) for name in single}
    chosen = {name: made[name] for name in names}
    fit = ridge.fit(chosen, rows, y, seed)
    scores, held_out = bank.predict(fit, chosen), ridge.held_out(chosen, rows, y, splits, seed)
    scores[at[rows]] = held_out
    if cfg.head == "logistic":
        from sklearn.metrics import roc_auc_score

        metrics["auc"] = float(roc_auc_score(y, held_out))
        metrics["baselines"] = {name: float(roc_auc_score(y, found)) for name, found in alone.items()}
        metrics["good_share"] = float(y.mean())
        if kinds is not None:
            named = np.array(["" if kinds[i] is None else str(kinds[i]) for i in at[rows]])
            metrics["by_kind"] = {
                kind: float(roc_auc_score(y[one], held_out[one]))
                for kind in sorted(set(named[y == 0]) - {""})
                for one in [(y == 1) | (named == kind)]
            }
        scores = _calibrate(held_out, y, scores)
        calibrated = np.empty(len(rows))
        for train, test in splits:
            calibrated[test] = _calibrate(held_out[train], y[train], held_out[test])
        metrics["accuracy"] = float(((calibrated >= 0.5) == (y == 1)).mean())
    else:
        metrics["spearman"] = spearman(held_out, y)
        metrics["baselines"] = {name: spearman(found, y) for name, found in alone.items()}
    metrics |= {"share": fit.share, "folds": len(splits)}
    effects = made["sae"].effects(fit.rows, fit.dual["sae"]) if "sae" in chosen else None
    return QualityResult(by_block(scores.__getitem__, bank.n_rows, np.float32), metrics, effects)


def why_not(cfg: QualityConfig, labels: np.ndarray) -> str | None:
    """Why no probe can be fitted to these labels (known ones, float64), or None."""
    if cfg.head == "none":
        return "quality.head is none: quality was not scored"
    if len(labels) < MIN_LABELS:
        return f"{len(labels)} quality labels are too few (10 needed): quality was not scored"
    if cfg.head == "ridge":
        return "all quality labels are equal: quality was not scored" if ridge.alike(labels) else None
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


def _calibrate(held_out: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Probabilities for ``scores`` by a logistic curve through the held-out ones.

    A curve that falls means the probe is no better than chance: all rows get the share of good ones.
    """
    from sklearn.linear_model import LogisticRegression

    scale = held_out.std() or 1.0
    model = LogisticRegression(C=1e3, max_iter=500).fit(held_out[:, None] / scale, labels)
    if model.coef_[0, 0] <= 0:
        return full(len(scores), labels.mean())
    return by_block(
        lambda part: model.predict_proba(scores[part, None] / scale)[:, 1], len(scores), np.float64
    )
