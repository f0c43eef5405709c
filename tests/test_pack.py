"""pack_encoder: every folding option against its formula and against SAELens' own encoders."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch

import saerl_kernels as sk

D_IN, D_SAE, K = 24, 96, 8


def tensors(dtype: torch.dtype = torch.float32) -> dict:
    return {
        "W_enc": torch.randn(D_IN, D_SAE).to(dtype),
        "b_enc": torch.randn(D_SAE).to(dtype),
        "W_dec": torch.randn(D_SAE, D_IN).to(dtype),
        "b_dec": torch.randn(D_IN).to(dtype),
    }


def dense(x: torch.Tensor, encoder: sk.PackedEncoder) -> torch.Tensor:
    return sk.encode_topk(x, encoder, K).to_dense(encoder.d_sae)


@pytest.mark.parametrize("permute", [False, True])
def test_fake_tensors_are_not_asked_for_an_address(permute, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    monkeypatch.setattr(
        torch.Tensor, "data_ptr", lambda tensor: pytest.fail("torch warns of undefined behaviour")
    )
    with FakeTensorMode(shape_env=ShapeEnv()):
        packed = sk.pack_encoder(torch.empty(D_IN, D_SAE), torch.empty(D_SAE), threshold=1.0, permute=permute)
        assert sk.encode_topk(torch.empty(3, D_IN), packed, K).values.shape == (3, K)
        assert sk.encode_threshold(torch.empty(3, D_IN), packed).n_rows == 3


FLAGS = list(itertools.product([False, True], [False, True], ["none", "layer_norm", "constant_norm_rescale"]))


@pytest.mark.parametrize(("apply_b_dec", "rescale", "norm"), FLAGS, ids=str)
def test_equals_saelens_topk(apply_b_dec, rescale, norm):
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    config = TopKSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        k=K,
        apply_b_dec_to_input=apply_b_dec,
        rescale_acts_by_decoder_norm=rescale,
        normalize_activations=norm,
        metadata=sae_lens.SAEMetadata() if hasattr(sae_lens, "SAEMetadata") else None,
    )
    sae = TopKSAE(config)
    parts = tensors()
    sae.load_state_dict(parts)
    x = torch.randn(3, 10, D_IN) * 3 + 1
    encoder = sk.pack_encoder(
        **parts,
        apply_b_dec_to_input=apply_b_dec,
        rescale_acts_by_decoder_norm=rescale,
        normalize_activations=norm,
        permute=True,
    )
    torch.testing.assert_close(dense(x, encoder), sae.encode(x).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("apply_b_dec", [False, True], ids=str)
def test_equals_saelens_jumprelu(apply_b_dec):
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    config = JumpReLUSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        apply_b_dec_to_input=apply_b_dec,
        metadata=sae_lens.SAEMetadata() if hasattr(sae_lens, "SAEMetadata") else None,
    )
    sae = JumpReLUSAE(config)
    parts = {**tensors(), "threshold": torch.rand(D_SAE) * 4}
    sae.load_state_dict(parts)
    x = torch.randn(30, D_IN)
    encoder = sk.pack_encoder(**parts, apply_b_dec_to_input=apply_b_dec)
    codes = sk.encode_threshold(x, encoder)
    assert codes.nnz > 0
    torch.testing.assert_close(codes.to_dense(), sae.encode(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_given_b_dec_is_subtracted_unless_switched_off():
    parts, x = tensors(), torch.randn(7, D_IN)
    W, b, c = parts["W_enc"], parts["b_enc"], parts["b_dec"]
    subtracted, as_it_is = ((x - c) @ W + b).relu(), (x @ W + b).relu()
    for options, want in (
        ({"b_dec": c}, subtracted),
        ({"b_dec": c, "apply_b_dec_to_input": True}, subtracted),
        ({"b_dec": c, "apply_b_dec_to_input": False}, as_it_is),
        ({}, as_it_is),
    ):
        got = sk.encode_topk(x, sk.pack_encoder(W, b, **options), D_SAE).to_dense(D_SAE)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_repr_is_one_line():
    encoder = sk.pack_encoder(torch.ones(4, 9))
    assert repr(encoder) == "PackedEncoder(d_in=4, d_sae=9, float32, cpu)"
    options = dict(threshold=0.1, normalize_activations="layer_norm", permute=True, dtype=torch.bfloat16)
    encoder = sk.pack_encoder(torch.ones(4, 9), **options)
    assert repr(encoder) == "PackedEncoder(d_in=4, d_sae=9, bfloat16, cpu, threshold, layer_norm, permuted)"


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "b_dec"])
def test_arrays_that_are_no_tensors_are_one_sentence(name):
    parts = tensors()
    with pytest.raises(ValueError, match=f"{name} is a ndarray; give a torch.Tensor"):
        sk.pack_encoder(**parts | {name: parts[name].numpy()})


def test_input_scale_and_formula():
    parts = tensors()
    x = torch.randn(7, D_IN)
    encoder = sk.pack_encoder(
        **parts,
        input_scale=3.0,
        normalize_activations="expected_average_only_in",
        apply_b_dec_to_input=True,
        rescale_acts_by_decoder_norm=True,
    )
    pre = (x * 3.0 - parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"]
    want = (pre * parts["W_dec"].norm(dim=-1)).relu()
    got = sk.encode_topk(x, encoder, D_SAE).to_dense(D_SAE)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_sixteen_bit_folding_uses_the_rounded_weight():
    """At x = b_dec nothing but b_enc is left, in any dtype."""
    parts = tensors(torch.bfloat16)
    encoder = sk.pack_encoder(**parts, apply_b_dec_to_input=True)
    assert encoder.dtype == torch.bfloat16 and encoder.bias.dtype == torch.float32
    got = sk.encode_topk(parts["b_dec"][None], encoder, D_SAE).to_dense(D_SAE)[0]
    torch.testing.assert_close(got, parts["b_enc"].float().relu(), rtol=0, atol=1e-5)


def test_packing_copies():
    """Training on must not change an encoder that was packed before."""
    W = torch.nn.Parameter(torch.eye(4))
    encoder = sk.pack_encoder(W, torch.zeros(4))
    assert not encoder.weight.requires_grad
    with torch.no_grad():
        W.zero_()
    assert bool((encoder.weight == torch.eye(4)).all())
    transposed = torch.eye(4).t()  # already K-major: packing must still copy it
    encoder = sk.pack_encoder(transposed)
    transposed.zero_()
    assert bool((encoder.weight == torch.eye(4)).all())


def test_permutation_is_stored_seeded_and_undone():
    parts = tensors()
    plain = sk.pack_encoder(**parts, threshold=1.0, permute=False)
    mixed = sk.pack_encoder(**parts, threshold=1.0, permute=True, seed=3)
    again = sk.pack_encoder(**parts, threshold=1.0, permute=True, seed=3)
    assert plain.permutation is None and mixed.permutation is not None
    assert torch.equal(mixed.permutation, again.permutation)
    assert not torch.equal(mixed.weight, plain.weight)
    assert torch.equal(mixed.natural().weight, plain.weight)
    assert torch.equal(mixed.natural().bias, plain.bias)
    assert torch.equal(mixed.weight, plain.weight[mixed.permutation.long()])


def test_to_dtype_and_device(device):
    parts = tensors()
    encoder = sk.pack_encoder(**parts, threshold=torch.rand(D_SAE)).to(device).to(dtype=torch.float16)
    assert encoder.dtype == torch.float16 and encoder.bias.dtype == encoder.threshold.dtype == torch.float32
    assert (encoder.permutation is not None) == (device.type == "cuda")
    assert encoder.to("cpu", torch.float32).device.type == "cpu"
    assert (encoder.d_in, encoder.d_sae) == (D_IN, D_SAE)
    with pytest.raises(ValueError, match="float64"):
        encoder.to(torch.float64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b_enc": torch.zeros(3)}, r"b_enc has shape \(3,\), expected \(96,\)"),
        ({"W_dec": torch.zeros(D_IN, D_SAE)}, "W_dec has shape"),
        ({"b_dec": torch.zeros(D_SAE)}, "b_dec has shape"),
        ({"threshold": torch.zeros(4)}, "threshold has shape"),
        ({"W_dec": None, "rescale_acts_by_decoder_norm": True}, "needs W_dec"),
        ({"b_dec": None, "apply_b_dec_to_input": True}, "needs b_dec"),
        ({"normalize_activations": "whiten"}, "normalize_activations='whiten' is unknown"),
        ({"permute": "yes"}, "permute='yes' is unknown"),
        ({"dtype": torch.float64}, "float64"),
        ({"W_enc": torch.zeros(4)}, "W_enc must be"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        sk.pack_encoder(**{**tensors(), **changes})


@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_input_scale_must_be_invertible(scale):
    with pytest.raises(ValueError, match="must be finite and not 0"):
        sk.pack_encoder(torch.ones(2, 3), input_scale=scale)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
def test_no_rows_give_no_warning(norm):
    encoder = sk.pack_encoder(torch.ones(4, 9), normalize_activations=norm)
    assert sk.encode_topk(torch.zeros(0, 4), encoder, 2).values.shape == (0, 2)
    assert sk.encode_pool(torch.rand(3, 4), [0, 0, 3], encoder, 2).n_rows == 2


def test_a_pickle_carries_no_copies():
    encoder = sk.pack_encoder(torch.randn(8, 40), permute=True)
    encoder.natural()
    again = pickle.loads(pickle.dumps(encoder))
    assert encoder._cache and not again._cache
    assert torch.equal(again.weight, encoder.weight) and torch.equal(again.permutation, encoder.permutation)


@pytest.mark.parametrize("n", [2, 40])
@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_nothing_made_of_old_weights_is_used(n, permute, name):
    """Copies that an encoder keeps (natural order, NumPy's views) follow what is written and rebound."""
    x = torch.randn(n, 8)
    encoder = sk.pack_encoder(torch.randn(8, 40), torch.randn(40), permute=permute, threshold=0.0)
    for write in (lambda part: part.mul_(-1.0), lambda part: setattr(part, "data", torch.randn(part.shape))):
        for backend in ("auto", "torch", "reference"):
            sk.encode_topk(x, encoder, 3, backend=backend), sk.encode_threshold(x, encoder, backend=backend)
        write(getattr(encoder, name))
        parts = (encoder.weight, encoder.bias, encoder.threshold, "none", encoder.permutation, permute, 0)
        for backend in ("auto", "torch", "reference"):
            got = sk.encode_topk(x, encoder, 3, backend=backend)
            want = sk.encode_topk(x, sk.PackedEncoder(*parts), 3, backend=backend)
            assert torch.equal(got.indices, want.indices) and torch.equal(got.values, want.values)
            rows = sk.encode_threshold(x, encoder, backend=backend)
            same = sk.encode_threshold(x, sk.PackedEncoder(*parts), backend=backend)
            assert torch.equal(rows.to_dense(), same.to_dense())
