"""``saerl watch``: how a run is doing, from the files it writes, while it writes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError
from saerl_fast.records.lock import NAME
from saerl_fast.records.log import format_row
from saerl_fast.records.plots import live
from saerl_fast.records.runs import RunRecord, load_runs, no_folder, read_object

BEGINNINGS = (
    "metrics.jsonl",
    "run.json",
    "labels.json",
    "scores.json",
    "compare.json",
    "sae",
    "features.partial-*",
    NAME,
)
BARS = "▁▂▃▄▅▆▇█"


def watch(root: str | Path, echo: Callable[[str], None], *, every: float = 5.0) -> Path:
    """Follow the run (or the comparison) in ``root`` until it ends; returns the figure, ``root/live.png``.

    Looks every ``every`` seconds. When something is new it redraws the figure, which most viewers reload by
    themselves, and gives ``echo`` the latest row of each run that went on, with the recent course of its
    reward as a bar chart of one line. A run has ended when it has written its summary; a comparison, when
    all its runs have. Waits for a run that has not started training yet, whose folder is empty or holds an
    SAE or labels. Raises SaerlError on a damaged file, and at once for a folder that is none or is no run's.
    """
    root = Path(root)
    if every <= 0:
        raise SaerlError(f"--every {every:g} is no interval; give seconds above 0")
    if root.is_file():
        raise SaerlError(f"{root} is a file; pass the folder of a run")
    if not root.is_dir():
        raise SaerlError(no_folder(root))
    if any(root.iterdir()) and not any(any(root.rglob(name)) for name in BEGINNINGS):
        raise SaerlError(f"{root} holds no run; pass the run_dir of one")
    figure, shown, waiting = root / "live.png", dict[Path, int](), False
    while True:
        if any(root.rglob("metrics.jsonl")):
            runs = [run for run in load_runs(root) if run.train or run.eval]
            ended = _ended(root, runs)  # asked first: what a run writes after this is drawn the next time
            fresh = [run for run in runs if shown.get(run.folder) != len(run.train) + len(run.eval)]
            for run in fresh:
                shown[run.folder] = len(run.train) + len(run.eval)
                name = f"{run.arm}, seed {run.seed}: " if len(runs) > 1 else ""
                echo(name + _latest(run))
            if fresh:
                live(runs, figure)
            if ended:
                echo(f"ended; {figure} holds the curves")
                return figure
        elif not waiting:
            echo(f"waiting for {root}/metrics.jsonl")
            waiting = True
        time.sleep(every)


def _ended(root: Path, runs: list[RunRecord]) -> bool:
    plan = read_object(root / "compare.json")
    expected = max(1, len(plan.get("arms", [])) * len(plan.get("seeds", [])))
    return len(runs) >= expected and all((run.folder / "summary.json").is_file() for run in runs)


def _latest(run: RunRecord) -> str:
    """The last row, and the rewards of up to 40 steps before it."""
    rows: list[dict[str, Any]] = sorted([*run.train, *run.eval], key=lambda row: row["step"])
    values = [row["reward"] for row in run.train if row.get("reward") is not None][-40:]
    low, span = (min(values), max(values) - min(values)) if values else (0.0, 0.0)
    bars = "".join(BARS[round((value - low) / span * (len(BARS) - 1)) if span else 0] for value in values)
    return f"{format_row(rows[-1], run.steps)}  {bars}".rstrip()
