"""Rows of a local file or a hub dataset as a dict of equally long columns."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?\Z")

Columns = dict[str, list[Any]]


def read_rows(spec: str, *, split: str, hub_config: str | None, text_columns: set[str]) -> Columns:
    """Columns of ``spec``: a file by its suffix, else a hub dataset id or a folder for `datasets`.

    ``text_columns`` are left as text when a CSV file is read; other CSV columns that hold only numbers
    become numbers, and empty cells become None. Raises SaerlError on anything that cannot be read.
    """
    path = Path(spec)
    if path.suffix.lower() in SUFFIXES:
        if not path.is_file():
            raise SaerlError(f"data file {spec} does not exist; check the path in data.train and data.eval")
        try:
            return _READERS[path.suffix.lower()](path, text_columns)
        except (OSError, UnicodeDecodeError) as err:
            raise SaerlError(f"data file {spec} cannot be read ({err}); save it as UTF-8 text") from None
    if path.is_dir() or _HUB_ID.match(spec):
        return _read_hub(spec, split, hub_config)
    raise SaerlError(
        f"data source {spec!r} is no {'/'.join(SUFFIXES)} file, hub id, reasoning-gym:NAME or module:function"
    )


def _read_jsonl(path: Path, _: set[str]) -> Columns:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as err:
                raise SaerlError(f"{path} line {number} is not valid JSON ({err.msg}); mend it") from None
            if not isinstance(row, dict):
                raise SaerlError(f"{path} line {number} must be a JSON object, not a {type(row).__name__}")
            rows.append(row)
    return columns_of(rows)


def _read_json(path: Path, _: set[str]) -> Columns:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as err:
        raise SaerlError(f"{path} line {err.lineno} is not valid JSON ({err.msg}); mend it") from None
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return columns_of(value)
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) <= 1:
            return value
        raise SaerlError(f"{path} has columns of different lengths; give each the same number of rows")
    raise SaerlError(f"{path} must hold a list of objects or an object of equally long lists")


def _read_csv(path: Path, text_columns: set[str]) -> Columns:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle)
        rows = []
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise SaerlError(
                        f"{path} line {reader.line_num} has another number of cells than its header"
                    )
                rows.append(row)
        except csv.Error as err:
            raise SaerlError(f"{path} line {reader.line_num} is not valid CSV ({err}); mend it") from None
        names = reader.fieldnames or []
    columns: Columns = {}
    for name in names:
        cells = [row[name] for row in rows]
        columns[name] = cells if name in text_columns else _numbers(cells)
    return columns


def _read_parquet(path: Path, _: set[str]) -> Columns:
    """All columns of one Parquet file as Python values."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise SaerlError(f"reading {path} needs pyarrow; pip install pyarrow") from None
    try:
        table = parquet.read_table(path)
    except pa.ArrowInvalid as err:
        raise SaerlError(f"{path} is not a Parquet file ({_first_line(err)}); write it again") from None
    return {name: table.column(name).to_pylist() for name in table.column_names}


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _read_hub(spec: str, split: str, hub_config: str | None) -> Columns:
    try:
        import datasets
    except ImportError:
        raise SaerlError(f"loading the dataset {spec} needs datasets; pip install datasets") from None
    try:
        data = datasets.load_dataset(spec, hub_config, split=split)
    except Exception as err:  # the hub client raises many kinds
        what = f"{spec} (configuration {hub_config})" if hub_config else spec
        reason = f"{type(err).__name__}: {_first_line(err)}"
        raise SaerlError(
            f"cannot load split {split!r} of the hub dataset {what} ({reason}); "
            "check the id and data.split, or pass a local file"
        ) from None
    return {name: data[name][:] for name in data.column_names}


def columns_of(rows: list[dict[str, Any]]) -> Columns:
    """Rows as columns; None where a row lacks one that another has."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _numbers(cells: list[str]) -> list[Any]:
    try:
        return [float(cell) if cell.strip() else None for cell in cells]
    except ValueError:
        return [cell if cell.strip() else None for cell in cells]


def _first_line(err: Exception) -> str:
    return (str(err).strip().splitlines() or [""])[0]
