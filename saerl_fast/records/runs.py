"""What a finished or running training run left on disk, read back for reports and comparisons."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError
from saerl_fast.records import manifest
from saerl_fast.records.log import read_metrics

SAERL_PHASES = ("capture", "encode", "plan")  # what this project adds to a vanilla step


@dataclass
class RunRecord:
    """One training run: its configuration, metrics and summary."""

    arm: str
    seed: int
    folder: Path
    config: dict[str, Any]  # what run.json holds
    train: list[dict[str, Any]] = field(default_factory=list)
    eval: list[dict[str, Any]] = field(default_factory=list)

    summary: dict[str, Any] = field(default_factory=dict)  # empty until the run has ended

    @property
    def steps(self) -> int | None:
        """Training steps in all, where they are recorded."""
        return self.config.get("config", {}).get("train", {}).get("steps")

    @property
    def eval_steps(self) -> list[int]:
        return [row["step"] for row in self.eval]

    @property
    def eval_mode(self) -> str | None:
        """How the last evaluation measured ``accuracy``: sample, greedy or prob; None if not recorded."""
        return next((row["mode"] for row in reversed(self.eval) if row.get("mode")), None)

    @property
    def accuracy(self) -> list[float]:
        return [row["accuracy"] for row in self.eval]

    def phase_seconds(self) -> dict[str, float]:
        """Seconds per phase over all training steps."""
        total: dict[str, float] = {}
        for row in self.train:
            for phase, seconds in row.get("time", {}).items():
                total[phase] = total.get(phase, 0.0) + seconds
        return total

    def overhead(self) -> float | None:
        """Seconds of capture, encoding and plan as a share of everything else in the training steps."""
        phases = self.phase_seconds()
        added = sum(phases.get(name, 0.0) for name in SAERL_PHASES)
        rest = sum(seconds for name, seconds in phases.items() if name not in (*SAERL_PHASES, "eval"))
        return added / rest if rest else None

    def total(self, key: str) -> int:
        return int(sum(row.get(key, 0) for row in self.train))


def load_runs(root: str | Path) -> list[RunRecord]:
    """Every run below ``root`` (or ``root`` itself), ordered as the comparison listed its arms.

    Without a compare.json the arm ``vanilla`` comes first, since the first arm is the baseline; the others
    follow by name. Raises SaerlError when there is no run or a file is damaged.
    """
    root = Path(root)
    if not root.is_dir():
        raise SaerlError(no_folder(root))
    files = sorted(root.rglob("metrics.jsonl"))
    if not files:
        raise SaerlError(f"{root} holds no metrics.jsonl; run `saerl train` or `saerl compare` first")
    runs = [_load_run(file.parent) for file in files]
    order: list[str] = []
    comparison = root / "compare.json"
    if comparison.is_file():
        listed = read_object(comparison)
        order = [arm.partition(":")[0] for arm in listed.get("arms", [])]
        runs = [run for run in runs if run.arm in order and run.seed in listed.get("seeds", [])] or runs
    rank = {arm: i for i, arm in enumerate(order)}
    return sorted(
        runs, key=lambda run: (rank.get(run.arm, len(rank)), run.arm != "vanilla", run.arm, run.seed)
    )


def no_folder(root: Path) -> str:
    """The sentence about a run folder that is none, with one beside it that may be meant."""
    beside = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
    close = difflib.get_close_matches(root.name, beside, n=1)
    hint = f"did you mean {root.parent / close[0]}?" if close else "pass"
    end = "" if close else " the run_dir that `saerl train` or `saerl compare` wrote"
    return f"{root} is not a folder; {hint}{end}"


def eval_modes(runs: list[RunRecord]) -> list[str]:
    """The evaluation modes that these runs recorded, sorted."""
    return sorted({run.eval_mode for run in runs if run.eval_mode is not None})


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, {} when there is no such file; SaerlError when it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # no JSON, or no text
        value = None
    if not isinstance(value, dict):
        raise SaerlError(f"{path} is damaged (not a JSON object); make it again or remove it")
    return value


def _load_run(folder: Path) -> RunRecord:
    for part in ("run", "result"):
        kept = manifest.look(folder, part)
        if kept.entry and kept.fault:
            raise SaerlError(f"{kept.fault}; make the run again with `saerl train --overwrite`")
    rows = read_metrics(folder / "metrics.jsonl")
    config = read_object(folder / "run.json")
    record = RunRecord(config.get("arm", folder.name), int(config.get("seed", 0)), folder, config)
    record.summary = read_object(folder / "summary.json")
    record.train = [row for row in rows if row.get("kind") == "train"]
    record.eval = [row for row in rows if row.get("kind") == "eval"]
    return record
