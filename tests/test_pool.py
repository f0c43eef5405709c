"""encode_pool against the dense reference, and its argument checks."""

from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import saerl_kernels as sk
from saerl_kernels import pool
from saerl_kernels._check import REDUCES
from tests.encoders import BACKENDS

OFFSETS = [0, 0, 5, 5, 6, 19, 19]


def inputs(threshold: float | None = None):
    x = torch.randint(-3, 4, (19, 12)).float()
    W, b = torch.randint(-2, 3, (12, 90)).float(), torch.randint(-30, 3, (90,)).float()
    return x, sk.pack_encoder(W, b, threshold=threshold, permute=True)


def assert_csr(got: sk.CSR, want: sk.CSR) -> None:
    for a, b in zip(got[:3], want[:3], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.cpu(), b.cpu())
    assert got.n_cols == want.n_cols


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_equals_reference(backend, reduce, masked, device, monkeypatch):
    if backend == "numba" and device.type != "cpu":
        pytest.skip("numba runs on the CPU")
    monkeypatch.setattr(pool, "TOKEN_CHUNK", 6)  # several chunks, and one sequence longer than a chunk
    x, encoder = inputs()
    mask = torch.rand(19) > 0.4 if masked else None
    if mask is not None:
        mask[5] = False  # the sequence of one token: nothing is left of it
    want = sk.reference.encode_pool(x, OFFSETS, encoder, 4, reduce, mask=mask)
    assert want.nnz > 0 and want.n_rows == 6
    got = sk.encode_pool(
        x.to(device), torch.tensor(OFFSETS), encoder.to(device), 4, reduce, mask=mask, backend=backend
    )
    assert_csr(got, want)
    assert bool((got.values > 0).all())
    assert int(got.indptr[1]) == 0 and (mask is None or int(got.indptr[4] - got.indptr[3]) == 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", REDUCES)
def test_threshold_encoding(backend, reduce, device):
    if backend == "numba" and device.type != "cpu":
        pytest.skip("numba runs on the CPU")
    x, encoder = inputs(threshold=6.0)
    want = sk.reference.encode_pool(x, OFFSETS, encoder, None, reduce)
    assert want.nnz > 0
    assert_csr(sk.encode_pool(x.to(device), OFFSETS, encoder.to(device), None, reduce, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    _, encoder = inputs()
    empty = torch.zeros(0, 12)
    assert sk.encode_pool(empty, [0], encoder, 3, backend=backend).n_rows == 0
    pooled = sk.encode_pool(empty, [0, 0, 0], encoder, 3, "last", backend=backend)
    assert pooled.n_rows == 2 and pooled.nnz == 0
    silent = sk.pack_encoder(torch.zeros(12, 90), -torch.ones(90))
    assert sk.encode_pool(torch.ones(4, 12), [0, 4], silent, 3, backend=backend).nnz == 0


def test_scores_are_never_materialised(monkeypatch):
    """No block of scores is larger than the cap, whatever the number of tokens."""
    from saerl_kernels import _torch

    monkeypatch.setattr(_torch, "CPU_CHUNK", 256)
    x, encoder = inputs()
    shapes = [scores.shape for _, scores in _torch.score_chunks(x, encoder)]
    assert max(rows * cols for rows, cols in shapes) <= 256 and sum(rows for rows, _ in shapes) == 19
    got = sk.encode_pool(x, OFFSETS, encoder, 4, backend="torch")
    assert_csr(got, sk.reference.encode_pool(x, OFFSETS, encoder, 4))


def weighted_pieces(data, n: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A mask and weights for n tokens, or None; eighths, so that their products and sums are exact."""
    chosen = data.draw(st.lists(st.sampled_from([0, 1, 2, 9, 16]), min_size=n, max_size=n))
    weights = torch.tensor(chosen, dtype=torch.float32) / 8
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool)
    return (mask if data.draw(st.booleans()) else None), (weights if data.draw(st.booleans()) else None)


LENGTHS = st.lists(st.integers(0, 9), max_size=6)


@pytest.mark.parametrize("reduce", REDUCES)
@hypothesis.given(LENGTHS, st.data())
def test_ragged_shapes(reduce, device, lengths, data):
    """Any lengths, mask, weights and chunk size: the reference's result, bit for bit."""
    x, encoder = ragged(sum(lengths))
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    mask, weights = weighted_pieces(data, len(x))
    k = data.draw(st.sampled_from([1, 4, 40, None]))
    want = sk.reference.encode_pool(x, offsets, encoder, k, reduce, mask=mask, weights=weights)
    size = data.draw(st.sampled_from([1, 2, 5, 100]))
    for backend in ["torch"] if device.type != "cpu" else ["torch", "numba"]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pool, "TOKEN_CHUNK", size)
            got = sk.encode_pool(
                x.to(device),
                offsets,
                encoder.to(device),
                k,
                reduce,
                mask=mask,
                weights=weights,
                backend=backend,
            )
        assert_csr(got, want)


def ragged(n: int) -> tuple[torch.Tensor, sk.PackedEncoder]:
    g = torch.Generator().manual_seed(n)
    x = torch.randint(-3, 4, (n, 6), generator=g).float()
    W, b = (
        torch.randint(-2, 3, (6, 40), generator=g).float(),
        torch.randint(-9, 3, (40,), generator=g).float(),
    )
    return x, sk.pack_encoder(W, b, threshold=3.0, permute=True)


@hypothesis.given(
    LENGTHS, st.data(), st.sampled_from(sorted({how.kind for how in REDUCES.values()})), st.integers(0, 99)
)
def test_pooling_of_codes_agrees_between_backends(lengths, data, kind, seed):
    """Sums of numbers whose order matters: the same bits from torch, numba and Triton."""
    from saerl_kernels import _numba, _torch, _triton

    g = torch.Generator().manual_seed(seed)
    n, n_cols = sum(lengths), data.draw(st.sampled_from([11, 2000]))  # rows that are full, and nearly empty
    counts = torch.randint(0, 5, (n,), generator=g)
    indptr = torch.tensor([0, *counts.cumsum(0).tolist()])
    nnz = int(indptr[-1])
    columns = [torch.randperm(n_cols, generator=g)[:c] for c in counts.tolist()]
    scale = 10.0 ** torch.randint(-12, 12, (nnz,), generator=g)
    values = torch.randn(nnz, generator=g) * scale  # some are negative: left out
    codes = sk.CSR(indptr, torch.cat([*columns, torch.empty(0)]).int(), values.float(), n_cols)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    weights = torch.rand(n, generator=g) + 0.1 if data.draw(st.booleans()) else None
    carry = None
    if lengths and data.draw(st.booleans()):
        carry = (torch.tensor([2, 7]).int(), torch.tensor([1e-9, 3e9], dtype=torch.float64))
    want = _numba.pool_codes(codes, offsets, kind, weights, carry)
    for backend in (_torch, _triton):
        got = backend.pool_codes(codes, offsets, kind, weights, carry)
        for ours, theirs in zip(got, want, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def spread(n: int) -> tuple[torch.Tensor, sk.PackedEncoder]:
    """Tokens whose activations are exact, whatever the batch, but span 2^60: the order of a sum shows."""
    x, encoder = ragged(n)
    scale = 2.0 ** torch.randint(-30, 31, (n, 1), generator=torch.Generator().manual_seed(n))
    return x * scale, dataclasses.replace(encoder, bias=torch.zeros_like(encoder.bias), _cache={})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce", REDUCES)
def test_one_long_sequence_is_chunked(backend, reduce, device, monkeypatch):
    if backend == "numba" and device.type != "cpu":
        pytest.skip("numba runs on the CPU")
    x, encoder = spread(50)
    weights = torch.rand(50)
    offsets, args = [0, 0, 47, 47, 50], (encoder.to(device), 7, reduce)
    whole = sk.encode_pool(x.to(device), offsets, *args, weights=weights, backend=backend)
    again = sk.encode_pool(x.to(device), offsets, *args, weights=weights, backend=backend)
    assert_csr(again, whole)
    want = sk.reference.encode_pool(x, offsets, encoder, 7, reduce, weights=weights)
    torch.testing.assert_close(whole.to_dense().cpu(), want.to_dense())
    for size in (20,) if backend == "triton" else (1, 7, 20):
        monkeypatch.setattr(pool, "TOKEN_CHUNK", size)
        parts = sk.encode_pool(x.to(device), offsets, *args, weights=weights, backend=backend)
        if backend == "torch" and device.type == "cuda":
            torch.testing.assert_close(parts.to_dense(), whole.to_dense(), rtol=2e-7, atol=0)
        else:
            assert_csr(parts, whole)


@pytest.mark.parametrize("reduce", REDUCES)
@hypothesis.given(LENGTHS, st.lists(st.integers(0, 54), max_size=4), st.data())
def test_stream_may_be_cut_anywhere(reduce, lengths, cuts, data):
    n = sum(lengths)
    x, encoder = spread(n)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    mask, weights = weighted_pieces(data, n)
    want = sk.encode_pool(x, ends, encoder, 5, reduce, mask=mask, weights=weights)
    stream = sk.PoolStream(encoder, 5, reduce)
    edges, done = sorted({0, n, *(c for c in cuts if c < n)}), 0
    for at, end in zip(edges[:-1], edges[1:], strict=True):
        stop = len(lengths) if end == n else int((ends[1:] < end).sum()) + 1  # those that start before end
        local = (ends[done : stop + 1].clamp(at, end) - at).tolist()
        unfinished = stop > done and int(ends[stop]) > end
        part = {"mask": None if mask is None else mask[at:end]}
        part["weights"] = None if weights is None else weights[at:end]
        stream.add(x[at:end], local, unfinished=unfinished, **part)
        done = stop - unfinished
    if n == 0:
        stream.add(x, ends)
    assert_csr(stream.finish(), want)
    assert stream.finish().n_rows == 0


def test_the_last_token_replaces_an_earlier_one(device):
    encoder = sk.pack_encoder(torch.eye(3), torch.zeros(3)).to(device)
    stream = sk.PoolStream(encoder, 1, "last")
    for row in torch.eye(3, device=device):
        stream.add(row[None], [0, 1], unfinished=True)
    assert stream.finish().to_dense().tolist() == [[0, 0, 1]]


def test_stream_left_unfinished(device):
    x, encoder = ragged(6)
    x, encoder = x.to(device), encoder.to(device)
    for reduce in REDUCES:
        stream = sk.PoolStream(encoder, 3, reduce)
        stream.add(x[:4], [0, 1, 4], unfinished=True)
        stream.add(x[:0], [0])  # changes nothing
        stream.add(x[4:], [0, 2], mask=torch.zeros(2, dtype=torch.bool), unfinished=True)
        assert_csr(stream.finish(), sk.encode_pool(x[:4], [0, 1, 4], encoder, 3, reduce).to("cpu"))


def test_the_reference_streams_too(device):
    x, encoder = ragged(6)
    with sk.use_backend("reference"):
        for reduce in REDUCES:
            stream = sk.PoolStream(encoder, 3, reduce)
            stream.add(x[:4], [0, 4], unfinished=True)
            stream.add(x[4:], [0, 2])
            assert_csr(stream.finish(), sk.encode_pool(x, [0, 6], encoder, 3, reduce))


def test_weights_by_hand():
    encoder = sk.pack_encoder(torch.eye(2), torch.zeros(2))
    x, weights = torch.tensor([[1.0, 0], [4, 2], [9, 9]]), torch.tensor([3.0, 0.5, 0])
    by_hand = {"max": [3, 1], "sum": [5, 1], "mean": [5 / 3.5, 1 / 3.5], "count": [3.5, 0.5], "last": [2, 1]}
    assert by_hand.keys() == REDUCES.keys() == sk.reference.REDUCE.keys()
    for reduce, want in by_hand.items():
        got = sk.encode_pool(x, [0, 3], encoder, 2, reduce, weights=weights)
        torch.testing.assert_close(got.to_dense(), torch.tensor([want]).float())
    tiny = sk.encode_pool(x * 1e-30, [0, 3], encoder, 2, "sum", weights=weights * 1e-30)
    assert tiny.values.tolist() == [2.0**-149, 2.0**-149]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 19], "start with 0"),
        ([0, 18], "end with n_tokens=19"),
        ([0, 5, 40], "end with n_tokens=19, got 40"),
        ([0, 40, 19], "must not fall, got 40 before 19"),
        ([0, 9, 4, 19], "must not fall, got 9 before 4 at position 1"),
        ([], "n_seq \\+ 1 integers"),
        ([0.0, 19.0], "n_seq \\+ 1 integers"),
        ([[0, 19]], "n_seq \\+ 1 integers"),
        (torch.tensor([False, True]), "n_seq \\+ 1 integers"),
    ],
    ids=["first", "last", "past the end", "overlap", "falling", "empty", "floats", "two dims", "bools"],
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_bad_offsets(offsets, message, backend):
    x, encoder = inputs()
    with pytest.raises(ValueError, match=message):
        sk.encode_pool(x, offsets, encoder, 4, backend=backend)


X = torch.zeros(19, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduce": "median"}, "reduce='median' is unknown"),
        ({"k": 91}, "k=91 is larger than d_sae=90"),
        ({"k": 0}, "k=0 must be a positive integer"),
        ({"k": None}, "no threshold"),
        ({"x": X[None]}, "n_tokens, d_in"),
        ({"x": X[:, :5]}, "last dimension must be d_in=12"),
        ({"x": X.long()}, "floating point"),
        ({"x": X.to("meta")}, "x is on meta but the encoder is on cpu"),
        ({"x": X / 0, "check": True}, "NaN or infinite"),
        ({"mask": torch.ones(3)}, "mask has shape"),
        ({"mask": torch.ones(19)}, "mask must be boolean, got torch.float32"),
        ({"weights": torch.ones(18)}, r"weights have shape \(18,\), expected \(19,\)"),
        ({"weights": torch.ones(19).bool()}, "weights must be floating point"),
        ({"weights": torch.arange(19) - 18.5}, "not negative, got -18.5 for token 0"),
        ({"weights": torch.where(torch.arange(19) == 7, torch.nan, 1.0)}, "got nan for token 7"),
        ({"weights": torch.full((19,), torch.inf)}, "got inf for token 0"),
        ({"backend": "cuda"}, "backend='cuda' is unknown"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "-".join(v),
)
@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_bad_arguments(changes, message, backend):
    _, encoder = inputs()
    args = {"x": X, "offsets": OFFSETS, "encoder": encoder, "k": 4, "backend": backend, **changes}
    with pytest.raises(ValueError, match=message):
        sk.encode_pool(**args)


def test_csr_helpers():
    dense = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]])
    csr = sk.CSR.from_dense(dense)
    assert csr.indptr.tolist() == [0, 1, 1, 3] and csr.n_rows == 3 and csr.nnz == 3
    assert torch.equal(csr.to_dense(), dense)
    assert torch.equal(csr.select_rows([2, 0, -1]).to_dense(), dense[[2, 0, 2]])
    assert torch.equal(csr.select_rows(torch.tensor([True, False, True])).to_dense(), dense[[0, 2]])
    assert csr.select_rows([]).n_rows == 0
    assert torch.equal(sk.CSR.concat([csr, csr]).to_dense(), torch.cat([dense, dense]))
    assert torch.equal(sk.CSR.from_scipy(csr.to_scipy()).to_dense(), dense)
    with pytest.raises(ValueError, match="widths"):
        sk.CSR.concat([csr, sk.CSR.empty(2, 4)])
    with pytest.raises(ValueError, match="outside 0..2"):
        csr.select_rows([3])
