"""BatchTopK's survivors on the CPU: scores are read in SIMD blocks, and most blocks hold none."""

from __future__ import annotations

from typing import Tuple

import numpy as np
import torch
from torch import Tensor

from . import select
from .threads import run


def above(scores: np.ndarray, limit: np.ndarray, first_column: int) -> Tuple[np.ndarray, ...]:
    """The ``scores`` [rows, C] above ``limit`` [C]: counts int64 [rows], columns int32, values float32."""
    rows = len(scores)
    counts = np.zeros(rows, dtype=np.int64)
    run(select.count_above, rows, scores, limit, counts)
    cursor = np.zeros(rows, dtype=np.int64)
    np.cumsum(counts[:-1], out=cursor[1:])
    columns = np.empty(int(counts.sum()), dtype=np.int32)
    values = np.empty(len(columns), dtype=np.float32)
    run(select.place_above, rows, scores, limit, first_column, cursor, columns, values)
    return counts, columns, values


def gather_survivors(scores: Tensor, edge: int) -> Tuple[Tensor, Tensor]:
    """See ``_batch.gather_survivors``."""
    rows, d_sae = scores.shape
    limit = np.full(d_sae, edge - 1, dtype=np.int32).view(np.float32)
    counts, columns, values = above(scores.numpy(), limit, 0)
    places = np.repeat(np.arange(rows, dtype=np.int64) * d_sae, counts) + columns
    return torch.from_numpy(places), torch.from_numpy(values.view(np.int32))
