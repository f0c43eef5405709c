"""Packed ids: the same as a list of strings, and every id is found in its row."""

import pytest

from saerl_fast.plan import packed
from saerl_fast.plan.packed import Packed, Rows

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
