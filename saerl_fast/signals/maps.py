"""A map of a pool's prompts: two coordinates for each of a sample of them, to be drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from saerl_fast.records.spilled import permutation
from saerl_fast.signals.features import Features, weighted

POINTS = 2000  # prompts on the map
TEXT = 120  # characters of each


def prompt_map(
    X: Features, weights: torch.Tensor, texts: Callable[[np.ndarray], list[str]], seed: int = 0
) -> dict[str, Any] | None:
    """Where some prompts lie by the features ``X`` [n, d_sae], times ``weights``, that clusters are made of.

    As JSON: ``row``, ``x``, ``y`` and ``text`` (cut) of POINTS rows at most, the same for the same ``seed``;
    ``of`` how many; ``method``: the first two principal components (pca), with the share of the variance that
    each explains, or, where umap-learn is installed, what UMAP (McInnes et al., arXiv 1802.03426) makes of
    cosine distances. None where fewer than four rows or columns leave nothing to draw, or all are alike.
    """
    at = np.sort(permutation(np.random.default_rng([seed, 7]), X.n_rows)[:POINTS])
    rows = weighted(X.select_rows(torch.from_numpy(at)), weights).to_scipy()
    if min(rows.shape) < 4 or (rows - rows[0].multiply(np.ones((len(at), 1)))).nnz == 0:
        return None
    made = _umap(rows, seed) or _pca(rows, seed)
    points = made.pop("points").astype(float).round(4)
    shown = [" ".join(text.split())[:TEXT] for text in texts(at)]
    where = {"row": at.tolist(), "x": points[:, 0].tolist(), "y": points[:, 1].tolist(), "text": shown}
    return {"of": X.n_rows, **made, **where}


def _pca(rows: Any, seed: int) -> dict[str, Any]:
    from sklearn.decomposition import PCA

    pca = PCA(2, svd_solver="arpack", random_state=seed)  # for sparse rows, whose mean it takes off unseen
    points = pca.fit_transform(rows.astype(np.float64))
    return {"method": "pca", "explained": pca.explained_variance_ratio_.tolist(), "points": points}


def _umap(rows: Any, seed: int) -> dict[str, Any] | None:
    try:
        from umap import UMAP
    except ImportError:
        return None
    return {
        "method": "umap",
        "points": UMAP(metric="cosine", random_state=seed, n_jobs=1).fit_transform(rows),
    }
