"""What a finished or running training run left on disk, read back for reports and comparisons."""

from __future__ import annotations

import difflib
import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saerl_fast.errors import SaerlError, printable
from saerl_fast.fileio import mismatch, read_json, write_json
from saerl_fast.records import manifest
from saerl_fast.records.log import LOGS, damage
from saerl_fast.records.rows import Block, blocks, last_row

log = logging.getLogger(__name__)
_NUMBER = (None, float)
ROWS: dict[str, Any] = {  # what a line of these files must hold
    "rollouts.jsonl": {"step": int, "rewards?": (None, [_NUMBER]), "completions?": (None, [str])},
    "eval_items.jsonl": {"step": int, "prompt_id": str, "score?": _NUMBER},
    "eval_prompts.jsonl": {"prompt_id": str},
}
RUN = {"arm?": str, "seed?": int, "id?": str, "made?": {str: Any}, "resumed?": [dict], "plan?": (None, str)}
RUN |= {"config?": {"train?": {"steps?": int}}, "target_values?": (None, [float])}
MERGED = {"change_kept": float, "accuracy": float, "rounded_to": str, "saved_as": str}
WARNED = {"first": int, "times": int, "steps": int}
SUMMARY = {
    "merged?": MERGED,
    "accuracy?": _NUMBER,
    "damage?": [str],
    "warnings?": {str: WARNED},
    "curve?": [[float]],
}
COMPARISON = "compare.json"
COMPARED = {"arms?": [str], "seeds?": [int], "notes?": list}
COMPARED |= {
    "targets?": [float],
    "pilots?": [int],
    "target_values?": (None, [float]),
    "smooth?": int,
    "vary_sae?": bool,
    "until?": bool,
    "pools?": [str],
    "sha256?": str,  # of the others
}
PROBE = {"note?": (None, str), "auc?": _NUMBER, "spearman?": _NUMBER, "baselines?": (None, {str: _NUMBER})}
PROBES = {"difficulty?": (None, PROBE), "quality?": (None, PROBE)}
SCORED = {"metadata?": {"difficulty_labels?": {"rollouts?": float}, "sae?": dict} | PROBES}
WRITTEN = {"logs": {str: {"rows": int, "bytes": int, "sha256": str}}, "damage": [str]}
FORMS: dict[str, tuple[str, Any]] = {  # name -> the command that writes it, and what it must hold
    "run.json": ("saerl train", RUN),
    "summary.json": ("saerl train", SUMMARY),
    COMPARISON: ("saerl compare", COMPARED),
    "scores.json": ("saerl score", SCORED),
    "train.json": ("saerl sae train", {}),
    LOGS: ("saerl train", WRITTEN),
}
AGAIN = {  # what mends a part of a run's manifest, alone and in a comparison
    "run": ("saerl train --resume", "saerl compare"),
    "result": ("saerl train --overwrite", "saerl compare --redo"),
}
PILOT = "pilot"  # the folder of a comparison's pilots, which are no part of it
MOST_STEPS = 10**6  # of which lost evaluations are told
SAERL_PHASES = ("capture", "encode", "plan")  # what this project adds to a vanilla step


class Course:
    """Columns of the training rows, float64 each: step, reward, pass_rate, rollouts, tokens generated, used,
    the share of groups with a gradient, and seconds, without evaluation. Ordered by step."""

    NAMES = ("step", "reward", "pass_rate", "rollouts", "tokens", "used", "seconds")

    def __init__(self) -> None:
        self._parts = [np.zeros((len(self.NAMES), 0))]

    def __len__(self) -> int:
        return sum(part.shape[1] for part in self._parts)

    def __getitem__(self, name: str) -> np.ndarray:
        if len(self._parts) > 1:
            whole = np.concatenate(self._parts, axis=1)
            self._parts = [
                whole if (np.diff(whole[0]) >= 0).all() else whole[:, whole[0].argsort(kind="stable")]
            ]
        return self._parts[0][self.NAMES.index(name)]

    def add(self, block: Block, rows: np.ndarray) -> None:
        with np.errstate(invalid="ignore"):
            used = block.figures["groups_used"] / np.maximum(block.figures["groups"], 1)
        phases = [np.nan_to_num(found) for name, found in block.seconds.items() if name != "eval"]
        seconds = np.sum(phases, axis=0) if phases else np.zeros(len(block.step))
        columns = [block.step, *(block.figures[name] for name in self.NAMES[1:5]), used, seconds]
        self._parts.append(np.stack([column[rows] for column in columns]).astype(np.float64))


