"""``python -m tests.faults [--share N] [--kinds a,b] [--of TEXT] [--jobs J] [--out FILE]``: trials and table.

An interrupted round goes on where it stopped, as long as the code is the same. Exit code 1 when anything went
wrong in silence, ended in a traceback, hung, or left a folder that no command takes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.trials import BAD, GOOD, Bench, Trial
from tests.faults.workbench import ROOT, templates, warm_up


def main(argv: list[str] | None = None) -> int:
    """Run the trials that are asked for in ``--jobs`` processes."""
    asked = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    asked.add_argument("--share", type=int, default=1, metavar="N", help="only every N-th trial of each kind")
    asked.add_argument("--kinds", default="", metavar="A,B", help="only kinds that begin with one of these")
    asked.add_argument("--of", default="", metavar="TEXT", help="only trials whose name has this in it")
    asked.add_argument("--jobs", type=int, default=2)
    asked.add_argument("--out", type=Path, help="write the table as JSON")
    asked.add_argument("--home", type=Path, default=ROOT / "build" / "faults")
    args = asked.parse_args(argv)
    home = args.home / _code()
    home.mkdir(parents=True, exist_ok=True)
    os.environ["FAULTS_WORK"] = str(_empty(home / "work"))
    warm_up()
    every = [trial for trial in Bench(templates(home / "templates")).all() if args.of in trial.name]
    trials = chosen(every, args.kinds, args.share)
    done = {result["trial"]: result for file in home.glob("results-*.jsonl") for result in _lines(file)}
    todo = [trial for trial in trials if _name(trial) not in done]
    print(f"{len(trials)} trials, {len(trials) - len(todo)} of them done before", flush=True)
    workers = [_work(todo[part :: args.jobs], home, part) for part in range(args.jobs)]
    ended = [os.waitpid(worker, 0)[1] for worker in workers]
    done = {result["trial"]: result for file in home.glob("results-*.jsonl") for result in _lines(file)}
    results = [done[_name(trial)] for trial in trials if _name(trial) in done]
    print(table(results))
    wrong = [result for result in results if result["outcome"] in BAD]
    for result in wrong:
        print(f"{result['outcome']}: {result['trial']}: {' '.join(result['said'].split())[-300:]}")
    if args.out:
        rows = {
            kind: dict(Counter(r["outcome"] for r in results if r["kind"] == kind))
            for kind in _kinds(results)
        }
        args.out.write_text(json.dumps({"share": args.share, "kinds": rows, "wrong": wrong}, indent=1) + "\n")
    return int(bool(wrong) or any(ended) or len(results) < len(trials))


def chosen(trials: list[Trial], kinds: str, share: int) -> list[Trial]:
    """Every ``share``-th trial of each kind that is asked for."""
    asked = tuple(kind for kind in kinds.split(",") if kind)
    kinds_of: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.kind.startswith(asked or ("",)):
            kinds_of.setdefault(trial.kind, []).append(trial)
    return [trial for some in kinds_of.values() for trial in some[min(share, len(some)) // 2 :: share]]


def table(results: list[dict[str, Any]]) -> str:
    """Kinds against outcomes, as text."""
    columns = [name for name in (*GOOD, *BAD)]
    rows = [["kind", "trials", *columns]]
    for kind in _kinds(results):
        count = Counter(result["outcome"] for result in results if result["kind"] == kind)
        rows.append([kind, str(count.total()), *(str(count[name]) for name in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def _work(trials: list[Trial], home: Path, part: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(home / f"results-{part}.jsonl", "a") as out:
            for number, trial in enumerate(trials):
                os.environ["FAULTS_WORK"] = str(_empty(home / f"work-{part}"))
                outcome, said = trial.call()
                row = {"trial": _name(trial), "kind": trial.kind, "outcome": outcome, "said": said}
                print(json.dumps(row), file=out, flush=True)
                if part == 0 and number % 20 == 0:
                    print(f"{number} of {len(trials)}", file=sys.stderr, flush=True)
        code = 0
    finally:
        os._exit(code)


def _code() -> str:
    files = [
        f for name in ("saerl_fast", "kernels", "tests/faults") for f in sorted((ROOT / name).rglob("*.py"))
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def _kinds(results: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(result["kind"] for result in results))


def _name(trial: Trial) -> str:
    return f"{trial.kind}: {trial.name}"


if __name__ == "__main__":
    sys.exit(main())
