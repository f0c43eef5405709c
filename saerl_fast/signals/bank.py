"""The kinds of features that probes read, by name: rows are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.records.spilled import full, permutation, rows_where
from saerl_fast.signals.features import Features, block, blocks
from saerl_fast.signals.ridge import Block, Fit
from saerl_fast.signals.text import Tfidf, plain, surface

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

SAMPLE = 1 << 14  # rows that means, spreads and vocabularies are taken from, beside those with labels
MOST = 1 << 15  # labels that a probe is fitted to

# What a probe reads that names no kinds, as far as it is there, and what it is compared with, each alone.
USUAL = ("length", "text", "tfidf", "answer_text", "sae", "hidden", "scalars", "answer_logprob")
OF_ANSWER = ("answer_text", "answer_logprob")
MOST_CELLS = 4096  # of `cells`
RANDOM = 32  # columns of a kind that says nothing

Rows = slice | np.ndarray


class Bank:
    """Features of the rows of a pool, [n, columns of the kind], dense or CSR.

    ``sae``: the pooled features ``X``. ``kept``: what else the forward pass left, by name (see `bank_pass`).
    ``text``, ``tfidf``: of the prompts' own text, without the chat template (see `text`); ``length``: the
    first column of ``text``; ``answer_text``: as ``text``, of the reference answers. ``random``: noise, as a
    control; ``none``: no column. A new kind is an entry of ``kinds``, and a choice in the config.
    """

    def __init__(
        self,
        X: Features,
        prompts: Sequence[Any],
        kept: Mapping[str, Any] | None = None,
        answers: Sequence[Any] | None = None,
    ) -> None:
        self.X, self.n_rows, self.prompts = X, len(prompts), prompts
        self.kinds: dict[str, Callable[[Rows], Any]] = {
            "sae": lambda rows: _activations(X, rows),
            "text": lambda rows: surface(self.texts(rows)),
            "tfidf": lambda rows: self._tfidf(self.texts(rows)),
            "length": lambda rows: surface(self.texts(rows))[:, :1],
            "random": lambda rows: self._random[rows],
            "none": lambda rows: self._random[rows][:, :0],
        }
        for name, features in (kept or {}).items():
            dense = isinstance(features, np.ndarray)
            self.kinds[name] = features.__getitem__ if dense else partial(_activations, features)
        if answers is not None and any(answers):
            self.kinds["answer_text"] = lambda rows: surface(
                [str(answer or "") for answer in _some(answers, rows)]
            )

    def names(self, asked: Sequence[str] | None, setting: str) -> list[str]:
        """The kinds that are asked for by ``setting``; of None all of `USUAL` that are there."""
        if asked is None:
            return [name for name in USUAL if name in self.kinds]
        for name in asked:
            if name == "answer_text" and name not in self.kinds:
                raise SaerlError(f"{setting} names answer_text, but the pool has no answers; leave it out")
            if name not in self.kinds:
                raise SaerlError(
                    f"{setting} names {name}, which the scores do not keep; add it to score.features"
                )
        return list(map(str, asked))

    def fitted(self, labelled: np.ndarray, seed: int) -> np.ndarray:
        """The rows to make blocks of: at most MOST of those ``labelled`` [bool, n], others up to SAMPLE."""
        order = permutation(np.random.default_rng([seed, 3]), self.n_rows)

        def first(wanted: bool, most: int) -> np.ndarray:
            places = rows_where(lambda part: labelled[order[part]] == wanted, len(order))
            return order[places[: max(most, 0)]]

        known = first(True, MOST)
        return np.sort(np.r_[known, first(False, SAMPLE - len(known))])

    def blocks(self, names: Sequence[str], rows: np.ndarray) -> dict[str, Block]:
        """A block by name of ``rows``; TF-IDF keeps its proportions, other columns are standardised."""
        return {name: Block(self.kinds[name](rows), scale=name != "tfidf") for name in names}

    def predict(self, fit: Fit, made: Mapping[str, Block]) -> np.ndarray:
        """What ``fit``, to the blocks ``made``, expects of every row, float64 [n], a part at a time."""
        linear = {name: made[name].linear(fit.rows, dual) for name, dual in fit.dual.items()}
        found = full(self.n_rows, fit.mean)
        for part in blocks(self.n_rows):
            for name, (weights, offset) in linear.items():
                found[part] += self.kinds[name](part) @ weights + offset
        return found

    def texts(self, rows: Rows) -> list[str]:
        """The prompts' own texts."""
        return list(map(plain, _some(self.prompts, rows)))

    @cached_property
    def _random(self) -> np.ndarray:
        return np.random.default_rng(6).normal(size=(self.n_rows, RANDOM)).astype(np.float32)

    @cached_property
    def _tfidf(self) -> Tfidf:
        order = permutation(np.random.default_rng(4), self.n_rows)
        return Tfidf(self.texts(np.sort(order[:SAMPLE])))


def cells(columns: Sequence[Sequence[Any]]) -> Callable[[Rows], csr_matrix]:
    """A kind with a column of 0 and 1 for every combination of values that rows of ``columns`` have."""
    from scipy.sparse import csr_matrix

    rows = map(repr, zip(*columns, strict=True))
    found, cell = np.unique(np.array(list(rows)), return_inverse=True)
    if len(found) > MOST_CELLS:
        raise SaerlError(
            f"plan.adaptive.columns tells {len(found)} kinds of prompts apart, more than {MOST_CELLS}; name "
            "columns with fewer values"
        )

    def kind(rows: Rows) -> csr_matrix:
        at = cell[rows]
        ones = np.ones(len(at), dtype=np.float32)
        return csr_matrix((ones, (np.arange(len(at)), at)), shape=(len(at), len(found)))

    return kind


def _some(values: Sequence[Any], rows: Rows) -> Sequence[Any]:
    return values[rows] if isinstance(rows, slice) else [values[i] for i in rows.tolist()]


def _activations(X: Features, rows: Rows) -> csr_matrix:
    part = block(X, rows) if isinstance(rows, slice) else X.select_rows(torch.from_numpy(rows))
    return part.to_scipy()


def spearman(scores: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where the scores are all the same."""
    from scipy.stats import spearmanr

    return float(spearmanr(scores, labels)[0]) if np.ptp(scores) > 1e-12 and np.ptp(labels) > 0 else 0.0
