"""Reconstructions from sparse codes, differentiable in the values and the decoder.

``sparse_decode`` takes a fixed number of entries per row (``TopK``), ``decode_csr`` rows of any length.
Forward and backward are custom ops, without the [n, k, d_in] tensor that gathering decoder rows would make.
"""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from . import reference
from ._check import check_csr, check_indices
from .dispatch import implementation, resolve
from .library import register
from .types import CSR, need_tensors, without_memory


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Optional[Tensor] = None,
    *,
    backend: str = "auto",
    check: Optional[bool] = None,
) -> Tensor:
    """``sum_j values[..., j] * W_dec[indices[..., j]] + b_dec``.

    Args:
        values: [..., k], floating point.
        indices: [..., k], int32 or int64, each in 0 .. d_sae - 1.
        W_dec: [d_sae, d_in], any floating dtype; sums run in float32 (float64 for a float64 decoder).
        b_dec: [d_in] or None.
        check: raise ValueError for an index out of range; on a GPU that waits for the device. None checks on
            the CPU only, and not under torch.compile. Unchecked, such an index is never followed and
            contributes nothing.

    Returns [..., d_in] in W_dec's dtype. Gradients flow to values, W_dec and b_dec; they are
    deterministic. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    need_tensors(values=values, indices=indices, W_dec=W_dec, b_dec=_other(b_dec))
    if values.shape != indices.shape or values.dim() == 0 or values.shape[-1] == 0:
        raise ValueError(
            f"values {tuple(values.shape)} and indices {tuple(indices.shape)} must have one shape "
            "[..., k] with k >= 1"
        )
    _check_parts(values, indices, W_dec, b_dec)
    eager = not without_memory(values, indices, W_dec, b_dec)
    check = eager and W_dec.device.type == "cpu" if check is None else check
    if eager and resolve(backend, W_dec.device) == "reference":
        if check:
            check_indices(indices, W_dec.shape[0])
        else:
            values, indices = _inside(values, indices, W_dec.shape[0])
        return reference.sparse_decode(values, indices, W_dec, b_dec)
    k = values.shape[-1]
    flat = _decode_op(values.reshape(-1, k), None, indices.reshape(-1, k), W_dec, check, backend)
    return _finish(flat, W_dec, b_dec).reshape(*values.shape[:-1], W_dec.shape[1])


def decode_csr(
    csr: CSR,
    W_dec: Tensor,
    b_dec: Optional[Tensor] = None,
    *,
    backend: str = "auto",
    check: Optional[bool] = None,
) -> Tensor:
    """``sparse_decode`` for rows of any length: row i is the sum of value * W_dec[column], + b_dec.

    Args:
        csr: [n_rows, d_sae]; columns in any order, and repeats add up. An empty row gives b_dec.
        W_dec, b_dec, backend: as in ``sparse_decode``.
        check: raise ValueError for columns out of range and an indptr that does not start with 0, falls or
            does not end with nnz; on a GPU that waits for the device. None checks as above. Unchecked,
            such a column contributes nothing, and no memory outside the tensors is read.

    Returns [n_rows, d_in] in W_dec's dtype. Gradients flow to csr.values, W_dec and b_dec; they are
    deterministic.
    """
    indptr, indices, values, n_cols = csr
    need_tensors(indptr=indptr, indices=indices, values=values, W_dec=W_dec, b_dec=_other(b_dec))
    _check_parts(values, indices, W_dec, b_dec)
    if n_cols != W_dec.shape[0]:
        raise ValueError(f"csr has {n_cols} columns but W_dec has {W_dec.shape[0]} rows")
    eager = not without_memory(values, indices, W_dec, b_dec)
    check = eager and W_dec.device.type == "cpu" if check is None else check
    check_csr(csr, False)
    if eager and resolve(backend, W_dec.device) == "reference":
        if not check_csr(csr, check):
            values, indices = _inside(values, indices, n_cols)
            indptr = indptr.clamp(0, csr.nnz).cummax(0).values
        return reference.decode_csr(CSR(indptr, indices, values, n_cols), W_dec, b_dec)
    return _finish(_decode_op(values, indptr, indices, W_dec, check, backend), W_dec, b_dec)


def _check_parts(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Optional[Tensor]) -> None:
    if W_dec.dim() != 2 or not W_dec.is_floating_point():
        raise ValueError(f"W_dec must be floating point [d_sae, d_in], got {W_dec.dtype} {list(W_dec.shape)}")
    if not values.is_floating_point():
        raise ValueError(f"values must be floating point, got {values.dtype}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices must be integers, int32 or int64, got {indices.dtype}")
    if b_dec is not None and b_dec.is_complex():
        raise ValueError(f"b_dec must be floating point, got {b_dec.dtype}")
    if b_dec is not None and b_dec.shape != W_dec.shape[1:]:
        raise ValueError(f"b_dec has shape {tuple(b_dec.shape)}, expected ({W_dec.shape[1]},)")
    devices = {"values": values.device, "indices": indices.device, "W_dec": W_dec.device}
    if b_dec is not None:
        devices["b_dec"] = b_dec.device
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{where}: move them to one device")


def _other(b_dec: Any) -> Any:
    """``b_dec`` if it is no tensor: it is added outside the op, and so may be inside a transform."""
    return None if isinstance(b_dec, Tensor) else b_dec


def _wide(W_dec: Tensor) -> torch.dtype:
    return torch.float64 if W_dec.dtype == torch.float64 else torch.float32


def _backend(backend: str, device: torch.device) -> Any:
    name = resolve(backend, device)
    return implementation("torch" if name == "reference" else name)


def _starts(indptr: Optional[Tensor], indices: Tensor) -> Optional[Tensor]:
    """Row starts that stay inside the entries and never fall."""
    return None if indptr is None else indptr.clamp(0, indices.shape[0]).cummax(0).values


def _inside(values: Tensor, indices: Tensor, d_sae: int) -> Tuple[Tensor, Tensor]:
    """Entries whose index is out of range become 0 times the first feature."""
    valid = (indices >= 0) & (indices < d_sae)
    return torch.where(valid, values, 0.0), torch.where(valid, indices, 0)


def _finish(flat: Tensor, W_dec: Tensor, b_dec: Optional[Tensor]) -> Tensor:
    if b_dec is not None:
        flat = flat + b_dec.to(flat.dtype)
    return flat.to(W_dec.dtype)


def _decode(
    values: Tensor, indptr: Optional[Tensor], indices: Tensor, W_dec: Tensor, check: bool, backend: str
) -> Tensor:
    """values and indices [n, k], or [nnz] with indptr [n + 1]: rows [n, d_in] in the dtype of their sums."""
    if check and indptr is not None:
        check_csr(CSR(indptr, indices, values, W_dec.shape[0]), True)
    elif check:
        check_indices(indices, W_dec.shape[0])
    module = _backend(backend, W_dec.device)
    if not check and resolve(backend, W_dec.device) != "triton":  # its kernel follows no such index
        indptr, (values, indices) = _starts(indptr, indices), _inside(values, indices, W_dec.shape[0])
    if indptr is None:
        return module.sparse_decode(values, indices, W_dec)
    return module.decode_csr(indptr, indices, values, W_dec)


def _decode_fake(
    values: Tensor, indptr: Optional[Tensor], indices: Tensor, W_dec: Tensor, check: bool, backend: str
) -> Tensor:
    n = indices.shape[0] if indptr is None else indptr.shape[0] - 1
    return W_dec.new_empty((n, W_dec.shape[1]), dtype=_wide(W_dec))


def _grads(
    grad: Tensor,
    values: Tensor,
    indptr: Optional[Tensor],
    indices: Tensor,
    W_dec: Tensor,
    check: bool,
    needs: List[bool],
    backend: str,
) -> Tuple[Tensor, Tensor]:
    """Gradients of values and W_dec; an empty tensor for one that ``needs`` does not name."""
    module, grad, kept = _backend(backend, W_dec.device), grad.contiguous(), indices
    if not check:
        indptr, (values, kept) = _starts(indptr, indices), _inside(values, indices, W_dec.shape[0])
    out = [values.new_empty(0), W_dec.new_empty(0)]
    if needs[0]:
        out[0] = module.value_grads(grad, kept, W_dec, indptr).to(values.dtype)
        if not check:  # what contributed nothing has no gradient
            out[0] = torch.where(kept == indices, out[0], 0.0)
    if needs[1]:
        out[1] = module.weight_grads(grad, values, kept, W_dec.shape[0], indptr)[0].to(W_dec.dtype)
    return out[0], out[1]


def _grads_fake(
    grad: Tensor,
    values: Tensor,
    indptr: Optional[Tensor],
    indices: Tensor,
    W_dec: Tensor,
    check: bool,
    needs: List[bool],
    backend: str,
) -> Tuple[Tensor, Tensor]:
    return (
        values.new_empty(indices.shape if needs[0] else (0,)),
        W_dec.new_empty(W_dec.shape if needs[1] else (0,)),
    )


def _setup(ctx: Any, inputs: Tuple[Any, ...], output: Tensor) -> None:
    values, indptr, indices, W_dec, ctx.check, ctx.backend = inputs
    ctx.save_for_backward(values, indptr, indices, W_dec)


def _backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[3]]
    by_value, by_weight = _grads_op(grad, *ctx.saved_tensors, ctx.check, needs, ctx.backend)
    return by_value if needs[0] else None, None, None, by_weight if needs[1] else None, None, None


_decode_op = register(
    "decode",
    _decode,
    "(Tensor values, Tensor? indptr, Tensor indices, Tensor W_dec, bool check, str backend) -> Tensor",
    _decode_fake,
    backward=_backward,
    setup=_setup,
)
_grads_op = register(
    "decode_grads",
    _grads,
    "(Tensor grad, Tensor values, Tensor? indptr, Tensor indices, Tensor W_dec, bool check, bool[] needs, "
    "str backend) -> (Tensor, Tensor)",
    _grads_fake,
)
