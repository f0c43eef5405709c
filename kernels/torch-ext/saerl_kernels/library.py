"""How ops become torch custom ops, which torch.compile and export see whole, and the encoders as such."""

from __future__ import annotations

from typing import Any, Callable, Optional, Tuple

import torch
from torch import Tensor

from . import reference
from .dispatch import NO_DATA, implementation, resolve
from .pack import PackedEncoder
from .types import CSR, TRANSFORMED, TopK

# The first part of the package's name, so that a copy loaded from the hub registers beside this one.
NAMESPACE = (__package__ or "saerl_kernels").partition(".")[0]

LARGEST_K = 1024  # on a GPU a program holds and sorts a row's k keys in registers; more are left to torch


def _encode(
    x: Tensor, weight: Tensor, bias: Tensor, permutation: Optional[Tensor], k: int, backend: str
) -> Tuple[Tensor, Tensor]:
    encoder = PackedEncoder(weight, bias, permutation=permutation)
    name = resolve(backend, x.device)
    if x.shape[0] == 0:
        kept = TopK.empty((0, k), x.device)
    elif name == "reference":
        kept = reference.encode_topk(x, encoder, k)
    else:
        kept = implementation(name).encode_topk(x, encoder, k)
    return kept.values, kept.indices


def encode_fake(
    x: Tensor, weight: Tensor, bias: Tensor, permutation: Optional[Tensor], k: int, backend: str
) -> Tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


def _threshold(
    x: Tensor, weight: Tensor, bias: Tensor, permutation: Optional[Tensor], limit: Tensor, backend: str
) -> Tuple[Tensor, Tensor, Tensor]:
    encoder = PackedEncoder(weight, bias, permutation=permutation)
    name = resolve(backend, x.device)
    if x.shape[0] == 0:
        csr = CSR.empty(0, encoder.d_sae, x.device)
    elif name == "reference":
        csr = reference.encode_threshold(x, encoder, threshold=limit)
    else:
        csr = implementation(name).encode_threshold(x, encoder, limit)
    return csr.indptr, csr.indices, csr.values


def _threshold_fake(
    x: Tensor, weight: Tensor, bias: Tensor, permutation: Optional[Tensor], limit: Tensor, backend: str
) -> Tuple[Tensor, Tensor, Tensor]:
    nnz, indptr = dynamic_size(x), x.new_empty(x.shape[0] + 1, dtype=torch.int64)
    return indptr, x.new_empty(nnz, dtype=torch.int32), x.new_empty(nnz, dtype=torch.float32)


def _topk(scores: Tensor, k: int, backend: str) -> Tuple[Tensor, Tensor]:
    name = resolve(backend, scores.device)
    if scores.shape[0] == 0:
        kept = TopK.empty((0, k), scores.device)
    else:
        kept = (reference if name == "reference" else implementation(name)).topk(scores, k)
    return kept.values, kept.indices


def _topk_fake(scores: Tensor, k: int, backend: str) -> Tuple[Tensor, Tensor]:
    shape = (scores.shape[0], k)
    return scores.new_empty(shape, dtype=torch.float32), scores.new_empty(shape, dtype=torch.int32)


def dynamic_size(x: Tensor, least: int = 0) -> Any:
    """A size that depends on what ``x`` holds, for a fake; ValueError for a meta tensor."""
    if type(x) is Tensor:
        raise ValueError(NO_DATA)
    return torch.library.get_ctx().new_dynamic_size(min=least)


def register(
    name: str,
    function: Callable,
    schema: str,
    fake: Callable,
    waiting: bool = False,
    backward: Optional[Callable] = None,
    setup: Optional[Callable] = None,
) -> Any:
    """A custom op; ``waiting``: it may wait for the device, so torch must not capture it in a CUDA graph.

    Without ``backward`` a derivative of its results is refused.
    """
    tag = getattr(torch.Tag, "cudagraph_unsafe", None) if waiting else None
    tags = {} if tag is None else {"tags": (tag,)}
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=(), schema=schema, **tags)
    op.register_fake(fake)
    op.register_vmap(_refuse_vmap)
    op.register_autograd(backward or _refuse_second, setup_context=setup)
    return op


def _refuse_vmap(*_: Any) -> Any:
    raise NotImplementedError(f"a tensor {TRANSFORMED}")


def _refuse_second(*_: Any) -> Any:
    raise NotImplementedError("sparse codes have first derivatives only: leave out create_graph=True")


ENCODER_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor bias, Tensor? permutation, int k, str backend) -> (Tensor, Tensor)"
)
encode_rows = register("encode_topk", _encode, ENCODER_SCHEMA, encode_fake)
encode_rows_waiting = register("encode_topk_waiting", _encode, ENCODER_SCHEMA, encode_fake, True)
threshold_rows = register(
    "encode_threshold",
    _threshold,
    "(Tensor x, Tensor weight, Tensor bias, Tensor? permutation, Tensor limit, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _threshold_fake,
    True,
)
topk_rows, topk_rows_waiting = (
    register(
        f"topk{'_waiting' * waiting}",
        _topk,
        "(Tensor scores, int k, str backend) -> (Tensor, Tensor)",
        _topk_fake,
        waiting,
    )
    for waiting in (False, True)
)


def waits(k: int, backend: str) -> bool:
    """Does ranking wait for the device? torch's does, and it ranks where k is above ``LARGEST_K``."""
    return k > LARGEST_K or backend in ("torch", "reference")
