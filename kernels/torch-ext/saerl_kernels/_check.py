"""Argument checks shared by the ops and their references."""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence, Union

import torch
from torch import Tensor

from .pack import PackedEncoder, number_or_tensor
from .types import CSR, need_tensors


class Reduce(NamedTuple):
    """How ``PoolStream`` makes a reduction of what the backends' ``pool_codes`` can do."""

    kind: str  # of pool_codes: "max", "sum" or "count"
    average: bool = False  # divide by the weights of all tokens
    last: bool = False  # of the last token alone


# The reductions; ``reference.REDUCE`` defines each, and the docstring of ``encode_pool`` describes it.
REDUCES = {
    "max": Reduce("max"),
    "mean": Reduce("sum", average=True),
    "sum": Reduce("sum"),
    "count": Reduce("count"),
    "last": Reduce("max", last=True),
}


def need_encoder(encoder: object, name: str = "encoder") -> None:
    # By what it offers, not by its class: another copy of this package makes such encoders too.
    if not hasattr(encoder, "prepare") or not hasattr(encoder, "d_sae"):
        raise ValueError(
            f"{name} is a {type(encoder).__name__}; give what pack_encoder returns "
            "(of a SparseEncoder: packed())"
        )


def check_count(count: int, name: str) -> None:
    """``count`` is an int of 1 or more."""
    if not isinstance(count, (bool, int)) and hasattr(count, "__index__"):
        raise ValueError(f"{name} is a {type(count).__module__}.{type(count).__name__}; give int({name})")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}={count!r} must be a positive integer")


def check_k(k: int, limit: int, name: str = "d_sae") -> None:
    check_count(k, "k")
    if k > limit:
        raise ValueError(f"k={k} is larger than {name}={limit}")


def check_average_k(k: Union[int, float], limit: int) -> None:
    """As `check_k`, of an average over rows, which may be a fraction."""
    if not isinstance(k, (bool, int, float)) and hasattr(k, "__float__"):
        raise ValueError(f"k is a {type(k).__module__}.{type(k).__name__}; give int(k) or float(k)")
    if isinstance(k, bool) or not isinstance(k, (int, float)) or not k > 0:
        raise ValueError(f"k={k!r} must be a positive number")
    if k > limit:
        raise ValueError(f"k={k} is larger than d_sae={limit}")


def check_reduce(reduce: str) -> None:
    if reduce not in REDUCES:
        raise ValueError(f"reduce={reduce!r} is unknown; choose one of {', '.join(REDUCES)}")


def check_offsets(x: Tensor, offsets: Union[Tensor, Sequence[int]]) -> Tensor:
    """``offsets`` as int64 [n_seq + 1] on the CPU: 0 first, n_tokens last, never falling."""
    if x.dim() != 2:
        raise ValueError(f"x must be [n_tokens, d_in], got shape {tuple(x.shape)}")
    try:
        given = torch.as_tensor(offsets, device="cpu")
    except (RuntimeError, TypeError, ValueError) as err:
        raise ValueError(f"offsets={offsets!r:.80} are no integers; give n_seq + 1, starting with 0") from err
    if given.dim() != 1 or given.numel() == 0 or not _is_integer(given.dtype):
        raise ValueError(
            f"offsets must hold n_seq + 1 integers, starting with 0; got {given.dtype} {list(given.shape)}"
        )
    starts = given.detach().cpu().long()
    if int(starts[0]) != 0:
        raise ValueError(f"offsets must start with 0, got {int(starts[0])}")
    falls = (starts.diff() < 0).nonzero()
    if len(falls):
        left = int(falls[0])
        before, after = starts[left : left + 2].tolist()
        raise ValueError(f"offsets must not fall, got {before} before {after} at position {left}")
    if int(starts[-1]) != x.shape[0]:
        raise ValueError(f"offsets must end with n_tokens={x.shape[0]}, got {int(starts[-1])}")
    return starts


def token_mask(x: Tensor, mask: Optional[Tensor]) -> Optional[Tensor]:
    """``mask`` as bool [n_tokens] on x's device; True keeps a token."""
    if mask is None:
        return None
    if mask.shape != x.shape[:1]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected ({x.shape[0]},)")
    if mask.dtype != torch.bool and not _is_integer(mask.dtype):
        raise ValueError(f"mask must be boolean, got {mask.dtype}; importance goes into weights=")
    return mask.to(x.device).bool()


