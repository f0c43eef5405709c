"""Near-copies of large pools: hashes find what the exact search finds, in time that grows with the rows."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch

from saerl_fast.signals import near, sketch
from saerl_fast.signals.copies import find_copies
from saerl_fast.signals.sketch import Groups, Sketches, agreeing
from saerl_kernels import CSR


def pool(count: int, copies: int) -> tuple[list[str], CSR]:
    """Texts of random words, ``copies`` of them again with a word in ten replaced, and their words."""
    rng = random.Random(0)
    texts = [" ".join(f"word{_letters(rng.randrange(900))}" for _ in range(30)) for _ in range(count)]
    for text in texts[:copies]:
        words = text.split()
        for place in rng.sample(range(30), 3):
            words[place] = f"other{_letters(rng.randrange(900))}"
        texts.append(" ".join(words))
    names = {word: i for i, word in enumerate(sorted({w for text in texts for w in text.split()}))}
    dense = torch.zeros(len(texts), len(names))
    for row, text in enumerate(texts):
        for word in text.split():
            dense[row, names[word]] += 1
    return texts, CSR.from_dense(dense)


def _letters(number: int) -> str:  # digits would be the same word
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


def found(texts: list[str], X: CSR) -> tuple[np.ndarray, dict]:
    return find_copies(X, texts, ["1"] * len(texts), [f"p{i}" for i in range(len(texts))])


def test_hashes_find_what_the_exact_search_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, X = pool(300, 120)
    exact, about = found(texts, X)
    assert about["near"] == 120 and about["recall"] is None
    monkeypatch.setattr(near, "EXACT", 100)
    hashed, said = found(texts, X)
    assert hashed.tolist() == exact.tolist() and said["near"] == 120
    assert said["recall"] == 1.0 and said["unsure"] == 0 and "p0 ~ p300" in [*about["examples"].split(", ")]


def test_what_hashes_miss_is_measured_and_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    texts, X = pool(200, 80)
    exact, _ = found(texts, X)
    monkeypatch.setattr(near, "EXACT", 100)
    monkeypatch.setattr(near, "BANDS", 1)  # finds about a third
    hashed, said = found(texts, X)
    assert 0.05 < said["recall"] < 0.9 and hashed.tolist() == exact.tolist()  # all rows are among CHECKED
    monkeypatch.setattr(near, "CHECKED", 20)
    assert 0 < found(texts, X)[1]["near"] < 80


def test_pairs_grow_with_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    alike = Sketches.alike

    def counted(self: Sketches, i: np.ndarray, j: np.ndarray, least: float):
        seen.append(len(i))
        return alike(self, i, j, least)

    monkeypatch.setattr(Sketches, "alike", counted)
    monkeypatch.setattr(near, "EXACT", 10)
    monkeypatch.setattr(near, "CHECKED", 0)
    pairs = []
    for count in (200, 800):
        seen.clear()
        found(*pool(count, count // 2))
        pairs.append(sum(seen))
    assert 400 <= pairs[1] < 6 * pairs[0]


def test_rows_of_one_template_are_bounded_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "EXACT", 10)
    monkeypatch.setattr(near, "MOST", 5)
    template = " ".join(f"word{_letters(i)}" for i in range(40))
    texts = [f"{template} name{_letters(i)}" for i in range(60)]
    dense = torch.zeros(61, 30)
    dense[:60, :29], dense[60, 29] = 1.0, 1.0
    of, about = found([*texts, "who"], CSR.from_dense(dense))
    assert about["unsure"] > 0 and about["near"] == 59 and set(of[1:60]) == {0}


def test_agreeing_pairs_are_those_with_equal_keys() -> None:
    keys = np.random.default_rng(0).integers(0, 40, 200).astype(np.uint64)
    wanted = {(i, j) for i in range(200) for j in range(i + 1, 200) if keys[i] == keys[j]}
    pairs = [pair for i, j, _ in agreeing(keys, 200) for pair in zip(i.tolist(), j.tolist(), strict=True)]
    assert set(pairs) == wanted and len(pairs) == len(wanted)
    more = np.concatenate([rows for *_, rows in agreeing(keys, 2)])
    assert len(more) == sum(max(count - 3, 0) for count in Counter(keys.tolist()).values())


def test_words_count_as_often_as_they_occur() -> None:
    words = Sketches([Counter(a=3, b=1), Counter(a=1, b=1, c=2), Counter(), Counter()])
    one, other = np.array([0, 2]), np.array([1, 3])
    assert [side.tolist() for side in words.alike(one, other, 0.5)] == [[0, 2], [1, 3]]  # 2 of 4
    assert [side.tolist() for side in words.alike(one, other, 0.51)] == [[2], [3]]
    assert (words.keys(0)[2] == words.keys(0)[3]) and (words.keys(0) != words.keys(1)).all()


def test_groups_are_known_by_their_first_row() -> None:
    groups = Groups(6)
    assert groups.join(4, 5) and groups.join(5, 2) and groups.join(1, 4) and not groups.join(2, 1)
    assert groups.flat().tolist() == [0, 1, 1, 3, 1, 1]


def test_agreement_has_the_probability_of_minhash() -> None:
    rng = random.Random(1)
    bags = []
    for _ in range(400):  # pairs with a Jaccard index of one half
        words = [str(rng.random()) for _ in range(40)]
        bags += [Counter(words[:30]), Counter(words[10:])]
    words = Sketches(bags)
    share = np.mean([(words.keys(band)[::2] == words.keys(band)[1::2]).mean() for band in range(24)])
    assert share == pytest.approx(0.5**sketch.ROWS, rel=0.35)
