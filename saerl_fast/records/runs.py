"""What a finished or running training run left on disk, read back for reports and comparisons."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError, printable
from saerl_fast.fileio import mismatch, read_json
from saerl_fast.records import manifest
from saerl_fast.records.log import read_metrics

_NUMBER = (None, float)
_COUNTS, _FIGURES = ("rollouts", "groups", "groups_used"), ("reward", "pass_rate", "accuracy")
ROW = {"step": int, "kind": str, "mode?": (None, str), "time?": {str: float}}
ROW |= {f"{name}?": float for name in _COUNTS} | {f"{name}?": _NUMBER for name in _FIGURES}
ROWS: dict[str, Any] = {  # what a line of these files must hold
    "metrics.jsonl": ROW,
    "rollouts.jsonl": {"step": int, "rewards?": (None, [_NUMBER]), "completions?": (None, [str])},
    "eval_items.jsonl": {"step": int, "prompt_id": str, "score?": _NUMBER},
    "eval_prompts.jsonl": {"prompt_id": str},
}
RUN = {"arm?": str, "seed?": int, "made?": {str: Any}, "resumed?": [dict], "plan?": (None, str)}
RUN |= {"config?": {"train?": {"steps?": int}}}
MERGED = {"change_kept": float, "accuracy": float, "rounded_to": str, "saved_as": str}
COMPARED = {"arms?": [str], "seeds?": [int], "notes?": list}
COMPARED |= {"targets?": [float], "target_values?": (None, [float]), "smooth?": int}
SCORED = {"metadata?": {"difficulty_labels?": {"rollouts?": float}, "sae?": dict}}
FORMS: dict[str, tuple[str, Any]] = {  # name -> the command that writes it, and what it must hold
    "run.json": ("saerl train", RUN),
    "summary.json": ("saerl train", {"merged?": MERGED, "accuracy?": _NUMBER}),
    "compare.json": ("saerl compare", COMPARED),
    "scores.json": ("saerl score", SCORED),
    "train.json": ("saerl sae train", {}),
}
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
        """NaN where no completion was judged."""
        found = (row.get("accuracy") for row in self.eval)
        return [math.nan if value is None else value for value in found]

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
    return read_json(path, *FORMS.get(path.name, ("saerl score", {})))


def checked(rows: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """``rows`` themselves; SaerlError where one is not what lines of ``file`` hold."""
    for number, row in enumerate(rows, 1):
        if fault := mismatch(row, ROWS[file.name]):
            raise SaerlError(f"{file} row {number} is damaged ({fault}); remove that line")
    return rows


def _load_run(folder: Path) -> RunRecord:
    for part in ("run", "result"):
        kept = manifest.look(folder, part)
        if kept.entry and kept.fault:
            raise SaerlError(f"{kept.fault}; make the run again with `saerl train --overwrite`")
    file = folder / "metrics.jsonl"
    rows = checked(read_metrics(file), file)
    config = read_object(folder / "run.json")
    arm = printable(config.get("arm", folder.name)).replace("\n", " ")
    record = RunRecord(arm, config.get("seed", 0), folder, config)
    record.summary = read_object(folder / "summary.json")
    record.train = [row for row in rows if row.get("kind") == "train"]
    record.eval = [row for row in rows if row.get("kind") == "eval"]
    return record
