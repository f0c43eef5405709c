"""Sparse-autoencoder kernels: exact TopK and threshold encoding, pooling, decoding.

Needs torch; uses Triton on CUDA devices and, where installed, numba on the CPU.
"""

from . import reference
from .decode import sparse_decode
from .dispatch import use_backend
from .encode import encode_threshold, encode_topk
from .pack import PackedEncoder, pack_encoder
from .pool import encode_pool
from .topk import topk
from .train import encode_batch_topk_train, encode_topk_train
from .types import CSR, TopK

__all__ = [
    "CSR",
    "PackedEncoder",
    "TopK",
    "encode_batch_topk_train",
    "encode_pool",
    "encode_threshold",
    "encode_topk",
    "encode_topk_train",
    "pack_encoder",
    "reference",
    "sparse_decode",
    "topk",
    "use_backend",
]
