from __future__ import annotations

from typing import Any

import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.sae.model import SAE, SAESpec
from saerl_kernels import CSR, TopK

D_IN, D_SAE = 12, 40


def make(threshold: bool = False, **cfg: Any) -> SAE:
    gen = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    cfg.setdefault("k", 4)
    return SAE(
        rand(D_IN, D_SAE),
        0.3 * rand(D_SAE),
        rand(D_SAE, D_IN),
        rand(D_IN),
        threshold=rand(D_SAE).abs() if threshold else None,
        cfg=SAESpec(**cfg),
    )


def test_topk_by_hand() -> None:
    sae, x = make(), torch.randn(5, D_IN)
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    want = pre.topk(4)
    codes = sae.encode(x)
    assert isinstance(codes, TopK)
    torch.testing.assert_close(codes.values, want.values.detach())
    assert torch.equal(codes.indices.long(), want.indices)
    recon = sum(want.values[:, [j]] * sae.W_dec[want.indices[:, j]] for j in range(4))  # type: ignore[call-overload]
    torch.testing.assert_close(sae(x), recon + sae.b_dec)


def test_shapes_with_leading_dimensions() -> None:
    x = torch.randn(2, 3, D_IN)
    assert make().encode(x).values.shape == (2, 3, 4)
    assert make()(x).shape == x.shape
    assert make(threshold=True, architecture="jumprelu")(x).shape == x.shape


@pytest.mark.parametrize("architecture", ["jumprelu", "batchtopk", "gated", "standard"])
def test_threshold_architectures_by_hand(architecture: str) -> None:
    sae = make(threshold=architecture != "standard", architecture=architecture, apply_b_dec_to_input=False)
    x = torch.randn(6, D_IN)
    pre = x @ sae.W_enc + sae.b_enc
    limit = 0.0 if sae.threshold is None else sae.threshold
    dense = (pre.relu() * (pre > limit)).detach()
    codes = sae.encode(x)
    assert isinstance(codes, CSR) and sae.k is None
    torch.testing.assert_close(codes.to_dense(), dense)
    torch.testing.assert_close(sae(x), dense @ sae.W_dec + sae.b_dec)
    pooled = sae.pool(x, torch.tensor([0, 2, 6]))
    torch.testing.assert_close(pooled.to_dense(), torch.stack([dense[:2].amax(0), dense[2:].amax(0)]))


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_run_time_normalisation_is_undone(kind: str) -> None:
    sae, x = make(normalize_activations=kind), 7 * torch.randn(5, D_IN) + 3
    if kind == "layer_norm":
        centred = x - x.mean(-1, keepdim=True)
        inner = centred / (centred.std(-1, keepdim=True) + 1e-5)
    else:
        inner = x * D_IN**0.5 / x.norm(dim=-1, keepdim=True)
    plain = make()
    torch.testing.assert_close(sae.encode(x).values, plain.encode(inner).values, atol=1e-4, rtol=1e-4)
    scaled = plain(inner)
    want = (
        scaled * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
        if kind == "layer_norm"
        else scaled * x.norm(dim=-1, keepdim=True) / D_IN**0.5
    )
    torch.testing.assert_close(sae(x), want, atol=1e-4, rtol=1e-4)
    with pytest.raises(SaerlError, match="needs the encoder's input"):
        sae.decode(sae.encode(x))


def test_packed_encoder_follows_the_weights() -> None:
    sae, x = make(), torch.randn(3, D_IN)
    first, codes = sae.packed(), sae.encode(x)
    assert sae.packed() is first
    with torch.no_grad():
        sae.b_enc.add_(1.0)
    assert sae.packed() is not first
    assert not torch.equal(sae.encode(x).values, codes.values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(architecture="sorted"), "'sorted' is not supported"),
        (dict(architecture="gated"), "a gated SAE needs its threshold"),
        (dict(threshold=True), "a topk SAE takes no threshold"),
        (dict(k=2.5), "k=2.5 must be an integer"),
        (dict(normalize_activations="expected_average_only_in"), "expected_average_only_in"),
        (dict(k=0), "k=0 must be an integer from 1 to d_sae=40"),
        (dict(k=41), "k=41 must be"),
        (dict(architecture="jumprelu"), "needs its threshold"),
        (dict(normalize_activations="odd"), "normalize_activations='odd'"),
        (dict(architecture="standard", rescale_acts_by_decoder_norm=True), "is for topk SAEs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_settings_are_one_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SaerlError, match=message):
        make(**change)


def test_bad_shapes_are_one_sentence() -> None:
    sae = make()
    with pytest.raises(SaerlError, match=r"W_dec has shape \(12, 40\), expected \(40, 12\)"):
        SAE(sae.W_enc, sae.b_enc, sae.W_dec.t(), sae.b_dec, cfg=SAESpec(k=4))
    with pytest.raises(SaerlError, match="width 12 but got width 13"):
        sae.pool(torch.randn(3, 13), torch.tensor([0, 3]))


def test_repr_is_one_line() -> None:
    sae = make(hook_layer=3)
    assert repr(sae) == "SAE(topk, d_in=12, d_sae=40, k=4, layer=3, float32, cpu)"
    assert repr(make(threshold=True, architecture="jumprelu", k=None)) == (
        "SAE(jumprelu, d_in=12, d_sae=40, float32, cpu)"
    )