@dataclass
class RunRecord:
    """One training run: its configuration, metrics and summary. `read` takes in what is new on disk."""

    arm: str
    seed: int
    folder: Path
    config: dict[str, Any]  # what run.json holds
    summary: dict[str, Any] = field(default_factory=dict)  # empty until the run has ended

    def __post_init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.train = Course()
        self.eval_steps: list[int] = []
        self.accuracy: list[float] = []
        self.eval_mode: str | None = None  # sample, greedy or prob, as last recorded
        self.alarms: dict[str, dict[str, int]] = {}  # name -> times, steps and the first step
        self.last: dict[str, Any] = {}  # the latest row
        self.first_line = b""
        self.damaged = 0  # lines
        self._seconds: dict[str, float] = {}
        self._active: dict[str, set[str]] = {}  # alarms in the latest row, by kind of row
        self._offset, self._end = 0, b""
        self._holes: list[str] | None = None

    def read(self, *, whole: bool = False) -> bool:
        """Take in the lines that metrics.jsonl gained since the last call; whether there were any.

        A file that was cut or replaced meanwhile is read anew. ``whole``: a last line that lacks its line end
        counts as well, if it is a row.
        """
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return False
        with path.open("rb") as file:
            if cause := _foreign(file.read(1 << 16)):
                raise SaerlError(f"{path} {cause}, so another program wrote it; put back the file of the run")
            file.seek(self._offset - len(self._end))
            if file.read(len(self._end)) != self._end:
                self._clear()
                self.config = read_object(self.folder / "run.json")
        before, self._holes = self._offset, None
        for block, lines in blocks(path, self._offset, whole=whole):
            self.first_line = self.first_line or lines[: lines.find(b"\n")]
            self._offset, self._end = self._offset + len(lines), lines[-256:]
            self.last = last_row(lines) or self.last
            self.add(block)
        return self._offset > before

    def add(self, block: Block) -> None:
        """Count the rows of a block."""
        train, evals = block.kind == "train", block.kind == "eval"
        self.damaged += block.damaged
        self.train.add(block, train)
        for name, values in block.seconds.items():
            known = values[train & np.isfinite(values)]
            if len(known):
                self._seconds[name] = self._seconds.get(name, 0.0) + float(known.sum())
        evals &= np.isfinite(block.figures["accuracy"])
        self.eval_steps += block.step[evals].tolist()
        self.accuracy += block.figures["accuracy"][evals].tolist()
        self.eval_mode = next((mode for mode in block.mode[evals][::-1] if mode), self.eval_mode)
        for i, (names, begun) in block.alarms.items():
            for name in names:
                found = self.alarms.setdefault(name, {"times": 0, "steps": 0, "first": int(block.step[i])})
                found["steps"] += 1
                found["times"] += name in begun

    @property
    def steps(self) -> int | None:
        """Training steps in all, where they are recorded."""
        return _inside(self.config, "config", "train", "steps")

    def phase_seconds(self) -> dict[str, float]:
        """Seconds per phase over all training steps."""
        return dict(self._seconds)

    def overhead(self) -> float | None:
        """Seconds of capture, encoding and plan as a share of everything else in the training steps."""
        phases = self.phase_seconds()
        added = sum(phases.get(name, 0.0) for name in SAERL_PHASES)
        rest = sum(seconds for name, seconds in phases.items() if name not in (*SAERL_PHASES, "eval"))
        return added / rest if rest else None

    def rollouts(self) -> int:
        return int(np.nansum(self.train["rollouts"]))

    def spent(self, what: str, steps: Any = None) -> np.ndarray:
        """float64: the sum of a column of `Course` until each of ``steps`` (None: of the evaluations)."""
        at = np.asarray(self.eval_steps if steps is None else steps, dtype=np.float64)
        if what == "steps":
            return at
        total = np.append(0.0, np.cumsum(np.nan_to_num(self.train[what])))
        return total[np.searchsorted(self.train["step"], at, side="right")]

    def steps_lost(self) -> str:
        """The sentence about training steps that have no row though later ones do, or the run has ended."""
        ended = _inside(self.summary, "steps")
        edges = np.unique(np.append(self.train["step"], [0] if ended is None else [0, ended + 1])).astype(
            np.int64
        )
        before = np.flatnonzero(np.diff(edges) > 1)
        gaps = zip(edges[before] + 1, edges[before + 1] - 1, strict=True)
        return f"metrics.jsonl lacks the training steps {_ranges([*gaps])}" if len(before) else ""

    def holes(self) -> list[str]:
        """What is missing from this run's record or was changed in it, a sentence each; [] when whole.

        The logs are read to their end, once until `read` is called again.
        """
        if self._holes is None:
            self._holes = self._missing()
        return self._holes

    def _missing(self) -> list[str]:
        said = [str(line) for line in self.summary.get("damage", [])]
        try:
            kept = read_object(self.folder / LOGS)
            said += [str(line) for line in kept.get("damage", [])]
            said += [damage(self.folder / name, written) for name, written in kept.get("logs", {}).items()]
        except (SaerlError, AttributeError, KeyError, TypeError):
            said.append(f"{LOGS} is damaged, so nothing shows whether the logs are whole")
        if self.damaged:
            said.append(f"metrics.jsonl has {self.damaged} damaged lines, which were left out")
        said.append(self.steps_lost())
        if twice := len(self.train) - len(np.unique(self.train["step"])):
            said.append(f"metrics.jsonl has {twice} training steps more than once")
        if lost := self.evals_lost():
            said.append(f"metrics.jsonl lacks the evaluations of the steps {_ranges([(s, s) for s in lost])}")
        if len(set(self.eval_steps)) < len(self.eval_steps):
            said.append("metrics.jsonl has evaluations more than once")
        return [line for line in dict.fromkeys(said) if line]

    def evals_lost(self) -> list[int]:
        """Steps whose evaluation has no row, or none with an accuracy, by the settings of the run."""
        every = _inside(self.config, "config", "train", "eval", "every")
        if every is None or not len(self.train):
            return []
        done = min(int(self.train["step"][-1]), MOST_STEPS)  # a damaged row says nothing of what was due
        done = done if self.steps is None else min(done, self.steps)
        due = set(range(0, done, every)) if every else set()
        due |= {done} if self.summary and done == self.steps else set()
        return sorted(due.difference(self.eval_steps))


