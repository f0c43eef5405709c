"""Threshold encoding and BatchTopK's survivors in one kernel with the product: exact and in order."""

from __future__ import annotations

import pytest
import torch

import saerl_kernels as sk
from saerl_kernels import _triton as triton_backend
from saerl_kernels._triton import above, device, tune
from tests.encoders import integers, poison  # noqa: F401

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's plans are looked at")
SHAPES = [(1, 1, 1), (5, 3, 33), (17, 40, 129), (33, 7, 1000), (16, 32, 256)]  # n, d_in, d_sae


def same(got: sk.CSR, want: sk.CSR) -> None:
    assert got.n_cols == want.n_cols and got.indices.dtype == torch.int32
    for ours, theirs in zip(got[:3], want[:3], strict=True):
        assert torch.equal(ours, theirs)


def mixed(d_sae: int) -> torch.Tensor:
    limit = torch.arange(d_sae).remainder(9).float() - 2
    limit[::7] = torch.inf
    limit[3::11] = torch.nan
    return limit


@pytest.mark.parametrize("permute", [False, True], ids=["natural", "permuted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape, permute, poison):  # noqa: F811
    x, encoder = integers(*shape, low=-8, permute=permute)
    for limit in (mixed(shape[2]), 0.0, -5.0, 1e9):
        want = sk.reference.encode_threshold(x, encoder, threshold=limit)
        same(sk.encode_threshold(x, encoder, threshold=limit, backend="triton"), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_encoders(dtype):
    x, encoder = integers(18, 24, 300, low=-8, dtype=dtype)
    want = sk.reference.encode_threshold(x, encoder, threshold=4.0)
    assert want.nnz > 50
    same(sk.encode_threshold(x, encoder, threshold=4.0, backend="triton"), want)


def test_odd_values():
    x, encoder = integers(6, 8, 200, low=-8)
    x[0], x[1, 2], x[2, 3], x[3] = torch.nan, torch.inf, -torch.inf, 0.0
    x[4] = 2.0**-140
    got = sk.encode_threshold(x, encoder, threshold=0.0, backend="triton")
    same(got, sk.reference.encode_threshold(x, encoder, threshold=0.0))
    assert got.indptr[1] == 0 and bool(torch.isinf(got.values).any())


def test_blocks_of_rows(monkeypatch):
    x, encoder = integers(50, 8, 200, low=-8)
    want = sk.reference.encode_threshold(x, encoder, threshold=2.0)
    monkeypatch.setattr(above, "SCORES", 1)  # one row of tiles at a time
    same(sk.encode_threshold(x, encoder, threshold=2.0, backend="triton"), want)


@pytest.mark.parametrize("refused", [False, True], ids=["no plan", "does not launch"])
def test_the_way_back(refused, monkeypatch):
    from triton.runtime.errors import OutOfResources

    x, encoder = integers(9, 8, 200, low=-8)
    monkeypatch.setattr(device, "_refused", set())
    if refused:

        def fails(*args):
            raise OutOfResources(300_000, 232_448, "shared memory")

        monkeypatch.setattr(above, "launch_above", fails)
        with pytest.warns(UserWarning, match="algorithm='above'.* does not launch") as said:
            got = sk.encode_threshold(x, encoder, threshold=2.0, backend="triton")
        assert len(said) == 1
        same(sk.encode_threshold(x, encoder, threshold=2.0, backend="triton"), got)
    else:
        monkeypatch.setattr(above, "plan_above", lambda encoder: None)
        got = sk.encode_threshold(x, encoder, threshold=2.0, backend="triton")
    same(got, sk.reference.encode_threshold(x, encoder, threshold=2.0))
    monkeypatch.setattr(triton_backend, "gather_survivors", None, raising=False)  # torch looks at no scores
    kept = sk.encode_batch_topk_train(x, encoder.weight.t(), encoder.bias, 4, backend="triton")
    want = sk.reference.encode_batch_topk_train(x, encoder.weight.t(), encoder.bias, 4)
    assert torch.equal(kept.to_dense(200), want.to_dense(200))


@pytest.mark.parametrize("k", [1, 3, 200])
def test_survivors_of_batch_topk(k, monkeypatch):
    x, encoder = integers(70, 8, 200, low=-8)
    x[3] = torch.nan
    W, b = encoder.weight.t(), encoder.bias
    monkeypatch.setattr(triton_backend, "gather_survivors", None, raising=False)  # no scores are looked at
    got = sk.encode_batch_topk_train(x, W, b, k, backend="triton")
    want = sk.reference.encode_batch_topk_train(x, W, b, k)
    assert torch.equal(got.values, want.values) and torch.equal(got.indices, want.indices)


def test_places_beyond_two_to_the_31(tmp_path):
    """The third row's scores lie at 2^31; a sparse file holds the pages that are touched."""
    F, groups = 1 << 30, 1 << 25
    places = torch.from_file(str(tmp_path / "places"), shared=True, size=2 * F + 128, dtype=torch.float32)
    words = torch.from_file(str(tmp_path / "words"), shared=True, size=2 * groups + 4, dtype=torch.int32)
    places[2 * F + 24] = 5.0  # column 24: group 0, position 3
    words[2 * groups] = 1 << 3
    counts = torch.zeros(3, dtype=torch.int32)
    above._count_bits_kernel[(3,)](words, counts, groups, BLOCK=4, TILES=1)
    assert counts.tolist() == [0, 0, 1]
    columns, values = torch.full((1,), -1, dtype=torch.int32), torch.zeros(1)
    indptr = torch.tensor([0, 0, 0, 1])
    above._place_bits_kernel[(3,)](words, places, indptr, columns, values, F, groups, BLOCK=128, TILES=1)
    assert columns.tolist() == [24] and values.tolist() == [5.0]


def test_float32_weights_take_cublas_on_a_gpu(monkeypatch):
    monkeypatch.setattr(tune, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    plain = sk.pack_encoder(torch.zeros(8, 32))
    assert tune.plan_above(plain) is None
    half = tune.plan_above(plain.to(torch.bfloat16))
    assert half == tune.above_plan(90) and half.BN == 128
