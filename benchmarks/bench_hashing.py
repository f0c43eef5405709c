"""What the hashes of files, settings and inputs take of a run of the demo, from its SAE to its report.

    pytest benchmarks/bench_hashing.py --benchmark-json=benchmarks/results/cpu/hashing.json

One `saerl demo` of two arms and one seed. Every call of SHA-256 counts, those of libraries as well, and so
does all of `manifest.digest`, which reads the file. ``percent``: of this process's CPU time, which other load
does not change; ``wall_percent``: of its time, in which the disk is waited for.

SAERL_BENCH_GRID=tiny: a few steps, to see that it runs.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import DEVICE, bench_threads, environment
from saerl_fast.config import load_config
from saerl_fast.records import manifest
from saerl_fast.rl import checkpoint
from saerl_fast.stages import pipeline
from saerl_fast.stages.compare import compare
from saerl_fast.stages.console import Echo

ROOT = Path(__file__).resolve().parents[1]
TINY = ["train.steps=2", "sae.steps=4", "data.limit=64", "data.eval_limit=8", "difficulty.n_labels=8"]
SMALL = os.environ.get("SAERL_BENCH_GRID") == "tiny"


class Clock:
    """Seconds of CPU and of wall time, and calls, of the outermost of the functions that it wraps."""

    def __init__(self) -> None:
        self.cpu = self.wall = 0.0
        self.calls = self.bytes = self._inside = 0

    def over(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **options: Any) -> Any:
            self._inside += 1
            began = time.process_time(), time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self._inside -= 1
                if not self._inside:
                    self.cpu += time.process_time() - began[0]
                    self.wall += time.perf_counter() - began[1]
                    self.calls += 1

        return timed

    def sha256(self, made: Callable[..., Any]) -> Callable[..., Any]:
        """``hashlib.sha256``, of which every call counts."""

        class Timed:
            def __init__(this, data: Any = b"", **options: Any) -> None:
                this.own = self.over(made)(data, **options)
                this.digest, this.hexdigest = self.over(this.own.digest), self.over(this.own.hexdigest)
                self.bytes += len(data)

            def update(this, data: Any) -> None:
                self.over(this.own.update)(data)
                self.bytes += memoryview(data).nbytes

        return Timed


def test_hashing(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = [f"run_dir={tmp_path}", "compare.arms=[vanilla,adaptive]", "compare.seeds=[0]"]
    config = load_config("examples/demo.yaml", settings + TINY * SMALL)
    clock, echo = Clock(), Echo(quiet=True)
    monkeypatch.setattr(hashlib, "sha256", clock.sha256(hashlib.sha256))
    for module in (manifest, checkpoint):
        monkeypatch.setattr(module, "digest", clock.over(manifest.digest))
    with bench_threads():
        began = time.process_time(), time.perf_counter()
        pipeline.plan_stage(config, echo)
        compare(config, echo)
        cpu, wall = time.process_time() - began[0], time.perf_counter() - began[1]
    rest = cpu - clock.cpu
    table = {"without hashes": {"p50_ms": rest * 1e3, "ratio": 1.0}}
    table["with hashes"] = {"p50_ms": cpu * 1e3, "ratio": cpu / rest}
    shape = {"steps": config.train.steps, "arms": len(config.compare.arms), "calls": clock.calls}
    shape |= {"megabytes": round(clock.bytes / 2**20, 1), "percent": round(100 * clock.cpu / cpu, 3)}
    shape |= {"wall_percent": round(100 * clock.wall / wall, 3)}
    benchmark.extra_info.update(shape, contenders=table, environment=environment(DEVICE))
    benchmark.pedantic(lambda: None, rounds=1)
