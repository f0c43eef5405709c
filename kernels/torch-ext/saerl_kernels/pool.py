"""encode_pool: tokens in, one sparse feature row per sequence out; PoolStream where tokens come in pieces."""

from __future__ import annotations

from typing import Any, Dict, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from . import reference
from ._check import (
    REDUCES,
    check_finite,
    check_k,
    check_offsets,
    check_reduce,
    need_encoder,
    token_mask,
    token_weights,
)
from .dispatch import implementation, resolve
from .encode import encode_threshold, encode_topk
from .library import dynamic_size, register
from .pack import PackedEncoder
from .types import CSR, need_tensors, without_memory

TOKEN_CHUNK = 1 << 16  # tokens whose codes are held at once


def encode_pool(
    x: Tensor,
    offsets: Union[Tensor, Sequence[int]],
    encoder: PackedEncoder,
    k: Optional[int],
    reduce: str = "max",
    *,
    mask: Optional[Tensor] = None,
    weights: Optional[Tensor] = None,
    backend: str = "auto",
    check: bool = False,
    batch_invariant: bool = False,
) -> CSR:
    """Encode every token and reduce over each sequence.

    Args:
        x: [n_tokens, d_in], the sequences one after another.
        offsets: [n_seq + 1] integers: sequence i is rows offsets[i] .. offsets[i + 1] - 1. Best on the CPU,
            where they are read.
        k: features kept per token; None uses the encoder's threshold instead.
        reduce: over the tokens in which a feature is active, with a_t its activation and w_t the token's
            weight (1 without ``weights``):

            ======= =========================================================
            "max"   max w_t a_t
            "sum"   sum w_t a_t
            "mean"  sum w_t a_t / sum of w_t over all tokens, active or not
            "count" sum w_t: without weights, in how many tokens it is active
            "last"  w_t a_t of the last token
            ======= =========================================================
        mask: bool [n_tokens]; False leaves a token out, and it is not encoded.
        weights: floating point [n_tokens], finite and not negative, taken as float32. Weight 0 is like mask
            False.
        check: raise ValueError when x is not finite; costs a pass and a synchronisation.
        batch_invariant: as in ``encode_topk``; needs k.

    Returns CSR [n_seq, d_sae] float32, positive entries only; a sequence of which no token is left is an
    empty row. Totals are float64, added up in token order and rounded once (a positive one never to 0),
    however tokens are split into chunks; only the torch backend on a GPU leaves the order to
    torch.segment_reduce. Under torch.compile it is one custom op, and the arguments are checked when it runs.

    Raises ValueError for offsets that do not start with 0, end with n_tokens and never fall; for a mask or
    weights of another length or kind; for shapes, devices or a k that do not fit.
    """
    need_encoder(encoder)
    need_tensors(x=x, mask=mask, weights=weights)
    if without_memory(x, encoder.weight, mask, weights):
        encoder.need_rows(x)
        check_reduce(reduce)
        if k is not None:
            check_k(k, encoder.d_sae)
        if batch_invariant:
            raise ValueError("batch_invariant=True runs on real tensors only; call it outside torch.compile")
        starts = torch.as_tensor(offsets)  # a tensor is read at run time, wherever it is
        own = (encoder.weight, encoder.bias, encoder.threshold, encoder.permutation)
        kind = encoder.normalize_activations
        indptr, indices, values = _encode_pool_op(
            x.detach(), starts, *own, kind, k, reduce, mask, weights, backend, check
        )
        return CSR(indptr, indices, values, encoder.d_sae)
    if resolve(backend, encoder.device) == "reference" and not batch_invariant:
        if k is not None:
            check_k(k, encoder.d_sae)
        if check:
            check_finite(x)
        return reference.encode_pool(x, offsets, encoder, k, reduce, mask=mask, weights=weights)
    stream = PoolStream(encoder, k, reduce, backend=backend, check=check, batch_invariant=batch_invariant)
    stream.add(x, offsets, mask=mask, weights=weights)
    return stream.finish()


