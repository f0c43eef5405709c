"""Metrics of a run: JSON lines on disk, one console line a step, and trackers when asked for."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError, first_line, no_memory
from saerl_fast.fileio import atomic_path, write_json, writing

log = logging.getLogger(__name__)

Row = dict[str, Any]
LOGS = "logs.json"  # what had been written to the logs of a run at its latest checkpoint
_SHOWN = ("reward", "pass_rate", "accuracy", "loss", "entropy", "lr", "tokens", "n")  # console order


class JsonlLog:
    """An append-only file of JSON objects, one a line, flushed after every write.

    A fresh log (``resume_step=None``) moves an older file of the same name aside, to ``*.previous``. A
    resumed one drops what was written after the checkpoint, since a run that stopped later will write those
    steps again: everything behind the bytes that ``written`` counts (what `digest` was at the checkpoint),
    or, where the file is no longer what was written then, the rows whose ``step`` is later than
    ``resume_step`` and the lines that cannot be read. ``damage`` then says what is wrong with the file.
    """

    def __init__(
        self, path: str | Path, resume_step: int | None = None, written: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.damage = Path(path), ""
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is not None:
                if (
                    self.path.is_file() and self.path.stat().st_nlink > 1
                ):  # a copy by links (cp -l) keeps its own
                    with atomic_path(self.path) as own:
                        shutil.copyfile(self.path, own)
                self.damage = _cut(self.path, resume_step, written)
            elif self.path.exists():
                self.path.replace(self.path.with_name(self.path.name + ".previous"))
            self._file = self.path.open("ab")
            self._rows = _lines(self.path)
            self._bytes, self._sha = _hashed(self.path)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows. NumPy and torch scalars become numbers, NaN and infinity null."""
        lines = [json.dumps(_json_value(row), allow_nan=False) + "\n" for row in rows]
        data = "".join(lines).encode()
        if not os.fstat(self._file.fileno()).st_nlink:
            raise SaerlError(f"{self.path} was removed while it was being written; resume, or start again")
        with writing(self.path):
            self._file.write(data)
            self._file.flush()
        self._rows, self._bytes = self._rows + len(lines), self._bytes + len(data)
        self._sha.update(data)

    def digest(self) -> dict[str, Any]:
        """Rows and bytes written so far, and their SHA-256."""
        return {"rows": self._rows, "bytes": self._bytes, "sha256": self._sha.hexdigest()}

    def close(self) -> None:
        with suppress(OSError):  # what a full disk did not take was said when it was written
            self._file.close()


def _blocks(path: Path, size: int | None) -> Iterator[bytes]:
    """The first ``size`` bytes of a file, or all that it has now."""
    left = size if size is not None else path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(min(left, 1 << 20)):
            left -= len(block)
            yield block


def _lines(path: Path, size: int | None = None) -> int:
    return sum(block.count(b"\n") for block in _blocks(path, size))


def _hashed(path: Path, size: int | None = None) -> tuple[int, Any]:
    """How many bytes there are among the first ``size`` (of all), and their SHA-256."""
    done, sha = 0, hashlib.sha256()
    for block in _blocks(path, size):
        sha.update(block)
        done += len(block)
    return done, sha


def write_logs(out_dir: str | Path, written: Mapping[str, Any], counters: Mapping[str, Any]) -> None:
    """Record in ``<out_dir>/logs.json`` what ``written`` says, the digest of each log by its name, and the
    ``damage`` that the run has counted."""
    write_json(Path(out_dir) / LOGS, {"logs": written, "damage": counters.get("damage", [])})


def damage(path: str | Path, written: Mapping[str, Any]) -> str:
    """What is wrong with a log of which ``written`` was the `JsonlLog.digest`; "" when nothing is.

    Rows that were appended later, and a torn last line, are no damage.
    """
    path = Path(path)
    if not written["rows"]:
        return ""
    if not path.is_file():
        return f"{path.name} is missing, and the {written['rows']} rows that it held"
    size, sha = _hashed(path, written["bytes"])
    if size == written["bytes"] and sha.hexdigest() == written["sha256"]:
        return ""
    rows = _lines(path, written["bytes"])
    if size < written["bytes"] and rows < written["rows"]:
        return f"{path.name} has {rows} of the {written['rows']} rows that were written"
    return f"{path.name} was changed after it was written"


def _cut(path: Path, step: int, written: Mapping[str, Any] | None) -> str:
    """Bring a log back to a checkpoint; what was wrong with it."""
    if written is not None and not damage(path, written):
        if path.is_file():
            os.truncate(path, written["bytes"])
        return ""
    if not path.is_file():
        return damage(path, written) if written is not None else ""
    unreadable = keep_until(path, step)
    rows = _lines(path)
    if written is None:
        return f"{path.name} had {unreadable} damaged lines" if unreadable else ""
    if rows == written["rows"]:
        return f"{path.name} was changed after it was written"
    what = f"{path.name} has {rows} of the {written['rows']} rows that were written"
    return what + (f" ({unreadable} damaged lines were dropped)" if unreadable else "")


