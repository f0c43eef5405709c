"""encode_topk and encode_threshold: sparse codes of rows, never holding all of [n, d_sae]."""

from __future__ import annotations

from typing import Any, Union

from torch import Tensor

from . import reference
from ._check import check_finite, check_k, check_threshold, need_encoder
from .dispatch import implementation, resolve
from .library import encode_rows, encode_rows_waiting, threshold_rows, waits
from .pack import PackedEncoder
from .types import CSR, TopK, need_tensors, without_memory


def encode_topk(
    x: Tensor,
    encoder: PackedEncoder,
    k: int,
    *,
    backend: str = "auto",
    check: bool = False,
    batch_invariant: bool = False,
) -> TopK:
    """The exact top-k of ReLU(pre-activations), ranked in float32.

    Args:
        x: [..., d_in], float32, bfloat16 or float16, any strides and leading shape, empty allowed; it is
            cast to the encoder's dtype.
        encoder: from ``pack_encoder``, on x's device.
        k: 1 .. d_sae; above 1024 a GPU runs torch's top-k, which waits for the device.
        backend: "auto", "triton", "torch", "numba" or "reference" (see ``dispatch.resolve``).
        check: raise ValueError when x is not finite; costs a pass and a synchronisation.
        batch_invariant: a row's result is the same to the bit whatever rows it comes with. numba and Triton
            only, outside torch.compile, without a run-time normalisation, on a GPU k up to 1024.

    Returns values float32 [..., k], descending, and indices int32 [..., k] in the original numbering. Equal
    values are ordered by index. NaN pre-activations count as 0, +inf ranks first; a row with fewer than k
    positive ones ends in value 0.0 at the lowest indices whose activation is 0.

    Not differentiable. Under torch.compile it is one custom op (``library.py``). Raises ValueError for a
    shape, dtype, device or k that does not fit.
    """
    need_encoder(encoder)
    check_k(k, encoder.d_sae)
    need_tensors(x=x)
    if check:
        check_finite(x)
    shape = (*x.shape[:-1], k)
    if batch_invariant:
        values, indices = _invariant(x, encoder, k, backend)
        return TopK(values.reshape(shape), indices.reshape(shape))
    if without_memory(x, encoder.weight):  # the backend is then chosen at run time, inside the op
        rows = encoder.prepare(x)
        op = encode_rows_waiting if waits(k, backend) else encode_rows
        kept = TopK(*op(rows, encoder.weight, encoder.bias, encoder.permutation, k, backend))
        return TopK(kept.values.reshape(shape), kept.indices.reshape(shape))
    name = resolve(backend, encoder.device)
    if name == "reference":
        return reference.encode_topk(x, encoder, k)
    rows = encoder.prepare(x)
    if rows.shape[0] == 0:
        return TopK.empty(shape, x.device)
    kept = implementation(name).encode_topk(rows, encoder, k)
    if len(shape) == 2:
        return kept
    return TopK(kept.values.reshape(shape), kept.indices.reshape(shape))


def _invariant(x: Tensor, encoder: PackedEncoder, k: int, backend: str) -> TopK:
    if without_memory(x, encoder.weight):
        raise ValueError("batch_invariant=True runs on real tensors only; call it outside torch.compile")
    if encoder.normalize_activations != "none":
        raise ValueError(
            f"batch_invariant=True can not promise the bits of {encoder.normalize_activations}; "
            "normalise x yourself and pack without it"
        )
    name = resolve(backend, encoder.device)
    own = None if name == "reference" else getattr(implementation(name), "encode_topk_invariant", None)
    if own is None:
        raise ValueError(
            f"backend {name!r} has no batch-invariant encoder; use 'numba' on a CPU or 'triton' on a GPU"
        )
    rows = encoder.prepare(x)
    return own(rows, encoder, k) if rows.shape[0] else TopK.empty((0, k), x.device)


def encode_threshold(
    x: Tensor,
    encoder: PackedEncoder,
    *,
    threshold: Union[Tensor, float, None] = None,
    backend: str = "auto",
    check: bool = False,
) -> CSR:
    """Positive pre-activations above a threshold (JumpReLU, or BatchTopK at inference).

    Args:
        x: [..., d_in]; leading dimensions are flattened into the rows of the result.
        threshold: one number or [d_sae] in the original numbering; None uses the encoder's own.
        check: raise ValueError when x is not finite.

    Returns CSR [n_rows, d_sae]. An entry is kept when it is > threshold and > 0; NaN never is. The number
    of entries depends on the data, so a GPU is waited for once per block of rows (2^26
    scores), to allocate them.
    """
    need_encoder(encoder)
    limit: Any = check_threshold(encoder.natural() if threshold is None else encoder, threshold)
    if check:
        check_finite(x)
    if without_memory(x, encoder.weight, limit):
        rows, parts = encoder.prepare(x), (encoder.weight, encoder.bias, encoder.permutation)
        indptr, indices, values = threshold_rows(rows, *parts, limit, backend)
        return CSR(indptr, indices, values, encoder.d_sae)
    name = resolve(backend, encoder.device)
    if name == "reference":
        return reference.encode_threshold(x, encoder, threshold=limit)
    rows = encoder.prepare(x)
    if rows.shape[0] == 0:
        return CSR.empty(0, encoder.d_sae, x.device)
    return implementation(name).encode_threshold(rows, encoder, limit)
