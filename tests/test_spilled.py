"""Arrays of a large pool, made a block at a time and lying in files, are those that numpy makes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from saerl_fast.errors import SaerlError
from saerl_fast.records import spilled
from saerl_fast.signals import cards, copies, near
from saerl_fast.signals.bank import Bank
from saerl_kernels import CSR

SIZES = [0, 1, 3, 4, 5, 8, 29, 100]


@pytest.fixture(params=["in memory", "in files"])
def places(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "in files":
        for name, value in {"BLOCK": 4, "SPILL": 8, "BUCKET": 3}.items():
            monkeypatch.setattr(spilled, name, value)
    return str(request.param)


def mapped(array: np.ndarray) -> bool:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return isinstance(array, np.memmap)


@pytest.mark.parametrize("count", SIZES)
def test_like_numpy(count: int, places: str) -> None:
    rng = np.random.default_rng(count)
    values, rows = rng.random(count), rng.integers(0, max(count, 1), 2 * count)
    labels = rng.integers(0, 5, count).astype(np.int32)
    pairs: list[tuple[np.ndarray, np.ndarray]] = [
        (spilled.full(count, np.nan, np.float32), np.full(count, np.nan, np.float32)),
        (spilled.arange(count), np.arange(count)),
        (spilled.permutation(np.random.default_rng(7), count), np.random.default_rng(7).permutation(count)),
        (spilled.taken(values, rows), values[rows]),
        (spilled.rows_where(lambda part: values[part] < 0.5, count), np.flatnonzero(values < 0.5)),
        (spilled.firsts(rows), np.flatnonzero(rows == np.arange(2 * count))),
        (spilled.counted(labels), np.bincount(labels)),
        (spilled.from_iter(iter(values.tolist()), count, np.float64), values),
        (spilled.by_block(lambda part: values[part] * 2, count, np.float32), (values * 2).astype(np.float32)),
    ]
    for found, wanted in pairs:
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
        if wanted is not pairs[6][1]:
            assert mapped(found) == (places == "in files" and found.nbytes > 8)
    assert list(spilled.each(values)) == values.tolist()


@pytest.mark.parametrize("count", SIZES)
def test_chains_end(count: int, places: str) -> None:
    root = np.array([np.random.default_rng([count, i]).integers(0, i + 1) for i in range(count)], np.int64)
    ends = []
    for row in range(count):
        while root[row] != row:
            row = root[row]
        ends.append(row)
    assert spilled.flattened(root).tolist() == ends


@pytest.mark.parametrize("count", SIZES)
def test_buckets_have_every_row_once_and_equal_keys_together(count: int, places: str) -> None:
    rng = np.random.default_rng(count)
    keys = rng.integers(0, 2**64, max(count // 2, 1), dtype=np.uint64)[
        rng.integers(0, max(count // 2, 1), count)
    ]
    found = list(spilled.buckets(keys))
    assert len(found) == (1 << (count // 3).bit_length() if places == "in files" else 1)
    assert sorted(np.concatenate(found).tolist()) == list(range(count))
    assert all((np.diff(rows) > 0).all() for rows in found)
    held = [set(keys[rows].tolist()) for rows in found]
    assert sum(map(len, held)) == len(set(keys.tolist()))
    tops = [max(some) for some in held if some]
    assert tops == sorted(tops)  # in the order of keys


@pytest.mark.parametrize("count", SIZES)
def test_the_first_of_equal_keys(count: int, places: str) -> None:
    names = [f"k{i}\ud800" for i in np.random.default_rng(count).integers(0, count // 2 + 1, count)]
    assert spilled.first_equal(iter(names)).tolist() == [names.index(name) for name in names]


def test_what_is_written_to_a_file_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spilled, "SPILL", 8)
    array, other = spilled.empty(100, np.int32), spilled.empty(100, np.int32)
    array[:], other[:] = 1, 2
    assert mapped(array) and array.sum() == 100 and other.sum() == 200


def test_a_full_disk_is_said_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spilled, "SPILL", 8)

    class Full:
        def write(self, _: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(spilled.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(SaerlError, match="No space left on device.; set TMPDIR"):
        spilled.arange(10)


@pytest.mark.parametrize("make", [lambda: spilled.arange(10), lambda: spilled.first_equal("abcdef")])
def test_no_folder_and_no_room_to_map_are_said(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spilled, "SPILL", 8)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(np, "memmap", refuse)
        with pytest.raises(SaerlError, match="do not fit into .*Too many open files"):
            make()
    monkeypatch.setattr(spilled.tempfile, "tempdir", None)
    monkeypatch.setattr(spilled.tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    with pytest.raises(SaerlError, match="do not fit into a temporary folder .*set TMPDIR"):
        make()


def test_too_few_values_are_an_error(places: str) -> None:
    with pytest.raises(ValueError):
        spilled.from_iter(iter([7]), 5, np.int64)


def test_answers_that_differ(places: str) -> None:
    """Against all answers of each text, side by side."""
    rng = np.random.default_rng(3)
    for _ in range(60):
        count = int(rng.integers(1, 40))
        texts = [f"t{i}" for i in rng.integers(0, count // 2 + 1, count)]
        answers: list[Any] = [[None, "1", "1.0", "2", "x"][i] for i in rng.integers(0, 5, count)]
        ids = [f"p{i}" for i in range(count)]
        same = copies.same_text(texts)
        rows = {first: np.flatnonzero(same == first) for first in sorted(set(same.tolist()))}
        apart = [
            ", ".join(ids[i] for i in of[: copies.NAMED])
            for of in rows.values()
            if len({copies._meant(answers[i]) for i in of} - {None}) > 1
        ]
        wanted = {"conflicting": len(apart), "conflicts": "; ".join(apart[: copies.NAMED]) or None}
        assert copies._conflicts(same, answers, ids) == wanted


def test_means_of_labels(places: str) -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0, np.inf, 7.0, np.nan], dtype=np.float32)
    labels = np.array([0, 0, 0, 1, 1, 1, 2])
    assert [cards._mean(values, labels, c) for c in range(3)] == [2.0, 6.0, None]
    many = np.full(1 << 16, 0.1, dtype=np.float32)
    assert cards._mean(many, np.zeros(len(many), np.int32), 0) == pytest.approx(float(many[0]), rel=1e-12)


@pytest.mark.parametrize("known", [0, 5, 40, 90])
def test_rows_that_are_fitted(known: int, places: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saerl_fast.signals.bank.SAMPLE", 30)
    monkeypatch.setattr("saerl_fast.signals.bank.MOST", 50)
    labelled = np.zeros(100, dtype=bool)
    labelled[np.random.default_rng(1).permutation(100)[:known]] = True
    order = np.random.default_rng([4, 3]).permutation(100)
    mine = order[labelled[order]][:50]
    wanted = np.sort(np.r_[mine, order[~labelled[order]][: max(30 - len(mine), 0)]])
    bank = Bank(CSR.empty(100, 4), ["p"] * 100)
    np.testing.assert_array_equal(bank.fitted(labelled, 4), wanted)


@pytest.mark.parametrize("held", [1, 1 << 20])
def test_copies_do_not_depend_on_how_many_pairs_are_held(
    held: int, monkeypatch: pytest.MonkeyPatch, places: str
) -> None:
    rng = np.random.default_rng(5)
    words = ["".join(chr(97 + i) for i in rng.integers(0, 26, 6)) for _ in range(300)]
    texts, groups = [], []
    for group in range(30):
        mine = [words[i] for i in rng.permutation(300)[:20]]
        for copy in range(int(rng.integers(1, 6))):
            texts.append(" ".join(mine[:-1] + [words[copy]]))
            groups.append(group)
    X = CSR.from_dense(_rows(groups))
    find: Callable[[], copies.Copies] = lambda: copies.find_copies(X, texts, texts, texts)  # noqa: E731
    exact = find()
    monkeypatch.setattr(near, "EXACT", 5)
    for name in ("MANY", "PRODUCTS"):
        monkeypatch.setattr(near, name, held)
    hashed = find()
    np.testing.assert_array_equal(hashed.of, exact.of)
    assert hashed.metrics["near"] == exact.metrics["near"] == len(texts) - 30 > 30
    assert hashed.metrics["recall"] == 1.0


def _rows(groups: list[int]) -> Any:
    import torch

    rows = torch.rand(30, 80, generator=torch.Generator().manual_seed(1))
    return torch.where(rows < 0.2, rows + 0.5, 0.0)[groups]
