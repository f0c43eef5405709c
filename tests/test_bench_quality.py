"""The benchmark of defects and copies: what it plants is what it says, and tables need only what was kept."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from benchmarks import bench_quality as bench
from benchmarks.defects import COPIES, DEFECTS
from benchmarks.pool import kept_bank

TEXT = (
    "Alice has 12 red balls and, in another box, some blue ones, twice as many blue as red.\n"
    "[asy] draw((0,0)--(1,1)); [/asy] Bob takes 3 of them. How many of the balls are left to Alice?"
)
WAYS = [(kind, way) for kind, ways in DEFECTS.items() for way in ways]


@pytest.mark.parametrize(("kind", "way"), [*WAYS, *COPIES.items()], ids=lambda x: getattr(x, "__name__", x))
def test_a_defect_is_another_text_from_a_seed(kind, way):
    text = (
        TEXT if way.__name__ == "drawing_removed" else TEXT.replace("[asy] draw((0,0)--(1,1)); [/asy] ", "")
    )
    made = way(text, random.Random(0))
    assert made and made == way(text, random.Random(0))
    assert (made == text) == (kind == "wrong_answer")
    if kind == "truncated":
        assert text.startswith(made) and len(made) < 0.85 * len(text)
    if kind == "question_removed":
        assert "How many" not in made and made.startswith("Alice")
    if kind not in ("wrong_answer", "spaces and case"):
        assert way("Hi.", random.Random(0)) is None


def test_tables_from_what_was_kept(tmp_path):
    rng = np.random.default_rng(0)
    topics = ("triangle", "prime", "probability", "polynomial")
    source = [
        {"id": i, "problem": f"{TEXT} The {topics[i % 4]} is {i}.", "answer": i, "pass_rate": (i % 5) / 4}
        for i in range(2600)
    ]
    pool, work = tmp_path / "pool.jsonl", tmp_path / "work"
    pool.write_text("".join(json.dumps(row) + "\n" for row in source))
    work.mkdir()
    bench.make_pool(pool, work / "pool.jsonl")
    rows = [json.loads(line) for line in (work / "pool.jsonl").read_text().splitlines()]
    originals = [row["of"] for row in rows if row["kind"] != "sound"]
    assert len(set(originals)) == len(originals) > 1000
    assert not {row["id"] for row in rows if row.get("part") == "sound"} & set(originals)
    assert {row["way"] for row in rows} >= {"within_a_word", "drawing_removed", "names changed"}
    kinds = {name: i for i, name in enumerate(dict.fromkeys(row["kind"] for row in rows))}
    pooled = rng.random((len(rows), 24)) * (rng.random((len(rows), 24)) < 0.4)
    pooled[np.arange(len(rows)), [kinds[row["kind"]] for row in rows]] += 1
    np.savez(work / "part-0.npz", ids=[row["id"] for row in rows], **{name: pooled for name in bench.STORED})
    bank, found = kept_bank(rows, work)
    table = bench.wrong_answers(found)
    assert table["pass rate of 128 rollouts"] == 0.9 and 0.7 < table["pass rate of 4 rollouts"] < 0.9
    assert bank.n_rows == len(rows) and bank.kinds["hidden"](slice(0, 2)).shape == (2, 24)