class MetricsLog:
    """The log of one training run: ``<out_dir>/metrics.jsonl``.

    ``echo`` receives one line of text per row (by default it goes to `logging` at level INFO).
    ``steps``: how many there will be, for those lines.
    ``resume_step`` is the step of the checkpoint that training continues from; None starts afresh.
    ``written``: as for `JsonlLog`.
    ``trackers``: tensorboard (written to ``<out_dir>/tensorboard``), wandb, trackio; every number of a row
    goes to each as ``<kind>/<name>``. wandb and trackio read their own environment variables; the project is
    "saerl-fast" unless WANDB_PROJECT or TRACKIO_PROJECT names one, a run is called by its folder, and a
    resumed one is a new run there, called ``<folder>-from-<step>``. One that fails on the way is left out
    from there on, with a warning.
    Raises SaerlError when the folder cannot be written, or a tracker is not installed or cannot start.
    """

    def __init__(
        self,
        out_dir: str | Path,
        resume_step: int | None = None,
        *,
        echo: Callable[[str], None] | None = None,
        trackers: Sequence[str] = (),
        steps: int | None = None,
        written: Mapping[str, Any] | None = None,
    ) -> None:
        self._echo, self._steps = echo if echo is not None else log.info, steps
        self._trackers = {name: _open_tracker(name, Path(out_dir), resume_step) for name in trackers}
        self.lines = JsonlLog(Path(out_dir) / "metrics.jsonl", resume_step, written)
        self.path = self.lines.path

    def log(self, row: Mapping[str, Any]) -> None:
        """Record one row; it must hold ``step`` (int) and ``kind`` ("train", "eval", ...)."""
        missing = [key for key in ("step", "kind") if key not in row]
        if missing:
            raise SaerlError(f"a metrics row needs the key {missing[0]!r}; it has {', '.join(row)}")
        plain = _json_value(row)
        self.lines.write([plain])
        self._echo(format_row(plain, self._steps))
        values = {f"{plain['kind']}/{name}": value for name, value in _flat(plain)}
        for name, (send, _) in list(self._trackers.items()):
            self._track(name, partial(send, values, plain["step"]))

    def close(self) -> None:
        self.lines.close()
        for name, (_, close) in list(self._trackers.items()):
            self._track(name, close)

    def _track(self, name: str, do: Callable[[], Any]) -> None:
        """What a tracker fails at ends its part, not the run."""
        try:
            do()
        except Exception as err:  # no network, no disk: each has its own
            if no_memory(err):
                raise
            del self._trackers[name]
            log.warning("%s takes no more rows (%s); metrics.jsonl has them all", name, first_line(err))

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
        except (ValueError, RecursionError) as err:
            if number == len(lines):
                break
            raise SaerlError(f"{path} line {number} is damaged ({err}); remove that line") from None
        rows.append(row)
    return rows


def end_rows(path: str | Path, *, last: bool) -> list[Row]:
    """The rows of the first or the last step in a JSON-lines file, read from that end only; what cannot be
    read is passed over. [] without a file."""
    path, found = Path(path), list[Row]()
    for line in (_backwards(path) if last else _forwards(path)) if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            if found and row.get("step") != found[0].get("step"):
                break
            found.append(row)
    return found[::-1] if last else found


def _forwards(path: Path) -> Iterator[bytes]:
    """The lines of a file."""
    with path.open("rb") as file:
        yield from file


def _backwards(path: Path) -> Iterator[bytes]:
    """The lines of a file, the last one first."""
    with path.open("rb") as file:
        at, rest = file.seek(0, os.SEEK_END), b""
        while at > 0:
            size = min(at, 1 << 20)
            at = file.seek(at - size)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            yield from reversed(lines)
        yield rest


def read_metrics(path: str | Path) -> list[Row]:
    """Rows of a metrics.jsonl, or of the one in the folder ``path``."""
    path = Path(path)
    return read_jsonl(path / "metrics.jsonl" if path.is_dir() else path)


def keep_until(path: str | Path, step: int) -> int:
    """Rewrite a JSON-lines file without the rows later than ``step``, a torn last line and damaged lines;
    returns how many of these were damaged."""
    unreadable = 0
    with atomic_path(path) as temporary, open(path, "rb") as old, temporary.open("wb") as new:
        for line in old:
            try:
                row = json.loads(line)
                if row.get("step", 0) <= step:
                    new.write(line.rstrip(b"\n") + b"\n")
            except (ValueError, AttributeError, TypeError, RecursionError):
                unreadable += line.endswith(b"\n") and bool(line.strip())
    return unreadable


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
    title = out_dir.name if resume_step is None else f"{out_dir.name}-from-{resume_step}"
    project = os.environ.get(f"{name.upper()}_PROJECT", "saerl-fast")
    where = {"dir": str(out_dir)} if name == "wandb" else {}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if name == "tensorboard":
            purge = None if resume_step is None else resume_step + 1
            board = module.SummaryWriter(str(out_dir / name), purge_step=purge)
        else:
            run = module.init(project=project, name=title, **where)
    except Exception as err:  # no login, no network, no disk: each has its own
        reason = first_line(err)
        raise SaerlError(f"{name} cannot start ({reason}); take it out of train.trackers") from err
    if name == "tensorboard":

        def send(values: dict[str, float], step: int) -> None:
            for key, value in values.items():
                board.add_scalar(key, value, step)
            board.flush()

        return send, board.close
    return lambda values, step: run.log(values, step=step), run.finish
