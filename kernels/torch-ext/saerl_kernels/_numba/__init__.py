"""CPU implementations: torch's matrix product in blocks that stay in cache, numba's selection on each."""

from __future__ import annotations

from typing import Iterator, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from .. import _torch
from .._torch import linear
from ..pack import PackedEncoder
from ..types import CSR, TopK, _indptr
from . import decode, screen, select
from .batch import above, gather_survivors
from .grads import value_grads, weight_grads
from .invariant import encode_topk_invariant
from .threads import run

__all__ = [
    "decode_csr",
    "encode_threshold",
    "encode_topk",
    "encode_topk_invariant",
    "gather_survivors",
    "pool_codes",
    "sparse_decode",
    "topk",
    "value_grads",
    "weight_grads",
]

ROWS = 1024  # rows of a block; more would only enlarge the block
BLOCK = 1 << 18  # float32 scores in a block, 1 MB (4 MB at most): selection reads them from cache
MIN_COLUMNS = 1024
WHOLE = 1 << 16  # scores that are held whole, since every further call costs more than cache misses
FEW_ROWS = 8  # up to here the weight's way through memory is the cost, and our own product is the faster
FEW_SMALL = 6  # the same where the weight fits in cache
SMALL_WEIGHT = 1 << 22


def _blocks(x: Tensor, encoder: PackedEncoder) -> Iterator[Tuple[int, int, Tensor]]:
    """(first row, first column, float32 pre-activations); columns ascend within a band of rows."""
    rows = min(ROWS, x.shape[0])
    columns = max(MIN_COLUMNS, BLOCK // rows)
    if torch.get_num_threads() > 1:
        columns *= 4  # every product ends in a barrier, which a busy machine makes long: fewer, larger ones
    columns = min(encoder.d_sae, columns)
    memory = torch.empty(rows * columns, dtype=torch.float32, device="cpu")
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
    if encoder.dtype == torch.float32 and (n <= FEW_ROWS or n * encoder.d_sae <= WHOLE):
        return _encode_whole(x, encoder, k)
    if screen.pays(x, encoder, k):
        return screen.encode_topk(x, encoder, k, _encode_blocks)
    return _encode_blocks(x, encoder, k)


def _encode_blocks(x: Tensor, encoder: PackedEncoder, k: int) -> TopK:
    """The same, ranking float32 products of blocks."""
    n = x.shape[0]
    values, indices = TopK.empty((n, k), "cpu")
    keys = np.empty((min(ROWS, n), select.room_for(k)), dtype=np.int64)
    counts = np.zeros(len(keys), dtype=np.int64)
    floor = np.zeros(len(keys), dtype=np.int32)
    for top, left, scores in _blocks(x, encoder):
        rows = scores.shape[0]
        if left == 0:
            counts[:], floor[:] = 0, 0
        bits = scores.numpy().view(np.int32)

        lanes = select.lanes_for(k, scores.shape[1]) if left == 0 else 0

        def gate(
            start: int, stop: int, bits: np.ndarray = bits, left: int = left, lanes: int = lanes
        ) -> None:
            scratch = np.empty(lanes, dtype=np.int32)
            select.gate_rows(bits, left, scratch, keys, counts, floor, k, start, stop)

        run(gate, rows)
        if left + scores.shape[1] == encoder.d_sae:
            out = values[top : top + rows].numpy().view(np.int32)
            run(select.finish_rows, rows, keys, counts, k, out, indices[top : top + rows].numpy())
    return TopK(values, indices)


def _encode_whole(x: Tensor, encoder: PackedEncoder, k: int) -> TopK:
    """The same where all scores may be held at once. Microseconds count here: hence numpy's outputs."""
    n, weight = x.shape[0], encoder.weight
    values, indices = np.empty((n, k), dtype=np.float32), np.empty((n, k), dtype=np.int32)
    bits = values.view(np.int32)
    if n > (FEW_SMALL if weight.numel() < SMALL_WEIGHT else FEW_ROWS):
        scores = linear(
            x, weight, encoder.bias, torch.empty((n, len(weight)), dtype=torch.float32, device=x.device)
        ).numpy()
        select.select_few(scores, k, bits, indices)
    else:
        memory = (weight.data_ptr(), encoder.bias.data_ptr())  # ``.data = other`` gives a tensor other memory
        held = encoder._cache.get("numpy")
        if held is None or held[0] != memory:
            held = encoder._cache["numpy"] = (memory, weight.numpy(), encoder.bias.numpy())
        args = (x.numpy(), *held[1:])
        least = max(1, (1 << 20) // x.numel())  # features worth a thread: about 0.1 ms of work
        if torch.get_num_threads() == 1 or len(weight) < 2 * least:
            select.encode_few(*args, k, bits, indices)
        else:
            scores = np.empty((n, len(weight)), dtype=np.float32)
            run(select.product, len(weight), *args, scores, least=least)
            select.select_few(scores, k, bits, indices)
    return TopK(torch.from_numpy(values), torch.from_numpy(indices))


def topk(scores: Tensor, k: int) -> TopK:
    """``scores`` [n, F]: see the public op."""
    scores = scores.float().contiguous()
    n = scores.shape[0]
    values, indices = TopK.empty((n, k), "cpu")
    step = min(n, 4096)
    keys = np.empty((step, select.room_for(k)), dtype=np.int64)
    for top in range(0, n, step):
        bits = scores[top : top + step].numpy().view(np.int32)

        def rank(start: int, stop: int, bits: np.ndarray = bits) -> None:
            select.rank_rows(bits, keys, start, stop, k)

        run(rank, len(bits))
        out = values[top : top + step].numpy().view(np.int32)
        run(select.sort_ranked, len(bits), keys, k, out, indices[top : top + step].numpy())
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
        local, found, value = above(scores, limit[left : left + scores.shape[1]], left)
        counts[top : top + len(scores)] += local
        bands.append((np.repeat(np.arange(top, top + len(scores)), local), found, value))
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
        carry = (codes.indices[:0], torch.empty(0, dtype=torch.float64, device="cpu"))
    size = codes.nnz + len(carry[0])
    columns = torch.empty(size, dtype=torch.int32, device="cpu")
    totals = torch.empty(size, dtype=torch.float64, device="cpu")
    indptr = torch.zeros(offsets.shape[0], dtype=torch.int64, device="cpu")
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
    return decode_csr(torch.arange(n + 1, device="cpu") * k, indices.reshape(-1), values.reshape(-1), W_dec)


def decode_csr(indptr: Tensor, indices: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """See ``_torch.decode_csr``, which takes every dtype but bfloat16."""
    if W_dec.dtype != torch.bfloat16:
        return _torch.decode_csr(indptr, indices, values, W_dec)
    out = torch.empty((indptr.shape[0] - 1, W_dec.shape[1]), dtype=torch.float32, device="cpu")
    bits = W_dec.detach().contiguous().view(torch.int16).numpy().view(np.uint16)
    entries = (part.detach().contiguous().numpy() for part in (indptr, indices, values.float()))
    run(decode.decode_rows, out.shape[0], *entries, bits, out.numpy())
    return out
