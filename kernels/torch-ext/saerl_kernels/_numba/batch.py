"""BatchTopK's survivors on the CPU: scores are read in SIMD blocks, and most blocks hold none."""

from __future__ import annotations

from typing import Tuple

import numpy as np
import torch
from torch import Tensor

from . import select


def gather_survivors(scores: Tensor, edge: int) -> Tuple[Tensor, Tensor]:
    """See ``_batch.gather_survivors``."""
    from . import _run

    rows, d_sae = scores.shape
    limit = np.full(d_sae, edge - 1, dtype=np.int32).view(np.float32)
    counts = np.zeros(rows, dtype=np.int64)
    _run(select.count_above, rows, scores.numpy(), limit, counts)
    cursor = np.zeros(rows, dtype=np.int64)
    np.cumsum(counts[:-1], out=cursor[1:])
    columns = np.empty(int(counts.sum()), dtype=np.int32)
    values = np.empty(len(columns), dtype=np.float32)
    _run(select.place_above, rows, scores.numpy(), limit, 0, cursor, columns, values)
    places = np.repeat(np.arange(rows, dtype=np.int64) * d_sae, counts) + columns
    return torch.from_numpy(places), torch.from_numpy(values.view(np.int32))
