"""Pairs of texts that have most words in common, for pools too large to compare each row with every other.

MinHash (Broder, 1997): of one random order of all words, the first word of two texts is the same with the
probability of their Jaccard index J. Rows whose ROWS first words agree in one of BANDS bands are compared: a
pair is missed with (1 - J^ROWS)^BANDS, at Dice's 0.8 (J = 2/3) one in 80, at 0.9 one in a million.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np

from saerl_fast.records.packed import Tokens
from saerl_fast.records.spilled import arange, buckets, flattened, full

BANDS, ROWS = 48, 6
NEXT = 0x9E3779B1  # between the numbers of a word's occurrences
PAIRS = 1 << 15  # compared at a time
CACHED = 1 << 10  # rows hashed at a time
SHORT = 32  # characters of a word up to which its hash is kept
SHIFT = np.uint64(33)


class Groups:
    """Rows joined into groups, each known by its first row: int64 [n]."""

    def __init__(self, count: int) -> None:
        self.root = arange(count)

    def top(self, row: int) -> int:
        """The first row of the group."""
        while self.root[row] != row:
            self.root[row] = row = int(self.root[self.root[row]])
        return row

    def join(self, a: int, b: int) -> bool:
        """Make one group of two rows' groups; False where they are one."""
        first, other = sorted((self.top(a), self.top(b)))
        self.root[other] = first
        return first != other

    def flat(self) -> np.ndarray:
        """The first row of every row's group, as long as no more are joined."""
        return flattened(self.root)


class Sketches:
    """The words of every row as hashes; a word that occurs twice is two words."""

    def __init__(self, bags: Iterable[Counter[str]]) -> None:
        self.words = Tokens.of(map(_hashes, bags))

    def keys(self, band: int) -> np.ndarray:
        """uint64 [n]: equal for rows that agree in this band."""
        found = full(len(self.words), 0, np.uint64)
        seeds = np.random.default_rng([band, 8]).integers(0, 2**63, ROWS, dtype=np.uint64)
        for at in range(0, len(self.words), CACHED):
            ends = self.words.ends[at : at + CACHED + 1]
            ids = self.words.array[ends[0] : ends[-1]].astype(np.uint64)
            for seed in seeds:
                least = np.minimum.reduceat(_mixed(ids + seed), ends[:-1] - ends[0])
                found[at : at + CACHED] = _mixed(found[at : at + CACHED] ^ least)
        return found

    def alike(self, i: np.ndarray, j: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
        """Those of the pairs of rows that have so much in common (Dice), as far as hashes tell."""
        ends = self.words.ends
        sizes = [ends[side + 1] - ends[side] for side in (i, j)]
        both_sizes = sizes[0] + sizes[1]
        found = 2 * np.minimum(*sizes) >= least * both_sizes
        close = np.flatnonzero(found)
        for at in range(0, len(close), PAIRS):
            part = close[at : at + PAIRS]
            names = [self.words.take(side[part]) for side in (i, j)]
            places = [np.arange(len(part)).repeat(rows.sizes) << 32 for rows in names]
            both = np.concatenate([place + rows.array for place, rows in zip(places, names, strict=True)])
            both.sort()
            common = np.bincount(both[1:][both[1:] == both[:-1]] >> 32, minlength=len(part))
            found[part] = 2 * common >= least * both_sizes[part]
        return i[found], j[found]


def agreeing(keys: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs (i, j) of rows with equal ``keys``, of each row with at most ``most`` that follow it.

    Also the rows that have more of them. Each row of such pairs comes once in ``i``.
    """
    for rows in buckets(keys):
        order = rows[np.argsort(keys[rows], kind="stable")]
        ordered = keys[order]
        at = np.flatnonzero(ordered[1:] == ordered[:-1])
        for step in range(1, most + 1):
            yield order[at], order[at + step], order[:0]
            at = at[at + step + 1 < len(order)]
            at = at[ordered[at] == ordered[at + step + 1]]
        yield order[:0], order[:0], order[at]


def _hashes(bag: Counter[str]) -> list[int]:
    """Sorted numbers of 31 bits, each once; one for no words."""
    found = {_kept(word) if len(word) <= SHORT else _hash(word) for word in bag}
    for word, count in bag.items():
        if count > 1:
            found |= {(_hash(word) + i * NEXT) % 2**31 for i in range(1, count)}
    return sorted(found) or [0]


def _hash(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "surrogatepass")) % 2**31


_kept = lru_cache(maxsize=1 << 16)(_hash)


def _mixed(x: np.ndarray) -> np.ndarray:
    """``x`` uint64, its bits well mixed in place (the end of MurmurHash3)."""
    high = x >> SHIFT
    for factor in (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)):
        x ^= high
        x *= factor
        np.right_shift(x, SHIFT, out=high)
    x ^= high
    return x
