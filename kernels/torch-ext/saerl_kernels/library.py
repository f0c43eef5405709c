"""How ops become torch custom ops, which torch.compile and export see whole, and encode_topk as one."""

from __future__ import annotations

from typing import Any, Callable, Optional, Tuple

import torch
from torch import Tensor

from . import reference
from .dispatch import implementation, resolve
from .pack import VMAP, PackedEncoder
from .types import TopK

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


def _encode_fake(
    x: Tensor, weight: Tensor, bias: Tensor, permutation: Optional[Tensor], k: int, backend: str
) -> Tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


def register(name: str, function: Callable, schema: str, fake: Callable, waiting: bool = False) -> Any:
    """A custom op; ``waiting``: it may wait for the device, so torch must not capture it in a CUDA graph."""
    tag = getattr(torch.Tag, "cudagraph_unsafe", None) if waiting else None
    tags = {} if tag is None else {"tags": (tag,)}
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=(), schema=schema, **tags)
    op.register_fake(fake)
    op.register_vmap(_refuse_vmap)
    return op


def _refuse_vmap(*_: Any) -> Any:
    raise NotImplementedError(VMAP)


_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor bias, Tensor? permutation, int k, str backend) -> (Tensor, Tensor)"
)
encode_rows = register("encode_topk", _encode, _SCHEMA, _encode_fake)
encode_rows_waiting = register("encode_topk_waiting", _encode, _SCHEMA, _encode_fake, True)


def waits(k: int, backend: str) -> bool:
    """Does ranking wait for the device? torch's does, and it ranks where k is above ``LARGEST_K``."""
    return k > LARGEST_K or backend in ("torch", "reference")
