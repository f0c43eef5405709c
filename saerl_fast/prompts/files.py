"""Rows of a local file, a folder or a hub dataset as a dict of equally long columns."""

from __future__ import annotations

import csv
import gzip
import io
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from saerl_fast.errors import SaerlError, first_line, named
from saerl_fast.fileio import check_fetched, damaged, parse_json
from saerl_fast.hub import at_home
from saerl_fast.prompts import jsontext
from saerl_fast.records.packed import BLOCK, Column, kept

_TEXTUAL = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (".parquet", *_TEXTUAL, *(f"{suffix}.gz" for suffix in _TEXTUAL))
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?\Z")
_SAVED = ("dataset_dict.json", "state.json")  # what datasets' save_to_disk leaves in a folder
_SPLITS = re.compile(r"(?<![a-z])(train|test|val(id(ation)?)?|dev|eval)(?![a-z])", re.I)

Columns = dict[str, Sequence[Any]]


def read_rows(spec: str, *, split: str, hub_config: str | None, text_columns: set[str]) -> Columns:
    """Columns of ``spec``: a file by its suffix, a folder, or a hub dataset id for `datasets`.

    A folder is one that `datasets` saved (``save_to_disk``), one of shards (files of one kind, which are
    joined in the order of their names), or one that `datasets` reads by its own rules: files named after
    splits, or in folders. ``text_columns`` are left as text when a CSV or TSV file is read; its other columns
    become numbers where they hold only numbers, and empty cells None. Raises SaerlError on
    anything that cannot be read.
    """
    path = at_home(spec)
    if suffix_of(path) is not None and not path.is_dir():
        if not path.is_file():
            raise SaerlError(f"data file {spec} does not exist; check the path in data.train and data.eval")
        return _read_file(path, text_columns)
    if path.is_dir():
        return _read_folder(path, split, hub_config, text_columns)
    kinds = "/".join(SUFFIXES)
    if path.is_file():
        raise SaerlError(f"data file {spec} is of a kind that is not read; save it as one of {kinds}")
    if _HUB_ID.match(spec):
        return _read_hub(spec, split, hub_config)
    raise SaerlError(
        f"data source {spec!r} is no {kinds} file, folder, hub id, reasoning-gym:NAME or module:function"
    )


def suffix_of(path: Path) -> str | None:
    """The entry of SUFFIXES that the file name ends in."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def columns_of(rows: Iterable[dict[str, Any]]) -> Columns:
    """Rows as columns; None where a row lacks one that another has. Many rows are not held as objects."""
    made: dict[str, Column] = {}
    done, rest = 0, iter(rows)
    while block := list(islice(rest, BLOCK)):
        for name in dict.fromkeys(name for row in block for name in row):
            if name not in made:
                made[name] = Column()
                made[name].add([None] * done)
        for name, column in made.items():
            column.add([row.get(name) for row in block])
        done += len(block)
    return {name: column.done() for name, column in made.items()}


def _joined(parts: Iterable[Columns]) -> Columns:
    """Columns of the same names, one after the other."""
    made: dict[str, Column] = {}
    for part in parts:
        for name, cells in part.items():
            made.setdefault(name, Column()).add(cells)
    return {name: column.done() for name, column in made.items()}


def _read_file(path: Path, text_columns: set[str]) -> Columns:
    suffix = (suffix_of(path) or "").removesuffix(".gz")
    try:
        check_fetched(path)
        return _READERS[suffix](path, text_columns)
    except (gzip.BadGzipFile, EOFError, zlib.error) as err:
        raise SaerlError(f"{path} is not a whole gzip file ({err}); copy it again") from None
    except UnicodeDecodeError as err:
        raise SaerlError(f"data file {path} cannot be read ({err}); save it as UTF-8 text") from None
    except OSError as err:
        raise damaged(f"data file {path}", err, "copy it again") from err


def _read_folder(folder: Path, split: str, hub_config: str | None, text_columns: set[str]) -> Columns:
    if any((folder / name).is_file() for name in _SAVED):
        return _read_saved(folder, split)
    visible = (path for path in folder.iterdir() if path.is_file() and path.name[0] not in "._")
    shards = sorted(path for path in visible if suffix_of(path) is not None)
    named = any(_SPLITS.search(path.name) for path in shards)
    if hub_config is not None or named or not shards:
        return _read_hub(str(folder), split, hub_config)
    kinds = sorted({suffix_of(path) or "" for path in shards})
    if len(kinds) > 1:
        raise SaerlError(f"folder {folder} holds files of several kinds ({', '.join(kinds)}); name one file")
    names: set[str] = set()

    def read(path: Path) -> Columns:
        columns = _read_file(path, text_columns)
        names.update(columns if path == shards[0] else ())
        if set(columns) != names:
            other = ", ".join(sorted(names ^ set(columns)))
            raise SaerlError(f"{path} and {shards[0].name} differ in columns ({other}); name one file")
        return columns

    return _joined(map(read, shards))


def _read_saved(folder: Path, split: str) -> Columns:
    datasets = _datasets(str(folder))
    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as err:  # whatever a damaged folder raises
        reason = named(err)
        raise SaerlError(f"{folder} is no whole save_to_disk folder ({reason}); save it again") from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise SaerlError(
                f"{folder} has no split {split!r} (data.split, data.eval_split); it has {', '.join(data)}"
            )
        data = data[split]
    return _of_dataset(data)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed, after a look at their encoding."""
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as handle:
        start = handle.read(4)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in start:
            raise SaerlError(f"{path} line 1 is UTF-16 or UTF-32 text; save the file as UTF-8")
        handle.seek(3 if start[:3] == b"\xef\xbb\xbf" else 0)
        yield handle  # type: ignore[misc]


