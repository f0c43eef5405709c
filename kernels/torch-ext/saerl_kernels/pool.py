"""encode_pool: tokens in, one sparse feature row per sequence out."""

from __future__ import annotations

from typing import Optional, Sequence, Union

import torch
from torch import Tensor

from . import _torch, reference
from ._check import check_finite, check_k, check_offsets, check_reduce, token_mask
from .dispatch import resolve
from .encode import encode_threshold, encode_topk
from .pack import PackedEncoder
from .types import CSR

TOKEN_CHUNK = 1 << 16  # tokens whose codes are held at once; a longer sequence is a chunk of its own


def encode_pool(
    x: Tensor,
    offsets: Union[Tensor, Sequence[int]],
    encoder: PackedEncoder,
    k: Optional[int],
    reduce: str = "max",
    *,
    mask: Optional[Tensor] = None,
    backend: str = "auto",
    check: bool = False,
) -> CSR:
    """Encode every token and reduce over each sequence.

    Args:
        x: [n_tokens, d_in], the sequences one after another.
        offsets: [n_seq + 1] integers: sequence i is rows offsets[i] .. offsets[i + 1] - 1.
        k: features kept per token; None uses the encoder's threshold instead.
        reduce: over the tokens in which a feature is active: "max", "sum", "count" (how many), "mean" (the
            sum over all unmasked tokens' number), or "last" (the codes of the last unmasked token).
        mask: bool [n_tokens]; False leaves a token out, and it is not encoded.

    Returns CSR [n_seq, d_sae] float32, positive entries only; a sequence without tokens is an empty row.
    Sums are taken in float64 and rounded once. Raises ValueError for offsets that do not start with 0, end
    with n_tokens and never fall.
    """
    check_reduce(reduce)
    if k is not None:
        check_k(k, encoder.d_sae)
    bounds = check_offsets(x, offsets)
    kept = token_mask(x, mask)
    name = resolve(backend, encoder.device)
    if check:
        check_finite(x)
    if name == "reference":
        return reference.encode_pool(x, bounds, encoder, k, reduce, mask=kept)
    starts = torch.tensor(bounds, dtype=torch.int64)
    if kept is not None:
        position = kept.nonzero().squeeze(-1)
        starts = torch.searchsorted(position.cpu(), starts)
        x = x[position]
    if reduce == "last":
        lengths = starts.diff()
        last = (starts[1:] - 1)[lengths > 0]
        x = x[last.to(x.device)]
        starts = torch.cat([starts[:1] * 0, (lengths > 0).long().cumsum(0)])
    parts = []
    bounds = starts.tolist()
    for first, stop in _chunks(bounds):
        local = (starts[first : stop + 1] - bounds[first]).to(x.device)
        parts.append(_pool_chunk(x[bounds[first] : bounds[stop]], local, encoder, k, reduce, name))
    return CSR.concat(parts) if parts else CSR.empty(0, encoder.d_sae, x.device)


def _chunks(bounds: list) -> list:
    """(first, stop) ranges of sequences that hold at most TOKEN_CHUNK tokens each, or one sequence."""
    ranges, first = [], 0
    for stop in range(1, len(bounds)):
        last = stop == len(bounds) - 1
        if last or bounds[stop + 1] - bounds[first] > TOKEN_CHUNK:
            ranges.append((first, stop))
            first = stop
    return ranges


def _pool_chunk(
    x: Tensor, offsets: Tensor, encoder: PackedEncoder, k: Optional[int], reduce: str, name: str
) -> CSR:
    tokens = offsets.diff()
    owner = torch.repeat_interleave(
        torch.arange(len(tokens), device=x.device), tokens, output_size=x.shape[0]
    )
    if name == "numba":
        from ._numba import pool_codes

        if k is None:
            codes = encode_threshold(x, encoder, backend=name)
            return pool_codes(offsets, codes.indptr, codes.indices, codes.values, encoder.d_sae, reduce)
        kept = encode_topk(x, encoder, k, backend=name)
        starts = torch.arange(x.shape[0] + 1) * k
        return pool_codes(offsets, starts, kept.indices, kept.values, encoder.d_sae, reduce)
    if k is None:
        codes = encode_threshold(x, encoder, backend=name)
        sequences, columns, values = owner[codes.row_ids()], codes.indices.long(), codes.values
    else:
        kept = encode_topk(x, encoder, k, backend=name)
        positive = kept.values > 0
        sequences = owner.unsqueeze(-1).expand(-1, k)[positive]
        columns, values = kept.indices[positive].long(), kept.values[positive]
    return _torch.pool_entries(sequences, columns, values, tokens, encoder.d_sae, reduce)
