"""``saerl watch``: how a run is doing, from the files it writes, while it writes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from saerl_fast.errors import SaerlError
from saerl_fast.records.lock import NAME, clean
from saerl_fast.records.log import format_row
from saerl_fast.records.plots import live
from saerl_fast.records.runs import (
    RunRecord,
    find_runs,
    listed,
    no_folder,
    one_of_each,
    open_run,
    pilots_note,
    read_object,
)

BEGINNINGS = (
    "metrics.jsonl",
    "run.json",
    "labels.json",
    "scores.json",
    "compare.json",
    "features.partial-*",
    NAME,
)
BARS = "▁▂▃▄▅▆▇█"


def watch(root: str | Path, echo: Callable[[str], None], *, every: float = 5.0) -> Path:
    """Follow the run (or the comparison) in ``root`` until it ends; returns the figure, ``root/live.png``.

    Looks every ``every`` seconds, and reads only what is new. When there is something, it redraws the figure,
    which most viewers reload by themselves, and gives ``echo`` the latest row of each run that went on, with
    the recent course of its reward as a bar chart of one line and the warnings of training so far. A run has
    ended when it has written its summary; a comparison, when all its runs have. Waits for a run that has not
    started training yet, whose folder is empty or holds an SAE or labels. Raises SaerlError on a damaged
    file, and at once for a folder that is none or is no run's.
    """
    root = Path(root)
    if every <= 0:
        raise SaerlError(f"--every {every:g} is no interval; give seconds above 0")
    if root.is_file():
        raise SaerlError(f"{root} is a file; pass the folder of a run")
    if not root.is_dir():
        raise SaerlError(no_folder(root))
    begun = (root / "sae").is_dir() or any(any(root.rglob(name)) for name in BEGINNINGS)
    if any(root.iterdir()) and not begun:
        raise SaerlError(f"{root} holds no run; pass the run_dir of one")
    if pools := read_object(root / "compare.json").get("pools"):
        raise SaerlError(
            f"{root} holds the pools {', '.join(pools)}; watch one of them, as {root / pools[0]}"
        )
    figure, known, said, waiting = root / "live.png", dict[Path, RunRecord](), set[str](), False

    def say(line: str) -> None:
        if line not in said:
            said.add(line)
            echo(line)

    clean(root)  # a watch that was killed
    while True:
        if gone := [folder for folder in (root, *known) if not folder.is_dir()]:
            raise SaerlError(f"{gone[0]} was removed while it was watched")
        if folders := [folder for folder in find_runs(root) if (folder / "metrics.jsonl").is_file()]:
            order, seeds = listed(root)
            for folder in folders:
                if folder not in known or (not known[folder].config and (folder / "run.json").is_file()):
                    known[folder] = open_run(folder)
            ended = {folder for folder in folders if (folder / "summary.json").is_file()}  # before it is read
            grown = [folder for folder in folders if known[folder].read(whole=folder in ended)]
            runs = [known[folder] for folder in folders if known[folder].last or folder in ended]
            runs = [run for run in runs if run.arm in order and run.seed in seeds] or runs
            runs = one_of_each(root, runs, say, strict=False)
            fresh = [run for run in runs if run.folder in grown and run.last]
            for run in fresh:
                name = f"{run.arm}, seed {run.seed}: " if len(runs) > 1 else ""
                echo(name + _latest(run))
                if lost := run.steps_lost():
                    say(f"{run.folder}: {lost}")
            for run in runs:
                if not run.last:
                    say(f"{run.folder}: it has ended, and metrics.jsonl holds no step")
            if fresh and root.is_dir():  # a picture would make it again
                live([run for run in runs if run.last], figure)
            expected = max(1, len(order) * len(seeds))
            if len(runs) >= expected and all(run.folder in ended for run in runs):
                echo(f"ended; {figure} holds the curves" if figure.exists() else "ended; there is no curve")
                return figure
        elif not waiting:
            note = pilots_note(root)
            echo(f"waiting for {root}/metrics.jsonl" + (f"; {note}" if note else ""))
            waiting = True
        time.sleep(every)


def _latest(run: RunRecord) -> str:
    """The last row, the rewards of up to 40 steps before it, and the warnings so far."""
    rewards = run.train["reward"]
    values = rewards[np.isfinite(rewards)][-40:].tolist()
    low, span = (min(values), max(values) - min(values)) if values else (0.0, 0.0)
    bars = "".join(BARS[round((value - low) / span * (len(BARS) - 1)) if span else 0] for value in values)
    warnings = "; ".join(f"{name}: {found['steps']} steps" for name, found in run.alarms.items())
    return f"{format_row(run.last, run.steps)}  {bars}".rstrip() + (f"  ! {warnings}" if warnings else "")
