"""encode_pool against the dense reference, and its argument checks."""

from __future__ import annotations

import pytest
import torch

import saerl_kernels as sk
from saerl_kernels import pool

BACKENDS = ["torch", "numba", "triton"]
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
@pytest.mark.parametrize("reduce", ["max", "mean", "sum", "count", "last"])
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
@pytest.mark.parametrize("reduce", ["max", "mean"])
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


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 19], "start with 0"),
        ([0, 18], "end with n_tokens=19"),
        ([0, 9, 4, 19], "must not fall, got 9 before 4"),
        ([], "n_seq \\+ 1 integers"),
        ([0.0, 19.0], "n_seq \\+ 1 integers"),
    ],
    ids=["first", "last", "falling", "empty", "floats"],
)
def test_bad_offsets(offsets, message):
    x, encoder = inputs()
    with pytest.raises(ValueError, match=message):
        sk.encode_pool(x, offsets, encoder, 4)


def test_other_errors():
    x, encoder = inputs()
    with pytest.raises(ValueError, match="reduce='median' is unknown"):
        sk.encode_pool(x, OFFSETS, encoder, 4, "median")
    with pytest.raises(ValueError, match="mask has shape"):
        sk.encode_pool(x, OFFSETS, encoder, 4, mask=torch.ones(3))
    with pytest.raises(ValueError, match="no threshold"):
        sk.encode_pool(x, OFFSETS, encoder, None)
    with pytest.raises(ValueError, match="n_tokens, d_in"):
        sk.encode_pool(x[None], OFFSETS, encoder, 4)


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