def _encode_pool(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor,
    threshold: Optional[Tensor],
    permutation: Optional[Tensor],
    normalize_activations: str,
    k: Optional[int],
    reduce: str,
    mask: Optional[Tensor],
    weights: Optional[Tensor],
    backend: str,
    check: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    encoder = PackedEncoder(weight, bias, threshold, normalize_activations, permutation)
    options: Dict[str, Any] = {"mask": mask, "weights": weights, "backend": backend, "check": check}
    csr = encode_pool(x, offsets, encoder, k, reduce, **options)
    return csr.indptr, csr.indices, csr.values


def _encode_pool_fake(x: Tensor, offsets: Tensor, *_: Any) -> Tuple[Tensor, Tensor, Tensor]:
    nnz, indptr = dynamic_size(x), x.new_empty(offsets.shape[0], dtype=torch.int64)
    return indptr, x.new_empty(nnz, dtype=torch.int32), x.new_empty(nnz, dtype=torch.float32)


_encode_pool_op = register(
    "encode_pool",
    _encode_pool,
    "(Tensor x, Tensor offsets, Tensor weight, Tensor bias, Tensor? threshold, Tensor? permutation, "
    "str normalize_activations, int? k, str reduce, Tensor? mask, Tensor? weights, str backend, bool check) "
    "-> (Tensor, Tensor, Tensor)",
    _encode_pool_fake,
    True,
)


class PoolStream:
    """``encode_pool`` for tokens that come in pieces, cut anywhere.

    The same codes give the same bits wherever they are cut: totals are added up in token order. The codes
    themselves may differ in the last bits, since a matrix product may sum a row in another order when it
    comes with other rows: features of nearly equal value may swap places, and sums differ by that rounding.
    With ``batch_invariant=True`` they do not: the result is the same to the bit wherever the tokens are cut.

        stream = PoolStream(encoder, k=64, reduce="mean")
        for hidden, offsets in batches:  # whole sequences
            stream.add(hidden, offsets)
        for hidden in parts_of_a_long_text:  # one sequence, piece by piece
            stream.add(hidden, [0, len(hidden)], unfinished=True)
        features = stream.finish()

    Held between calls: the finished rows, and the features seen so far of the sequence that goes on.
    Arguments are those of ``encode_pool``.
    """

    def __init__(
        self,
        encoder: PackedEncoder,
        k: Optional[int],
        reduce: str = "max",
        *,
        backend: str = "auto",
        check: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        need_encoder(encoder)
        check_reduce(reduce)
        if k is not None:
            check_k(k, encoder.d_sae)
        elif encoder.threshold is None:
            raise ValueError("the encoder has no threshold; pass k, or threshold= to pack_encoder")
        if batch_invariant and k is None:
            raise ValueError("batch_invariant=True needs k; a threshold's product depends on the batch")
        self.batch_invariant = batch_invariant
        self.encoder, self.k, self.reduce, self.check = encoder, k, reduce, check
        self.backend = resolve(backend, encoder.device)
        self._how = REDUCES[reduce]
        self._rows: list = []
        self._clear()

    def _clear(self) -> None:
        self._carry: Optional[Tuple[Tensor, Tensor]] = None  # columns, float64 totals of the open sequence
        # float64 [1]: the sum of its tokens' weights
        self._size = torch.zeros(1, dtype=torch.float64, device=self.encoder.device)
        self._open = False

    def add(
        self,
        x: Tensor,
        offsets: Union[Tensor, Sequence[int]],
        *,
        mask: Optional[Tensor] = None,
        weights: Optional[Tensor] = None,
        unfinished: bool = False,
    ) -> None:
        """Encode and pool ``x`` [n_tokens, d_in].

        ``unfinished`` says that the last sequence goes on as the first one of the next call. A piece without
        sequences (offsets [0]) changes nothing.
        """
        starts = check_offsets(x, offsets)
        kept, share = token_mask(x, mask), token_weights(x, weights)
        self.encoder.prepare(x[:0])  # its checks hold for tokens that are left out, too
        if self.check:
            check_finite(x)
        if share is not None:
            kept = share > 0 if kept is None else kept & (share > 0)
        position = None  # which tokens are encoded; None for all
        if kept is not None:
            position = kept.nonzero().squeeze(-1)
            starts = torch.searchsorted(position, starts.to(x.device)).cpu()
        if self._how.last:
            filled = starts.diff() > 0
            last = (starts[1:][filled] - 1).to(x.device)
            position = last if position is None else position[last]
            starts = torch.cat([starts[:1], filled.cumsum(0)])
            if len(filled) and bool(filled[0]):
                self._carry = None  # a later token takes the place of the earlier one
        n_seq = starts.shape[0] - 1
        first = at = 0
        while first < n_seq:
            stop = int(torch.searchsorted(starts, at + TOKEN_CHUNK, right=True)) - 1
            whole = stop > first  # else a sequence longer than a chunk: this much of it
            end = int(starts[stop]) if whole else at + TOKEN_CHUNK
            goes_on = not whole or (unfinished and stop == n_seq)
            stop = max(stop, first + 1)
            picked = slice(at, end) if position is None else position[at:end]
            local = (starts[first : stop + 1].clamp(at, end) - at).to(x.device)
            self._pool(x[picked], local, None if share is None else share[picked], goes_on)
            first, at = stop if whole else first, end

    def finish(self) -> CSR:
        """The pooled rows of all sequences since the start, [n_seq, d_sae]; the stream is then empty."""
        device = self.encoder.device
        if self._open:
            none = torch.empty((0, self.encoder.d_in), dtype=self.encoder.dtype, device=device)
            self._pool(none, torch.zeros(2, dtype=torch.int64, device=device), None, False)
        rows, self._rows = self._rows, []
        return CSR.concat(rows) if rows else CSR.empty(0, self.encoder.d_sae, device)

    def _pool(self, x: Tensor, offsets: Tensor, weights: Optional[Tensor], goes_on: bool) -> None:
        """One chunk: ``offsets`` local to it; its first sequence takes up the open one."""
        if self.k is None:
            codes = encode_threshold(x, self.encoder, backend=self.backend)
        else:
            kept = encode_topk(
                x, self.encoder, self.k, backend=self.backend, batch_invariant=self.batch_invariant
            )
            starts = torch.arange(x.shape[0] + 1, device=x.device) * self.k
            codes = CSR(starts, kept.indices.reshape(-1), kept.values.reshape(-1), self.encoder.d_sae)
        pool = implementation("torch" if self.backend == "reference" else self.backend).pool_codes
        indptr, columns, totals = pool(codes, offsets, self._how.kind, weights, self._carry)
        if self._how.average:
            share = torch.ones_like(x[:, 0], dtype=torch.float64) if weights is None else weights.double()
            edges = (offsets + 1).index_fill_(0, torch.zeros_like(offsets[:1]), 0)
            share = torch.cat([self._size, share])
            sizes = torch.segment_reduce(share, "sum", offsets=edges, unsafe=True, initial=0.0)
        self._clear()
        if goes_on:
            done = int(indptr[-2])
            self._carry, self._open = (columns[done:].clone(), totals[done:].clone()), True
            indptr, columns, totals = indptr[:-1], columns[:done], totals[:done]
            if self._how.average:
                self._size, sizes = sizes[-1:], sizes[:-1]
        rows = CSR(indptr, columns, totals, self.encoder.d_sae)
        if self._how.average:
            totals = totals / sizes[rows.row_ids()]
        self._rows.append(rows._replace(values=totals.float().clamp_(min=reference.SMALLEST)))
