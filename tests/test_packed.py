"""Packed ids: the same as a list of strings, and every id is found in its row."""

import datetime
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from saerl_fast.errors import SaerlError
from saerl_fast.records import packed, spilled
from saerl_fast.records.packed import Packed, Rows

IDS = ["a", "", "größer", "日本", "x" * 300, "lone \ud800", "a b", "\0"]


def test_strings_come_back(monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", 3)
    ids = Packed.of(iter(IDS))
    assert len(ids) == 8 and list(ids) == IDS and [ids[i] for i in range(8)] == IDS
    assert ids[-1] == "\0" and ids[2:4] == IDS[2:4] and ids[::-3] == IDS[::-3]
    with pytest.raises(IndexError):
        ids[8]
    assert list(Packed.of([])) == []


class Clash(str):
    """Of one hash with all others."""

    def __hash__(self) -> int:
        return 7


@pytest.mark.parametrize("kind", [str, Clash])
def test_rows_are_found_also_where_hashes_are_equal(kind):
    ids = [kind(name) for name in IDS]
    rows = Rows(ids)
    assert [rows[name] for name in ids] == list(range(8)) and rows.repeated is None
    assert rows.get(kind("b")) is None
    with pytest.raises(KeyError):
        rows[kind("b")]
    assert Rows([*ids, kind("a b")]).repeated == "a b"


def test_rows_are_taken_and_missing_ids_found(monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", 3)
    names = [f"p{'ä' * (i % 3)}{i}" for i in range(10)] + [""]
    some = Packed.of(names)
    for rows in ([], [10], [3, 3, 0, 9, 10, 1, 2], list(range(11))):
        assert list(some.take(np.array(rows, dtype=np.int64))) == [names[i] for i in rows]
        assert list(packed.chosen(names, np.array(rows, dtype=np.int64))) == [names[i] for i in rows]
    assert Rows(some).lacking([*names, "x", "p1", "y"]) == ["x", "p1", "y"]
    assert Rows(some).lacking(names[::-1]) == [] and Rows([]).lacking(["a"]) == ["a"]


def test_rows_are_found_in_another_process():
    """Whose hashes of strings are other ones."""
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).of([*map(str, range(50)), 'x']))"
    for ids in ([str(i) for i in range(50)], Packed.of(map(str, range(50)))):
        for seed in "12":
            done = subprocess.run(
                [sys.executable, "-c", code],
                input=pickle.dumps(Rows(ids)),
                capture_output=True,
                check=True,
                env={**os.environ, "PYTHONHASHSEED": seed},
            )
            assert done.stdout.decode().strip() == str([*range(50), None])


def test_tokens_are_kept_in_one_array(monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", 2)
    rows = [[1, 2, 3], [], [70_000], [4, 5]]
    tokens = packed.Tokens.of(iter(rows))
    assert list(tokens) == rows and tokens[1:3] == rows[1:3] and tokens[-1] == [4, 5]
    assert tokens.array.dtype == np.int32 and len(packed.Tokens.of([])) == 0
    assert all(type(token) is int for row in tokens for token in row)


CELLS = [
    "text",
    'with "quotes"',
    "日本 \ud800",
    None,
    True,
    3,
    -2.5,
    float("inf"),
    [1, "a", None],
    {"a": {"b": []}},
]


@pytest.mark.parametrize("spill", [0, 1 << 26])
def test_cells_come_back_as_they_were(monkeypatch, spill):
    monkeypatch.setattr(packed, "BLOCK", 3)
    monkeypatch.setattr(packed, "LARGE", 4)
    monkeypatch.setattr(packed, "FEW", 4)
    monkeypatch.setattr(spilled, "SPILL", spill)
    cells = packed.kept(iter(CELLS))
    assert isinstance(cells, packed.Cells) and list(cells) == CELLS and len(cells) == 10
    assert [cells[i] for i in range(-10, 10)] == CELLS * 2 and cells[2:9] == CELLS[2:9] and cells[3:3] == []
    assert [type(cell) for cell in cells] == [type(cell) for cell in CELLS]
    rows = np.array([9, 0, 0, 4, 5, 7])
    assert list(cells.take(rows)) == [CELLS[i] for i in rows]
    assert packed.chosen(cells, [2, 1]) == [CELLS[2], CELLS[1]]  # few are a list
    assert isinstance(packed.chosen(cells, rows), packed.Cells)
    assert list(packed.Packed.of(map(str, CELLS))) == list(map(str, CELLS))


@pytest.mark.parametrize(
    "odd",
    [(1, 2), {1: 2}, [b"x"], np.float32(1), datetime.date(2020, 1, 1), 10**5000],
    ids=lambda odd: type(odd).__name__,
)
@pytest.mark.parametrize("place", [0, 7, 19])
def test_a_column_that_json_would_change_stays_a_list(monkeypatch, odd, place):
    monkeypatch.setattr(packed, "BLOCK", 3)
    monkeypatch.setattr(packed, "LARGE", 4)
    values = [*range(place), odd, *range(place + 1, 20)]
    column = packed.kept(iter(values))
    assert isinstance(column, list) and column == values and type(column[place]) is type(odd)


def test_few_values_stay_a_list_and_a_full_disk_is_said(monkeypatch):
    assert packed.kept(iter([1, 2])) == [1, 2] and isinstance(packed.strings(["a"], 1), list)
    monkeypatch.setattr(spilled, "SPILL", 0)

    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(spilled.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(SaerlError, match="No space left on device.*set TMPDIR"):
        packed.Packed.of(["a", "b"])
