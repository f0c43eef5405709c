"""Ids and tokens of a large pool: as one array, not as objects; ids are found by their hash."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, TypeVar, overload

import numpy as np

BLOCK = 1 << 16
LARGE = 1 << 18  # strings from which they are packed


Row = TypeVar("Row")


class Ragged(Sequence[Row]):
    """Rows of different lengths in one array: row i is what lies from ``ends[i]`` to ``ends[i + 1]``."""

    ends: np.ndarray  # int64 [n + 1]

    @abstractmethod
    def _between(self, start: int, stop: int) -> Row:
        """The row that these places of the array hold."""

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        at = range(len(self))[at]
        return self._between(self.ends[at], self.ends[at + 1])


def _read(rows: Iterable[Any], dtype: type, joined: Callable[[list], np.ndarray]) -> tuple[np.ndarray, ...]:
    """The array and ``ends`` of rows that ``joined`` puts one after the other, a block at a time."""
    parts: list[np.ndarray] = [np.empty(0, dtype=dtype)]
    rest, sizes = iter(rows), [np.zeros(1, dtype=np.int64)]
    while block := list(islice(rest, BLOCK)):
        sizes.append(np.fromiter(map(len, block), dtype=np.int64, count=len(block)))
        parts.append(joined(block))
    return np.concatenate(parts), np.cumsum(np.concatenate(sizes))


def _taken(array: np.ndarray, ends: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The array and ``ends`` of some rows."""
    sizes = np.diff(ends)[rows]
    new = np.concatenate([[0], np.cumsum(sizes)])
    found = np.empty(new[-1], dtype=array.dtype)
    for at in range(0, len(rows), BLOCK):
        part = slice(at, min(at + BLOCK, len(rows)))
        first, last = new[part.start], new[part.stop]
        shift = np.repeat(ends[rows[part]] - new[part], sizes[part])
        found[first:last] = array[np.arange(first, last) + shift]
    return found, new


class Packed(Ragged[str]):
    """Strings in ``text`` uint8, UTF-8."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Packed:
        encoded = (text.encode("utf-8", "surrogatepass") for text in strings)
        return cls(*_read(encoded, np.uint8, lambda block: np.frombuffer(b"".join(block), dtype=np.uint8)))

    def take(self, rows: np.ndarray) -> Packed:
        """The strings at ``rows``, in that order."""
        return Packed(*_taken(self.text, self.ends, rows))

    def _between(self, start: int, stop: int) -> str:
        return self.text[start:stop].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BLOCK):
            ends = self.ends[start : start + BLOCK + 1].tolist()
            text = self.text[ends[0] : ends[-1]].tobytes()
            for i in range(len(ends) - 1):
                yield text[ends[i] - ends[0] : ends[i + 1] - ends[0]].decode("utf-8", "surrogatepass")


class Tokens(Ragged[list[int]]):
    """Rows of token ids in ``ids`` int32."""

    def __init__(self, ids: np.ndarray, ends: np.ndarray) -> None:
        self.ids, self.ends = ids, ends

    @classmethod
    def of(cls, rows: Iterable[list[int]]) -> Tokens:
        return cls(*_read(rows, np.int32, lambda block: np.fromiter(chain.from_iterable(block), np.int32)))

    def take(self, rows: np.ndarray) -> Tokens:
        """The rows at ``rows``, in that order."""
        return Tokens(*_taken(self.ids, self.ends, rows))

    def _between(self, start: int, stop: int) -> list[int]:
        return self.ids[start:stop].tolist()


def chosen(strings: Sequence[str], rows: np.ndarray) -> Sequence[str]:
    """The strings at ``rows``, packed if they are."""
    return strings.take(rows) if isinstance(strings, Packed) else [strings[i] for i in rows.tolist()]


class Rows:
    """The row of every id in ``ids``, 12 bytes each; ``repeated`` is an id that occurs twice, or None."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = ids
        hashes = np.fromiter(map(hash, ids), dtype=np.int64, count=len(ids))
        self._order = np.argsort(hashes, kind="stable").astype(np.int32)
        self._hashes = hashes[self._order]
        later = self._order[1:][self._hashes[1:] == self._hashes[:-1]]
        self.repeated = next((ids[row] for row in later if self[ids[row]] != row), None)

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that are no id."""
        rest, found = iter(names), []
        while part := list(islice(rest, BLOCK)):
            hashes = np.fromiter(map(hash, part), dtype=np.int64, count=len(part))
            at = np.searchsorted(self._hashes[:-1], hashes)
            known = self._hashes[at] == hashes if len(self._hashes) else np.zeros(len(part), dtype=bool)
            found += [part[i] for i in np.flatnonzero(~known)]
        return found

    def get(self, name: str) -> int | None:
        """The row, None where there is no such id."""
        value = hash(name)
        at = int(np.searchsorted(self._hashes, value))
        while at < len(self._hashes) and self._hashes[at] == value:
            if self._ids[self._order[at]] == name:
                return int(self._order[at])
            at += 1
        return None

    def __getitem__(self, name: str) -> int:
        row = self.get(name)
        if row is None:
            raise KeyError(name)
        return row
