"""Encoders to train with: the exact selections of encode_topk, and BatchTopK, differentiable.

Gradients go through the selected features only: dW_enc and db_enc are sums over each feature's tokens, dx is
a sparse decode. Both passes are torch custom ops, so torch.compile sees them whole.
"""

from __future__ import annotations

from typing import Any, List, Optional, Tuple, Union

import torch
from torch import Tensor

from . import _torch, reference
from ._batch import batch_topk, gather_survivors
from ._check import check_average_k, check_indices, check_k
from .dispatch import implementation, resolve
from .library import dynamic_size, register, waits
from .pack import DTYPES, PackedEncoder
from .types import TopK, need_tensors, without_memory


def encode_topk_train(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Optional[Tensor],
    k: int,
    *,
    b_dec: Optional[Tensor] = None,
    features: Optional[Tensor] = None,
    relu: bool = True,
    dtype: Optional[torch.dtype] = None,
    backend: str = "auto",
) -> TopK:
    """Top-k of ``relu((x - b_dec) @ W_enc + b_enc)``, differentiable in x, W_enc, b_enc and b_dec.

    Args:
        x: [..., d_in].
        W_enc: [d_in, d_sae]. Fastest as the transpose of a contiguous [d_sae, d_in] (``linear.weight.t()``):
            the gradient is made in that layout, and on a GPU any other is copied first.
        b_enc: [d_sae] or None.
        k: 1 .. d_sae (of the features that compete).
        b_dec: [d_in], subtracted from x first; its gradient costs no gradient of x.
        features: integers [m], each in 0 .. d_sae - 1 and different (checked on a CPU): only these compete,
            at the cost of m features. For the auxiliary loss over dead features (Gao et al. 2024,
            arXiv 2406.04093).
        relu: False ranks and returns the pre-activations themselves, so that a feature below zero everywhere
            can come back.
        dtype: of the product (bfloat16, float16, float32); None: W_enc's. Sums and the returned values are
            float32 either way, and a float32 W_enc gets a float32 gradient.

    Returns values float32 [..., k] (float64 for a float64 W_enc), descending, and indices int32 [..., k];
    ties and fillers as in ``encode_topk``. Ranking is in float32. A filler 0.0 gets no gradient.
    Gradients are deterministic; no [n, k, d_in] and no dense [n, d_sae] gradient is formed. Raises
    ValueError for shapes, devices or dtypes that do not fit.
    """
    _check(x, W_enc, b_enc, b_dec, features, dtype)
    check_k(k, W_enc.shape[1] if features is None else features.shape[0], "the number of features")
    if not without_memory(x, W_enc) and resolve(backend, x.device) == "reference":
        return reference.encode_topk_train(
            x, W_enc, b_enc, k, b_dec=b_dec, features=features, relu=relu, dtype=dtype
        )
    weight, bias = W_enc.t(), b_enc
    if features is not None:
        weight = weight.index_select(0, features)
        bias = None if bias is None else bias.index_select(0, features)
    rows = x.reshape(-1, x.shape[-1])
    mode = "topk" if relu else "signed"
    op = _encode_op_waiting if waits(k, backend) else _encode_op
    values, indices = op(rows, weight, bias, b_dec, k, mode, dtype, backend)
    if features is not None:
        indices = features[indices.long()].int()
    shape = (*x.shape[:-1], k)
    return TopK(values.reshape(shape), indices.reshape(shape))


