"""Everything that wants a GPU, in pieces: what is measured is kept, and the next call goes on from there.

    bash benchmarks/gpu.sh --out FOLDER [--seconds 450] [--only smoke,encode]

runs the units of PARTS one after another, each saved before the next begins, and ends within the seconds.
Call it again with the same FOLDER until it says that nothing is left. The first part is a smoke test of every
launcher, a minute long. FOLDER holds at most eight files:

    progress.json   every unit: done, failed (and why) or to be taken again; where it ran
    tuned.json      the fastest plans; copy it over kernels/torch-ext/saerl_kernels/_triton/tuned.json
    encode.json, decode.json, pool.json, train_step.json, kmeans.json   copy them to benchmarks/results/<gpu>/
    tables.md       the tables of those

A unit that ends its process (a fault of the device) is marked as failed and the others go on in a new one;
one that the seconds cut short is taken again, once. Needs torch, triton, numpy, scipy and pytest; peers are
measured where they are installed, and what needs another package is skipped and says so.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.run_all import ROOT, heed_interrupts
from saerl_fast.fileio import write_json, write_text

SECONDS = 450.0  # of a call: what lends a device for eight minutes also copies files
GRACE = 8.0  # what a process that is told to stop may take
FIRST = 20.0  # seconds that a part's first unit is expected to take; afterwards its longest so far
BENCHES = ("encode", "decode", "pool", "train_step", "kmeans")
TESTS = (
    "encode_gpu",
    "chunked",
    "topk",
    "decode",
    "csr",
    "train_ops",
    "pool",
    "kmeans",
    "encode",
    "screened",
)
PARTS = ("smoke", "tune", *BENCHES, "tests")
TRIES = 2
OUT_OF_TIME, BROKEN = 3, 4  # exit codes of the process of a part


class Unit(NamedTuple):
    name: str
    run: Callable[[], Any]  # raises where it fails; what it returns is kept by ``keep``
    keep: Callable[[Any], None] = lambda result: None


class Progress:
    """progress.json: a unit's state (started, again, done, skipped or failed), seconds, tries and error."""

    def __init__(self, out: Path) -> None:
        self.path = out / "progress.json"
        self.units: dict[str, dict[str, Any]] = {}
        self.environment: dict[str, Any] = {}
        if self.path.is_file():
            found = json.loads(self.path.read_text())
            self.units, self.environment = found["units"], found["environment"]

    def set(self, name: str, state: str, **more: Any) -> None:
        self.units[name] = {**self.units.get(name, {}), "state": state, **more}
        write_json(self.path, {"environment": self.environment, "units": self.units})

    def settled(self, name: str) -> bool:
        return self.units.get(name, {}).get("state") in ("done", "failed", "skipped")

    def expected(self, part: str) -> float:
        """Seconds that the part's next unit may take: a fifth more than the longest one so far."""
        known = [
            u["seconds"] for name, u in self.units.items() if name.startswith(f"{part}/") and "seconds" in u
        ]
        return 1.2 * max(known) if known else FIRST

    def abandon(self, part: str, why: str, cut: bool) -> None:
        """What was running when its process ended: failed, or (cut short by the clock) to be taken again."""
        for name, unit in self.units.items():
            if name.startswith(f"{part}/") and unit["state"] == "started":
                again = cut and unit["tries"] < TRIES
                self.set(name, "again" if again else "failed", **({} if again else {"error": why}))


def units_of(part: str, out: Path) -> list[Unit]:
    tiny = os.environ.get("SAERL_BENCH_GRID") == "tiny"
    if part == "smoke":
        from benchmarks.smoke import launchers

        return [Unit(name, call) for name, call in launchers().items()]
    if part == "tune":
        return _tuning(out)
    if part == "tests":
        files = [] if tiny else [ROOT / f"tests/test_{name}.py" for name in TESTS]
        return [Unit(file.stem, functools.partial(_pytest, file)) for file in files if file.is_file()]
    return _benches(part, out)


def _tuning(out: Path) -> list[Unit]:
    import torch

    from benchmarks.bench_encode import GPU_GRID
    from benchmarks.tune_encode import keep_row, tune

    if not torch.cuda.is_available():
        return []
    gpu = torch.cuda.get_device_name()
    # The middle batch first: what is cut short still has every width and k.
    shapes = sorted(GPU_GRID, key=lambda s: (s.batch != 4096, s.batch))
    return [
        Unit(
            "x".join(map(str, shape)),
            functools.partial(tune, shape),
            functools.partial(keep_row, out / "tuned.json", gpu),
        )
        for shape in shapes
    ]


class Recorder:
    """Stands where pytest-benchmark's fixture does: keeps ``extra_info``, which is all the tables use."""

    disabled, enabled = False, True

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, call: Callable, args: tuple = (), **_: Any) -> Any:
        return call(*args)


def _benches(part: str, out: Path) -> list[Unit]:
    module = importlib.import_module(f"benchmarks.bench_{part}")
    found = []
    for test in [value for name, value in vars(module).items() if name.startswith("test_")]:
        marks = {mark.name: mark for mark in getattr(test, "pytestmark", [])}
        if any(marks["skipif"].args if "skipif" in marks else ()):
            continue
        for shape in marks["parametrize"].args[1]:
            name = f"{test.__name__}[{'x'.join(map(str, shape))}]"
            full = f"benchmarks/bench_{part}.py::{name}"
            keep = functools.partial(_keep_bench, out / f"{part}.json", name, full)
            found.append(Unit(name, functools.partial(_bench, test, shape), keep))
    return found


