"""``scores.parquet``: the columns of a pool and its scores, written and read in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import damaged
from saerl_fast.records.packed import kept, strings

GROUP = 1 << 16  # rows written and read at a time
# The columns this package adds. A float is NaN (null on disk) where the signal is not known.
SCORE_COLUMNS = {
    "saerl_cluster": np.int32,
    "saerl_difficulty": np.float32,
    "saerl_quality": np.float32,
    "saerl_pass_rate": np.float32,
    "saerl_copy_of": np.int32,  # the row that this one repeats, or -1
}


class Table(Mapping[str, Any]):
    """The columns of a Parquet file: the ids and scores are read at once, others when they are asked for.

    SaerlError, which ends in ``again``, for a file that cannot be read.
    """

    def __init__(self, file: Path, again: str) -> None:
        import pyarrow.parquet as pq

        self._file, self._again = file, again
        with self._reading("") as _, pq.ParquetFile(file) as found:
            self._names, self.rows = found.schema_arrow.names, found.metadata.num_rows
        self._read = {name: self[name] for name in self._names if name in ("prompt_id", *SCORE_COLUMNS)}

    def __getitem__(self, name: str) -> Any:
        import pyarrow.parquet as pq

        if name in self.__dict__.get("_read", {}):
            return self._read[name]
        if name not in self._names:
            raise KeyError(name)
        with self._reading(f"column {name}: "), pq.ParquetFile(self._file) as found:
            if name in SCORE_COLUMNS:
                return score_array(found.read([name]).column(0), SCORE_COLUMNS[name])
            cells = (
                c for batch in found.iter_batches(GROUP, columns=[name]) for c in batch[name].to_pylist()
            )
            return strings(map(str, cells), self.rows) if name == "prompt_id" else kept(cells)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except SaerlError:  # the disk has no room for the column
            raise
        except Exception as err:  # Arrow's own, OSError, and what single values raise
            raise damaged(self._file, err, self._again, what) from err


def score_array(column: Any, dtype: Any) -> np.ndarray:
    """A score column as an array, NaN for null; ValueError and its like for what is no number."""
    if hasattr(column, "to_numpy"):
        column = column.to_numpy()
    if isinstance(column, np.ndarray) and column.dtype.kind == "f" and dtype is np.int32:
        column = column.tolist()  # whose nulls are refused
    if isinstance(column, np.ndarray) and column.dtype.kind in "fiub":
        return np.asarray(column, dtype)
    return np.array([np.nan if value is None else value for value in column], dtype=dtype)


def arrow_type(name: str, column: Any) -> Any:
    """The Arrow type of a column; SaerlError for one that Parquet cannot hold."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if name in SCORE_COLUMNS:
        return pa.from_numpy_dtype(SCORE_COLUMNS[name])
    with _said(name):
        parts = range(0, max(len(column), 1), GROUP)
        types = dict.fromkeys(pa.array(column[at : at + GROUP]).type for at in parts)
        schemas = [pa.schema({name: kind}) for kind in types]
        found = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
        sample = pa.table({name: pa.array(column[:1], found)})
        pq.write_table(sample, pa.BufferOutputStream())  # not every type can be
        return found


def write_table(
    file: Path, columns: Mapping[str, Any], types: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Write equally long columns of these Arrow types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(types.items(), metadata)
    with pq.ParquetWriter(file, schema) as writer:
        for at in range(0, max(len(columns["prompt_id"]), 1), GROUP):
            arrays = []
            for name, column in columns.items():
                part = column[at : at + GROUP]
                with _said(name):
                    if name in SCORE_COLUMNS:
                        part = np.asarray(part, SCORE_COLUMNS[name])
                    arrays.append(pa.array(part, types[name], from_pandas=name in SCORE_COLUMNS))
            writer.write_table(pa.table(arrays, schema=schema))


@contextmanager
def _said(name: str) -> Iterator[None]:
    """The errors of Arrow about a column as SaerlError."""
    try:
        yield
    except Exception as err:  # Arrow's own, and OverflowError for an integer beyond 64 bits
        reason = " ".join(str(err).split())
        raise SaerlError(
            f"column {name!r} cannot be written to Parquet ({reason}); leave it out of the pool, or write it "
            "as text"
        ) from err
