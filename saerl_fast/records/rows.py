"""metrics.jsonl as columns, block by block: a million rows in seconds, in memory that the file's size does
not set."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FIGURES = ("reward", "pass_rate", "accuracy", "rollouts", "tokens", "groups", "groups_used")
PHASES = ("plan", "generate", "capture", "encode", "reward", "logprob", "update", "eval")
BLOCK = 1 << 20  # bytes
SMALL = 1 << 18  # a block that is parsed before pyarrow would be imported


class Block(NamedTuple):
    """The rows of some whole lines. step int64 [n]; kind, mode: str or None [n]; the figures and the seconds
    of each phase float64 [n], NaN where there is none; alarms: those that stand in a row and those that begin
    in it, by row number; damaged: how many lines hold no row."""

    step: np.ndarray
    kind: np.ndarray
    mode: np.ndarray
    figures: dict[str, np.ndarray]
    seconds: dict[str, np.ndarray]
    alarms: dict[int, tuple[list[str], list[str]]]
    damaged: int


def parse(lines: bytes) -> Block:
    """Columns of whole lines of JSON: by pyarrow where it can, else line by line."""
    found = _with_arrow(lines) if len(lines) > SMALL else None
    return found if found is not None else _with_json(lines)


def blocks(path: Path, start: int, *, whole: bool) -> Iterator[tuple[Block, bytes]]:
    """The columns of what stands behind ``start``, with the lines that they are of.

    Without ``whole`` a last line that has no line end yet is left for the next time; with it, it counts when
    it is a row, and is a torn line, no damage, when not. Two threads parse while the file is read.
    """
    waiting: deque[tuple[Future[Block], bytes]] = deque()
    with path.open("rb") as file, ThreadPoolExecutor(2) as pool:
        file.seek(start)
        rest = b""
        while read := file.read(BLOCK):
            end = read.rfind(b"\n") + 1
            lines, rest = (rest + read[:end], read[end:]) if end else (b"", rest + read)
            if lines:
                waiting.append((pool.submit(parse, lines), lines))
            if len(waiting) > 2:
                ready, lines = waiting.popleft()
                yield ready.result(), lines
        while waiting:
            ready, lines = waiting.popleft()
            yield ready.result(), lines
        if whole and rest and not (last := _with_json(rest)).damaged:
            yield last, rest


def _with_json(lines: bytes) -> Block:
    rows: list[dict[str, Any]] = []
    damaged = 0
    for line in lines.split(b"\n"):
        if line.strip():
            row = as_row(line)
            rows += [row] if row is not None else []
            damaged += row is None
    times = [row["time"] if isinstance(row.get("time"), dict) else {} for row in rows]
    return Block(
        np.array([row["step"] for row in rows], np.int64),
        np.array([row["kind"] for row in rows], object),
        np.array([mode if isinstance(mode := row.get("mode"), str) else None for row in rows], object),
        {name: _numbers([row.get(name) for row in rows]) for name in FIGURES},
        {
            name: _numbers([time.get(name) for time in times])
            for name in dict.fromkeys(n for time in times for n in time)
        },
        {
            i: (_names(row["alarms"]), _names(row.get("begun")))
            for i, row in enumerate(rows)
            if "alarms" in row
        },
        damaged,
    )


def as_row(line: bytes) -> dict[str, Any] | None:
    """The metrics row in a line; None when there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        return None
    step = row.get("step")
    return row if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**62 else None


def last_row(lines: bytes) -> dict[str, Any] | None:
    """The last metrics row in whole lines, which may end with damaged ones; None when there is none."""
    end = len(lines)
    while end:
        start = lines.rfind(b"\n", 0, end - 1) + 1
        if row := as_row(lines[start:end]):
            return row
        end = start
    return None


def _names(value: Any) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _numbers(values: list[Any]) -> np.ndarray:
    def number(value: Any) -> float:
        known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
        return float(value) if known else math.nan

    return np.array([number(value) for value in values], np.float64)


def _with_arrow(lines: bytes) -> Block | None:
    """None without pyarrow, and for lines that it cannot read as metrics."""
    try:
        import pyarrow as pa
        import pyarrow.json as pj
    except ImportError:
        return None
    ends = [as_row(lines[: lines.find(b"\n")]), as_row(lines[lines.rfind(b"\n", 0, -1) + 1 :])]
    phases = dict.fromkeys(PHASES)  # and what an engine of one's own may add to every step
    for row in ends:
        phases |= dict.fromkeys(row["time"]) if row and isinstance(row.get("time"), dict) else {}
    schema = [("step", pa.int64()), ("kind", pa.string()), ("mode", pa.string())]
    schema += [(name, pa.float64()) for name in FIGURES]
    schema += [("time", pa.struct([(name, pa.float64()) for name in phases]))]
    schema += [(name, pa.list_(pa.string())) for name in ("alarms", "begun")]
    try:
        table = pj.read_json(
            pa.BufferReader(lines),
            read_options=pj.ReadOptions(use_threads=False, block_size=max(BLOCK, len(lines))),
            parse_options=pj.ParseOptions(pa.schema(schema), unexpected_field_behavior="ignore"),
        )
    except (pa.ArrowException, OverflowError):
        return None
    step, kind = table["step"].combine_chunks(), table["kind"]
    if step.null_count or kind.null_count:
        return None
    numbers = _raw(step, np.int64)
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= 2**62):
        return None

    def figures(array: Any) -> np.ndarray:
        found = _raw(array, np.float64)
        return np.where(_known(array) & (np.abs(found) < 1e300), found, np.nan)

    time, alarms, begun = (table[name].combine_chunks() for name in ("time", "alarms", "begun"))
    return Block(
        numbers,
        np.array(kind.to_pylist(), object),
        np.array(table["mode"].to_pylist(), object),
        {name: figures(table[name].combine_chunks()) for name in FIGURES},
        {name: figures(time.field(name)) for name in phases},
        {
            i: (_names(alarms[i].as_py()), _names(begun[i].as_py()))
            for i in np.flatnonzero(_known(alarms)).tolist()
        },
        0,
    )


# Arrow's own ways to NumPy, and its functions on columns, import pandas, which takes longer than most files.


def _raw(array: Any, dtype: type) -> np.ndarray:
    """The values of an Arrow array of numbers; where it has none, anything."""
    size = np.dtype(dtype).itemsize
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * size)


def _known(array: Any) -> np.ndarray:
    """bool [n]: where an Arrow array has a value."""
    bits = array.buffers()[0]
    if bits is None:
        return np.ones(len(array), dtype=bool)
    found = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
    return found[array.offset : array.offset + len(array)].astype(bool)
