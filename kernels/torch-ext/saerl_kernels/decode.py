"""sparse_decode: reconstructions from sparse codes, differentiable in the values and the decoder."""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from . import reference
from .dispatch import implementation, resolve


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


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Optional[Tensor] = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``sum_j values[..., j] * W_dec[indices[..., j]] + b_dec``.

    Args:
        values: [..., k], floating point.
        indices: [..., k], int32 or int64, each in 0 .. d_sae - 1 (not checked on a GPU).
        W_dec: [d_sae, d_in], any floating dtype; sums run in float32 (float64 for a float64 decoder).
        b_dec: [d_in] or None.

    Returns [..., d_in] in W_dec's dtype. Gradients flow to values, W_dec and b_dec; they are
    deterministic. Raises ValueError for shapes or devices that do not fit.
    """
    if values.shape != indices.shape or values.dim() == 0 or values.shape[-1] == 0:
        raise ValueError(
            f"values {tuple(values.shape)} and indices {tuple(indices.shape)} must have one shape "
            "[..., k] with k >= 1"
        )
    if W_dec.dim() != 2:
        raise ValueError(f"W_dec must be [d_sae, d_in], got shape {tuple(W_dec.shape)}")
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"indices must be integers, got {indices.dtype}")
    if b_dec is not None and b_dec.shape != W_dec.shape[1:]:
        raise ValueError(f"b_dec has shape {tuple(b_dec.shape)}, expected ({W_dec.shape[1]},)")
    if not values.device == indices.device == W_dec.device:
        raise ValueError(
            f"values, indices and W_dec are on {values.device}, {indices.device} and {W_dec.device}; "
            "move them to one device"
        )
    name = resolve(backend, W_dec.device)
    if W_dec.device.type == "cpu" and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= W_dec.shape[0]:
            raise ValueError(f"indices reach {low}..{high}, outside 0..{W_dec.shape[0] - 1}")
    if name == "reference":
        return reference.sparse_decode(values, indices, W_dec, b_dec)
    k = values.shape[-1]
    flat = SparseDecode.apply(values.reshape(-1, k), indices.reshape(-1, k), W_dec, name)
    if b_dec is not None:
        flat = flat + b_dec.to(flat.dtype)
    return flat.to(W_dec.dtype).reshape(*values.shape[:-1], W_dec.shape[1])