def _text(raw: bytes, path: Path, line: int = 1) -> str:
    """``raw``, which begins in this line of the file, as text."""
    try:
        return raw.decode()
    except UnicodeDecodeError as err:
        line += raw.count(b"\n", 0, err.start)
        raise SaerlError(
            f"{path} line {line} is not UTF-8 text ({err.reason}); save the file as UTF-8"
        ) from None


def _read_jsonl(path: Path, _: set[str]) -> Columns:
    with _opened(path) as lines:
        return columns_of(_rows(path, lines))


def _rows(path: Path, lines: Any) -> Iterator[dict[str, Any]]:
    for number, raw in enumerate(lines, 1):
        line = _text(raw, path, number)
        if not line.strip():
            continue
        row = parse_json(line, f"{path} line {number}")
        if not isinstance(row, dict):
            whole = "; a file that is one list is named .json" if isinstance(row, list) else ""
            raise SaerlError(f"{path} line {number} must be a JSON object, not a {type(row).__name__}{whole}")
        yield row


def _read_json(path: Path, _: set[str]) -> Columns:
    with _opened(path) as handle:
        raw = handle.read()
    text = _text(raw, path)
    if jsontext.is_list(text):
        rows = list(jsontext.elements(text, str(path)))
        if all(isinstance(row, dict) for row in rows):
            return columns_of(rows)
    elif text.lstrip()[:1] == "{" and _one_a_line(text):
        return columns_of(_rows(path, raw.splitlines()))
    else:
        value = parse_json(text, str(path))
        if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
            if len({len(column) for column in value.values()}) <= 1:
                return value
            raise SaerlError(f"{path} has columns of different lengths; give each the same number of rows")
    raise SaerlError(f"{path} must hold a list of objects or an object of equally long lists")


def _one_a_line(text: str) -> bool:
    """Whether this is JSON Lines under the name .json: two lines or more, each an object of its own."""
    lines = [line for line in text.split("\n") if line.strip()]
    return len(lines) > 1 and all(line.lstrip()[0] == "{" and line.rstrip()[-1] == "}" for line in lines)


def _read_csv(path: Path, text_columns: set[str], dialect: str = "excel") -> Columns:
    limit = csv.field_size_limit(sys.maxsize)  # a long prompt is no fault
    try:
        with _opened(path) as handle:
            return _read_cells(path, _text(handle.read(), path), text_columns, dialect)
    finally:
        csv.field_size_limit(limit)


