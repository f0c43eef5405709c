"""The benchmark of signals: its defects are what they say, and its tables come from what was kept."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from benchmarks import bench_signals as bench

TEXT = "There are 12 red balls and some blue ones in a box, twice as many blue as red. How many are blue?"


@pytest.mark.parametrize("name", bench.DEFECTS)
def test_a_defect_is_made_only_where_it_can_be(name):
    spoil = bench.DEFECTS[name]
    made = spoil(TEXT, random.Random(0))
    assert made and (made == TEXT) == (name == "wrong_answer")
    if name == "truncated":
        assert TEXT.startswith(made) and len(made) < 0.8 * len(TEXT)
    if name == "question_removed":
        assert made.endswith("red.")
    if name == "figure_missing":
        assert "12" not in made and any(words in made for words in bench.FIGURES)
        assert spoil("No number at all.", random.Random(0)) is None
    assert name == "wrong_answer" or spoil("Hi.", random.Random(0)) is None


def test_tables_from_what_was_kept(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    rows = [
        {"id": i, "problem": f"{TEXT} {'Really? ' * int(k)}", "answer": 1, "pass_rate": float(1 - k / 5)}
        for i, k in enumerate(rng.integers(0, 6, 400))
    ]
    pool, work = tmp_path / "pool.jsonl", tmp_path / "work"
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    work.mkdir()
    bench.make_pool(pool, work / "pool.jsonl")
    made = [json.loads(line) for line in (work / "pool.jsonl").read_text().splitlines()]
    copied = {row["id"].split("-")[1] for row in made[400:]}
    assert len(made[400:]) == 6 * 33 == len(copied)
    assert not copied & {row["id"] for row in made[:400] if row["part"] == "quality"}
    ids = np.array([row["id"] for row in made])
    parts = {
        "sae": rng.random((len(ids), 9)),
        "mean": rng.random((len(ids), 4)),
        "last": np.ones((len(ids), 4)),
    }
    np.savez(work / "part-0.npz", ids=ids, **parts)
    (work / "sae").mkdir()
    (work / "sae" / "train.json").write_text(json.dumps({"config": {"model": {"path": "some/model"}}}))
    (work / "complete").touch()
    monkeypatch.setattr(bench, "COUNTS", (40,))
    bench.main([str(pool), "--work", str(work), "--out", str(tmp_path / "out.json"), "--draws", "2"])
    result = json.loads((tmp_path / "out.json").read_text())
    spearman = result["difficulty"]["spearman"]
    assert spearman["text"]["40"]["mean"] > 0.9 > 0.3 > spearman["hidden"]["40"]["mean"]
    assert result["quality"]["truncated"]["text"]["mean"] > 0.9 and set(result["quality"]) == set(
        bench.DEFECTS
    )
    assert result["model"] == "model" and "| default |" in capsys.readouterr().out