def _foreign(start: bytes) -> str:
    """What the start of a file of rows says of a program that wrote it anew, or ""."""
    if start[:2] == b"\x1f\x8b":
        return "is compressed"
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "is no text of UTF-8"
    return (
        "ends its lines with CR alone" if start[:1] == b"{" and b"\r" in start and b"\n" not in start else ""
    )


def _inside(tree: Any, *path: str) -> int | None:
    """The whole number that stands at ``path`` in nested objects, if one does."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree if isinstance(tree, int) and not isinstance(tree, bool) and 0 <= tree < 2**53 else None


def _ranges(gaps: list[tuple[int, int]]) -> str:
    shown = [str(a) if a == b else f"{a} to {b}" for a, b in gaps[:5]]
    return ", ".join(shown) + (f" and {len(gaps) - 5} more stretches" if len(gaps) > 5 else "")


def find_runs(root: str | Path) -> list[Path]:
    """The folders below ``root``, and ``root`` itself, that hold a run: metrics.jsonl, or run.json and what a
    run writes later. Links are followed; a folder that is reached twice is listed once, not as a link. A
    comparison's pilots are passed over."""
    found, seen, links = [], set(), [Path(root)]
    while links:
        for at, folders, files in os.walk(links.pop(0), onerror=_unreadable):
            real = os.path.realpath(at)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            if PILOT in folders and "compare.json" in files:
                folders.remove(PILOT)
            if "metrics.jsonl" in files or ("run.json" in files and {LOGS, "summary.json"} & set(files)):
                found.append(Path(at))
            links += [path for name in sorted(folders) if (path := Path(at, name)).is_symlink()]
    return sorted(found)


