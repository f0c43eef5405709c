"""The benchmark of signals: its table comes from what was kept of a forward pass."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import bench_signals as bench
from benchmarks import pool


def test_the_table_comes_from_what_was_kept(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    level = rng.integers(0, 6, 400)
    rows = [
        {"id": f"r{i}", "problem": f"What is it? {'Really? ' * int(k)}", "answer": 1, "pass_rate": 1 - k / 5}
        for i, k in enumerate(level)
    ]
    pool, work = tmp_path / "pool.jsonl", tmp_path / "work"
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    work.mkdir()
    kinds = {name: rng.random((400, 5), dtype=np.float32) for name in bench.STORED}
    kinds["scalars"][:, 2] = level
    order = rng.permutation(400)
    for part, some in enumerate(np.array_split(order, 2)):
        ids = np.array([f"r{i}" for i in some])
        np.savez(work / f"part-{part}.npz", ids=ids, **{name: rows[some] for name, rows in kinds.items()})
    (work / "complete").touch()
    monkeypatch.setattr(bench, "COUNTS", (40,))
    monkeypatch.setattr(bench, "SPREAD", (40,))
    bench.main([str(pool), "--work", str(work), "--out", str(tmp_path / "out.json"), "--draws", "2"])
    result = json.loads((tmp_path / "out.json").read_text())
    found = {name: row["40"]["mean"] for name, row in result["spearman"].items()}
    assert min(found[name] for name in ("text", "length", "scalars", "default", "all")) > 0.8
    assert max(found[name] for name in ("hidden", "random", "sae")) < 0.4
    assert "within tasks" not in result["spearman"]["default"]
    assert "| default |" in capsys.readouterr().out and result["prompts"] == 400


def test_what_only_tells_tasks_apart_says_nothing_within_them():
    tasks = np.repeat(["a", "b"], 50)
    failed = np.r_[np.linspace(0, 0.4, 50), np.linspace(0.6, 1, 50)]
    assert bench._within(failed, failed, tasks) == pytest.approx(1)
    assert bench._within(np.repeat([0.0, 1.0], 50), failed, tasks) == 0


def test_small_pools_are_tested_on_what_each_draw_leaves():
    known = np.arange(100, 700)
    tested, labelled = bench.split(known, 0)
    assert sorted([*tested, *labelled]) == known.tolist() and len(labelled) == 300
    assert (bench.split(known, 1)[0] != tested).any()
    large = np.arange(5000)
    (tested, first), (again, second) = bench.split(large, 0), bench.split(large, 1)
    assert (tested == again).all() and (first != second).any() and not set(first) & set(tested)


def test_a_pool_of_tasks_is_made_once(tmp_path, monkeypatch):
    """The model's pass rates of the prompts that were tried; a second call needs no model."""
    asked = {"prompt_id": list("abc"), "prompt": ["A?", "B?", "C?"], "answer": list("123"), "task": ["t"] * 3}
    seen = []

    def opened(config, echo):
        seen.append(config)
        return SimpleNamespace(train=SimpleNamespace(column=asked.__getitem__))

    monkeypatch.setattr(pool.Session, "open", opened)
    labels = lambda *_: (np.array([0.25, np.nan, 1.0]), {})  # noqa: E731
    monkeypatch.setattr("saerl_fast.stages.labels.difficulty_labels", labels)
    rows = pool.rows_of(pool.made("reasoning-gym:t", tmp_path / "work", "M", "auto"))
    first = {"id": "a", "problem": "A?", "answer": "1", "task": "t", "pass_rate": 0.25}
    assert rows[0] == first and [row["id"] for row in rows] == ["a", "c"]
    assert seen[0].data.train == "reasoning-gym:t" and seen[0].difficulty.n_labels == pool.TRIED
    assert (
        pool.rows_of(pool.made("reasoning-gym:t", tmp_path / "work", None, "auto")) == rows and len(seen) == 1
    )


def test_prompts_are_drawn_without_a_model(tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(pool, "UNTRIED", 20)
    rows = pool.rows_of(pool.drawn("reasoning-gym:syllogism,aiw", tmp_path))
    assert len({row["problem"] for row in rows}) == 20 and {row["task"] for row in rows} == {
        "syllogism",
        "aiw",
    }
    assert all(row["pass_rate"] is None and row["answer"] for row in rows)
