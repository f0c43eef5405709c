"""A card for every cluster: how large, hard and good it is, and which features and prompts make it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from saerl_fast.records.spilled import counted, slices
from saerl_fast.signals.features import Features, block, blocks, weighted

CARDS = 32  # the largest clusters
FEATURES, EXAMPLES = 5, 3  # of a card; examples also of each feature
CARRIERS = 8  # features of a probe
TEXT = 160  # characters of a prompt


def cards(
    X: Features,
    weights: torch.Tensor,
    labels: np.ndarray,
    ids: Sequence[str],
    texts: Callable[[np.ndarray], list[str]],
    signals: dict[str, np.ndarray],
) -> list[dict[str, Any]]:
    """What `cluster_prompts` found in the features ``X`` [n, d_sae], as JSON; the largest clusters first.

    ``weights``: its, of the features. ``texts`` gives the texts of some rows; of ``signals`` (float [n], NaN
    where unknown) each card has the mean over its cluster. Features are those that weigh more in the cluster
    than in all rows (``lift``: by how much, in rows of norm 1), each with the prompts that have most of it;
    ``prompts`` are nearest to the cluster's centre.
    """
    sizes = counted(labels)
    largest = np.argsort(-sizes, kind="stable")[:CARDS]
    sums = np.zeros((len(sizes), X.n_cols))
    for part in blocks(X.n_rows):
        rows = weighted(block(X, part), weights).to_scipy()
        np.add.at(sums, (labels[part].repeat(np.diff(rows.indptr)), rows.indices), rows.data)
    lift = sums / sizes[:, None] - sums.sum(axis=0) / X.n_rows
    chosen = {int(c): [f for f in np.argsort(-lift[c])[:FEATURES] if lift[c, f] > 0] for c in largest}
    columns = np.unique([f for found in chosen.values() for f in found]).astype(np.int64)
    most = _most(X, columns)
    near = {c: _Top() for c in chosen}
    for part in blocks(X.n_rows):
        mine = labels[part]
        rows = weighted(block(X, part), weights).to_scipy()
        for c in chosen:
            members = np.flatnonzero(mine == c)
            near[c].add(part.start + members, rows[members] @ sums[c])
    prompts = _shown([*most.values(), *near.values()], ids, texts)

    return [
        {
            "cluster": c,
            "size": int(sizes[c]),
            **{name: _mean(values, labels, c) for name, values in signals.items()},
            "features": [
                {"feature": int(f), "lift": float(lift[c, f]), "prompts": prompts(most[int(f)])}
                for f in chosen[c]
            ],
            "prompts": prompts(near[c]),
        }
        for c in chosen
    ]


def carriers(
    X: Features, effects: np.ndarray, ids: Sequence[str], texts: Callable[[np.ndarray], list[str]]
) -> list[dict[str, Any]]:
    """The SAE features that move a probe's predictions most, the strongest first, as JSON.

    ``effects`` [d_sae]: what a standard deviation more of each adds. Each has the prompts with most of it.
    """
    strongest = [int(f) for f in np.argsort(-np.abs(effects), kind="stable")[:CARRIERS] if effects[f]]
    most = _most(X, np.array(strongest, dtype=np.int64))
    prompts = _shown(list(most.values()), ids, texts)
    return [{"feature": f, "effect": float(effects[f]), "prompts": prompts(most[f])} for f in strongest]


def _most(X: Features, columns: np.ndarray) -> dict[int, _Top]:
    """The rows that have most of each of ``columns``."""
    most = {int(f): _Top() for f in columns}
    for part in blocks(X.n_rows):
        some = block(X, part).to_scipy()[:, columns].tocsc()
        for place, f in enumerate(columns.tolist()):
            at = slice(some.indptr[place], some.indptr[place + 1])
            most[f].add(part.start + some.indices[at], some.data[at])
    return most


def _shown(
    tops: Sequence[_Top], ids: Sequence[str], texts: Callable[[np.ndarray], list[str]]
) -> Callable[[_Top], list[dict[str, str]]]:
    """What shows the prompts of one of ``tops``, whose texts are asked for at once."""
    named = np.unique(np.concatenate([np.empty(0, np.int64), *(top.rows for top in tops)]))
    found = dict(zip(named.tolist(), texts(named), strict=True))
    return lambda top: [
        {"id": str(ids[i]), "text": " ".join(found[i].split())[:TEXT]} for i in top.rows.tolist()
    ]


class _Top:
    """The rows of the largest values seen, the first of equal ones."""

    def __init__(self) -> None:
        self.rows, self.values = np.empty(0, dtype=np.int64), np.empty(0)

    def add(self, rows: np.ndarray, values: np.ndarray) -> None:
        rows, values = np.r_[self.rows, rows].astype(np.int64), np.r_[self.values, values]
        order = np.lexsort((rows, -values))[:EXAMPLES]
        self.rows, self.values = rows[order], values[order]


def _mean(values: np.ndarray, labels: np.ndarray, label: int) -> float | None:
    """The mean of those that are known of one label."""
    total, count = 0.0, 0
    for part in slices(len(values)):
        some = values[part][labels[part] == label]
        known = some[np.isfinite(some)]
        total, count = total + float(known.sum(dtype=np.float64)), count + len(known)
    return total / count if count else None
