"""Run every benchmark on the CPU (make bench); gpu.py is the one for a GPU.

    python -m benchmarks.run_all [--only encode,pool] [--seconds 600]

Each bench_<name>.py writes results/<device>/<name>.json. A part that fails or runs over its share of the
time does not keep the later ones from running; what it had measured by then is written; the exit status is 1
at the end. SAERL_BENCH_GRID=tiny takes one shape of each file, on any device, into a folder of its own: a
rehearsal.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from saerl_fast.fileio import write_json

ROOT = Path(__file__).resolve().parents[1]
OF_A_POOL = ("bench_quality", "bench_signals")  # no tests: they need a pool and a model
GRACE = 10.0  # what a part that is told to stop may take to write its results


class Part(NamedTuple):
    name: str
    command: list[str]
    share: float  # of the time left, relative to the parts still to come
    output: Path | None = None  # the JSON it writes


def parts(results: Path) -> list[Part]:
    """What to run, in order."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found = []
    files = (ROOT / "benchmarks").glob("bench_*.py")
    files = (file for file in files if file.stem not in OF_A_POOL)
    files = sorted(files, key=lambda p: (p.stem != "bench_encode", p.stem))
    for file in files:
        name = file.stem.removeprefix("bench_")
        output = results / f"{name}.json"
        command = [*pytest, str(file.relative_to(ROOT)), "--benchmark-json={output}"]
        found.append(Part(name, command, 3.0 if name == "encode" else 1.0, output))
    return found


def run(found: list[Part], seconds: float | None) -> list[str]:
    """Run the parts, each with its share of the ``seconds`` that are left; returns a sentence per failure."""
    failures = []
    stop = None if seconds is None else time.monotonic() + seconds
    for place, part in enumerate(found):
        share = None
        if stop is not None:
            rest = sum(other.share for other in found[place:])
            share = max(1.0, (stop - time.monotonic()) * part.share / rest)
        print(f"== {part.name}" + ("" if share is None else f", at most {share:.0f} s"), flush=True)
        failure = _run_part(part, share)
        if failure:
            failures.append(f"{part.name}: {failure}")
            print(f"== {failures[-1]}", flush=True)
    return failures


def _run_part(part: Part, seconds: float | None) -> str | None:
    """Run one part; a sentence when it failed. Old results stay unless there are new ones."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "result.json"
        soft = None if seconds is None else max(1.0, seconds - GRACE)
        command = [word.replace("{output}", str(fresh)) for word in part.command]
        environment = dict(os.environ)
        if soft is not None:
            environment["SAERL_BENCH_SECONDS"] = str(0.9 * soft)
        process = subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=heed_interrupts)
        failure = None
        try:
            code = process.wait(soft)
            failure = None if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            failure = f"stopped after {soft:.0f} s"
            process.send_signal(signal.SIGINT)  # pytest then still writes what it has
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if part.output is not None:
            slim = _slim(fresh)
            if slim is None:
                return failure or "wrote no result"
            write_json(part.output, slim)
            print(f"wrote {part.output} ({len(slim['benchmarks'])} shapes)", flush=True)
        return failure


def heed_interrupts() -> None:
    """What a shell starts in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _slim(path: Path) -> dict | None:
    """pytest-benchmark's JSON without host, processor flags and raw times; None when nothing was measured."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    kept = [
        {key: entry[key] for key in ("name", "fullname", "extra_info")}
        for entry in found["benchmarks"]
        if entry["extra_info"]
    ]
    return {"datetime": found["datetime"], "version": found["version"], "benchmarks": kept} if kept else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=None, help="in all")
    parser.add_argument("--results", type=Path, default=None, help="where the JSON files go")
    parser.add_argument("--only", default="", help="comma-separated names of parts, such as encode,pool")
    args = parser.parse_args(argv)
    tiny = os.environ.get("SAERL_BENCH_GRID") == "tiny"
    results = args.results
    if results is None and tiny:
        results = Path(tempfile.mkdtemp(prefix="saerl-bench-"))
    elif results is None:
        results = ROOT / "benchmarks" / "results" / "cpu"
    found = parts(results.resolve())
    if args.only:
        chosen = args.only.split(",")
        unknown = set(chosen) - {part.name for part in found}
        if unknown:
            parser.error(f"--only names no part: {', '.join(sorted(unknown))}")
        found = [part for part in found if part.name in chosen]
    failures = run(found, args.seconds)
    print("all parts ran" if not failures else "failed: " + "; ".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
