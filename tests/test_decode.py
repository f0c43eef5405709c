"""sparse_decode: values and gradients on every backend."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import saerl_kernels as sk
from tests.encoders import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    if request.param == "numba" and device.type != "cpu":
        pytest.skip("numba runs on the CPU")
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "d_sae", "d_in"), [((5, 7), 31, 19), ((2, 3, 1), 4, 130), ((1, 9), 9, 1)], ids=str
)
def test_equals_reference(backend, dtype, shape, d_sae, d_in, device):
    values = torch.rand(shape, device=device)
    indices = torch.randint(0, d_sae, shape, device=device, dtype=torch.int32)
    W, b = torch.randn(d_sae, d_in, device=device).to(dtype), torch.randn(d_in, device=device).to(dtype)
    got = sk.sparse_decode(values, indices, W, b, backend=backend)
    want = sk.reference.sparse_decode(values, indices, W, b)
    assert got.dtype == dtype and got.shape == (*shape[:-1], d_in)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_gradients(backend, device):
    values = torch.rand(2, 3, 4, dtype=torch.float64, device=device, requires_grad=True)
    indices = torch.randint(0, 6, (2, 3, 4), device=device)  # features repeat within and across rows
    W = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v, w, c: sk.sparse_decode(v, indices, w, c, backend=backend),
        (values, W, b),
        fast_mode=backend == "triton",  # the interpreter takes 20 s for the full Jacobian
    )


def test_gradients_of_16_bit_decoders(backend, device):
    values = torch.rand(6, 4, device=device, requires_grad=True)
    indices = torch.randint(0, 9, (6, 4), device=device)
    W = torch.randn(9, 8, device=device).bfloat16().requires_grad_()
    sk.sparse_decode(values, indices, W, backend=backend).float().square().sum().backward()
    assert values.grad.dtype == torch.float32 and W.grad.dtype == torch.bfloat16
    v, w = values.detach().requires_grad_(), W.detach().float().requires_grad_()
    sk.reference.sparse_decode(v, indices, w).square().sum().backward()
    torch.testing.assert_close(values.grad, v.grad, rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(W.grad.float(), w.grad, rtol=3e-2, atol=3e-2)


def test_empty_batch(backend, device):
    W = torch.randn(9, 8, device=device, requires_grad=True)
    values, indices = torch.zeros(0, 4, device=device), torch.zeros(0, 4, device=device, dtype=torch.int32)
    out = sk.sparse_decode(values, indices, W, backend=backend)
    assert out.shape == (0, 8)
    out.sum().backward()
    assert bool((W.grad == 0).all())


def test_round_trip(device):
    """With k = d_sae and tied orthonormal weights, decoding restores the positive part."""
    x = torch.rand(5, 8, device=device)
    encoder = sk.pack_encoder(torch.eye(8, device=device))
    kept = sk.encode_topk(x, encoder, 8)
    torch.testing.assert_close(sk.sparse_decode(*kept, torch.eye(8, device=device)), x)


def ragged(lengths: list[int], d_sae: int, device: torch.device, dtype=torch.float32) -> sk.CSR:
    """Rows of the given lengths; features may come in any order, and twice."""
    g = torch.Generator().manual_seed(len(lengths))
    nnz = sum(lengths)
    indices = torch.randint(0, d_sae, (nnz,), generator=g, dtype=torch.int32)
    indptr = torch.tensor([0, *lengths]).cumsum(0)
    return sk.CSR(indptr, indices, torch.randn(nnz, generator=g).to(dtype), d_sae).to(device)


SIZES = st.tuples(st.lists(st.integers(0, 9), max_size=5), st.integers(1, 20), st.integers(1, 33))


@hypothesis.given(SIZES, st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_csr_equals_reference(backend, device, sizes, dtype):
    lengths, d_sae, d_in = sizes
    csr = ragged(lengths, d_sae, device)
    W, b = torch.randn(d_sae, d_in, device=device).to(dtype), torch.randn(d_in, device=device).to(dtype)
    got = sk.decode_csr(csr, W, b, backend=backend)
    assert got.dtype == dtype and got.shape == (len(lengths), d_in)
    want = sk.reference.decode_csr(csr._replace(values=csr.values.double()), W.double(), b.double())
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 2e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=10 * tolerance)
    assert torch.equal(got, sk.decode_csr(csr, W, b, backend=backend))


def test_csr_and_fixed_k_agree(backend, device):
    """One kernel serves both, so the bits are equal."""
    values, indices = torch.rand(6, 5, device=device), torch.randint(0, 30, (6, 5), device=device)
    W = torch.randn(30, 70, device=device)
    csr = sk.CSR(torch.arange(7, device=device) * 5, indices.reshape(-1).int(), values.reshape(-1), 30)
    fixed = sk.sparse_decode(values, indices, W, backend=backend)
    assert torch.equal(sk.decode_csr(csr, W, backend=backend), fixed)


@pytest.mark.parametrize("lengths", [[0, 7, 1, 0, 2], [3], [0, 0], [1, 1, 1, 12]], ids=str)
@pytest.mark.parametrize("engine", [*BACKENDS, "reference"])
def test_csr_gradients(engine, lengths, device):
    if engine == "numba" and device.type != "cpu":
        pytest.skip("numba runs on the CPU")
    csr = ragged(lengths, 6, device, torch.float64)
    values = csr.values.requires_grad_()
    W = torch.randn(6, 5, dtype=torch.float64, device=device, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)

    def decode(v, w, c):
        return sk.decode_csr(csr._replace(values=v), w, c, backend=engine)

    inputs = (values, W, b) if csr.nnz else (W, b)
    call = decode if csr.nnz else lambda w, c: decode(values, w, c)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=engine == "triton", raise_exception=True)
    once, twice = (torch.autograd.grad(decode(values, W, b).square().sum(), (values, W)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, twice, strict=True))


def test_csr_gradients_of_16_bit_decoders(backend, device):
    csr = ragged([3, 0, 8], 9, device)
    values, W = csr.values.requires_grad_(), torch.randn(9, 8, device=device).bfloat16().requires_grad_()
    sk.decode_csr(csr, W, backend=backend).float().square().sum().backward()
    assert values.grad.dtype == torch.float32 and W.grad.dtype == torch.bfloat16
    v, w = values.detach().requires_grad_(), W.detach().float().requires_grad_()
    sk.reference.decode_csr(csr._replace(values=v), w).square().sum().backward()
    torch.testing.assert_close(values.grad, v.grad, rtol=3e-2, atol=0.2)
    torch.testing.assert_close(W.grad.float(), w.grad, rtol=3e-2, atol=0.2)


def test_unchecked_indices_contribute_nothing(backend, device):
    """Forward and backward: an index out of range is as good as absent, far ones and negative ones alike."""
    W = torch.randn(9, 8, device=device, requires_grad=True)
    indices = torch.tensor(
        [[3, -1, 8], [9, 2**31 - 1, 0], [-(2**31), 9, 70]], device=device, dtype=torch.int32
    )
    values = torch.rand(3, 3, device=device, requires_grad=True)
    inside = (indices >= 0) & (indices < 9)
    want = sk.reference.sparse_decode(values * inside, indices * inside, W)
    want_grads = torch.autograd.grad(want.square().sum(), (values, W))
    csr = sk.CSR(torch.tensor([0, 3, 6, 9], device=device), indices.reshape(-1), values.reshape(-1), 9)
    with torch.no_grad():
        got = sk.sparse_decode(values, indices, W, backend=backend, check=False)
        torch.testing.assert_close(got, want)
    for decode in (
        lambda: sk.sparse_decode(values, indices, W, backend=backend, check=False),
        lambda: sk.decode_csr(csr, W, backend=backend, check=False),
    ):
        got = decode()
        torch.testing.assert_close(got, want)
        for ours, theirs in zip(
            torch.autograd.grad(got.square().sum(), (values, W), retain_graph=True), want_grads, strict=True
        ):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("indptr", [[0, 5, 3, 99], [-7, 2, 1, 4], [-(2**40), 2**40, 0, 0]], ids=str)
def test_unchecked_indptr_reads_nothing_outside(backend, device, indptr):
    values, indices = torch.ones(4, device=device), torch.arange(4, device=device, dtype=torch.int32)
    csr = sk.CSR(torch.tensor(indptr, device=device), indices, values, 9)
    W = torch.ones(9, 2, device=device)
    got = sk.decode_csr(csr, W, backend=backend, check=False)
    assert bool(((got >= 0) & (got <= 4)).all())
    with pytest.raises(ValueError, match=r"csr\.indptr must rise from 0 to nnz=4"):
        sk.decode_csr(csr, W, backend=backend, check=True)


W98 = torch.zeros(9, 8)
ONES, FIRST = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int32)
ROWS = sk.CSR(torch.tensor([0, 1, 3]), torch.tensor([0, 2, 8]).int(), torch.ones(3), 9)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((ONES, FIRST[:, :2], W98), "must have one shape"),
        ((ONES[:, :0], FIRST[:, :0], W98), "k >= 1"),
        ((ONES, ONES, W98), "indices must be integers"),
        ((ONES, FIRST.bool(), W98), "indices must be integers"),
        ((ONES.long(), FIRST, W98), "values must be floating point, got torch.int64"),
        ((ONES, FIRST, W98[0]), r"W_dec must be floating point \[d_sae, d_in\], got torch.float32 \[8\]"),
        ((ONES, FIRST, W98.long()), "W_dec must be floating point"),
        ((ONES, FIRST, W98, torch.zeros(7)), "b_dec has shape"),
        ((ONES, FIRST + 9, W98), r"indices reach 9\.\.9, outside 0\.\.8"),
        ((ONES, FIRST - 1, W98), r"indices reach -1\.\.-1, outside 0\.\.8"),
        ((ONES.to("meta"), FIRST, W98), "values on meta, indices on cpu, W_dec on cpu: move them"),
        ((ONES, FIRST, W98, torch.zeros(8, device="meta")), "b_dec on meta: move them"),
        ((ROWS, torch.tensor(1.0)), r"W_dec must be floating point \[d_sae, d_in\], got torch.float32 \[\]"),
        ((ROWS._replace(n_cols=10), W98), "csr has 10 columns but W_dec has 9 rows"),
        ((ROWS._replace(indices=ROWS.indices + 1), W98), r"csr\.indices reach 1\.\.9, outside 0\.\.8"),
        ((ROWS._replace(indptr=torch.tensor([0, 2, 1])), W98), "goes from 0 to 1 and falls 1 times"),
        ((ROWS._replace(indptr=torch.tensor([0, 1, 4])), W98), "goes from 0 to 4 and falls 0 times"),
        ((ROWS._replace(indptr=torch.tensor([0, 3]).int()), W98), "csr.indptr must be int64"),
        ((ROWS._replace(values=torch.ones(2)), W98), r"csr\.values \[2\] must both be \[nnz\]"),
        ((ROWS._replace(indptr=ROWS.indptr.to("meta")), W98), "csr is on meta, cpu and cpu"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_errors(args, message, backend):
    decode = sk.decode_csr if isinstance(args[0], sk.CSR) else sk.sparse_decode
    with pytest.raises(ValueError, match=message):
        decode(*args, backend=backend)


def test_strided_codes(backend, device):
    csr = ragged([3, 0, 5, 1], 9, device)
    indptr, indices, values = (torch.stack([part, part], 1)[:, 0] for part in csr[:3])
    apart = sk.CSR(indptr, indices, values, 9)
    grads = []
    for rows in (csr, apart):
        W = torch.linspace(-1, 1, 9 * 4, device=device).view(9, 4).requires_grad_()
        v = rows.values.requires_grad_()
        out = sk.decode_csr(rows, W, backend=backend)
        grads.append([out, *torch.autograd.grad(out.square().sum(), (v, W))])
    torch.testing.assert_close(*grads)
