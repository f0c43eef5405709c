"""Sparse-autoencoder kernels: exact TopK and threshold encoding, pooling, decoding.

Needs torch; uses Triton on CUDA devices and, where installed, numba on the CPU.
"""

from . import csr, reference
from .decode import decode_csr, sparse_decode
from .dispatch import register_backend, use_backend
from .encode import encode_threshold, encode_topk
from .kmeans import KMeans, kmeans_assign, kmeans_update, spherical_kmeans
from .module import SparseEncoder
from .pack import PackedEncoder, pack_encoder
from .pool import PoolStream, encode_pool
from .topk import topk
from .train import encode_batch_topk_train, encode_topk_train
from .types import CSR, TopK
from .variants import encode_abs_topk, encode_group_max, encode_topk_sharded, merge_topk, pack_both_signs

__version__ = "0.1.0"

__all__ = [
    "CSR",
    "KMeans",
    "PackedEncoder",
    "PoolStream",
    "SparseEncoder",
    "TopK",
    "csr",
    "decode_csr",
    "encode_abs_topk",
    "encode_batch_topk_train",
    "encode_group_max",
    "encode_pool",
    "encode_threshold",
    "encode_topk",
    "encode_topk_sharded",
    "encode_topk_train",
    "kmeans_assign",
    "kmeans_update",
    "merge_topk",
    "pack_both_signs",
    "pack_encoder",
    "reference",
    "register_backend",
    "sparse_decode",
    "spherical_kmeans",
    "topk",
    "use_backend",
]
