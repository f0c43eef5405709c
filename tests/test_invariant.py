"""Batch invariance: a row's result is the same to the bit whatever rows it comes with."""

from __future__ import annotations

import pytest
import torch

import saerl_kernels as sk
from saerl_kernels._numba import screen
from saerl_kernels._triton import tune
from tests.encoders import float64_topk

g = torch.Generator().manual_seed(1)
PIECES = (slice(0, 1), slice(1, 3), slice(3, 12), slice(12, 40), slice(7, 8))


def floats(d_in, d_sae, dtype=torch.float32, n=40):
    W = torch.randn(d_in, d_sae, generator=g) / d_in**0.5
    return torch.randn(n, d_in, generator=g), sk.pack_encoder(W, torch.randn(d_sae, generator=g), dtype=dtype)


def invariant(x, encoder, k, backend):
    together = sk.encode_topk(x, encoder, k, backend=backend, batch_invariant=True)
    for rows in PIECES:
        alone = sk.encode_topk(x[rows], encoder, k, backend=backend, batch_invariant=True)
        assert torch.equal(alone.values, together.values[rows])
        assert torch.equal(alone.indices, together.indices[rows])
    order = torch.randperm(len(x), generator=g)
    mixed = sk.encode_topk(x[order], encoder, k, backend=backend, batch_invariant=True)
    assert torch.equal(mixed.values, together.values[order])
    return together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d_in", [50, 200])  # the screen takes the second, where the processor has the units
def test_numba(d_in, dtype):
    x, encoder = floats(d_in, 700, dtype)
    x[5], x[6, 3], x[9] = 0.0, torch.nan, x[8]
    kept = invariant(x, encoder, 7, "numba")
    assert torch.equal(kept.values[9], kept.values[8])
    want = float64_topk(torch.where(x.isnan(), torch.inf, x)[:5].to(dtype), encoder, 7)
    torch.testing.assert_close(kept.values[:5], want.values)


@pytest.mark.parametrize("pays", [True, False])
def test_the_screen_changes_no_bit(pays, monkeypatch):
    """It is taken by the number of rows, so both ways must agree."""
    x, encoder = floats(256, 2048)
    monkeypatch.setattr(screen, "pays", lambda *args: pays)
    g.manual_seed(7)
    x = torch.randn(40, 256, generator=g)
    W = torch.randn(256, 2048, generator=g)
    encoder = sk.pack_encoder(W, torch.zeros(2048))
    kept = sk.encode_topk(x, encoder, 20, backend="numba", batch_invariant=True)
    monkeypatch.setattr(screen, "pays", lambda *args: not pays)
    again = sk.encode_topk(x, encoder, 20, backend="numba", batch_invariant=True)
    assert torch.equal(kept.values, again.values) and torch.equal(kept.indices, again.indices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter")
@pytest.mark.parametrize("k", [3, 60])  # the second would take the chunked plan, which follows the rows
def test_triton(k):
    x, encoder = floats(20, 200, n=18)
    together = sk.encode_topk(x, encoder, k, backend="triton", batch_invariant=True)
    for rows in (slice(0, 1), slice(16, 18)):  # at their place in a tile: NumPy's product depends on it
        alone = sk.encode_topk(x[rows], encoder, k, backend="triton", batch_invariant=True)
        assert torch.equal(alone.values, together.values[rows])
        assert torch.equal(alone.indices, together.indices[rows])
    assert tune.plan_encode(18, encoder, k).algorithm == ("groups" if k == 3 else "chunked")


def test_pooling_is_the_same_wherever_the_tokens_are_cut():
    x, encoder = floats(64, 1024, n=64)
    want = sk.encode_pool(x, [0, 64], encoder, 16, "sum", backend="numba", batch_invariant=True)
    stream = sk.PoolStream(encoder, 16, "sum", backend="numba", batch_invariant=True)
    for token in x[:63].split(1):
        stream.add(token, [0, 1], unfinished=True)
    stream.add(x[63:], [0, 1])
    for got, part in zip(stream.finish()[:3], want[:3], strict=True):
        assert torch.equal(got, part)


def test_what_can_not_promise_it_says_so():
    x, encoder = floats(16, 64)
    for backend in ("torch", "reference"):
        with pytest.raises(ValueError, match=f"backend '{backend}' has no batch-invariant encoder"):
            sk.encode_topk(x, encoder, 3, backend=backend, batch_invariant=True)
    layered = sk.pack_encoder(encoder.weight.t(), normalize_activations="layer_norm")
    with pytest.raises(ValueError, match="normalise x yourself"):
        sk.encode_topk(x, layered, 3, batch_invariant=True)
    with pytest.raises(ValueError, match="batch_invariant=True needs k"):
        sk.PoolStream(sk.pack_encoder(encoder.weight.t(), threshold=1.0), None, batch_invariant=True)
    with pytest.raises(ValueError, match="outside torch.compile"):
        sk.encode_topk(x.to("meta"), encoder.to("meta"), 3, batch_invariant=True)
    empty = sk.encode_topk(x[:0], encoder, 3, backend="numba", batch_invariant=True)
    assert empty.values.shape == (0, 3)
