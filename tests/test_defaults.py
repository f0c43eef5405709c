"""torch's defaults belong to the caller: no op's result or memory may follow set_default_dtype or _device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import saerl_kernels as sk
from tests.encoders import integers

CPU_BACKENDS = ("numba", "torch")


def flat(*found) -> list[torch.Tensor]:
    """The tensors of results, in order."""
    parts: list[torch.Tensor] = []
    for one in found:
        if isinstance(one, torch.Tensor):
            parts.append(one)
        elif isinstance(one, tuple):
            parts += flat(*one)
    return parts


def everything(backend: str, x: torch.Tensor, encoder: sk.PackedEncoder) -> list[torch.Tensor]:
    """What every op makes of small integers, and the gradients of training."""
    k, weight = 3, encoder.weight.t().clone().requires_grad_()
    kept = sk.encode_topk(x, encoder, k, backend=backend)
    trained = sk.encode_topk_train(x, weight, None, k, b_dec=x[0], backend=backend)
    batch = sk.encode_batch_topk_train(x, weight, encoder.bias, 2.5, backend=backend)
    decoder = encoder.weight.clone()
    restored = sk.sparse_decode(*trained, decoder, backend=backend)
    (restored.sum() + batch.values.sum()).backward()
    codes = sk.encode_threshold(x, encoder, threshold=1, backend=backend)
    pooled = [
        sk.encode_pool(x, [0, 4, len(x)], encoder, k, kind, backend=backend) for kind in ("mean", "last")
    ]
    clusters = sk.spherical_kmeans(codes, 2, max_iter=2, backend=backend)
    return flat(
        *(kept, trained, batch, restored, weight.grad, codes, *pooled, clusters),
        sk.encode_topk(x[:2], encoder, k, backend=backend),
        sk.topk(x, k, backend=backend),
        sk.decode_csr(codes, decoder, backend=backend),
        sk.encode_abs_topk(x, sk.pack_both_signs(encoder), k, backend=backend),
        sk.encode_group_max(x, encoder, 30, backend=backend),
        sk.pack_encoder(encoder.weight.t(), encoder.bias, permute=True).weight,
        kept.to_dense(encoder.d_sae),
        kept.to_csr(encoder.d_sae),
    )


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def default(request):
    """Another default dtype, or a default device on which nothing may be made."""
    if request.param == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_dtype(before)


@pytest.fixture(params=CPU_BACKENDS)
def wanted(request):
    """(backend, x, encoder, results under torch's own defaults); set up before ``default``."""
    x, encoder = integers(40, 130, 900)
    return request.param, x, encoder, everything(request.param, x, encoder)


def test_no_result_follows_the_defaults(wanted, default):
    backend, x, encoder, want = wanted
    got = everything(backend, x, encoder)
    assert len(got) == len(want) > 30
    for found, one in zip(got, want, strict=True):
        assert found.device.type == "cpu" and found.dtype == one.dtype
        torch.testing.assert_close(found, one, rtol=0, atol=0)


@pytest.mark.parametrize(
    "k", [np.int64(2), np.float32(2.5), torch.tensor(2)], ids=["int64", "float32", "tensor"]
)
def test_a_k_of_numpy_is_refused_with_the_fix(k):
    x, encoder = integers(4, 9, 70)
    with pytest.raises(ValueError, match=r"k is a \S+; give int\(k\) or float\(k\)"):
        sk.encode_batch_topk_train(x, encoder.weight.t(), None, k)


def pooled(offsets):
    x, encoder = integers(6, 9, 70)
    return sk.encode_pool(x, offsets, encoder, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, e: sk.topk(torch.tensor(2.0), 1), "scores is a single number"),
        (lambda x, e: sk.encode_topk(x, None, 3), "encoder is a NoneType; give what pack_encoder returns"),
        (lambda x, e: sk.encode_threshold(x, torch.nn.Linear(9, 70)), "encoder is a Linear; give"),
        (lambda x, e: sk.encode_topk(x, sk.SparseEncoder(e, 3), 3), r"of a SparseEncoder: packed\(\)"),
        (lambda x, e: sk.PoolStream(None, 3), "encoder is a NoneType"),
        (lambda x, e: sk.encode_group_max(x, 3, 7), "encoder is a int"),
        (lambda x, e: sk.SparseEncoder(e.weight, 3), "encoder is a Tensor"),
        (lambda x, e: pooled(None), "offsets=None are no integers"),
        (lambda x, e: pooled(["a"]), r"offsets=\['a'\] are no integers"),
        (lambda x, e: sk.encode_threshold(x, e, threshold="1"), "threshold='1' is no number"),
        (lambda x, e: sk.pack_encoder(x, threshold=[[1], [2, 3]]), "is no number"),
        (lambda x, e: sk.pack_encoder(x, input_scale="2"), "input_scale='2' must be finite and not 0"),
        (
            lambda x, e: sk.spherical_kmeans(sk.encode_threshold(x, e, threshold=0), np.int64(2)),
            r"n_clusters is a numpy.int64; give int\(n_clusters\)",
        ),
    ],
)
def test_arguments_of_the_wrong_kind(call, message):
    with pytest.raises(ValueError, match=message):
        call(*integers(6, 9, 70))


def test_numpy_numbers_that_are_taken():
    x, encoder = integers(6, 9, 70)
    W, limit = encoder.weight.t(), np.ones(70, dtype=np.float32)
    plain = sk.pack_encoder(W, input_scale=np.float32(2), permute=True, seed=np.int64(3))
    assert torch.equal(plain.weight, sk.pack_encoder(W, input_scale=2.0, permute=True, seed=3).weight)
    want = sk.encode_threshold(x, encoder, threshold=1.0)
    for given in (np.float32(1), limit, torch.ones(1).expand(70)):
        assert torch.equal(sk.encode_threshold(x, encoder, threshold=given).indices, want.indices)
