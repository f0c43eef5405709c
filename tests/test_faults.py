"""A sample of the fault suite; ``make faults`` runs all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.trials import BAD, REFUSED, SAID, SAME, TRACEBACK, WRONG, Bench
from tests.faults.workbench import ROOT, Ended, written


def test_sample(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--share", "500", "--home", str(tmp_path), "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels/torch-ext'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = json.loads(out.read_text())["kinds"]
    assert len(kinds) == 9
    assert all(not set(outcomes) & set(BAD) for outcomes in kinds.values())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    (tmp_path / "scores.parquet").write_bytes(b"right")
    found = Bench.__new__(Bench)
    found.expected = {"score": written(tmp_path, ("scores.parquet",))}
    return found


@pytest.mark.parametrize(
    ("content", "ended", "outcome"),
    [
        (b"right", Ended(0, "wrote it"), SAME),
        (b"wrong", Ended(0, "wrote it"), WRONG),
        (b"wrong", Ended(0, "metrics.jsonl has a hole"), SAID),
        (b"right", Ended(2, "saerl: scores.parquet is damaged; run `saerl score`"), REFUSED),
        (b"right", Ended(2, "Aborted"), TRACEBACK),
        (b"right", Ended(1, "Traceback (most recent call last):\n  KeyError: 'a'"), TRACEBACK),
        (b"right", Ended(0, "Traceback (most recent call last):\n  KeyError: 'a'"), TRACEBACK),
    ],
)
def test_judges(tmp_path: Path, bench: Bench, content: bytes, ended: Ended, outcome: str) -> None:
    (tmp_path / "scores.parquet").write_bytes(content)
    assert bench.judge("score", tmp_path, ended, "metrics.jsonl", patterns=("scores.parquet",))[0] == outcome
