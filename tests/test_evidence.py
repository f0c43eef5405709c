"""The evidence: its table is that of the kept curves, and benchmarks/README.md says what it says."""

from __future__ import annotations

import json

import pytest

from benchmarks import evidence


def test_the_summary_and_the_table_come_from_the_curves():
    found = json.loads((evidence.OUT / "summary.json").read_text())
    text = (evidence.ROOT / "benchmarks" / "README.md").read_text()
    assert found
    for pool in dict.fromkeys(line["pool"] for line in found):
        curves = json.loads((evidence.OUT / f"{pool}.json").read_text())
        mine = [line for line in found if line["pool"] == pool]
        assert evidence.lines(pool, curves, 3) == mine
        assert all(evidence.row(line) in text for line in mine)


def test_a_line_is_the_paired_comparison():
    steps = [0, 10, 20, 30]
    slow, fast = [0.4, 0.44, 0.48, 0.52], [0.4, 0.48, 0.56, 0.64]
    curves = {
        arm: {
            str(s): {"steps": steps, "accuracy": [a + s / 1000 for a in values], "used": 0.5}
            for s in range(4)
        }
        for arm, values in (("vanilla", slow), ("adaptive", fast))
    }
    first, second = evidence.lines("demo", curves, 1)
    assert first["saved"] == pytest.approx(0.5, abs=1e-3) == second["saved"] and first["pairs"] == 4
    assert first["low"] <= first["saved"] <= first["high"] and first["final_adaptive"] == pytest.approx(
        0.6415
    )
    assert evidence.row(first).startswith("| demo | 0.463 | 4 | 50% [50%, 50%] | 50% | 50% |")


def test_pools_differ_in_what_is_beyond_the_model(tmp_path):
    hardness = {}
    for pool in evidence.POOLS:
        config = evidence.configured(pool, [200, 201], tmp_path)
        rows = [json.loads(line) for line in (tmp_path / f"{pool}.jsonl").read_text().splitlines()]
        hardness[pool] = sum(row["level"] == 5 for row in rows)
        assert config.compare.seeds == [200, 201] and config.compare.arms == ["vanilla", "adaptive"]
    assert hardness["easy"] < hardness["demo"] < hardness["hard"]
    shipped = (evidence.ROOT / "examples" / "demo" / "pool.jsonl").read_text()
    assert [json.loads(line) for line in shipped.splitlines()] == [
        json.loads(line) for line in (tmp_path / "demo.jsonl").read_text().splitlines()
    ]
