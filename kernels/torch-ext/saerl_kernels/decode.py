"""Reconstructions from sparse codes, differentiable in the values and the decoder.

``sparse_decode`` takes a fixed number of entries per row (``TopK``), ``decode_csr`` rows of any length.
"""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from . import reference
from ._check import check_csr, check_indices
from .dispatch import implementation, resolve
from .types import CSR


class SparseDecode(torch.autograd.Function):
    """Forward and backward without the [n, k, d_in] tensor that gathering decoder rows would make."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        ctx.name = name
        return implementation(name).sparse_decode(values, indices, W_dec)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], None, Optional[Tensor], None]:
        values, indices, W_dec = ctx.saved_tensors
        backend, grad = implementation(ctx.name), grad.contiguous()
        grad_values = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_values = backend.value_grads(grad, indices, W_dec).to(values.dtype)
        if ctx.needs_input_grad[2]:
            grad_weight = backend.weight_grads(grad, values, indices, W_dec.shape[0])[0].to(W_dec.dtype)
        return grad_values, None, grad_weight, None


class DecodeCSR(torch.autograd.Function):
    """As ``SparseDecode``, for rows of any length."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, indptr: Tensor, indices: Tensor, W_dec: Tensor, name: str
    ) -> Tensor:
        ctx.save_for_backward(values, indptr, indices, W_dec)
        ctx.name = name
        return implementation(name).decode_csr(indptr, indices, values, W_dec)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], None, None, Optional[Tensor], None]:
        values, indptr, indices, W_dec = ctx.saved_tensors
        backend, grad = implementation(ctx.name), grad.contiguous()
        grad_values = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_values = backend.value_grads(grad, indices, W_dec, indptr).to(values.dtype)
        if ctx.needs_input_grad[3]:
            grad_weight = backend.weight_grads(grad, values, indices, W_dec.shape[0], indptr)[0]
            grad_weight = grad_weight.to(W_dec.dtype)
        return grad_values, None, None, grad_weight, None


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
            the CPU only. Unchecked, such an index is never followed and contributes nothing.

    Returns [..., d_in] in W_dec's dtype. Gradients flow to values, W_dec and b_dec; they are
    deterministic. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    if values.shape != indices.shape or values.dim() == 0 or values.shape[-1] == 0:
        raise ValueError(
            f"values {tuple(values.shape)} and indices {tuple(indices.shape)} must have one shape "
            "[..., k] with k >= 1"
        )
    _check_parts(values, indices, W_dec, b_dec)
    name = resolve(backend, W_dec.device)
    if W_dec.device.type == "cpu" if check is None else check:
        check_indices(indices, W_dec.shape[0])
    elif not _masked_in_kernel(name, values, W_dec):
        values, indices = _inside(values, indices, W_dec.shape[0])
    if name == "reference":
        return reference.sparse_decode(values, indices, W_dec, b_dec)
    k = values.shape[-1]
    flat = SparseDecode.apply(values.reshape(-1, k), indices.reshape(-1, k), W_dec, name)
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
            does not end with nnz; on a GPU that waits for the device. None checks on the CPU only. Unchecked,
            such a column contributes nothing, and no memory outside the tensors is read.

    Returns [n_rows, d_in] in W_dec's dtype. Gradients flow to csr.values, W_dec and b_dec; they are
    deterministic.
    """
    indptr, indices, values, n_cols = csr
    _check_parts(values, indices, W_dec, b_dec)
    if n_cols != W_dec.shape[0]:
        raise ValueError(f"csr has {n_cols} columns but W_dec has {W_dec.shape[0]} rows")
    name = resolve(backend, W_dec.device)
    checked = check_csr(csr, W_dec.device.type == "cpu" if check is None else check)
    if not (checked or _masked_in_kernel(name, values, W_dec)):
        values, indices = _inside(values, indices, n_cols)
        indptr = indptr.clamp(0, csr.nnz).cummax(0).values
    if name == "reference":
        return reference.decode_csr(CSR(indptr, indices, values, n_cols), W_dec, b_dec)
    return _finish(DecodeCSR.apply(values, indptr, indices, W_dec, name), W_dec, b_dec)


def _check_parts(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Optional[Tensor]) -> None:
    if W_dec.dim() != 2 or not W_dec.is_floating_point():
        raise ValueError(f"W_dec must be floating point [d_sae, d_in], got {W_dec.dtype} {list(W_dec.shape)}")
    if not values.is_floating_point():
        raise ValueError(f"values must be floating point, got {values.dtype}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices must be integers, int32 or int64, got {indices.dtype}")
    if b_dec is not None and b_dec.shape != W_dec.shape[1:]:
        raise ValueError(f"b_dec has shape {tuple(b_dec.shape)}, expected ({W_dec.shape[1]},)")
    devices = {"values": values.device, "indices": indices.device, "W_dec": W_dec.device}
    if b_dec is not None:
        devices["b_dec"] = b_dec.device
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{where}: move them to one device")


def _masked_in_kernel(name: str, values: Tensor, W_dec: Tensor) -> bool:
    """Triton's forward kernel follows no index or row start that leaves the tensors; its gradients may."""
    needs_grad = torch.is_grad_enabled() and (values.requires_grad or W_dec.requires_grad)
    return name == "triton" and not needs_grad


def _inside(values: Tensor, indices: Tensor, d_sae: int) -> Tuple[Tensor, Tensor]:
    """Entries whose index is out of range become 0 times the first feature."""
    valid = (indices >= 0) & (indices < d_sae)
    return torch.where(valid, values, 0.0), torch.where(valid, indices, 0)


def _finish(flat: Tensor, W_dec: Tensor, b_dec: Optional[Tensor]) -> Tensor:
    if b_dec is not None:
        flat = flat + b_dec.to(flat.dtype)
    return flat.to(W_dec.dtype)
