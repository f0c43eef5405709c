"""Ids and tokens of a large pool: as one array, not as objects; ids are found by their hash."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import overload

import numpy as np

BLOCK = 1 << 16
LARGE = 1 << 18  # strings from which they are packed


class Packed(Sequence[str]):
    """Strings in ``text`` uint8, UTF-8; string i is ``text[ends[i]:ends[i + 1]]``, ``ends`` int64 [n + 1]."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Packed:
        rest, texts, sizes = iter(strings), [], [np.zeros(1, dtype=np.int64)]
        while block := [text.encode("utf-8", "surrogatepass") for text in islice(rest, BLOCK)]:
            texts.append(np.frombuffer(b"".join(block), dtype=np.uint8))
            sizes.append(np.fromiter(map(len, block), dtype=np.int64, count=len(block)))
        text = np.concatenate(texts) if texts else np.empty(0, dtype=np.uint8)
        return cls(text, np.cumsum(np.concatenate(sizes)))

    def take(self, rows: np.ndarray) -> Packed:
        """The strings at ``rows``, in that order."""
        sizes = np.diff(self.ends)[rows]
        ends = np.concatenate([[0], np.cumsum(sizes)])
        text = np.empty(ends[-1], dtype=np.uint8)
        for at in range(0, len(rows), BLOCK):
            part = slice(at, min(at + BLOCK, len(rows)))
            first, last = ends[part.start], ends[part.stop]
            shift = np.repeat(self.ends[rows[part]] - ends[part], sizes[part])
            text[first:last] = self.text[np.arange(first, last) + shift]
        return Packed(text, ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        at = range(len(self))[at]
        return self.text[self.ends[at] : self.ends[at + 1]].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BLOCK):
            ends = self.ends[start : start + BLOCK + 1].tolist()
            text = self.text[ends[0] : ends[-1]].tobytes()
            for i in range(len(ends) - 1):
                yield text[ends[i] - ends[0] : ends[i + 1] - ends[0]].decode("utf-8", "surrogatepass")


class Tokens(Sequence[list[int]]):
    """Rows of token ids: row i is ``ids[ends[i]:ends[i + 1]]``, ids int32 and ends int64 [n + 1]."""

    def __init__(self, ids: np.ndarray, ends: np.ndarray) -> None:
        self.ids, self.ends = ids, ends

    @classmethod
    def of(cls, rows: Iterable[list[int]]) -> Tokens:
        rest, parts, sizes = iter(rows), [np.empty(0, dtype=np.int32)], [np.zeros(1, dtype=np.int64)]
        while block := list(islice(rest, BLOCK)):
            sizes.append(np.fromiter(map(len, block), dtype=np.int64, count=len(block)))
            parts.append(np.fromiter(chain.from_iterable(block), dtype=np.int32, count=int(sizes[-1].sum())))
        return cls(np.concatenate(parts), np.cumsum(np.concatenate(sizes)))

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, at: int) -> list[int]: ...
    @overload
    def __getitem__(self, at: slice) -> list[list[int]]: ...
    def __getitem__(self, at: int | slice) -> list[int] | list[list[int]]:
        if isinstance(at, slice):
            return [self[i] for i in range(len(self))[at]]
        at = range(len(self))[at]
        return self.ids[self.ends[at] : self.ends[at + 1]].tolist()


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
