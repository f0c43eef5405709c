"""Ridge regression over blocks of features, the penalty of each block chosen by the evidence.

With columns standardised over all rows and every block scaled to the same mean square row norm, the labels y
of some rows, standardised too, are modelled as

    y ~ Normal(0, S),  S = sum_b s_b K_b + s_0 I,  K_b = X_b X_b^T

which is ridge regression with penalty s_0 / s_b on the weights of block b. The s maximise the evidence
(MacKay, Bayesian interpolation, 1992; Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006,
equation 5.9) under wide log-normal priors, so a block that says nothing fades by itself, and few labels are
enough: there are as many s as blocks, plus one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from saerl_fast.errors import SaerlError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Splits = Sequence[tuple[np.ndarray, np.ndarray]]
SIGNAL, NOISE = 0.3, 0.8  # where the priors of the blocks together and of the noise have their medians
WIDTH = 1.0  # of the priors of log s_b; that of log s_0 is wider by a factor of 1.4
SEARCHED = 500  # labels that the s are chosen on: their number is small, and the cost cubic in this
DIRECT = 2000  # labels up to which the regression is solved directly


class Block:
    """Features [n rows, d] of one kind, dense or CSR, as the regression reads them; never made dense.

    ``scale``: divide each column by its standard deviation; False keeps the proportions, as for TF-IDF, whose
    weighting is a scale already. Columns without variance are left out. Raises SaerlError on NaN.
    """

    def __init__(self, X: np.ndarray | csr_matrix, *, scale: bool = True) -> None:
        from scipy.sparse import csr_matrix, issparse

        X = csr_matrix(X, dtype=np.float64) if issparse(X) else np.asarray(X, dtype=np.float64)
        if not np.isfinite(X if isinstance(X, np.ndarray) else X.data).all():
            raise SaerlError("features to predict from are NaN or infinite; score the pool again")
        mean = np.asarray(X.mean(axis=0)).ravel()
        square = np.asarray((X * X if isinstance(X, np.ndarray) else X.multiply(X)).mean(axis=0)).ravel()
        spread = np.sqrt(np.maximum(square - mean * mean, 0.0))
        self.kept, self.columns = np.flatnonzero(spread > 1e-6 * np.sqrt(square)), X.shape[1]
        X, mean, spread = X[:, self.kept], mean[self.kept], spread[self.kept]
        factor = 1.0 / spread if scale else np.ones(len(spread))
        norm = float(np.sqrt(np.square(spread * factor).sum())) or 1.0
        self.factor, self.spread = factor / norm, spread
        self.X = X * self.factor if isinstance(X, np.ndarray) else csr_matrix(X.multiply(self.factor))
        self.mean = mean * self.factor

    def kernel(self, rows: np.ndarray) -> np.ndarray:
        """Products [len(rows), len(rows)] of the standardised rows."""
        X = self.X[rows]
        products = np.asarray(X @ X.T if isinstance(X, np.ndarray) else (X @ X.T).todense())
        shift = X @ self.mean
        return products - shift[:, None] - shift[None] + self.mean @ self.mean

    def predict(self, rows: np.ndarray, dual: np.ndarray, at: np.ndarray | None = None) -> np.ndarray:
        """X X[rows]^T dual, of all rows or of those ``at``."""
        weights = self.X[rows].T @ dual - self.mean * dual.sum()
        return (self.X if at is None else self.X[at]) @ weights - self.mean @ weights

    def linear(self, rows: np.ndarray, dual: np.ndarray) -> tuple[np.ndarray, float]:
        """``weights`` [d] and ``offset``: ``Z @ weights + offset`` is the same of features Z [m, d]."""
        inner = self.X[rows].T @ dual - self.mean * dual.sum()
        weights = np.zeros(self.columns)
        weights[self.kept] = inner * self.factor
        return weights, -float(self.mean @ inner)

    def effects(self, rows: np.ndarray, dual: np.ndarray) -> np.ndarray:
        """What a standard deviation more of each column adds to the prediction, float64 [d]."""
        found, _ = self.linear(rows, dual)
        found[self.kept] *= self.spread
        return found


def alike(labels: np.ndarray) -> bool:
    """Whether labels are equal, or differ by no more than rounding: nothing can be fitted to them."""
    least, most = float(labels.min()), float(labels.max())
    spread = most - least
    none = spread * spread == 0.0  # too small a spread for its square to be a number
    return none or spread <= 1e-12 * max(abs(least), abs(most))


@dataclass
class Fit:
    """A fitted regression: ``share`` of the prior variance by block, and of the noise under ``noise``."""

    rows: np.ndarray
    mean: float
    dual: dict[str, np.ndarray]  # s_b S^-1 (y - mean), by block
    share: dict[str, float]
    scales: np.ndarray  # the s

    def predict(self, blocks: Mapping[str, Block], at: np.ndarray | None = None) -> np.ndarray:
        """The expected label of all rows, or of those ``at``."""
        parts = [blocks[name].predict(self.rows, dual, at) for name, dual in self.dual.items()]
        return self.mean + np.sum(parts, axis=0)


def fit(
    blocks: Mapping[str, Block],
    rows: Sequence[int] | np.ndarray,
    labels: np.ndarray,
    seed: int = 0,
    start: np.ndarray | None = None,
) -> Fit:
    """Fit to ``labels`` [len(rows)] of ``rows``; labels that are not `alike`.

    ``start``: ``scales`` that may be near, as those of a fit to most of the same labels.
    """
    rows, labels = np.asarray(rows), np.asarray(labels, dtype=np.float64)
    mean, spread = float(labels.mean()), float(labels.std())
    y = (labels - mean) / spread
    some = np.random.default_rng([seed, 2]).permutation(len(rows))[:SEARCHED]
    scales = _search([block.kernel(rows[some]) for block in blocks.values()], y[some], start)
    dual = spread * _solve(list(blocks.values()), rows, scales, y)
    share = dict(zip((*blocks, "noise"), (scales / scales.sum()).tolist(), strict=True))
    return Fit(rows, mean, {name: s * dual for name, s in zip(blocks, scales, strict=False)}, share, scales)


def held_out(
    blocks: Mapping[str, Block], rows: np.ndarray, labels: np.ndarray, splits: Splits, seed: int = 0
) -> np.ndarray:
    """Predictions [len(rows)] by fits that did not see the label: ``splits`` are (seen, tested) positions.

    All are about the mean of all labels. About the mean of those that a fit saw, which is low where the
    tested ones are high, features that say nothing would rank rows against their labels.
    """
    found, start = np.full(len(rows), labels.mean()), None
    for seen, test in splits:
        if not alike(labels[seen]):
            fitted = fit(blocks, rows[seen], labels[seen], seed, start)
            found[test] += fitted.predict(blocks, rows[test]) - fitted.mean
            start = fitted.scales
    return found


def _solve(blocks: list[Block], rows: np.ndarray, scales: np.ndarray, y: np.ndarray) -> np.ndarray:
    """S^-1 y, for many rows by conjugate gradients, without S."""
    from scipy.sparse.linalg import LinearOperator, cg

    if len(rows) <= DIRECT:
        S = sum((s * block.kernel(rows) for s, block in zip(scales, blocks, strict=False)), 0.0)
        return np.asarray(np.linalg.solve(S + scales[-1] * np.eye(len(rows)), y))
    parts = [(s, block.X[rows], block.mean) for s, block in zip(scales, blocks, strict=False)]

    def times(v: np.ndarray) -> np.ndarray:
        found = scales[-1] * v
        for s, X, mean in parts:
            weights = X.T @ v - mean * v.sum()
            found = found + s * (X @ weights - mean @ weights)
        return found

    return np.asarray(cg(LinearOperator((len(y), len(y)), matvec=times), y, rtol=1e-6, maxiter=500)[0])


def _search(kernels: list[np.ndarray], y: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """The s [blocks + 1], noise last, of largest posterior density given ``y``."""
    from scipy.optimize import minimize

    count = len(kernels)
    centre = np.log(np.r_[np.full(count, SIGNAL / count), NOISE])
    precision = np.r_[np.full(count, WIDTH**-2), (1.4 * WIDTH) ** -2]
    evidence = _of_one(kernels[0], y) if count == 1 else _of_several(kernels, y)

    def cost(logs: np.ndarray) -> tuple[float, np.ndarray]:
        s = np.exp(logs)
        value, slope = evidence(s)
        off = logs - centre
        return value + 0.5 * (precision * off * off).sum(), s * slope + precision * off

    bounds = [(-9.0, 3.0)] * (count + 1)  # exp(-9): a share that no longer matters
    first = centre if start is None else np.log(start)
    return np.exp(minimize(cost, first, jac=True, method="L-BFGS-B", bounds=bounds).x)


Evidence = Callable[[np.ndarray], tuple[float, np.ndarray]]  # s -> -log p(y | s) and its slope


def _of_several(kernels: list[np.ndarray], y: np.ndarray) -> Evidence:
    from scipy.linalg import cho_factor, cho_solve

    eye = np.eye(len(y))

    def evidence(s: np.ndarray) -> tuple[float, np.ndarray]:
        S = sum(a * kernel for a, kernel in zip(s, kernels, strict=False)) + s[-1] * eye
        factor = cho_factor(S, lower=True)
        inverse = cho_solve(factor, eye)
        dual = inverse @ y
        rise = np.outer(dual, dual) - inverse
        slope = [-0.5 * np.vdot(rise, kernel) for kernel in kernels] + [-0.5 * np.trace(rise)]
        return 0.5 * y @ dual + np.log(np.diag(factor[0])).sum(), np.array(slope)

    return evidence


def _of_one(kernel: np.ndarray, y: np.ndarray) -> Evidence:
    """The same of one block, in the basis of its kernel, where S is diagonal."""
    values, vectors = np.linalg.eigh(kernel)
    values, square = np.maximum(values, 0.0), np.square(vectors.T @ y)

    def evidence(s: np.ndarray) -> tuple[float, np.ndarray]:
        S = s[0] * values + s[1]
        rise = square / S**2 - 1.0 / S
        return 0.5 * (square / S + np.log(S)).sum(), np.array([-0.5 * rise @ values, -0.5 * rise.sum()])

    return evidence
