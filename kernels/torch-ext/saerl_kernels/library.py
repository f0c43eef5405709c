"""encode_topk as a torch custom op, with a fake implementation: what torch.compile and export see."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor

from . import reference
from .dispatch import implementation, resolve
from .pack import PackedEncoder
from .types import TopK

# The first part of the package's name, so that a copy loaded from the hub registers beside this one.
NAMESPACE = (__package__ or "saerl_kernels").partition(".")[0]


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


_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor bias, Tensor? permutation, int k, str backend) -> (Tensor, Tensor)"
)
encode_rows = torch.library.custom_op(f"{NAMESPACE}::encode_topk", _encode, mutates_args=(), schema=_SCHEMA)
encode_rows.register_fake(_encode_fake)
