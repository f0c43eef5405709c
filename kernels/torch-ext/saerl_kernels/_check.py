"""Argument checks shared by the ops and their references."""

from __future__ import annotations

from typing import Optional, Sequence, Union

import torch
from torch import Tensor

from .pack import PackedEncoder
from .types import CSR

REDUCES = ("max", "mean", "sum", "count", "last")


def check_k(k: int, limit: int, name: str = "d_sae") -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k={k!r} must be a positive integer")
    if k > limit:
        raise ValueError(f"k={k} is larger than {name}={limit}")


def check_reduce(reduce: str) -> None:
    if reduce not in REDUCES:
        raise ValueError(f"reduce={reduce!r} is unknown; choose one of {', '.join(REDUCES)}")


def check_offsets(x: Tensor, offsets: Union[Tensor, Sequence[int]]) -> list:
    """``offsets`` as a list of ints: 0 first, n_tokens last, never falling."""
    if x.dim() != 2:
        raise ValueError(f"x must be [n_tokens, d_in], got shape {tuple(x.shape)}")
    given = torch.as_tensor(offsets)
    if given.dim() != 1 or given.numel() == 0 or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError("offsets must hold n_seq + 1 integers, starting with 0")
    bounds = given.tolist()
    if bounds[0] != 0:
        raise ValueError(f"offsets must start with 0, got {bounds[0]}")
    if bounds[-1] != x.shape[0]:
        raise ValueError(f"offsets must end with n_tokens={x.shape[0]}, got {bounds[-1]}")
    for left, right in zip(bounds, bounds[1:]):
        if right < left:
            raise ValueError(f"offsets must not fall, got {left} before {right}")
    return bounds


def token_mask(x: Tensor, mask: Optional[Tensor]) -> Optional[Tensor]:
    """``mask`` as bool [n_tokens] on x's device; True keeps a token."""
    if mask is None:
        return None
    if mask.shape != x.shape[:1]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected ({x.shape[0]},)")
    return mask.to(x.device).bool()


def check_threshold(encoder: PackedEncoder, threshold: Union[Tensor, float, None]) -> Tensor:
    """The thresholds to use, float32 [d_sae] in the original numbering, on the encoder's device."""
    if threshold is None:
        if encoder.threshold is None:
            raise ValueError("the encoder has no threshold; pass threshold= here or to pack_encoder")
        return encoder.threshold
    limit = torch.as_tensor(threshold, dtype=torch.float32, device=encoder.device).detach()
    if limit.dim() > 0 and limit.shape != (encoder.d_sae,):
        raise ValueError(f"threshold has shape {tuple(limit.shape)}, expected ({encoder.d_sae},)")
    return limit.expand(encoder.d_sae)


def check_finite(x: Tensor) -> None:
    """One pass over x and one host synchronisation; the ops do it only when asked."""
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN or infinite values; drop those rows or find where they come from")


def check_csr(X: CSR, entries: bool) -> None:
    """Shapes, dtypes and devices of ``X``; with ``entries`` also ranges and finiteness, in passes over X."""
    if X.indptr.dim() != 1 or X.indptr.shape[0] < 1 or X.indptr.dtype != torch.int64:
        raise ValueError(f"X.indptr must be int64 [n_rows + 1], got {X.indptr.dtype} {tuple(X.indptr.shape)}")
    if X.indices.dim() != 1 or X.indices.dtype != torch.int32 or X.values.shape != X.indices.shape:
        raise ValueError(
            f"X.indices must be int32 [nnz] and X.values as long, got {X.indices.dtype} "
            f"{tuple(X.indices.shape)} and {tuple(X.values.shape)}"
        )
    if X.values.dtype != torch.float32:
        raise ValueError(f"X.values must be float32, got {X.values.dtype}")
    if not X.indptr.device == X.indices.device == X.values.device:
        raise ValueError(
            f"X is on {X.indptr.device}, {X.indices.device} and {X.values.device}; move it to one device"
        )
    if not entries:
        return
    if int(X.indptr[0]) != 0 or int(X.indptr[-1]) != X.nnz or bool((X.indptr.diff() < 0).any()):
        raise ValueError(f"X.indptr must start with 0, never fall and end with nnz={X.nnz}")
    if X.nnz and (int(X.indices.min()) < 0 or int(X.indices.max()) >= X.n_cols):
        raise ValueError(
            f"X.indices reach {int(X.indices.min())}..{int(X.indices.max())}, outside 0..{X.n_cols - 1}"
        )
    if not bool(torch.isfinite(X.values).all()):
        row = int(X.row_ids()[int((~torch.isfinite(X.values)).nonzero()[0])])
        raise ValueError(f"X.values of row {row} are NaN or infinite; drop the row or find the cause")
