"""Near-copies: rows that are near in the space of SAE features, and whose words agree as well.

Features see through other numbers and names. The search goes block by block and is exact: rows x, y of norm 1
with coordinates p, q in some orthonormal directions have

    x . y <= p . q + sqrt(1 - |p|^2) sqrt(1 - |q|^2)

(Cauchy and Schwarz), so pairs that this bound rules out need not be looked at, and of the others the products
are taken. That takes time with the square of the rows. Of more than EXACT rows those are compared whose words
agree by their hashes (`sketch`), which takes time with the rows alone; how many pairs that misses is
measured: some rows are compared with all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from saerl_fast.records.spilled import Growing, each, permutation
from saerl_fast.signals.features import SAMPLE, Features, block, blocks, rows_with, svd_reduce, weighted
from saerl_fast.signals.sketch import BANDS, Groups, Sketches, agreeing
from saerl_fast.signals.text import NUMBER, TOKEN
from saerl_kernels import csr

DIRECTIONS = 128
ALIKE = 0.8  # share of the words that near-copies have in common (Dice), numbers counted as one word
MOST = 64  # neighbours of a row that are looked at; further ones are counted (``unsure``)
STEP = 2048  # rows compared at a time, or fewer
BOUNDS = 1 << 24  # pairs whose bound is held
EXACT = 1 << 17  # rows up to which all are compared
MANY = 1 << 20  # pairs that are held
PRODUCTS = 1 << 16  # pairs whose products are taken at a time
CHECKED = 512  # rows of a larger pool that are compared with all
DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)  # says little of the problem, in many words

Pairs = tuple[np.ndarray, np.ndarray]  # of rows [m]


class NearCopies:
    """Groups of ``rows`` of the features ``X`` and ``texts`` whose cosine is at least ``least``."""

    def __init__(
        self, X: Features, rows: np.ndarray, texts: Sequence[str], least: float, seed: int = 0
    ) -> None:
        self.X, self.rows, self.texts, self.least, self.seed = X, rows, texts, least, seed
        self.groups, self._joined = Groups(len(rows)), Growing(np.int64)
        self.unsure = 0
        self.recall: float | None = None
        if len(rows) > EXACT:
            self._by_hashes()
        elif len(rows) > 1:
            self._by_features()

    def _join(self, i: np.ndarray, j: np.ndarray) -> None:
        new: list[int] = []
        for a, b in zip(i.tolist(), j.tolist(), strict=True):
            if self.groups.top(a) != self.groups.top(b) and self._alike(a, b):
                self.groups.join(a, b)
                new += sorted((a, b))
        self._joined.add(self.rows[np.array(new, dtype=np.int64)])

    @property
    def pairs(self) -> np.ndarray:
        """int64 [near, 2]: the rows that made one group of two, as they were found."""
        return self._joined.done().reshape(-1, 2)

    def _alike(self, a: int, b: int) -> bool:
        one, other = (_words(self.texts[int(self.rows[i])]) for i in (a, b))
        return all(
            2 * (x & y).total() >= ALIKE * (x.total() + y.total()) for x, y in zip(one, other, strict=True)
        )

    def _by_features(self) -> None:
        sizes = np.array([_words(self.texts[i])[0].total() for i in self.rows.tolist()])
        X = self.X if len(self.rows) == self.X.n_rows else self.X.select_rows(torch.from_numpy(self.rows))
        for i, j, unsure in neighbours(X, sizes, self.least, self.seed):
            self.unsure += unsure
            self._join(i, j)

    def _by_hashes(self) -> None:
        words = Sketches(long or terms for terms, long in (_words(self.texts[i]) for i in each(self.rows)))
        self._idf = csr.idf(self.X, 0.0, rows_with(self.X))
        crowded = np.zeros(len(self.rows), dtype=bool)
        for band in range(BANDS):
            root, pairs, count = self.groups.flat(), [], 0
            for i, j, more in agreeing(words.keys(band), MOST):
                crowded[more] = True
                apart = root[i] != root[j]
                pairs.append(words.alike(i[apart], j[apart], ALIKE))
                count += len(pairs[-1][0])
                if count > MANY:
                    self._join_near(*_joined(pairs))
                    root, pairs, count = self.groups.flat(), [], 0
            self._join_near(*_joined(pairs))
        self.unsure = int(crowded.sum())
        i, j = _joined(self._of_some(words))
        alike = np.array([self._alike(a, b) for a, b in zip(i.tolist(), j.tolist(), strict=True)], dtype=bool)
        i, j, root = i[alike], j[alike], self.groups.flat()
        self.recall = float((root[i] == root[j]).mean()) if len(i) else None
        self._join(i, j)

    def _join_near(self, i: np.ndarray, j: np.ndarray) -> None:
        """Those of the pairs whose features are near, sorted by row, since features may lie in files."""
        order = np.lexsort((j, i))
        for at in range(0, len(order), PRODUCTS):
            a, b = i[order[at : at + PRODUCTS]], j[order[at : at + PRODUCTS]]
            products = self._weighted(a).multiply(self._weighted(b)).sum(axis=1)
            near = np.asarray(products).ravel() >= self.least
            self._join(a[near], b[near])

    def _of_some(self, words: Sketches) -> Iterator[Pairs]:
        """The pairs of CHECKED rows with any other."""
        some = np.sort(permutation(np.random.default_rng([self.seed, 9]), len(self.rows))[:CHECKED])
        mine = self._weighted(some)
        for part in blocks(len(self.rows)):
            products = (self._weighted(np.arange(part.start, part.stop)) @ mine.T).tocoo()
            near = products.data >= self.least
            i, j = some[products.col[near]], part.start + products.row[near]
            yield words.alike(i[i != j], j[i != j], ALIKE)

    def _weighted(self, rows: np.ndarray) -> Any:
        """CSR float32 [rows, columns] of norm 1."""
        return weighted(self.X.select_rows(torch.from_numpy(self.rows[rows])), self._idf).to_scipy()


def neighbours(
    X: Features, sizes: np.ndarray, least: float, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Pairs (i, j) of rows whose cosine is at least ``least`` and whose texts' ``sizes`` may agree.

    Also how many rows had more of them than MOST, of which the nearest by the bound are given.
    """
    idf, n = csr.idf(X, 0.0, rows_with(X)), X.n_rows
    some = np.sort(np.random.default_rng([seed, 6]).permutation(n)[:SAMPLE])
    fitted = weighted(X.select_rows(torch.from_numpy(some)), idf)
    components = svd_reduce(fitted, DIRECTIONS, seed)[1]
    Z = np.empty((n, len(components) + 1), dtype=np.float32)
    for part in blocks(n):
        rows = weighted(block(X, part), idf).to_scipy()
        Z[part, :-1] = rows @ components.T
        square = np.asarray(rows.multiply(rows).sum(axis=1)).ravel() - np.square(Z[part, :-1]).sum(axis=1)
        Z[part, -1] = np.sqrt(np.maximum(square, 0.0))
    order = np.argsort(sizes, kind="stable")  # a pair of rows agrees only if their sizes are close
    Z, ranked = Z[order], sizes[order]
    step = min(STEP, BOUNDS // n + 1)
    for at in range(0, n, step):
        mine = slice(at, min(at + step, n))
        end = int(np.searchsorted(ranked, ranked[mine.stop - 1] * (2 / ALIKE - 1), side="right"))
        bound = Z[mine] @ Z[at:end].T
        bound[np.tril_indices(mine.stop - at, 0, end - at)] = -1.0
        near = bound >= least - 1e-4
        crowded = np.flatnonzero(near.sum(axis=1) > MOST)
        for row in crowded:
            far = np.argpartition(-bound[row], MOST)[MOST:]
            near[row, far] = False
        i, j = np.nonzero(near)
        i, j = order[at + i], order[at + j]
        if len(i):
            rows = [weighted(X.select_rows(torch.from_numpy(side)), idf).to_scipy() for side in (i, j)]
            close = np.asarray(rows[0].multiply(rows[1]).sum(axis=1)).ravel() >= least
            i, j = i[close], j[close]
        yield i, j, len(crowded)


def _joined(parts: Iterable[Pairs]) -> Pairs:
    none = np.empty(0, dtype=np.int64)
    i, j = zip((none, none), *parts, strict=True)
    return np.concatenate(i), np.concatenate(j)


def _words(text: str) -> tuple[Counter[str], Counter[str]]:
    """All terms of a text, numbers as one, and those of three letters or more, drawings left out."""
    terms = Counter(re.findall(TOKEN, NUMBER.sub("0", DRAWING.sub(" ", text.lower()))))
    return terms, Counter({term: count for term, count in terms.items() if len(term) > 2})
