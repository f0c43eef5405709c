"""Pooled features that stay in their files: what more rows than the memory has room for are read from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import damaged
from saerl_kernels import CSR

AGAIN = "make it again with `saerl score`"
BLOCK = 1 << 14


class Part(NamedTuple):
    """One file, and the bytes where ``indptr`` int64, ``indices`` int32 and ``values`` float32 begin."""

    path: Path
    n_rows: int
    nnz: int
    indptr: int
    indices: int
    values: int


class Stored:
    """CSR rows [n_rows, n_cols] in files, one after the other; rows are read when they are asked for.

    They are read, not mapped: a mapped file counts as resident. Every row that is read is checked, and
    SaerlError raised where the file does not hold what it should.
    """

    def __init__(self, parts: Sequence[Part], n_cols: int) -> None:
        self.parts, self.n_cols = parts, n_cols
        self._starts = np.cumsum([0, *(part.n_rows for part in parts)])
        self.n_rows, self.nnz = int(self._starts[-1]), sum(part.nnz for part in parts)

    def rows(self, start: int, stop: int) -> CSR:
        """Rows ``start`` to ``stop``, in memory."""
        first, last = (int(np.searchsorted(self._starts[1:-1], at, side="right")) for at in (start, stop - 1))
        found = []
        for i in range(first, max(first, last) + 1):
            at, part = int(self._starts[i]), self.parts[i]
            found.append(self._read(part, max(start - at, 0), min(stop - at, part.n_rows)))
        return CSR.concat(found)

    def select_rows(self, index: torch.Tensor) -> CSR:
        """The rows at ``index`` int64, in that order, in memory."""
        ordered, place = torch.sort(index, stable=True)
        bounds = torch.arange(0, self.n_rows + BLOCK, BLOCK)
        cuts = torch.searchsorted(ordered, bounds).tolist()
        found = [
            self.rows(at, min(at + BLOCK, self.n_rows)).select_rows(ordered[low:high] - at)
            for at, low, high in zip(bounds.tolist(), cuts, cuts[1:], strict=False)
            if high > low
        ]
        rows = CSR.concat(found) if found else CSR.empty(0, self.n_cols)
        return rows if bool((index == ordered).all()) else rows.select_rows(torch.argsort(place))

    def check(self) -> None:
        """Read every row once; SaerlError for what is no CSR, since the kernels take it at its word."""
        for at in range(0, max(self.n_rows, 1), BLOCK):
            self.rows(at, min(at + BLOCK, self.n_rows))

    def _read(self, part: Part, start: int, stop: int) -> CSR:
        indptr = _read(part.path, np.int64, part.indptr + 8 * start, stop - start + 1)
        first, last = int(indptr[0]), int(indptr[-1])
        ends = (start > 0 or first == 0) and (stop < part.n_rows or last == part.nnz)
        if not ends or not 0 <= first <= last <= part.nnz or (np.diff(indptr) < 0).any():
            raise _damaged(part.path, "indptr does not divide the entries into rows")
        indices = _read(part.path, np.int32, part.indices + 4 * first, last - first)
        values = _read(part.path, np.float32, part.values + 4 * first, last - first)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.n_cols:
            raise _damaged(part.path, f"its entries do not lie in {self.n_cols} columns")
        parts = torch.from_numpy(indptr - first), torch.from_numpy(indices), torch.from_numpy(values)
        return CSR(*parts, self.n_cols)


def _read(path: Path, dtype: type, at: int, count: int) -> np.ndarray:
    try:
        found: np.ndarray = np.fromfile(path, dtype, count, offset=at)
    except OSError as err:
        raise damaged(path, err, AGAIN) from err
    if len(found) != count:
        raise _damaged(path, "its end is missing")
    return found


def _damaged(path: Path, why: str) -> SaerlError:
    return SaerlError(f"{path} is damaged ({why}); {AGAIN}")