def encode_batch_topk_train(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Optional[Tensor],
    k: Union[int, float],
    *,
    b_dec: Optional[Tensor] = None,
    dtype: Optional[torch.dtype] = None,
    backend: str = "auto",
) -> TopK:
    """The n * k largest positive activations of a batch x [n, d_in] (BatchTopK, arXiv 2412.06410).

    k may be a fraction: n * k is rounded down, as in SAELens. Other arguments and gradients as in
    ``encode_topk_train``. A row wins any number of places, so the result is padded with 0.0 at feature 0 to
    the longest row: values and indices [n, width], width >= 1, values descending. Exactly n * k values are
    positive when the batch has as many; equal ones: the earlier row first, then the lower feature. The least
    positive value is the threshold to average for inference.

    Never ranks n * d_sae entries: a histogram over survivors bounds the threshold as rows come in
    (``_batch.py``). The width depends on the data, so a GPU is waited for.
    """
    _check(x, W_enc, b_enc, b_dec, None, dtype)
    if x.dim() != 2:
        raise ValueError(f"x must be [n, d_in], got shape {tuple(x.shape)}")
    check_average_k(k, W_enc.shape[1])
    if not without_memory(x, W_enc) and resolve(backend, x.device) == "reference":
        return reference.encode_batch_topk_train(x, W_enc, b_enc, k, b_dec=b_dec, dtype=dtype)
    count = k * x.shape[0] if isinstance(k, int) else int(k * x.shape[0])
    return TopK(*_encode_op_waiting(x, W_enc.t(), b_enc, b_dec, count, "batch", dtype, backend))


def _check(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Optional[Tensor],
    b_dec: Optional[Tensor],
    features: Optional[Tensor],
    dtype: Optional[torch.dtype],
) -> None:
    need_tensors(x=x, W_enc=W_enc, b_enc=b_enc, b_dec=b_dec, features=features)
    if W_enc.dim() != 2:
        raise ValueError(f"W_enc must be [d_in, d_sae], got shape {tuple(W_enc.shape)}")
    d_in, d_sae = W_enc.shape
    if x.dim() == 0 or x.shape[-1] != d_in:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be d_in={d_in}")
    for name, tensor, size in (("b_enc", b_enc, d_sae), ("b_dec", b_dec, d_in)):
        if tensor is not None and tuple(tensor.shape) != (size,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({size},)")
    for name, tensor in (("x", x), ("W_enc", W_enc)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    for name, tensor in (("W_enc", W_enc), ("b_enc", b_enc), ("b_dec", b_dec), ("features", features)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device} but {name} is on {tensor.device}; move one of them")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not supported; choose float32, bfloat16 or float16")
    if features is not None and (features.dim() != 1 or features.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"features must be integers [m], got {features.dtype} {tuple(features.shape)}")
    if features is not None and features.device.type == "cpu" and not without_memory(x, features):
        check_indices(features, d_sae, "features")
        if features.unique().numel() < features.numel():
            raise ValueError("features holds a feature twice; each may compete once (features.unique())")


def _rows(x: Tensor, b_dec: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (x if b_dec is None else x.to(wide) - b_dec.to(wide)).to(dtype).contiguous()


def _backend(backend: str, device: torch.device) -> Any:
    name = resolve(backend, device)
    return _torch if name == "reference" else implementation(name)


def _encode(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    b_dec: Optional[Tensor],
    k: int,
    mode: str,
    dtype: Optional[torch.dtype],
    backend: str,
) -> Tuple[Tensor, Tensor]:
    dtype = dtype or weight.dtype
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if x.shape[0] == 0 or k == 0:  # k: of "batch", how many in all
        kept = TopK.empty((x.shape[0], 1 if mode == "batch" else k), x.device)
        return kept.values.zero_().to(exact), kept.indices.zero_()
    module, rows = _backend(backend, x.device), _rows(x, b_dec, dtype).detach()
    narrow = torch.float32 if dtype == torch.float64 else dtype
    zero = torch.zeros(weight.shape[0], dtype=torch.float32, device=x.device)
    encoder = PackedEncoder(weight.detach().to(narrow), zero if bias is None else bias)
    ranked = rows.to(narrow)
    if mode == "topk":
        kept = module.encode_topk(ranked, encoder, k)
    elif mode == "batch":
        gather = getattr(module, "gather_survivors", gather_survivors)
        kept = batch_topk(ranked, encoder, k, gather, getattr(module, "score_survivors", None))
    else:
        parts = [module.topk(scores, k) for _, scores in _torch.score_chunks(ranked, encoder)]
        kept = TopK(torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts]))
    if exact == torch.float32:
        return kept.values, kept.indices
    values = module.value_grads(rows.double(), kept.indices, weight)
    values = values if bias is None else values + bias[kept.indices.long()]
    return (values if mode == "signed" else torch.where(kept.values > 0, values, 0.0)), kept.indices