def _read_tsv(path: Path, text_columns: set[str]) -> Columns:
    return _read_csv(path, text_columns, "excel-tab")


def _read_cells(path: Path, text: str, text_columns: set[str], dialect: str) -> Columns:
    header = text.split("\n", 1)[0]
    spaced = ", " in header  # written with blanks after its commas
    reader = csv.DictReader(
        io.StringIO(text, newline=""), dialect=dialect, skipinitialspace=spaced, strict=True
    )
    rows = []
    try:
        names = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = names
        if len(names) == 1 and (mark := re.search(r"\w([;\t|])\w", names[0])):
            raise SaerlError(
                f"{path} line 1 is separated by {mark[1]!r}; save it with commas, or tabs as .tsv"
            )
        for row in reader:
            if len(names) > 1 and not (row[names[0]] or "").strip() and {*list(row.values())[1:]} == {None}:
                continue  # a line of blanks
            if None in row or None in row.values():
                raise SaerlError(f"{path} line {reader.line_num} has another number of cells than its header")
            rows.append(row)
    except csv.Error as err:
        raise SaerlError(f"{path} line {reader.line_num} is not valid CSV ({err}); mend it") from None
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SaerlError(f"{path} line 1 names the column {twice!r} twice; rename one of them")
    columns: Columns = {}
    for name in names:
        cells = [row[name] for row in rows]
        texts = [cell if cell.strip() else None for cell in cells]
        columns[name] = texts if name in text_columns else _numbers(texts)
    return columns


def _read_parquet(path: Path, _: set[str]) -> Columns:
    """All columns of one Parquet file as Python values."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise SaerlError(f"reading {path} needs pyarrow; pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [Column() for _ in names]
            for batch in file.iter_batches(BLOCK):
                for column, cells in zip(columns, batch.columns, strict=True):
                    column.add(cells.to_pylist())
    except SaerlError:
        raise
    except Exception as err:  # Arrow's own, and what values raise: no UTF-8, a date beyond year 9999
        raise SaerlError(f"{path} is not a Parquet file ({first_line(err)}); write it again") from None
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SaerlError(f"{path} has the column {twice!r} twice; rename one of them")
    return {name: column.done() for name, column in zip(names, columns, strict=True)}


_READERS: dict[str, Callable[[Path, set[str]], Columns]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def _read_hub(spec: str, split: str, hub_config: str | None) -> Columns:
    datasets = _datasets(spec)
    try:
        data = datasets.load_dataset(spec, hub_config, split=split)
    except Exception as err:  # the hub client raises many kinds
        what = f"{spec} (configuration {hub_config})" if hub_config else spec
        cause: BaseException = err  # what datasets raises may say no more than that something failed
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = named(cause)
        local = Path(spec).is_dir()
        raise SaerlError(
            f"cannot load split {split!r} of the {'folder' if local else 'hub dataset'} {what} ({reason}); "
            f"check {'its files' if local else 'the id'} and data.split, or pass a local file"
        ) from None
    return _of_dataset(data)


def _of_dataset(data: Any) -> Columns:
    if not len(data):
        return {name: [] for name in data.column_names}
    return _joined(data[at : at + BLOCK] for at in range(0, len(data), BLOCK))


def _datasets(spec: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise SaerlError(f"loading the dataset {spec} needs datasets; pip install datasets") from None
    return datasets


def without_nan(columns: Columns) -> Columns:
    """NaN as None in every column: pandas writes its missing values so."""
    return {
        name: kept(None if isinstance(cell, float) and cell != cell else cell for cell in column)
        if any(isinstance(cell, float) and cell != cell for cell in column)
        else column
        for name, column in columns.items()
    }


def _numbers(cells: list[str | None]) -> list[Any]:
    """Cells as numbers, where all are; 007, and more digits than a float keeps, are names."""
    if any(cell and re.match(r"\s*[-+]?(0\d|\d{16})", cell) for cell in cells):
        return list(cells)
    try:
        return [None if cell is None else float(cell) for cell in cells]
    except ValueError:
        return list(cells)
