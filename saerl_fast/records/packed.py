"""Columns, ids and tokens of a large pool: as one array, which may lie in a file, not as objects.

Ids are found by their hash.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from saerl_fast.records.spilled import BLOCK, Growing, buckets, by_block, each, empty, from_iter, rows_where

if TYPE_CHECKING:
    from typing_extensions import Self

LARGE = 1 << 18  # rows from which they are packed
FEW = 1 << 14  # rows that are a list when they are taken from packed ones

_written = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make one for every cell
Row = TypeVar("Row")


class Ragged(Sequence[Row]):
    """Rows of different lengths in one ``array``: row i is what lies from ``ends[i]`` to ``ends[i + 1]``."""

    def __init__(self, array: np.ndarray, ends: np.ndarray) -> None:
        self.array, self.ends = array, ends  # ends: int64 [n + 1]

    @abstractmethod
    def _rows(self, ends: list[int]) -> list[Row]:
        """The rows that lie between ``ends``, which follow each other."""

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def sizes(self) -> np.ndarray:
        """int64 [n]: elements of each row."""
        return by_block(lambda rows: np.diff(self.ends[rows.start : rows.stop + 1]), len(self), np.int64)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        if not isinstance(at, slice):
            at = range(len(self))[at]
            return self._rows(self.ends[at : at + 2].tolist())[0]
        places = range(len(self))[at]
        if places.step == 1:
            return self._rows(self.ends[places.start : places.stop + 1].tolist()) if len(places) else []
        return [self[i] for i in places]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), BLOCK):
            yield from self._rows(self.ends[start : start + BLOCK + 1].tolist())

    def take(self, rows: np.ndarray) -> Self:
        """The rows at ``rows``, in that order."""
        array, ends = Growing(self.array.dtype.type), Growing(np.int64)
        ends.add(np.zeros(1, dtype=np.int64))
        total = 0
        for at in range(0, len(rows), BLOCK):
            part = rows[at : at + BLOCK]
            first, last = self.ends[part], self.ends[part + 1]
            array.add(np.concatenate([self.array[a:b] for a, b in zip(each(first), each(last), strict=True)]))
            ends.add(total + np.cumsum(last - first))
            total = array.size
        return type(self)(array.done(), ends.done())

    @classmethod
    def _read(cls, rows: Iterable[Any], dtype: type, joined: Callable[[list], np.ndarray]) -> Self:
        """Rows that ``joined`` puts one after the other, a block at a time."""
        array, ends, rest, total = Growing(dtype), Growing(np.int64), iter(rows), 0
        ends.add(np.zeros(1, dtype=np.int64))
        while block := list(islice(rest, BLOCK)):
            ends.add(total + np.cumsum(np.fromiter(map(len, block), dtype=np.int64, count=len(block))))
            array.add(part := joined(block))
            total += len(part)
        return cls(array.done(), ends.done())


class Packed(Ragged[str]):
    """Strings in ``array`` uint8, UTF-8."""

    @classmethod
    def of(cls, strings: Iterable[str]) -> Self:
        encoded = (text.encode("utf-8", "surrogatepass") for text in strings)
        return cls._read(encoded, np.uint8, _bytes)

    def _rows(self, ends: list[int]) -> list[str]:
        first, text = ends[0], self.array[ends[0] : ends[-1]].tobytes()
        return [
            text[a - first : b - first].decode("utf-8", "surrogatepass")
            for a, b in zip(ends, ends[1:], strict=False)
        ]


class Cells(Ragged[Any]):
    """Values in ``array`` uint8, as JSON, with a comma after each."""

    @classmethod
    def of(cls, values: Iterable[Any]) -> Self:
        """ValueError for a value that JSON would not give back as it is."""
        return cls._read(map(_cell, values), np.uint8, _bytes)

    def _rows(self, ends: list[int]) -> list[Any]:
        text = self.array[ends[0] : max(ends[-1] - 1, 0)].tobytes().decode("utf-8", "surrogatepass")
        found: list[Any] = json.loads(f"[{text}]")
        return found


class Tokens(Ragged[list[int]]):
    """Rows of token ids in ``array`` int32."""

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Self:
        return cls._read(rows, np.int32, lambda block: np.fromiter(chain.from_iterable(block), np.int32))

    def _rows(self, ends: list[int]) -> list[list[int]]:
        ids = self.array[ends[0] : ends[-1]].tolist()
        return [ids[a - ends[0] : b - ends[0]] for a, b in zip(ends, ends[1:], strict=False)]


class Column:
    """Values added in blocks: a list, and above LARGE packed, unless some are such that JSON would change."""

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._count, self._packs = 0, True
        self._array, self._ends = Growing(np.uint8), Growing(np.int64)
        self._ends.add(np.zeros(1, dtype=np.int64))

    def add(self, block: Iterable[Any]) -> None:
        """Append; SaerlError where the disk has no room."""
        self._values += block
        if len(self._values) >= BLOCK:
            self._pack()

    def done(self) -> Sequence[Any]:
        """All values."""
        self._pack()
        return self._packed() if self._count else self._values

    def _pack(self) -> None:
        if not self._packs or not self._values or self._count + len(self._values) <= LARGE:
            return
        try:
            cells = [_cell(value) for value in self._values]
        except ValueError:
            before = self._packed() if self._count else []
            self._packs, self._count, self._values = False, 0, [*before, *self._values]
            return
        sizes = np.fromiter(map(len, cells), dtype=np.int64, count=len(cells))
        self._ends.add(self._array.size + np.cumsum(sizes))
        self._array.add(_bytes(cells))
        self._count, self._values = self._count + len(cells), []

    def _packed(self) -> Cells:
        return Cells(self._array.done(), self._ends.done())


def kept(values: Iterable[Any]) -> Sequence[Any]:
    """The values as a list or, of many, as `Cells` (see `Column`)."""
    column, rest = Column(), iter(values)
    while block := list(islice(rest, BLOCK)):
        column.add(block)
    return column.done()


def strings(values: Iterable[str], count: int) -> Sequence[str]:
    """So many strings as a list or, of many, packed."""
    return Packed.of(values) if count > LARGE else list(values)


def _hashes(names: Iterable[str]) -> np.ndarray:
    return np.fromiter(map(hash, names), dtype=np.int64).view(np.uint64)


def _bytes(rows: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(rows), dtype=np.uint8)


def _cell(value: Any) -> bytes:
    if not _comes_back(value):
        raise ValueError(f"JSON does not keep a {type(value).__name__}")
    return _written(value).encode("utf-8", "surrogatepass") + b","


def _comes_back(value: Any) -> bool:
    """Whether JSON gives ``value`` back as it is."""
    kind = type(value)
    if kind is list:
        return all(map(_comes_back, value))
    if kind is dict:
        return all(type(key) is str and _comes_back(item) for key, item in value.items())
    return kind in (str, int, float, bool, type(None))


def chosen(values: Sequence[Row], rows: Sequence[int] | np.ndarray) -> Sequence[Row]:
    """The values at ``rows``; of many that are packed, packed."""
    if isinstance(values, Ragged) and len(rows) > FEW:
        return values.take(np.asarray(rows))
    return [values[i] for i in rows]


class Rows:
    """The row of every id in ``ids``, 12 bytes each; ``repeated`` is an id that occurs twice, or None."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = ids
        hashes = from_iter(map(hash, ids), len(ids), np.int64).view(np.uint64)
        self._order, self._hashes, at = empty(len(ids), np.int32), empty(len(ids), np.uint64), 0
        for rows in buckets(hashes):
            place, at = slice(at, at + len(rows)), at + len(rows)
            self._order[place] = rows[np.argsort(hashes[rows], kind="stable")]
            self._hashes[place] = hashes[self._order[place]]
        found = self._hashes
        again = rows_where(lambda part: found[part] == found[part.start + 1 : part.stop + 1], len(ids) - 1)
        later = (int(self._order[i + 1]) for i in each(again))
        self.repeated = next((ids[row] for row in later if self[ids[row]] != row), None)

    def __reduce__(self) -> tuple[type[Rows], tuple[Sequence[str]]]:
        return Rows, (self._ids,)  # another process has other hashes

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that are no id."""
        rest, found = iter(names), []
        while part := list(islice(rest, BLOCK)):
            hashes = _hashes(part)
            at = np.searchsorted(self._hashes[:-1], hashes)
            known = self._hashes[at] == hashes if len(self._hashes) else np.zeros(len(part), dtype=bool)
            found += [part[i] for i in np.flatnonzero(~known)]
        return found

    def of(self, names: Sequence[str]) -> list[int | None]:
        """The row of each name, None where there is no such id."""
        hashes = _hashes(names)
        places = np.searchsorted(self._hashes, hashes).tolist()
        return [self._at(name, *first) for name, *first in zip(names, hashes.tolist(), places, strict=True)]

    def get(self, name: str) -> int | None:
        """The row, None where there is no such id."""
        return self.of([name])[0]

    def _at(self, name: str, value: int, at: int) -> int | None:
        """The row of ``name``, whose hash is ``value``, of which the first has the place ``at``."""
        while at < len(self._hashes) and self._hashes[at] == value:
            row = int(self._order[at])
            if self._ids[row] == name:
                return row
            at += 1
        return None

    def __getitem__(self, name: str) -> int:
        row = self.get(name)
        if row is None:
            raise KeyError(name)
        return row
