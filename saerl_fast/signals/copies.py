"""Prompts that repeat others: the same text, the same but for its numbers, and near-copies.

Near-copies are looked for among the nearest neighbours in the space of SAE features, which see through other
numbers and names, and count where the words agree as well. The search goes block by block and is exact: rows
x, y of norm 1 with coordinates p, q in some orthonormal directions have

    x . y <= p . q + sqrt(1 - |p|^2) sqrt(1 - |q|^2)

(Cauchy and Schwarz), so pairs that this bound rules out need not be looked at, and of the others the products
are taken.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from saerl_fast.signals.features import SAMPLE, Features, block, blocks, rows_with, svd_reduce, weighted
from saerl_fast.signals.text import NUMBER, TOKEN
from saerl_kernels import csr

log = logging.getLogger(__name__)
NAMED = 5  # copies that a message names
DIRECTIONS = 128
ALIKE = 0.8  # share of the words that near-copies have in common (Dice), numbers counted as one word
MOST = 64  # neighbours of a row that are looked at; further ones are counted (``unsure``)
STEP = 2048  # rows compared at a time
DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)  # says little of the problem, in many words


class Copies(NamedTuple):
    """``of`` int32 [n]: the row that each row repeats, -1 for a row that stands for itself; metrics."""

    of: np.ndarray
    metrics: dict[str, Any]


def find_copies(
    X: Features,
    texts: Sequence[str],
    answers: Sequence[Any],
    ids: Sequence[str],
    *,
    near: float = 0.8,
    seed: int = 0,
) -> Copies:
    """Which of the prompts ``texts`` repeat another one; ``X``: their pooled SAE features, unweighted.

    ``near``: the least cosine of near-copies; at 1 none are looked for. Of equal texts, the first stands for
    all. Metrics: ``rows`` have a text that occurs before, but for spaces and case; ``conflicting`` texts have
    several answers, ``conflicts`` names their rows; ``renumbered`` rows repeat an earlier text with other
    numbers; ``near`` rows are further near-copies, ``examples`` names some; ``unsure`` rows had more
    neighbours than were looked at.
    """
    same = same_text(texts)
    own = np.flatnonzero(same == np.arange(len(same)))
    found: dict[str, Any] = {"rows": len(same) - len(own)} | _conflicts(same, answers, ids)
    shapes = _first(NUMBER.sub("0", _folded(texts[i])) for i in own.tolist())
    kept = np.flatnonzero(shapes == np.arange(len(own)))
    found["renumbered"] = len(own) - len(kept)
    group = own[shapes]  # of the rows `own`: the first of their shape
    root = {int(i): int(i) for i in own[kept]}
    examples: list[str] = []
    found |= {"near": 0, "examples": None, "unsure": 0}
    if near < 1 and len(kept) > 1:

        def top(i: int) -> int:
            while root[i] != i:
                root[i] = i = root[root[i]]
            return i

        rows = own[kept]
        sizes = np.array([_words(texts[i])[0].total() for i in rows])
        chosen = X if len(rows) == X.n_rows else X.select_rows(torch.from_numpy(rows))
        for i, j, unsure in _neighbours(chosen, sizes, near, seed):
            found["unsure"] += unsure
            for a, b in zip(rows[i].tolist(), rows[j].tolist(), strict=True):
                one, other = sorted((top(a), top(b)))
                if one != other and _alike(_words(texts[a]), _words(texts[b])):
                    root[other] = one
                    examples += [f"{ids[min(a, b)]} ~ {ids[max(a, b)]}"][: NAMED - len(examples)]
                    found["near"] += 1
        found["examples"] = ", ".join(examples) or None
        group = np.array([top(int(i)) for i in group])
    of = np.empty(len(same), dtype=np.int64)
    of[own] = group
    of = of[same]
    of[of == np.arange(len(of))] = -1
    if found["rows"]:
        log.warning("%d of %d prompts repeat an earlier prompt's text", found["rows"], len(texts))
    if found["conflicting"]:
        log.warning(
            "%d prompts occur with different answers, so at least one is wrong; ids: %s",
            found["conflicting"],
            found["conflicts"],
        )
    return Copies(of.astype(np.int32), found)


def same_text(texts: Iterable[str]) -> np.ndarray:
    """int64 [n]: the first row whose text is the same but for spaces and case."""
    return _first(map(_folded, texts))


def _folded(text: Any) -> str:
    """A text without what does not make it another: case, and how its words are spaced."""
    return " ".join(str(text).lower().split())


def _conflicts(same: np.ndarray, answers: Sequence[Any], ids: Sequence[str]) -> dict[str, Any]:
    """How many texts have several answers, and whose they are."""
    repeated = np.flatnonzero(np.bincount(same, minlength=len(same)) > 1)
    rows: dict[int, list[int]] = {int(i): [] for i in repeated}
    for i in np.flatnonzero(np.isin(same, repeated)).tolist():
        rows[int(same[i])].append(i)
    apart = [of for of in rows.values() if len({_folded(answers[i]) for i in of}) > 1]
    named = "; ".join(", ".join(str(ids[i]) for i in of[:NAMED]) for of in apart[:NAMED])
    return {"conflicting": len(apart), "conflicts": named or None}


def _first(keys: Iterable[str]) -> np.ndarray:
    """int64 [n]: the position of the first key equal to each; by digest, so that no text is kept."""
    seen: dict[bytes, int] = {}
    places = (
        seen.setdefault(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest(), i)
        for i, key in enumerate(keys)
    )
    return np.fromiter(places, dtype=np.int64)


def _words(text: str) -> tuple[Counter[str], Counter[str]]:
    """All terms of a text, numbers as one, and those of three letters or more, drawings left out."""
    terms = Counter(re.findall(TOKEN, NUMBER.sub("0", DRAWING.sub(" ", text.lower()))))
    return terms, Counter({term: count for term, count in terms.items() if len(term) > 2})


def _alike(a: tuple[Counter[str], ...], b: tuple[Counter[str], ...]) -> bool:
    return all(2 * (x & y).total() >= ALIKE * (x.total() + y.total()) for x, y in zip(a, b, strict=True))


def _neighbours(
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
    for at in range(0, n, STEP):
        mine = slice(at, min(at + STEP, n))
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