def token_weights(x: Tensor, weights: Optional[Tensor]) -> Optional[Tensor]:
    """``weights`` as float32 [n_tokens] on x's device, checked: finite and not negative."""
    if weights is None:
        return None
    if weights.shape != x.shape[:1]:
        raise ValueError(f"weights have shape {tuple(weights.shape)}, expected ({x.shape[0]},)")
    if not weights.is_floating_point():
        raise ValueError(
            f"weights must be floating point, got {weights.dtype}; a boolean mask goes into mask="
        )
    weights = weights.detach().to(x.device, torch.float32)
    wrong = ~((weights >= 0) & (weights < torch.inf))
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0])
        raise ValueError(
            f"weights must be finite and not negative, got {float(weights[token])} for token {token}"
        )
    return weights


def check_indices(indices: Tensor, limit: int, name: str = "indices") -> None:
    """Every one in 0 .. limit - 1; waits for the device."""
    if indices.numel():
        low, high = (int(edge) for edge in torch.stack(torch.aminmax(indices)).tolist())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} reach {low}..{high}, outside 0..{limit - 1}")


def check_csr(csr: CSR, contents: bool) -> bool:
    """Shapes, dtypes and devices of ``csr``, and with ``contents`` what is in it; returns ``contents``."""
    indptr, indices, values, n_cols = csr
    if indptr.dim() != 1 or indptr.numel() == 0 or indptr.dtype != torch.int64:
        raise ValueError(f"csr.indptr must be int64 [n_rows + 1], got {indptr.dtype} {list(indptr.shape)}")
    if indices.dim() != 1 or indices.shape != values.shape:
        raise ValueError(
            f"csr.indices {list(indices.shape)} and csr.values {list(values.shape)} must both be [nnz]"
        )
    if not indptr.device == indices.device == values.device:
        raise ValueError(
            f"csr is on {indptr.device}, {indices.device} and {values.device}; move it to one device"
        )
    if contents:
        edges = torch.stack([indptr[0], indptr[-1], (indptr.diff() < 0).sum()]).tolist()
        if edges[:2] != [0, indices.shape[0]] or edges[2]:
            raise ValueError(
                f"csr.indptr must rise from 0 to nnz={indices.shape[0]}; it goes from {edges[0]} to "
                f"{edges[1]} and falls {edges[2]} times"
            )
        check_indices(indices, n_cols, "csr.indices")
    return contents


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def check_threshold(encoder: PackedEncoder, threshold: Union[Tensor, float, None]) -> Tensor:
    """The thresholds to use, float32 [d_sae] in the original numbering, on the encoder's device."""
    if threshold is None:
        if encoder.threshold is None:
            raise ValueError("the encoder has no threshold; pass threshold= here or to pack_encoder")
        return encoder.threshold
    need_tensors(threshold=threshold if isinstance(threshold, Tensor) else None)
    limit = number_or_tensor(threshold, encoder.device)
    if limit.dim() > 0 and limit.shape != (encoder.d_sae,):
        raise ValueError(f"threshold has shape {tuple(limit.shape)}, expected ({encoder.d_sae},)")
    return limit.expand(encoder.d_sae)


def check_finite(x: Tensor) -> None:
    """One pass over x and one host synchronisation; the ops do it only when asked."""
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x holds NaN or infinite values; drop those rows or find where they come from")


def check_rows(X: CSR, contents: bool) -> None:
    """As ``check_csr``, and int32 indices, float32 values; with ``contents`` finite ones."""
    need_tensors(indptr=X.indptr, indices=X.indices, values=X.values)
    check_csr(X, contents)
    if X.indices.dtype != torch.int32 or X.values.dtype != torch.float32:
        raise ValueError(
            f"csr.indices must be int32 and csr.values float32, got {X.indices.dtype} and {X.values.dtype}"
        )
    if contents and not bool(torch.isfinite(X.values).all()):
        row = int(X.row_ids()[int((~torch.isfinite(X.values)).nonzero()[0])])
        raise ValueError(f"csr.values of row {row} are NaN or infinite; drop the row or find the cause")
