from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from saerl_fast.records import rows
from saerl_fast.records.rows import blocks, parse


def made(n: int, seed: int = 0) -> list[dict]:
    """Rows as the trainer writes them, with what may be missing missing here and there."""
    rng, found = random.Random(seed), []
    for step in range(1, n + 1):
        row = {"step": step, "kind": "train", "reward": rng.random() if step % 7 else None, "pass_rate": 0.25}
        row |= {
            "groups": 4,
            "groups_used": step % 5,
            "rollouts": 16,
            "plan": {"target": 0.5},
            "text": "\u00e9\\n",
        }
        row["time"] = {"generate": rng.random(), "mine": 1.0} | ({"encode": 2.0} if step % 3 == 0 else {})
        if step % 11 == 0:
            row["alarms"] = ["no signal", "mismatch"]
            row |= {"begun": ["mismatch"]} if step % 22 == 0 else {}
        found.append(row)
        if step % 10 == 0:
            found.append({"step": step, "kind": "eval", "accuracy": rng.random(), "mode": "greedy", "n": 3})
    return found


def lines(found: list[dict]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in found)


def same(one: rows.Block, two: rows.Block) -> None:
    assert one.step.tolist() == two.step.tolist() and one.kind.tolist() == two.kind.tolist()
    assert one.mode.tolist() == two.mode.tolist() and one.alarms == two.alarms
    for a, b in ((one.figures, two.figures), (one.seconds, two.seconds)):
        for name in a.keys() | b.keys():
            nothing = np.full(len(one.step), np.nan)
            np.testing.assert_array_equal(a.get(name, nothing), b.get(name, nothing), name)


def test_both_readers_find_the_same() -> None:
    data = lines(made(200))
    fast = rows._with_arrow(data)
    assert fast is not None
    same(fast, rows._with_json(data))
    assert fast.alarms[11 - 1 + 1] == (
        ["no signal", "mismatch"],
        [],
    )  # a row of an evaluation stands before it


DAMAGED = [b'{"step"', b"[1]", b"3", b'{"kind": "train"}', b'{"step": "1", "kind": "train"}', b"\xff\xfe",
           b'{"step": -1, "kind": "eval"}', b'{"step": true, "kind": "train"}',
           b'{"step": 1e3, "kind": "train"}',
           b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b', "kind": "train"}', b"\0\0\0"]  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_counted_and_the_others_kept(line: bytes, monkeypatch) -> None:
    monkeypatch.setattr(rows, "SMALL", 0)
    data = lines(made(30))
    cut = data.find(b"\n", len(data) // 2) + 1
    found = parse(data[:cut] + line + b"\n" + data[cut:])
    assert found.damaged == 1
    same(found, rows._with_json(data))


@pytest.mark.parametrize("value", ['"x"', "[1]", "{}", "true", "1e999", "9" * 400, "NaN", "-Infinity"])
def test_a_figure_that_is_none_is_unknown(value: str, monkeypatch) -> None:
    monkeypatch.setattr(rows, "SMALL", 0)
    data = f'{{"step": 1, "kind": "train", "reward": {value}, "pass_rate": 0.5, "time": {value}}}\n'.encode()
    found = parse(data)
    assert math.isnan(found.figures["reward"][0]) and found.figures["pass_rate"].tolist() == [0.5]
    assert not found.damaged and not any(np.isfinite(v).any() for v in found.seconds.values())


@pytest.mark.parametrize("size", [64, 1000, 1 << 20])
def test_blocks_of_any_size_are_one_file(tmp_path, monkeypatch, size: int) -> None:
    monkeypatch.setattr(rows, "BLOCK", size)
    data = lines(made(40))
    (tmp_path / "m").write_bytes(data + b'{"step": 41, "ki')
    found = [*blocks(tmp_path / "m", 0, whole=True)]
    assert b"".join(part for _, part in found) == data and not any(block.damaged for block, _ in found)
    assert [s for block, _ in found for s in block.step] == [row["step"] for row in made(40)]
    later = [*blocks(tmp_path / "m", len(data) // 2, whole=False)]
    assert b"".join(part for _, part in later) == data[len(data) // 2 :]


def test_a_last_row_without_a_line_end_counts_when_the_file_is_whole(tmp_path) -> None:
    (tmp_path / "m").write_bytes(lines(made(2)).rstrip(b"\n"))
    assert [len(block.step) for block, _ in blocks(tmp_path / "m", 0, whole=True)] == [1, 1]
    assert [len(block.step) for block, _ in blocks(tmp_path / "m", 0, whole=False)] == [1]
