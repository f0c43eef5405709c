"""Packed ids: the same as a list of strings, and every id is found in its row."""

import numpy as np
import pytest

from saerl_fast.records import packed
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


def test_tokens_are_kept_in_one_array(monkeypatch):
    monkeypatch.setattr(packed, "BLOCK", 2)
    rows = [[1, 2, 3], [], [70_000], [4, 5]]
    tokens = packed.Tokens.of(iter(rows))
    assert list(tokens) == rows and tokens[1:3] == rows[1:3] and tokens[-1] == [4, 5]
    assert tokens.ids.dtype == np.int32 and len(packed.Tokens.of([])) == 0
    assert all(type(token) is int for row in tokens for token in row)
