"""Metrics of a run: JSON lines on disk, one console line a step, and trackers when asked for."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import atomic_path

log = logging.getLogger(__name__)

Row = dict[str, Any]
_SHOWN = ("reward", "pass_rate", "accuracy", "loss", "entropy", "lr", "tokens", "n")  # console order


class JsonlLog:
    """An append-only file of JSON objects, one a line, flushed after every write.

    A fresh log (``resume_step=None``) moves an older file of the same name aside, to ``*.previous``.
    A resumed one drops the rows whose ``step`` is later than ``resume_step``, atomically, since a run that
    stopped after its last checkpoint will write those steps again.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                if resume_step is None:
                    self.path.replace(self.path.with_name(self.path.name + ".previous"))
                else:
                    keep_until(self.path, resume_step)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as err:
            raise SaerlError(f"cannot write {self.path}: {err.strerror}; choose another run_dir") from None

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows. NumPy and torch scalars become numbers, NaN and infinity null."""
        text = "".join(json.dumps(_json_value(row), allow_nan=False) + "\n" for row in rows)
        if not os.fstat(self._file.fileno()).st_nlink:
            raise SaerlError(f"{self.path} was removed while it was being written; resume, or start again")
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as err:
            raise SaerlError(
                f"cannot write {self.path}: {err.strerror}; free some space and resume"
            ) from None

    def close(self) -> None:
        self._file.close()


class MetricsLog:
    """The log of one training run: ``<out_dir>/metrics.jsonl``.

    ``echo`` receives one line of text per row (by default it goes to `logging` at level INFO).
    ``steps``: how many there will be, for those lines.
    ``resume_step`` is the step of the checkpoint that training continues from; None starts afresh.
    ``trackers``: tensorboard (written to ``<out_dir>/tensorboard``), wandb, trackio; every number of a row
    goes to each as ``<kind>/<name>``. wandb and trackio read their own environment variables; the project is
    "saerl-fast" unless WANDB_PROJECT or TRACKIO_PROJECT names one, a run is called by its folder, and a
    resumed one is a new run there, called ``<folder>-from-<step>``.
    Raises SaerlError when the folder cannot be written or a tracker is not installed.
    """

    def __init__(
        self,
        out_dir: str | Path,
        resume_step: int | None = None,
        *,
        echo: Callable[[str], None] | None = None,
        trackers: Sequence[str] = (),
        steps: int | None = None,
    ) -> None:
        self._echo, self._steps = echo if echo is not None else log.info, steps
        self._trackers = [_open_tracker(name, Path(out_dir), resume_step) for name in trackers]
        self._lines = JsonlLog(Path(out_dir) / "metrics.jsonl", resume_step)
        self.path = self._lines.path

    def log(self, row: Mapping[str, Any]) -> None:
        """Record one row; it must hold ``step`` (int) and ``kind`` ("train", "eval", ...)."""
        missing = [key for key in ("step", "kind") if key not in row]
        if missing:
            raise SaerlError(f"a metrics row needs the key {missing[0]!r}; it has {', '.join(row)}")
        plain = _json_value(row)
        self._lines.write([plain])
        self._echo(format_row(plain, self._steps))
        values = {f"{plain['kind']}/{name}": value for name, value in _flat(plain)}
        for send, _ in self._trackers:
            send(values, plain["step"])

    def close(self) -> None:
        self._lines.close()
        for _, close in self._trackers:
            close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def format_row(row: Mapping[str, Any], steps: int | None = None) -> str:
    """One console line: step (of ``steps``) and kind, the usual figures, seconds in all."""
    total = f"/{steps}" if steps else ""
    parts = [f"step {row['step']:>5}{total} {row['kind']:<5}"]
    parts += [f"{name} {_short(row[name])}" for name in _SHOWN if row.get(name) is not None]
    seconds = row.get("time")
    if isinstance(seconds, Mapping) and seconds:
        parts.append(f"{sum(v for v in seconds.values() if isinstance(v, (int, float))):.1f} s")
    return "  ".join(parts)


def read_jsonl(path: str | Path) -> list[Row]:
    """The rows of a JSON-lines file. A torn last line (the writer was killed) is left out."""
    path = Path(path)
    if not path.is_file():
        raise SaerlError(f"{path} does not exist; make it with `saerl train`")
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as err:
            if number == len(lines):
                break
            raise SaerlError(f"{path} line {number} is damaged ({err}); remove that line") from None
        rows.append(row)
    return rows


def read_metrics(path: str | Path) -> list[Row]:
    """Rows of a metrics.jsonl, or of the one in the folder ``path``."""
    path = Path(path)
    return read_jsonl(path / "metrics.jsonl" if path.is_dir() else path)


def keep_until(path: str | Path, step: int) -> None:
    """Rewrite a JSON-lines file without the rows later than ``step`` and without a torn last line."""
    rows = [row for row in read_jsonl(path) if row.get("step", 0) <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _json_value(value: Any) -> Any:
    """``value`` with only what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and torch scalars and arrays
        return _json_value(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield prefix + name, value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _open_tracker(
    name: str, out_dir: Path, resume_step: int | None
) -> tuple[Callable[[dict[str, float], int], Any], Callable[[], Any]]:
    """What takes (values, step), and what closes it."""
    try:
        module = importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError:
        raise SaerlError(f"train.trackers={name} needs its package; pip install {name}") from None
    if name == "tensorboard":
        purge = None if resume_step is None else resume_step + 1
        board = module.SummaryWriter(str(out_dir / name), purge_step=purge)

        def send(values: dict[str, float], step: int) -> None:
            for key, value in values.items():
                board.add_scalar(key, value, step)
            board.flush()

        return send, board.close
    title = out_dir.name if resume_step is None else f"{out_dir.name}-from-{resume_step}"
    project = os.environ.get(f"{name.upper()}_PROJECT", "saerl-fast")
    where = {"dir": str(out_dir)} if name == "wandb" else {}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        run = module.init(project=project, name=title, **where)
    except Exception as err:  # no login, no network, no disk: each has its own
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise SaerlError(f"{name} cannot start ({reason}); take it out of train.trackers") from None
    return lambda values, step: run.log(values, step=step), run.finish
