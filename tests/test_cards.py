"""The cards say of each cluster what was planted in it."""

from __future__ import annotations

import json

import numpy as np
import torch

from saerl_fast.signals import cards as module
from saerl_fast.signals.cards import cards, carriers
from saerl_kernels import CSR


def make(monkeypatch=None, block: int = 1 << 14):
    labels = np.array([1, 0, 1, 1, 0, 2])
    dense = np.zeros((6, 8), dtype=np.float32)
    dense[:, 7] = 1.0  # in all rows
    dense[np.arange(6), labels] = [1, 2, 5, 3, 4, 1]
    signals = {"difficulty": np.array([0.2, 0.5, 0.4, np.nan, 0.7, np.nan])}
    texts = lambda rows: [f"text {i}\nof {labels[i]} " + "x" * 500 for i in rows]  # noqa: E731
    return cards(CSR.from_dense(torch.tensor(dense)), torch.ones(8), labels, list("abcdef"), texts, signals)


def test_cards_by_hand():
    found = make()
    assert [(card["cluster"], card["size"]) for card in found] == [(1, 3), (0, 2), (2, 1)]
    first = found[0]
    assert [feature["feature"] for feature in first["features"]] == [1]
    assert [prompt["id"] for prompt in first["features"][0]["prompts"]] == ["c", "d", "a"]
    assert first["difficulty"] == np.mean([0.2, 0.4]) and found[2]["difficulty"] is None
    assert {prompt["id"] for prompt in first["prompts"]} == {"a", "c", "d"}
    assert first["prompts"][0]["text"].startswith("text 3 of 1 x") and len(first["prompts"][0]["text"]) == 160
    json.dumps(found, allow_nan=False)


def test_cards_are_bounded_and_made_in_parts(monkeypatch):
    whole = make()
    monkeypatch.setattr("saerl_fast.signals.features.BLOCK", 2)
    assert make() == whole
    monkeypatch.setattr(module, "CARDS", 1)
    assert make() == whole[:1]


def test_carriers_are_the_strongest_features_with_their_prompts(monkeypatch):
    dense = np.zeros((6, 8), dtype=np.float32)
    dense[:, 2], dense[:, 5] = range(6), [9, 0, 0, 0, 0, 1]
    X, effects = CSR.from_dense(torch.tensor(dense)), np.array([0, 0.1, -0.3, 0, 0, 0.2, 0, 0])
    texts = lambda rows: [f"text\n{i} " + "x" * 500 for i in rows]  # noqa: E731
    found = carriers(X, effects, list("abcdef"), texts)
    assert [(one["feature"], one["effect"]) for one in found] == [(2, -0.3), (5, 0.2), (1, 0.1)]
    assert [[prompt["id"] for prompt in one["prompts"]] for one in found] == [["f", "e", "d"], ["a", "f"], []]
    assert (
        found[0]["prompts"][0]["text"].startswith("text 5 x") and len(found[0]["prompts"][0]["text"]) == 160
    )
    monkeypatch.setattr(module, "CARRIERS", 1)
    assert carriers(X, effects, list("abcdef"), texts) == found[:1]
    assert carriers(X, np.zeros(8), list("abcdef"), texts) == []
