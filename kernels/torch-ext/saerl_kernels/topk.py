"""Exact top-k of materialised rows."""

from __future__ import annotations

import math

from torch import Tensor

from . import reference
from ._check import check_k
from .dispatch import implementation, resolve
from .library import topk_rows, topk_rows_waiting, waits
from .types import TopK, need_tensors, without_memory


def topk(scores: Tensor, k: int, *, backend: str = "auto") -> TopK:
    """The k largest entries of each row of ``scores`` [..., n], any sign, compared in float32.

    Returns values float32 [..., k], descending, and indices int32 [..., k]; equal values (0.0 and -0.0
    are equal) are ordered by index, which torch.topk does not promise. NaN counts as -inf.
    Raises ValueError unless 1 <= k <= n.
    """
    need_tensors(scores=scores)
    if scores.dim() == 0:
        raise ValueError("scores is a single number; give [..., n]")
    check_k(k, scores.shape[-1], "the row length")
    rows = scores.detach().resolve_neg().reshape(math.prod(scores.shape[:-1]), scores.shape[-1])
    shape = (*scores.shape[:-1], k)
    if without_memory(scores):
        kept = TopK(*(topk_rows_waiting if waits(k, backend) else topk_rows)(rows, k, backend))
        return TopK(kept.values.reshape(shape), kept.indices.reshape(shape))
    name = resolve(backend, scores.device)
    if name == "reference":
        return reference.topk(scores, k)
    if rows.shape[0] == 0:
        return TopK.empty(shape, scores.device)
    kept = implementation(name).topk(rows, k)
    return TopK(kept.values.reshape(shape), kept.indices.reshape(shape))
