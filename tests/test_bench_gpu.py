"""benchmarks/gpu.py rehearsed without a GPU: interrupted, crashed, resumed, and with five packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[1]
# A part's process with units of its own; which ones ran goes to a file beside the progress.
STUB = """
import os, sys, time
from pathlib import Path
from benchmarks import gpu
part, out, stop = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])

def unit(name, call):
    def run():
        with open(out.parent / "ran", "a") as file:
            file.write(name + " ")
        return call()
    return gpu.Unit(name, run, lambda found: gpu._keep_bench(out / "encode.json", name, name, found))

def fails():
    raise ValueError("wrong result")

calls = {CALLS}
gpu.units_of = lambda part, out: [unit(name, call) for name, call in calls.items()]
gpu.Progress.expected = lambda self, part: 0.0
sys.exit(gpu.work(part, out, stop))
"""
# The machine it is for: no other package is found. (numba stays: on a CPU it is what is measured.)
HIDE = """
from importlib.machinery import PathFinder
hidden = {"transformers", "datasets", "trl", "sae_lens", "sparsify", "sklearn", "hypothesis", "matplotlib",
          "pytest_benchmark", "safetensors", "threadpoolctl", "pandas", "transformer_lens", "tokenizers"}
real = PathFinder.find_spec

@staticmethod
def find_spec(name, *args):
    return None if name.partition(".")[0] in hidden else real(name, *args)

PathFinder.find_spec = find_spec
"""


def run(tmp_path: Path, calls: str, seconds: float) -> tuple[bool, dict, list[str]]:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    over = gpu.run(["encode"], out, seconds, [sys.executable, "-c", STUB.replace("{CALLS}", calls)])
    states = {name: unit["state"] for name, unit in gpu.Progress(out).units.items()}
    return over, states, (tmp_path / "ran").read_text().split()


def test_what_is_cut_short_is_kept_and_resumed(tmp_path, monkeypatch):
    """A call that ends in the middle of a unit keeps those before it; the next one goes on with that unit."""
    monkeypatch.setattr(gpu, "GRACE", 4.0)
    wait = "lambda: time.sleep(0 if (out / 'now').exists() else 60) or {}"
    slow = "{'a': dict, 'b': lambda: {'k': 1}, 'c': " + wait + "}"
    over, states, ran = run(tmp_path, slow, 25.0)
    assert not over and ran == ["a", "b", "c"]
    assert states == {"encode/a": "done", "encode/b": "done", "encode/c": "again"}
    assert len(json.loads((tmp_path / "out/encode.json").read_text())["benchmarks"]) == 2
    (tmp_path / "out/now").touch()
    over, states, ran = run(tmp_path, slow, 60.0)
    assert over and ran == ["a", "b", "c", "c"] and set(states.values()) == {"done"}
    kept = json.loads((tmp_path / "out/encode.json").read_text())["benchmarks"]
    assert [entry["name"] for entry in kept] == ["a", "b", "c"]
    over, _, ran = run(tmp_path, slow, 60.0)
    assert over and len(ran) == 4  # nothing is measured twice


def test_a_crash_and_a_failure_cost_their_unit_only(tmp_path):
    calls = "{'a': dict, 'dies': lambda: os._exit(139), 'wrong': fails, 'b': dict}"
    over, states, ran = run(tmp_path, calls, 120.0)
    assert over and ran == ["a", "dies", "wrong", "b"]
    assert states == {
        "encode/a": "done", "encode/dies": "failed", "encode/wrong": "failed", "encode/b": "done",
    }  # fmt: skip
    text = gpu.finish(tmp_path / "out")
    assert "2 units done, 2 failed" in text and "wrong result" in text and "exit status 139" in text


def test_a_part_that_does_not_start_is_a_failure(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert gpu.run(["pool"], out, 60.0, [sys.executable, "-c", "raise SystemExit(1)"])
    assert "failed: pool/start: does not start (exit status 1)" in gpu.finish(out)


def test_twice_too_slow_is_given_up(tmp_path):
    progress = gpu.Progress(tmp_path)
    progress.set("tune/a", "started", tries=1)
    progress.abandon("tune", "late", cut=True)
    assert not progress.settled("tune/a")
    progress.set("tune/a", "started", tries=2)
    progress.abandon("tune", "late", cut=True)
    assert gpu.Progress(tmp_path).settled("tune/a")


def test_a_unit_that_would_not_fit_is_not_begun(tmp_path):
    progress = gpu.Progress(tmp_path)
    assert progress.expected("tune") == gpu.FIRST
    for name, seconds in (("tune/a", 10.0), ("tune/b", 30.0), ("encode/a", 90.0)):
        progress.set(name, "done", seconds=seconds)
    assert progress.expected("tune") == pytest.approx(36.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal for machines without a GPU")
def test_rehearsal_with_five_packages(tmp_path):
    """Every part runs with torch, triton, numpy, scipy and pytest alone, into one folder of eight files."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    env = {**os.environ, "SAERL_BENCH_GRID": "tiny", "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu.sh"), "--out", str(out)],
        env=env, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "nothing is left" in done.stdout, done.stdout + done.stderr
    units = json.loads((out / "progress.json").read_text())["units"]
    bad = {name: unit for name, unit in units.items() if unit["state"] != "done"}
    assert set(bad) == {"kmeans/test_spherical_kmeans[300x12x256x5x3]"}, bad  # its base is scikit-learn
    assert {name.partition("/")[0] for name in units} == {"smoke", *gpu.BENCHES}
    assert len(list(out.iterdir())) <= 8
    assert "encode_topk" in (out / "tables.md").read_text()


def test_the_smoke_test_launches_every_kernel_within_its_minute(monkeypatch):
    """Each kernel of the package runs, and the variants that a GPU would have to compile fit 60 seconds."""
    if torch.cuda.is_available():
        pytest.skip("kernels are counted in the interpreter")
    from triton.runtime import interpreter

    from benchmarks.smoke import launchers

    seen = set()
    real = interpreter.GridExecutor.__call__

    def spy(self, *args, **kwargs):
        sizes = [str(a.dtype) if hasattr(a, "dtype") else a if a == 1 else type(a) for a in args]
        seen.add((self.fn.__name__, *map(str, sizes), *sorted(map(str, kwargs.items()))))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", spy)
    for call in launchers().values():
        call()
    sources = (ROOT / "kernels/torch-ext/saerl_kernels/_triton").glob("*.py")
    kernels = {
        line.removeprefix("def ").partition("(")[0]
        for source in sources
        for line in source.read_text().splitlines()
        if line.startswith("def _") and line.partition("(")[0].endswith("_kernel")
    }
    assert {name for name, *_ in seen} == kernels
    assert 1.2 * len(seen) < 60, len(seen)  # 28 variants took 30 seconds of CPU time
