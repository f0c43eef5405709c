"""CPU implementations: torch's matrix product in blocks that stay in cache, numba's selection on each."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterator, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from .. import _torch
from .._torch import decode_grads, linear
from ..pack import PackedEncoder
from ..types import CSR, TopK, _indptr
from . import decode, select

__all__ = [
    "decode_csr",
    "decode_grads",
    "encode_threshold",
    "encode_topk",
    "pool_codes",
    "sparse_decode",
    "topk",
]

ROWS = 1024  # rows of a block; more would only enlarge the block
BLOCK = 1 << 18  # float32 scores in a block, 1 MB (4 MB at most): selection reads them from cache
MIN_COLUMNS = 1024

_pool: Optional[Tuple[int, int, ThreadPoolExecutor]] = None


def _run(function: Callable, rows: int, *args: Any) -> None:
    """``function(*args, start, stop)`` over ``rows``, split over torch's thread count."""
    global _pool
    threads = min(torch.get_num_threads(), rows // 32)
    if threads <= 1:
        function(*args, 0, rows)
        return
    key = (os.getpid(), torch.get_num_threads())  # threads do not survive a fork
    if _pool is None or _pool[:2] != key:
        _pool = (*key, ThreadPoolExecutor(key[1], thread_name_prefix="saerl_kernels"))
    edges = [rows * i // threads for i in range(threads + 1)]
    jobs = [_pool[2].submit(function, *args, a, b) for a, b in zip(edges, edges[1:])]
    for job in jobs:
        job.result()


def _blocks(x: Tensor, encoder: PackedEncoder) -> Iterator[Tuple[int, int, Tensor]]:
    """(first row, first column, float32 pre-activations); columns ascend within a band of rows."""
    rows = min(ROWS, x.shape[0])
    columns = max(MIN_COLUMNS, BLOCK // rows)
    if torch.get_num_threads() > 1:
        columns *= 4  # every product ends in a barrier, which a busy machine makes long: fewer, larger ones
    columns = min(encoder.d_sae, columns)
    memory = torch.empty(rows * columns, dtype=torch.float32)
    for top in range(0, x.shape[0], rows):
        band = x[top : top + rows].float()
        for left in range(0, encoder.d_sae, columns):
            weight = encoder.weight[left : left + columns].float()
            block = memory[: len(band) * len(weight)].view(len(band), len(weight))
            yield top, left, linear(band, weight, encoder.bias[left : left + columns], block)


def encode_topk(x: Tensor, encoder: PackedEncoder, k: int) -> TopK:
    """``x`` [n, d_in] as ``PackedEncoder.prepare`` returns it."""
    encoder = encoder.natural()
    n = x.shape[0]
    values, indices = TopK.empty((n, k))
    keys = np.empty((min(ROWS, n), _room(k)), dtype=np.int64)
    counts = np.zeros(len(keys), dtype=np.int64)
    floor = np.zeros(len(keys), dtype=np.int32)
    for top, left, scores in _blocks(x, encoder):
        rows = scores.shape[0]
        if left == 0:
            counts[:], floor[:] = 0, 0
        bits = scores.numpy().view(np.int32)

        lanes = 64 * -(-2 * k // 64) if left == 0 else 0
        lanes = lanes if scores.shape[1] >= 4 * lanes else 0  # of too few values each, they bound badly

        def gate(
            start: int, stop: int, bits: np.ndarray = bits, left: int = left, lanes: int = lanes
        ) -> None:
            scratch = np.empty(lanes, dtype=np.int32)
            select.gate_rows(bits, left, scratch, keys, counts, floor, k, start, stop)

        _run(gate, rows)
        if left + scores.shape[1] == encoder.d_sae:
            out = values[top : top + rows].numpy().view(np.int32)
            _run(select.finish_rows, rows, keys, counts, k, out, indices[top : top + rows].numpy())
    return TopK(values, indices)


def _room(k: int) -> int:
    """Candidates a row may hold: k, as many again before the next selection, and one block."""
    return k + max(k, 64) + select.BLOCK


def topk(scores: Tensor, k: int) -> TopK:
    """``scores`` [n, F]: see the public op."""
    scores = scores.float().contiguous()
    n = scores.shape[0]
    values, indices = TopK.empty((n, k))
    step = min(n, 4096)
    keys = np.empty((step, _room(k)), dtype=np.int64)
    for top in range(0, n, step):
        bits = scores[top : top + step].numpy().view(np.int32)

        def rank(start: int, stop: int, bits: np.ndarray = bits) -> None:
            select.rank_rows(bits, keys, start, stop, k)

        _run(rank, len(bits))
        out = values[top : top + step].numpy().view(np.int32)
        _run(select.sort_ranked, len(bits), keys, k, out, indices[top : top + step].numpy())
    return TopK(values, indices)


def encode_threshold(x: Tensor, encoder: PackedEncoder, threshold: Tensor) -> CSR:
    """``x`` [n, d_in] prepared; ``threshold`` float32 [d_sae] in the original numbering."""
    encoder = encoder.natural()
    n = x.shape[0]
    limit = threshold.clamp(min=0.0).contiguous().numpy()
    bands: list = []  # of each band of rows: (row, columns, values) of its blocks, columns ascending
    counts = np.zeros(n, dtype=np.int64)
    for top, left, block in _blocks(x, encoder):
        scores = block.numpy()
        rows, columns = scores.shape
        local = np.zeros(rows, dtype=np.int64)
        _run(select.count_above, rows, scores, limit[left : left + columns], local)
        cursor = np.zeros(rows, dtype=np.int64)
        np.cumsum(local[:-1], out=cursor[1:])
        found = np.empty(int(local.sum()), dtype=np.int32)
        value = np.empty(len(found), dtype=np.float32)
        args = (scores, limit[left : left + columns], left, cursor, found, value)
        _run(select.place_above, rows, *args)
        counts[top : top + rows] += local
        bands.append((np.repeat(np.arange(top, top + rows), local), found, value))
    owner = np.concatenate([band[0] for band in bands])
    order = np.argsort(owner, kind="stable")
    found = np.concatenate([band[1] for band in bands])[order]
    value = np.concatenate([band[2] for band in bands])[order]
    indptr = _indptr(torch.from_numpy(counts))
    return CSR(indptr, torch.from_numpy(found), torch.from_numpy(value), encoder.d_sae)


def pool_codes(
    codes: CSR,
    offsets: Tensor,
    kind: str,
    weights: Optional[Tensor],
    carry: Optional[Tuple[Tensor, Tensor]],
) -> Tuple[Tensor, Tensor, Tensor]:
    """See ``_torch.pool_codes``."""
    if carry is None:
        carry = (codes.indices[:0], torch.empty(0, dtype=torch.float64))
    size = codes.nnz + len(carry[0])
    columns = torch.empty(size, dtype=torch.int32)
    totals = torch.empty(size, dtype=torch.float64)
    indptr = torch.zeros(offsets.shape[0], dtype=torch.int64)
    select.pool_rows(
        offsets.numpy(),
        codes.indptr.numpy(),
        codes.indices.numpy(),
        codes.values.numpy(),
        np.empty(0, dtype=np.float32) if weights is None else weights.numpy(),
        carry[0].numpy(),
        carry[1].numpy(),
        codes.n_cols,
        {"max": 0, "sum": 1, "count": 2}[kind],
        indptr.numpy(),
        columns.numpy(),
        totals.numpy(),
    )
    used = int(indptr[-1])
    return indptr, columns[:used].clone(), totals[:used]  # the columns are kept: not with all that room


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """See ``_torch.sparse_decode``."""
    n, k = indices.shape
    return decode_csr(torch.arange(n + 1) * k, indices.reshape(-1), values.reshape(-1), W_dec)


def decode_csr(indptr: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """See ``_torch.decode_csr``, which takes every dtype but bfloat16."""
    if W_dec.dtype != torch.bfloat16:
        return _torch.decode_csr(indptr, indices, values, W_dec)
    out = torch.empty((indptr.shape[0] - 1, W_dec.shape[1]), dtype=torch.float32)
    bits = W_dec.detach().contiguous().view(torch.int16).numpy().view(np.uint16)
    entries = (part.detach().contiguous().numpy() for part in (indptr, indices, values.float()))
    _run(decode.decode_rows, out.shape[0], *entries, bits, out.numpy())
    return out