def pilots_note(root: Path) -> str:
    """Where the pilots of the comparison in ``root`` are, as the end of a sentence; "" without any."""
    there = (root / PILOT).is_dir() and find_runs(root / PILOT)
    return f"its pilots are in {root / PILOT}, a folder to report and to watch" if there else ""


def _unreadable(err: OSError) -> None:
    if not isinstance(err, FileNotFoundError):  # removed meanwhile
        raise SaerlError(f"cannot read {err.filename}: {err.strerror}; make it readable")


def load_runs(root: str | Path, say: Callable[[str], None] = log.warning) -> list[RunRecord]:
    """Every run below ``root`` (or ``root`` itself), ordered as the comparison listed its arms.

    Without a compare.json the arm ``vanilla`` comes first, since the first arm is the baseline; the others
    follow by name. ``say`` is told, a sentence each, what was left out (see `one_of_each`) and which runs
    have lost rows. Raises SaerlError when there is no run, a file is damaged, or two runs that differ have
    one arm and seed.
    """
    root = Path(root)
    if not root.is_dir():
        raise SaerlError(no_folder(root))
    folders = find_runs(root)
    if not folders and (note := pilots_note(root)):
        raise SaerlError(f"no run of the comparison in {root} has begun; {note}")
    if not folders:
        raise SaerlError(
            f"{root} holds no metrics.jsonl and no scores; run `saerl score`, `saerl train` or "
            "`saerl compare` first"
        )
    runs = [open_run(folder) for folder in folders]
    order, seeds = listed(root)
    others = [run for run in runs if run.arm not in order or run.seed not in seeds]
    if len(others) < len(runs):
        for run in others:
            say(f"{run.folder} (arm {run.arm}, seed {run.seed}) is not of the comparison: it is not counted")
        runs = [run for run in runs if run.arm in order and run.seed in seeds]
    for run in runs:
        run.read(whole=True)
    runs = one_of_each(root, runs, say)
    there = {(run.arm, run.seed) for run in runs}
    for arm, seed in itertools.product(order, seeds):
        if (arm, seed) not in there:
            say(f"arm {arm}, seed {seed} of the comparison has no run in {root}")
    for run in runs:
        for line in run.holes():
            say(f"{run.folder}: {line}")
    rank = {arm: i for i, arm in enumerate(order)}
    return sorted(
        runs, key=lambda run: (rank.get(run.arm, len(rank)), run.arm != "vanilla", run.arm, run.seed)
    )


def listed(root: Path) -> tuple[list[str], list[int]]:
    """Arms and seeds of the comparison in ``root``; empty when there is none."""
    comparison = read_object(root / "compare.json")
    arms, seeds = comparison.get("arms", []), comparison.get("seeds", [])
    if not isinstance(arms, list) or not isinstance(seeds, list) or not all(isinstance(a, str) for a in arms):
        raise SaerlError(f"{root / 'compare.json'} is damaged (no list of arms); run `saerl compare` again")
    return [arm.partition(":")[0] for arm in arms], seeds


