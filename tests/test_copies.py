"""Prompts that repeat others are found whatever was changed, and nothing else is."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from saerl_fast.signals import copies, near, sketch
from saerl_fast.signals.copies import find_copies, same_text
from saerl_fast.signals.features import weighted
from saerl_kernels import CSR, csr

STORY = "Alice has {} red apples and gives {} of them to her good friend Bob before lunch. How many are left?"


def features(groups: list[int], d: int = 60, seed: int = 0) -> CSR:
    """Rows of one group are alike, those of others are not."""
    rng = np.random.default_rng(seed)
    centre = (rng.random((max(groups) + 1, d)) < 0.3) * rng.gamma(3.0, 1.0, (max(groups) + 1, d))
    dense = np.maximum(centre[groups] + 0.02 * rng.normal(size=(len(groups), d)) * (centre[groups] > 0), 0)
    return CSR.from_dense(torch.tensor(dense, dtype=torch.float32))


def found(texts: list[str], groups: list[int], answers: list[str] | None = None, **settings):
    ids = [f"p{i}" for i in range(len(texts))]
    return find_copies(features(groups), texts, answers or ["1"] * len(texts), ids, **settings)


def test_copies_of_every_kind() -> None:
    texts = [
        STORY.format(7, 3),
        STORY.format(7, 3).upper().replace(" ", "  "),  # spaces and case
        STORY.format(9, 4),  # numbers
        STORY.format(7, 3).replace("Alice", "Carol").replace("Bob", "Dan"),  # names
        STORY.format(11, 2).replace("Alice", "Emma"),  # both
        "What is the derivative of the sine of x at the origin, and why is it so?",
        STORY.format(7, 3).replace("Alice", "Ruth"),  # its features are others
    ]
    result = found(texts, [0, 0, 0, 0, 0, 1, 2])
    assert result.of.tolist() == [-1, 0, 0, 0, 0, -1, -1] and result.of.dtype == np.int32
    assert {k: result.metrics[k] for k in ("rows", "renumbered", "near", "unsure")} == {
        "rows": 1,
        "renumbered": 1,
        "near": 2,
        "unsure": 0,
    }
    assert result.metrics["examples"] == "p0 ~ p3, p0 ~ p4"
    assert found(texts, [0, 0, 0, 0, 0, 1, 2], near=1.0).of.tolist() == [-1, 0, 0, -1, -1, -1, -1]


def test_what_nobody_sees_makes_no_other_text() -> None:
    seen = "Zoë buys 3 cafés. How many?"
    texts = [seen, seen.replace("ë", "e\u0308"), seen.replace("é", "e\u0301") + "\u200b", "\ufeff" + seen]
    texts += [seen.replace("3 ", "3\u00a0"), seen.replace("3", "³"), seen.replace("o", "\u043e")]
    assert same_text(texts).tolist() == [0, 0, 0, 0, 0, 5, 6]  # a power and a Cyrillic letter are others


def test_like_features_with_other_words_are_no_copies() -> None:
    texts = [
        "Compute the greatest common factor of 12 and 18.",
        "Compute the least common multiple of 12 and 18.",
    ]
    assert found(texts, [0, 0]).metrics["near"] == 0


def test_one_text_with_two_answers_is_named(caplog: pytest.LogCaptureFixture) -> None:
    result = found(["What is 1+1?", "what  is 1+1?", "What is 2+2?"], [0, 0, 1], ["2", "3", "4"])
    assert result.metrics["conflicting"] == 1 and result.metrics["conflicts"] == "p0, p1"
    assert result.of.tolist() == [-1, 0, 0] and "p0, p1" in caplog.text
    assert found(["What is 1+1?", "what  is 1+1?"], [0, 0], ["2", " 2"]).metrics["conflicting"] == 0


@pytest.mark.parametrize("least", [0.5, 0.8, 0.95])
def test_the_search_is_exact(least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    X = features(rng.integers(0, 60, 300).tolist(), d=90, seed=2)
    rows = weighted(X, csr.idf(X)).to_scipy()
    close = np.triu((rows @ rows.T).toarray(), 1) >= least
    monkeypatch.setattr(near, "STEP", 37)
    monkeypatch.setattr(near, "DIRECTIONS", 8)
    monkeypatch.setattr(near, "MOST", 300)
    pairs = {
        tuple(sorted(pair))
        for i, j, _ in near.neighbours(X, np.full(300, 20), least, 0)
        for pair in zip(i.tolist(), j.tolist(), strict=True)
    }
    assert pairs == set(zip(*map(np.ndarray.tolist, np.nonzero(close)), strict=True)) and len(pairs) > 100


def test_a_template_stays_one_group_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "MOST", 5)
    texts = [STORY.format(3, 1).replace("Alice", "X" + "abcdefghij"[i % 10] * 3) for i in range(40)]
    texts = [text + " Say" * (i // 10) for i, text in enumerate(texts)]
    result = found([*texts, "Who?"], [0] * 40 + [1])
    assert (result.of[:40] <= 0).all() and result.metrics["near"] == 39 and result.metrics["unsure"] > 0


@pytest.mark.parametrize("texts", [[], ["one"], ["", ""], ["", "a"]])
def test_few_and_empty_texts(texts: list[str]) -> None:
    X = CSR.empty(len(texts), 4)
    assert len(find_copies(X, texts, [None] * len(texts), ["i"] * len(texts)).of) == len(texts)
    assert same_text(texts).tolist() == ([0, 0] if texts == ["", ""] else list(range(len(texts))))


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ("1/2", "$0.5$", False),
        ("1,000", "1000.0", False),
        ("Yes.", " yes", False),
        ("4", None, False),
        ("4", "5", True),
        ("1,2", "12", True),
        ("1/0", "0", True),
        ("1e999999999", "2", True),
        ("9" * 5000, "9", True),
    ],
)
def test_answers_conflict_that_cannot_mean_the_same(one, other, differ):
    found = copies._conflicts(np.array([0, 0, 2]), [one, other, "7"], ["a", "b", "c"])
    assert found == {"conflicting": int(differ), "conflicts": "a, b" if differ else None}


def test_no_long_word_is_kept_when_its_text_is_gone() -> None:
    words, long = list("abcde"), [letter * size for letter in "abc" for size in (1, 40, 5000)]
    sketch._kept.cache_clear()
    found = sketch.Sketches(map(Counter, (words, long, long))).words
    assert found[0] == sorted(map(sketch._hash, words)) and found[1] == sorted(map(sketch._hash, long))
    assert found[1] == found[2] and sketch._kept.cache_info().currsize == 5
