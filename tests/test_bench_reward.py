"""The benchmark of rewards in a process of their own compares the same steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.faults.workbench import ROOT


def test_both_ways_are_timed_in_the_same_run(tmp_path: Path) -> None:
    out = tmp_path / "reward.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_reward.py"]
    # pytest-benchmark measures nothing in what it takes for one of several workers
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    environment |= {"SAERL_BENCH_GRID": "tiny"}
    subprocess.run([*command, f"--benchmark-json={out}"], cwd=ROOT, env=environment, check=True)
    (entry,) = json.loads(out.read_text())["benchmarks"]  # a rehearsal takes one shape
    here, limited = entry["extra_info"]["contenders"].values()
    assert here["ratio"] == 1.0 and min(limited["reward_ms"], here["reward_ms"]) > 0
