"""Encoders of small integers: their products are exact in float32 whatever the order of summation."""

from __future__ import annotations

import pytest
import torch

import saerl_kernels as sk
from saerl_kernels import dispatch

BACKENDS = [name for name in dispatch.BACKENDS if name not in ("auto", "reference")]  # that tests run


def integers(n: int, d_in: int, d_sae: int, seed: int = 0, low: int = -40, permute: bool = False, **options):
    """(x [n, d_in], encoder) with many ties."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (n, d_in), generator=g).float()
    W = torch.randint(-2, 3, (d_in, d_sae), generator=g).float()
    b = torch.randint(low, 6, (d_sae,), generator=g).float()
    return x, sk.pack_encoder(W, b, permute=permute, **options)


def float64_topk(x: torch.Tensor, encoder: sk.PackedEncoder, k: int) -> sk.TopK:
    """The definition, in float64 and by a full sort."""
    plain = encoder.natural()
    scores = x.double() @ plain.weight.double().t() + plain.bias.double()
    scores = torch.where(scores > 0, scores, 0.0)
    values, indices = scores.sort(dim=-1, descending=True, stable=True)
    return sk.TopK(values[:, :k].float(), indices[:, :k].int())


def assert_equal(got: sk.TopK, want: sk.TopK) -> None:
    assert got.values.dtype == torch.float32 and got.indices.dtype == torch.int32
    torch.testing.assert_close(got.values.cpu(), want.values.cpu(), rtol=0, atol=0)
    assert torch.equal(got.indices.cpu(), want.indices.cpu())


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill torch.empty with garbage, so that an unwritten output cannot pass by luck."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        if out.is_floating_point():
            return out.fill_(float("nan"))
        return out if out.dtype == torch.bool else out.fill_(-77)

    monkeypatch.setattr(torch, "empty", poisoned)
