"""Difficulty: each prompt's failure rate, predicted from a few labelled prompts, beside what is cheaper.

``difficulty.probe=ridge`` is a ridge regression over kinds of features, whose weights the evidence chooses
(see `ridge`). ``elasticnet``, on weighted SAE features, is what was published for SAERL (arXiv 2605.27354).
The label is 1 - pass rate.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saerl_fast.config import DifficultyConfig
from saerl_fast.errors import SaerlError
from saerl_fast.records.spilled import Growing, by_block, full, rows_where, slices, taken
from saerl_fast.signals import ridge
from saerl_fast.signals.bank import Bank, spearman
from saerl_fast.signals.features import ProbeMatrix, blocks

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

log = logging.getLogger(__name__)
MIN_LABELS = 10  # fewer cannot be split into folds that mean anything
LEVEL = 0.8  # of the interval


class DifficultyResult(NamedTuple):
    """scores float32 [n] in [0, 1], higher is harder, NaN when there is no label at all; metrics; of ridge
    what a standard deviation more of each SAE feature adds to the score, float64 [d_sae]."""

    scores: np.ndarray
    metrics: dict[str, Any]
    effects: np.ndarray | None = None


def check_rates(rates: np.ndarray) -> None:
    """SaerlError unless all that are known (not NaN) are in [0, 1]."""
    for part in slices(len(rates)):
        some = rates[part]
        outside = some[~np.isnan(some) & ~((some >= 0) & (some <= 1))]
        if len(outside):
            raise SaerlError(
                f"pass rate {outside[0]} is not in [0, 1]; difficulty.label_column takes shares of passes"
            )


def fit_difficulty(bank: Bank, pass_rates: Any, cfg: DifficultyConfig, *, seed: int = 0) -> DifficultyResult:
    """Difficulty, a predicted failure rate, of every row of ``bank``.

    ``pass_rates`` [n] in [0, 1], NaN where unknown. Unlabelled rows get the prediction of a fit on all
    labels, labelled rows that of the fold that did not see their label, so that the scores of both mean the
    same. The metrics compare those with the labels: ``spearman`` and ``r2`` are held out, and so are those of
    ``baselines``, the same regression on one kind of features; ``spearman_error`` is the standard error, by a
    paired bootstrap, of the difference to the best of them. ``interval``: so far from the score, either way,
    lay 80 % of the held-out labels (Vovk et al., Algorithmic Learning in a Random World, 2005). ``share``:
    the part of the labels' variance that the regression expects each kind to explain. With fewer than 10
    labels, or all alike, every score is 0.5 and ``note`` says so.
    """
    rates = np.asarray(pass_rates, dtype=np.float64)
    count = len(rates)
    if rates.shape != (bank.n_rows,):
        raise SaerlError(f"{count} pass rates cannot belong to {bank.n_rows} prompts")
    check_rates(rates)
    known = ~np.isnan(rates)
    told = taken(rates, rows_where(known.__getitem__, count))
    total = len(told)
    metrics: dict[str, Any] = {"n_labels": total, "spearman": None, "r2": None, "note": None}
    if not total:
        metrics["note"] = "no pass rates are known: difficulty was not scored"
        return DifficultyResult(full(count, np.nan, np.float32), metrics)
    metrics["mean_label"] = float(1.0 - told.mean())
    if total < MIN_LABELS or ridge.alike(by_block(lambda part: 1.0 - told[part], total, told.dtype)):
        why = f"only {total} pass rates are known" if total < MIN_LABELS else "all pass rates are equal"
        metrics["note"] = f"{why}: every prompt has the neutral difficulty 0.5"
        log.warning(metrics["note"])
        return DifficultyResult(full(count, 0.5, np.float32), metrics)

    from sklearn.model_selection import KFold

    at = bank.fitted(known, seed)
    rows = np.flatnonzero(known[at])  # within the blocks; at[rows] within the pool
    labels = 1.0 - rates[at[rows]]
    names, single = bank.names(cfg.features, "difficulty.features"), bank.names(None, "")
    made = bank.blocks(list(dict.fromkeys([*names, *single])), at)

    splits = list(KFold(min(cfg.folds, len(rows)), shuffle=True, random_state=seed).split(rows))

    def held_out(names: Iterable[str]) -> np.ndarray:
        return ridge.held_out({name: made[name] for name in names}, rows, labels, splits, seed)

    alone = {name: held_out([name]) for name in single}
    if cfg.probe == "ridge":
        chosen = {name: made[name] for name in names}
        fit = ridge.fit(chosen, rows, labels, seed)
        scores, found = bank.predict(fit, chosen), held_out(names)
        metrics["share"] = fit.share
        effects = made["sae"].effects(fit.rows, fit.dual["sae"]) if "sae" in chosen else None
    else:
        effects = None
        scores, found, metrics["features_used"] = _elastic(ProbeMatrix(bank.X), at[rows], labels, cfg, splits)
    scores[at[rows]] = found
    spread = float(np.square(labels - labels.mean()).sum())
    rank = min(int(np.ceil(LEVEL * (len(rows) + 1))), len(rows))
    metrics.update(
        probe=cfg.probe,
        spearman=spearman(found, labels),
        r2=1.0 - float(np.square(labels - found).sum()) / spread,
        interval=float(np.sort(np.abs(labels - np.clip(found, 0.0, 1.0)))[rank - 1]),
        folds=min(cfg.folds, len(rows)),
        baselines={name: spearman(other, labels) for name, other in alone.items()},
    )
    best = max(alone, key=lambda name: metrics["baselines"][name])
    metrics["spearman_error"] = _error(found, alone[best], labels, seed)
    behind = metrics["baselines"][best] - metrics["spearman"]
    chance = 2 / np.sqrt(len(rows))  # what the best of some useless kinds may reach
    if behind > 2.5 * metrics["spearman_error"] and metrics["baselines"][best] > chance:
        metrics["note"] = (
            f"{best} alone predicts difficulty better, by more than noise: Spearman "
            f"{metrics['baselines'][best]:.2f} against {metrics['spearman']:.2f}; try difficulty.probe=ridge "
            f"difficulty.features={best}"
        )
        log.warning(metrics["note"])
    clipped = by_block(lambda part: np.clip(scores[part], 0.0, 1.0), count, np.float32)
    return DifficultyResult(clipped, metrics, effects)


def _error(scores: np.ndarray, others: np.ndarray, labels: np.ndarray, seed: int, draws: int = 200) -> float:
    """Standard deviation of the difference of two Spearmans over resampled rows."""
    rng = np.random.default_rng([seed, 5])
    found = []
    for _ in range(draws):
        some = rng.integers(0, len(labels), min(len(labels), 4000))
        found.append(spearman(scores[some], labels[some]) - spearman(others[some], labels[some]))
    return float(np.std(found) * np.sqrt(min(len(labels), 4000) / len(labels)))


def _elastic(
    matrix: ProbeMatrix, rows: np.ndarray, labels: np.ndarray, cfg: DifficultyConfig, splits: ridge.Splits
) -> tuple[np.ndarray, np.ndarray, int]:
    """Predictions of all rows, held-out ones of ``rows``, and how many features the whole fit uses."""
    scores, used = _fit_predict(matrix[rows], labels, map(matrix.__getitem__, blocks(matrix.shape[0])), cfg)
    held_out = np.full(len(rows), labels.mean())  # as in `ridge.held_out`
    for fit, test in splits:
        found = _fit_predict(matrix[rows[fit]], labels[fit], [matrix[rows[test]]], cfg)[0]
        held_out[test] += found - labels[fit].mean()
    return scores, held_out, used


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
        return full(sum(part.shape[0] for part in target), mean), 0
    alpha = cfg.alpha * correlation / cfg.l1_ratio
    model = ElasticNet(alpha=alpha, l1_ratio=cfg.l1_ratio, max_iter=500, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the held-out figures judge the fit
        model.fit(X, labels)
    predicted = Growing(np.float64)
    for part in target:
        predicted.add(model.predict(part))
    return predicted.done(), int(np.count_nonzero(model.coef_))
