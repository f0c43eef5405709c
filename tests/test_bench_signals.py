"""The benchmark of signals: its table comes from what was kept of a forward pass."""

from __future__ import annotations

import json

import numpy as np

from benchmarks import bench_signals as bench


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
    assert "| default |" in capsys.readouterr().out and result["prompts"] == 400