def _bench(test: Callable, shape: Any) -> dict[str, Any]:
    recorder = Recorder()
    test(recorder, shape)
    return recorder.extra_info


def _keep_bench(path: Path, name: str, full: str, info: dict[str, Any]) -> None:
    found = json.loads(path.read_text()) if path.is_file() else {"version": "gpu.py", "benchmarks": []}
    found["datetime"] = datetime.datetime.now(datetime.timezone.utc).isoformat()
    found["benchmarks"].append({"name": name, "fullname": full, "extra_info": info})
    write_json(path, found)


def _pytest(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if missing := re.search(r"No module named '(\w+)'", done.stdout):
        raise ModuleNotFoundError(name=missing[1])
    if done.returncode:
        raise AssertionError((done.stdout + done.stderr)[-1500:])


def work(part: str, out: Path, stop: float) -> int:
    """The process of a part: its units until they or the time (``stop``, of time.time) are used up."""
    progress = Progress(out)
    if not progress.environment:
        from benchmarks.harness import DEVICE, environment

        progress.environment = environment(DEVICE)
    if part not in ("smoke", "tune") and (out / "tuned.json").is_file():
        from saerl_kernels._triton import tune

        tune.TABLE = str(out / "tuned.json")
    for unit in units_of(part, out):
        name = f"{part}/{unit.name}"
        if progress.settled(name):
            continue
        if stop - time.time() < progress.expected(part):
            return OUT_OF_TIME
        progress.set(name, "started", tries=progress.units.get(name, {}).get("tries", 0) + 1)
        begin = time.time()
        try:
            unit.keep(unit.run())
        except ModuleNotFoundError as err:
            progress.set(name, "skipped", error=f"{err.name} is not installed")
            continue
        except Exception as err:
            text = f"{type(err).__name__}: {err}"[-2000:]
            progress.set(name, "failed", seconds=time.time() - begin, error=text)
            print(f"{name}: {text.splitlines()[0][:200]}", flush=True)
            if "CUDA" in text or "AcceleratorError" in text:
                return BROKEN  # a fault stays with its process
            continue
        progress.set(name, "done", seconds=time.time() - begin)
    return 0


def run(parts: list[str], out: Path, seconds: float, command: list[str]) -> bool:
    """The parts in order, each in a process of its own; True when nothing is left to do.

    ``command`` starts a part's process, given its name, the folder and when to stop.
    """
    stop = time.time() + seconds
    for part in parts:
        while True:
            if time.time() > stop - GRACE:
                return False
            print(f"== {part}, {stop - time.time():.0f} s left", flush=True)
            known = len(Progress(out).units)
            words = [*command, part, str(out), str(stop - GRACE)]
            process = subprocess.Popen(words, cwd=ROOT, preexec_fn=heed_interrupts)
            cut = False
            try:
                code = process.wait(max(1.0, stop - GRACE - time.time()))
            except subprocess.TimeoutExpired:
                cut = True
                process.send_signal(signal.SIGINT)
                try:
                    code = process.wait(GRACE / 2)
                except subprocess.TimeoutExpired:
                    process.kill()
                    code = process.wait()
            Progress(out).abandon(part, f"ended its process (exit status {code})", cut)
            if cut or code == OUT_OF_TIME:
                return False
            if code == 0:
                break
            if len(Progress(out).units) == known:  # no unit had begun
                why = f"does not start (exit status {code})"
                Progress(out).set(f"{part}/start", "failed", error=why)
                break
    return True


def finish(out: Path) -> str:
    """Write tables.md; one line on what was done, and a line for each unit that failed."""
    from benchmarks.report import load, render

    units = Progress(out).units
    tables, complaints = load(out, "*.json")
    write_text(out / "tables.md", render(tables) + "\n" if tables else "Nothing was measured yet.\n")
    states = [unit["state"] for unit in units.values()]
    lines = [f"{states.count('done')} units done, {states.count('failed')} failed; in {out}"]
    lines += [
        f"failed: {n}: {u['error'].splitlines()[0][:160]}" for n, u in units.items() if u["state"] == "failed"
    ]
    return "\n".join([*lines, *complaints])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["work"]:
        return work(argv[1], Path(argv[2]), float(argv[3]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder for everything that is written")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of this call; {SECONDS:.0f}")
    parser.add_argument("--only", default=",".join(PARTS), help=f"comma-separated, of {', '.join(PARTS)}")
    args = parser.parse_args(argv)
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only names no part: {', '.join(sorted(unknown))}")
    if os.environ.get("SAERL_BENCH_GRID") != "tiny":
        import torch

        if not torch.cuda.is_available():
            sys.stderr.write("no CUDA device found; `make bench` runs the benchmarks on the CPU\n")
            return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    over = run(parts, out, args.seconds, [sys.executable, "-m", "benchmarks.gpu", "work"])
    print(finish(out))
    print("nothing is left" if over else f"not finished: bash benchmarks/gpu.sh --out {args.out} goes on")
    failed = any(unit["state"] == "failed" for unit in Progress(out).units.values())
    return 3 if not over else int(failed)


if __name__ == "__main__":
    sys.exit(main())