def one_of_each(
    root: Path, runs: list[RunRecord], say: Callable[[str], None], *, strict: bool = True
) -> list[RunRecord]:
    """``runs`` without copies: of one arm and seed there is one run.

    Copies have one id, or one first row with its clock times, wherever they lie and whatever they are called.
    The run nearest to ``root`` counts, then the one in the folder that its arm's runs have, then the longest.
    Runs that differ may share arm and seed only where one is nearer or has that folder; else SaerlError, or,
    not ``strict``, both are kept.
    """
    kept: list[RunRecord] = []

    def rank(run: RunRecord) -> tuple[int, bool]:
        named = run.folder.name in (run.arm, f"{run.arm}.seed-{run.seed}")
        return len(run.folder.relative_to(root).parts), not named

    for run in sorted(runs, key=lambda run: (*rank(run), -len(run.train), str(run.folder))):
        same = [one for one in kept if _copy(one, run)]
        rival = [one for one in kept if (one.arm, one.seed) == (run.arm, run.seed)]
        if same:
            say(f"{run.folder} is a copy of {same[0].folder}, not another seed: it is not counted")
        elif rival and rank(rival[0]) < rank(run):
            both = f"{rival[0].folder} and {run.folder} are different runs of arm {run.arm}, seed {run.seed}"
            say(f"{both}: only the first is counted")
        elif rival and strict:
            both = f"{rival[0].folder} and {run.folder} are different runs of arm {run.arm}, seed {run.seed}"
            raise SaerlError(f"{both}; move one of them out of {root}")
        else:
            kept.append(run)
    return kept


def _copy(one: RunRecord, two: RunRecord) -> bool:
    ids = one.config.get("id"), two.config.get("id")
    if all(ids):
        return ids[0] == ids[1]
    rows = one.first_line == two.first_line != b""
    return rows and (one.arm, one.seed) == (two.arm, two.seed)


def no_folder(root: Path) -> str:
    """The sentence about a run folder that is none, with one beside it that may be meant."""
    beside = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
    close = difflib.get_close_matches(root.name, beside, n=1)
    hint = f"did you mean {root.parent / close[0]}?" if close else "pass"
    end = "" if close else " the run_dir of `saerl score`, `saerl train` or `saerl compare`"
    return f"{root} is not a folder; {hint}{end}"


def eval_modes(runs: list[RunRecord]) -> list[str]:
    """The evaluation modes that these runs recorded, sorted."""
    return sorted({run.eval_mode for run in runs if run.eval_mode is not None})


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``, {} when there is no such file; SaerlError when it is damaged."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = read_json(path, *FORMS.get(path.name, ("saerl score", {})))
    if path.name == COMPARISON and found.pop("sha256", None) not in (None, manifest.json_digest(found)):
        raise SaerlError(f"{path} is not as it was written; run `saerl compare` again, which mends it")
    return found


def write_comparison(root: Path, record: dict[str, Any]) -> None:
    """Write what the comparison in ``root`` is made with, and its hash."""
    write_json(root / COMPARISON, record | {"sha256": manifest.json_digest(record)})


def checked(rows: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """``rows`` themselves; SaerlError where one is not what lines of ``file`` hold."""
    for number, row in enumerate(rows, 1):
        if fault := mismatch(row, ROWS[file.name]):
            raise SaerlError(f"{file} row {number} is damaged ({fault}); remove that line")
    return rows


def open_run(folder: Path) -> RunRecord:
    """The run in ``folder``, no row read yet. SaerlError where a file that describes it is damaged."""
    for part, again in AGAIN.items():
        kept = manifest.look(folder, part)
        if kept.entry and kept.fault:
            compared = any((above / "compare.json").is_file() for above in [*folder.absolute().parents][:2])
            raise SaerlError(f"{kept.fault}; mend it with `{again[compared]}` and the settings of the run")
    config = read_object(folder / "run.json")
    arm = printable(config.get("arm", folder.name)).replace("\n", " ")
    return RunRecord(arm, config.get("seed", 0), folder, config, read_object(folder / "summary.json"))
