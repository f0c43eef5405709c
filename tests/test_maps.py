"""Maps of prompts: what lies together is drawn together, of a sample that does not change."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saerl_fast.signals import maps
from saerl_fast.signals.maps import prompt_map
from saerl_kernels import CSR


@pytest.fixture(autouse=True)
def without_umap(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)


def texts(rows):
    return [f"prompt\n{i} " + "x" * 500 for i in rows]


def groups(count=60):
    """Rows of three groups, told by three features, with noise in seven others."""
    rng = np.random.default_rng(0)
    dense = 0.2 * rng.random((count, 10), dtype=np.float32)
    dense[np.arange(count), np.arange(count) % 3] = 2.0
    return CSR.from_dense(torch.tensor(dense))


def test_groups_lie_apart():
    found = prompt_map(groups(), torch.ones(10), texts)
    json.dumps(found, allow_nan=False)
    at = np.c_[found["x"], found["y"]]
    centres = np.stack([at[np.arange(60) % 3 == g].mean(0) for g in range(3)])
    nearest = np.linalg.norm(at[:, None] - centres[None], axis=2).argmin(1)
    assert (nearest == np.arange(60) % 3).all()
    assert found["of"] == 60 and found["row"] == list(range(60)) and found["method"] == "pca"
    assert 0.5 < sum(found["explained"]) <= 1.0
    assert found["text"][7].startswith("prompt 7 xx") and len(found["text"][7]) == maps.TEXT


def test_a_large_pool_is_a_sample_that_the_seed_fixes(monkeypatch):
    monkeypatch.setattr(maps, "POINTS", 20)
    found = prompt_map(groups(), torch.ones(10), texts, 3)
    assert found["of"] == 60 and len(found["row"]) == len(set(found["row"])) == len(found["x"]) == 20
    assert found == prompt_map(groups(), torch.ones(10), texts, 3)
    assert found["row"] != prompt_map(groups(), torch.ones(10), texts, 4)["row"]
    assert all(
        text.startswith(f"prompt {row} ") for row, text in zip(found["row"], found["text"], strict=True)
    )


@pytest.mark.parametrize(
    "dense", [torch.ones(3, 10), torch.ones(50, 3), torch.ones(50, 10), torch.zeros(50, 10)]
)
def test_nothing_to_draw(dense):
    assert prompt_map(CSR.from_dense(dense), torch.ones(dense.shape[1]), texts) is None


def test_umap_draws_where_it_is_installed(monkeypatch):
    class UMAP:
        def __init__(self, **settings):
            self.settings = settings

        def fit_transform(self, rows):
            assert self.settings == {"metric": "cosine", "random_state": 5, "n_jobs": 1}
            return np.arange(2.0 * rows.shape[0]).reshape(-1, 2)

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP))
    found = prompt_map(groups(), torch.ones(10), texts, 5)
    assert found["method"] == "umap" and "explained" not in found and found["y"][:3] == [1.0, 3.0, 5.0]
