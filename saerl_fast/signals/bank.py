"""The kinds of features that probes read, by name: rows are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saerl_fast.signals.features import Features, block, blocks
from saerl_fast.signals.ridge import Block, Fit
from saerl_fast.signals.text import Tfidf, plain, surface

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

SAMPLE = 1 << 14  # rows that means, spreads and vocabularies are taken from, beside those with labels
MOST = 1 << 15  # labels that a probe is fitted to

BASELINES = ("length", "text", "tfidf", "sae")  # kinds that every probe is compared with, each alone

Rows = slice | np.ndarray


class Bank:
    """Features of the rows of a pool, [n, columns of the kind], dense or CSR.

    ``sae``: the pooled features ``X``; ``answer``: the same of those of the answers.
    ``text``, ``tfidf``: of the prompts' own text, without the chat template (see `text`); ``length``: the
    first column of ``text``. A new kind is an entry of ``kinds``, and a choice in the config.
    """

    def __init__(self, X: Features, prompts: Sequence[Any], answers: Features | None = None) -> None:
        self.X, self.n_rows, self.prompts = X, len(prompts), prompts
        self.kinds: dict[str, Callable[[Rows], Any]] = {
            "sae": lambda rows: _activations(X, rows),
            "text": lambda rows: surface(self.texts(rows)),
            "tfidf": lambda rows: self._tfidf(self.texts(rows)),
            "length": lambda rows: surface(self.texts(rows))[:, :1],
        }
        if answers is not None:
            self.kinds["answer"] = lambda rows: _activations(answers, rows)

    def fitted(self, labelled: np.ndarray, seed: int) -> np.ndarray:
        """The rows to make blocks of: at most MOST of those ``labelled`` [bool, n], others up to SAMPLE."""
        order = np.random.default_rng([seed, 3]).permutation(self.n_rows)
        known = order[labelled[order]][:MOST]
        return np.sort(np.r_[known, order[~labelled[order]][: max(SAMPLE - len(known), 0)]])

    def blocks(self, names: Sequence[str], rows: np.ndarray) -> dict[str, Block]:
        """A block by name of ``rows``; TF-IDF keeps its proportions, other columns are standardised."""
        return {name: Block(self.kinds[name](rows), scale=name != "tfidf") for name in names}

    def predict(self, fit: Fit, made: Mapping[str, Block]) -> np.ndarray:
        """What ``fit``, to the blocks ``made``, expects of every row, float64 [n], a part at a time."""
        linear = {name: made[name].linear(fit.rows, dual) for name, dual in fit.dual.items()}
        found = np.full(self.n_rows, fit.mean)
        for part in blocks(self.n_rows):
            for name, (weights, offset) in linear.items():
                found[part] += self.kinds[name](part) @ weights + offset
        return found

    def texts(self, rows: Rows) -> list[str]:
        """The prompts' own texts."""
        chosen: Iterator[int] = iter(range(self.n_rows)[rows] if isinstance(rows, slice) else rows.tolist())
        return [plain(self.prompts[i]) for i in chosen]

    @cached_property
    def _tfidf(self) -> Tfidf:
        order = np.random.default_rng(4).permutation(self.n_rows)[:SAMPLE]
        return Tfidf(self.texts(np.sort(order)))


def _activations(X: Features, rows: Rows) -> csr_matrix:
    part = block(X, rows) if isinstance(rows, slice) else X.select_rows(torch.from_numpy(rows))
    return part.to_scipy()


def spearman(scores: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where the scores are all the same."""
    from scipy.stats import spearmanr

    return float(spearmanr(scores, labels)[0]) if np.ptp(scores) > 1e-12 and np.ptp(labels) > 0 else 0.0
