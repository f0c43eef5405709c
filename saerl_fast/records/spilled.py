"""Arrays with an entry for each row of a large pool: above SPILL bytes in a file without a name, mapped.

The system takes their pages back when it needs them, so memory does not grow with the pool; what is done with
all rows is done a block at a time.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import IO, Any

import numpy as np

from saerl_fast.errors import SaerlError

BLOCK = 1 << 16  # rows
SPILL = 1 << 24  # bytes of an array from which it lies in a file
BUCKET = 1 << 19  # rows that are sorted at a time
ZEROS = 1 << 20  # bytes written at a time


class Growing:
    """An array of a size that is not known before."""

    def __init__(self, dtype: type) -> None:
        self._dtype, self.size = dtype, 0
        self._parts: list[np.ndarray] = [np.empty(0, dtype)]
        self._file: IO[bytes] | None = None

    def add(self, part: np.ndarray) -> None:
        """Append; SaerlError where the disk has no room."""
        self._parts.append(part)
        self.size += len(part)
        if self._file is None and self.size * self._parts[0].itemsize <= SPILL:
            return
        with _room():
            if self._file is None:
                self._file = _file()
            for held in self._parts:
                _write(self._file, np.ascontiguousarray(held, self._dtype))
            self._parts = [self._parts[0][:0]]

    def done(self) -> np.ndarray:
        """The whole array; what is written to a mapped one stays in memory."""
        if self._file is None:
            return np.concatenate(self._parts)
        with _room():
            return np.asarray(np.memmap(self._file, self._dtype, "c"))


def _file() -> IO[bytes]:
    """Without a buffer, which would be written again, to the same full disk, when it is collected."""
    return tempfile.TemporaryFile(buffering=0, prefix="saerl-")


def _write(file: IO[bytes], array: np.ndarray) -> None:
    left = array.view(np.uint8).data
    while len(left):
        left = left[file.write(left) :]


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise SaerlError(
            f"the arrays of a large pool do not fit into {tempfile.tempdir or 'a temporary folder'} "
            f"({err.strerror}); set TMPDIR to a folder with more room"
        ) from None


def slices(count: int) -> Iterator[slice]:
    """All rows, a block at a time."""
    return (slice(at, min(at + BLOCK, count)) for at in range(0, count, BLOCK))


def empty(count: int, dtype: Any) -> np.ndarray:
    """An array [count] to be filled, which forks may share; SaerlError where the disk has no room for it."""
    size = count * np.dtype(dtype).itemsize
    if size <= SPILL:
        return np.empty(count, dtype)
    with _room():
        file = _file()
        for at in range(0, size, ZEROS):
            _write(file, np.zeros(min(ZEROS, size - at), np.uint8))
        return np.asarray(np.memmap(file, dtype, "r+", shape=(count,)))


def by_block(call: Callable[[slice], Any], count: int, dtype: Any) -> np.ndarray:
    """An array [count] of what ``call`` gives for each block of rows."""
    found = empty(count, dtype)
    for part in slices(count):
        found[part] = call(part)
    return found


def from_iter(values: Iterable[Any], count: int, dtype: Any) -> np.ndarray:
    """An array [count] of so many values."""
    rest = iter(values)
    return by_block(lambda part: np.fromiter(rest, dtype, part.stop - part.start), count, dtype)


def full(count: int, value: float, dtype: Any = np.float64) -> np.ndarray:
    """An array [count] of one value."""
    return by_block(lambda _: value, count, dtype)


def arange(count: int) -> np.ndarray:
    """int64 [count]: every row."""
    return by_block(lambda part: np.arange(part.start, part.stop), count, np.int64)


def permutation(rng: np.random.Generator, count: int) -> np.ndarray:
    """int64 [count]: every row in random order, as ``rng.permutation(count)`` has them."""
    rows = arange(count)
    rng.shuffle(rows)
    return rows


def taken(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """``array[rows]``."""
    return by_block(lambda part: array[rows[part]], len(rows), array.dtype)


def rows_where(true: Callable[[slice], np.ndarray], count: int) -> np.ndarray:
    """int64: the rows, of ``count``, for which ``true`` (bool of a block of rows) holds, in order."""
    found = Growing(np.int64)
    for part in slices(count):
        found.add(part.start + np.flatnonzero(true(part)))
    return found.done()


def firsts(of: np.ndarray) -> np.ndarray:
    """int64: the rows that ``of`` int64 [n] gives themselves."""
    return rows_where(lambda part: of[part] == np.arange(part.start, part.stop), len(of))


def counted(labels: np.ndarray) -> np.ndarray:
    """int64: how many of ``labels`` int [n], none of them negative, are 0, 1, ... to the largest."""
    found = np.zeros(int(labels.max(initial=-1)) + 1, dtype=np.int64)
    for part in slices(len(labels)):
        found += np.bincount(labels[part], minlength=len(found))
    return found


def each(array: np.ndarray) -> Iterator[Any]:
    """The entries as Python's numbers."""
    return (value for part in slices(len(array)) for value in array[part].tolist())


def flattened(root: np.ndarray) -> np.ndarray:
    """``root`` int64 [n], where every row names another one or itself, in place: the last of each chain."""
    changed = True
    while changed:
        changed = False
        for part in slices(len(root)):
            further = root[root[part]]
            changed = changed or not np.array_equal(root[part], further)
            root[part] = further
    return root


def buckets(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The rows int64 of some ``keys`` uint64 at a time, by their highest bits.

    Rows of equal keys come together, each bucket's in order. Of hashes, but for equal ones, a bucket has some
    BUCKET rows at most.
    """
    bits = (len(keys) // BUCKET).bit_length()
    for bucket in range(1 << bits):
        yield np.concatenate(
            [np.empty(0, dtype=np.int64)]
            + [
                part.start + np.flatnonzero(keys[part] >> np.uint64(64 - bits) == bucket)
                if bits
                else np.arange(part.start, part.stop)
                for part in slices(len(keys))
            ]
        )


def first_equal(keys: Iterable[str]) -> np.ndarray:
    """int64 [n]: the position of the first key equal to each; by digest, so that no key is kept."""
    rest, parts = iter(keys), Growing(np.uint64)
    while part := list(islice(rest, BLOCK)):
        texts = (key.encode("utf-8", "surrogatepass") for key in part)
        found = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
        parts.add(np.frombuffer(found, dtype=np.uint64))
    digests = parts.done().reshape(-1, 2)
    first = empty(len(digests), np.int64)
    for rows in buckets(digests[:, 0]):
        found = digests[rows]
        order = np.lexsort(found.T)
        found, rows = found[order], rows[order]
        begins = np.ones(len(rows), dtype=bool)
        begins[1:] = (found[1:] != found[:-1]).any(axis=1)
        first[rows] = rows[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
    return first