def _encode_fake(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    b_dec: Optional[Tensor],
    k: int,
    mode: str,
    dtype: Optional[torch.dtype],
    backend: str,
) -> Tuple[Tensor, Tensor]:
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    width = dynamic_size(x, 1) if mode == "batch" else k
    shape = (x.shape[0], width)
    return x.new_empty(shape, dtype=exact), x.new_empty(shape, dtype=torch.int32)


def _grads(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    b_dec: Optional[Tensor],
    mode: str,
    dtype: Optional[torch.dtype],
    needs: List[bool],
    backend: str,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and b_dec; an empty tensor for one that ``needs`` does not name."""
    module, wide = _backend(backend, x.device), values.dtype
    grad = grad.to(wide).contiguous() if mode == "signed" else torch.where(values > 0, grad.to(wide), 0.0)
    out = [x.new_empty(0) for _ in range(4)]
    if needs[0]:
        out[0] = module.sparse_decode(grad, indices, weight).to(x.dtype)
    if any(needs[1:]):
        rows = _rows(x, b_dec, dtype or weight.dtype)
        total, sums = module.weight_grads(rows, grad, indices, weight.shape[0])
        out[1], out[2] = total.to(weight.dtype), sums
        if needs[3]:  # what would be -dx summed over the rows, as one matrix-vector product
            shift = torch.empty(weight.shape[1], dtype=weight.dtype, device=x.device)
            torch.mv(weight.t(), sums.to(weight.dtype), out=shift)  # with out=, autocast leaves it alone
            out[3] = -shift.to(wide)
    return out[0], out[1], out[2], out[3]


def _grads_fake(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    b_dec: Optional[Tensor],
    mode: str,
    dtype: Optional[torch.dtype],
    needs: List[bool],
    backend: str,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    out = [x.new_empty(0) for _ in range(4)]
    if needs[0]:
        out[0] = x.new_empty(x.shape)
    if any(needs[1:]):
        out[1] = weight.new_empty(weight.shape)
        out[2] = weight.new_empty(weight.shape[:1], dtype=values.dtype)
        if needs[3]:
            out[3] = weight.new_empty(weight.shape[1:], dtype=values.dtype)
    return out[0], out[1], out[2], out[3]


def _setup(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Tensor, Tensor]) -> None:
    x, weight, bias, b_dec, _, ctx.mode, ctx.dtype, ctx.backend = inputs
    ctx.save_for_backward(x, weight, b_dec, *output)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor, _: Any) -> Tuple[Optional[Tensor], ...]:
    x, weight, b_dec, values, indices = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:4])
    found = _grads_op(grad, values, indices, x, weight, b_dec, ctx.mode, ctx.dtype, needs, ctx.backend)
    dtypes = (x.dtype, weight.dtype, ctx.bias_dtype, None if b_dec is None else b_dec.dtype)
    grads = [g.to(d) if need else None for g, d, need in zip(found, dtypes, needs)]
    return (*grads, None, None, None, None)


_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? b_dec, int k, str mode, ScalarType? dtype, str backend) "
    "-> (Tensor, Tensor)"
)
_encode_op, _encode_op_waiting = (
    register(
        f"encode_train{'_waiting' * waiting}", _encode, _SCHEMA, _encode_fake, waiting, _backward, _setup
    )
    for waiting in (False, True)
)
_grads_op = register(
    "encode_train_grads",
    _grads,
    "(Tensor grad, Tensor values, Tensor indices, Tensor x, Tensor weight, Tensor? b_dec, str mode, "
    "ScalarType? dtype, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _grads_fake,
)
