"""The benchmark of hashing counts a run's hashes, and not what it does beside them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.bench_hashing import Clock
from tests.faults.workbench import ROOT


def test_every_call_counts_once() -> None:
    clock = Clock()
    sha256 = clock.sha256(hashlib.sha256)

    def both() -> str:
        found = sha256(b"12")
        found.update(b"345")
        return found.hexdigest()

    assert clock.over(both)() == hashlib.sha256(b"12345").hexdigest()
    assert (clock.calls, clock.bytes) == (1, 5) and clock.wall > 0
    sha256(b"6").digest()
    assert (clock.calls, clock.bytes) == (3, 6)


def test_a_run_of_the_demo(tmp_path: Path) -> None:
    out = tmp_path / "hashing.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_hashing.py"]
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    environment |= {"SAERL_BENCH_GRID": "tiny"}
    subprocess.run([*command, f"--benchmark-json={out}"], cwd=ROOT, env=environment, check=True)
    (entry,) = json.loads(out.read_text())["benchmarks"]
    without, with_hashes = entry["extra_info"]["contenders"].values()
    assert 1 < with_hashes["ratio"] < 1.2 and without["p50_ms"] > 0
    assert entry["extra_info"]["megabytes"] > 1 and entry["extra_info"]["calls"] > 50
