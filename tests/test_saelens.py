"""SAELens configurations: every class of SAELens, and what is refused by its name rather than dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saerl_fast.errors import SaerlError
from saerl_fast.sae.files import load_sae, save_sae
from saerl_fast.sae.saelens import build, layer_of_hook
from tests.sae_parts import D_IN, D_SAE, assert_equal, dense, make, tensors, threshold

SIX = {"metadata": {"sae_lens_version": "6.1.0", "hook_name": "blocks.3.hook_resid_post"}}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.5.hook_resid_post", 6),
        ("blocks.5.hook_resid_pre", 5),
        ("model.layers.5", 6),
        ("transformer.h.0", 1),
        ("embed_tokens", 0),
        ("model.layers.5.output", 6),
        ("model.layers.5.input", 5),
        ("model.layers[5].output[0]", 6),
        ("resid_pre_layer_5", 5),
        ("blocks.5.hook_resid_post.hook_sae_input", 6),
        (" blocks.5.hook_resid_pre ", 5),
        ("model.layers.5.self_attn.output", None),
        ("layer_5", None),
        ("blocks.5.hook_mlp_out", None),
        ("layers.5.mlp", None),
        (None, None),
    ],
)
def test_hook_names(name: str | None, layer: int | None) -> None:
    assert layer_of_hook(name) == layer


def spread(sae: Any) -> Any:
    """Every weight of a fresh SAELens SAE made to matter."""
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            weight.copy_(torch.rand_like(weight) * 2 if name == "threshold" else torch.randn_like(weight) / 2)
    return sae


@pytest.mark.parametrize("b_dec", [True, False])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("name", ["topk", "standard", "jumprelu", "gated"])
def test_every_class_that_saelens_saves(tmp_path: Path, name: str, norm: str, b_dec: bool) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_class

    kind, config = get_sae_class(name)
    more = {"k": 5} if name == "topk" else {}
    flags = {"normalize_activations": norm, "apply_b_dec_to_input": b_dec}
    theirs = spread(kind(config(d_in=D_IN, d_sae=D_SAE, **more, **flags)))
    theirs.save_model(tmp_path / "theirs")
    ours = load_sae(tmp_path / "theirs")
    assert ours.architecture == name
    assert_equal(ours, theirs)
    again = save_sae(ours, tmp_path / "ours")  # and back
    assert_equal(load_sae(again), sae_lens.SAE.load_from_disk(again))


@pytest.mark.parametrize(
    "name", ["topk", "batchtopk", "matryoshka_batchtopk", "gated", "jumprelu", "standard"]
)
@pytest.mark.parametrize("rescale", [True, False])
def test_every_class_that_saelens_trains(tmp_path: Path, name: str, rescale: bool) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_training_class

    kind, config = get_sae_training_class(name)
    more: dict[str, Any] = {}
    if "topk" in name:
        more = {"k": 1.5 if name == "batchtopk" else 4, "rescale_acts_by_decoder_norm": rescale}
    elif rescale:
        pytest.skip("a flag of the TopK family")
    if name == "matryoshka_batchtopk":
        more["matryoshka_widths"] = [10, D_SAE]
    theirs = spread(kind(config(d_in=D_IN, d_sae=D_SAE, **more)))
    if "batchtopk" in name:
        theirs.topk_threshold.fill_(0.7)
    theirs.save_inference_model(tmp_path / "inference")
    theirs.save_model(tmp_path / "training")
    reference = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    for folder in ("inference", "training"):
        assert_equal(load_sae(tmp_path / folder), reference)
    if name == "batchtopk":
        assert load_sae(tmp_path / "training").cfg.k == 1.5


@pytest.mark.parametrize("name", ["abstopk", "matching_pursuit", "transcoder", "skip_transcoder", "temporal"])
def test_classes_without_a_twin_are_refused_by_name(tmp_path: Path, name: str) -> None:
    pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_class

    kind, config = get_sae_class(name)
    more: dict[str, Any] = {}
    if "transcoder" in name:
        more = {"d_out": D_IN, "apply_b_dec_to_input": False}
    if name == "temporal":
        save_file(tensors(), tmp_path / "sae_weights.safetensors")
        (tmp_path / "cfg.json").write_text(json.dumps(SIX | {"architecture": name, "n_heads": 4}))
    else:
        kind(config(d_in=D_IN, d_sae=D_SAE, **more)).save_model(tmp_path)
    with pytest.raises(SaerlError, match=rf"\({name}\), which is not supported") as caught:
        load_sae(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_gated_sae_by_its_formula() -> None:
    gen = torch.Generator().manual_seed(1)
    parts = {name: tensor for name, tensor in tensors().items() if name != "b_enc"}
    for name, width in (("b_gate", 2.0), ("b_mag", 2.0), ("r_mag", 0.7)):
        parts[name] = width * torch.randn(D_SAE, generator=gen)
    sae = build("SAE x", SIX | {"architecture": "gated"}, parts)
    x = torch.randn(200, D_IN)
    shared = (x - parts["b_dec"]) @ parts["W_enc"]
    gate = shared + parts["b_gate"] > 0
    want = gate * (shared * parts["r_mag"].exp() + parts["b_mag"]).relu()
    assert (gate & (want == 0)).any() and (~gate).any()  # each of the two decides somewhere
    got = dense(sae, x)
    assert torch.equal(got > 0, want > 0)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sae(x).detach(), want @ parts["W_dec"] + parts["b_dec"], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("where", ["metadata", "top"])
def test_centred_residual_streams(apply_b_dec: bool, norm: str, where: str) -> None:
    """gpt2-small-res-jb: trained on residual streams from which TransformerLens took each token's mean."""
    options = {"model_from_pretrained_kwargs": {"center_writing_weights": True, "fold_ln": False}}
    config: dict[str, Any] = {"architecture": "standard", "apply_b_dec_to_input": apply_b_dec}
    place = {"hook_name": "blocks.8.hook_resid_pre", "model_name": "gpt2-small"}
    config |= {"normalize_activations": norm}
    if where == "metadata":
        config["metadata"] = place | options | {"sae_lens_version": "6.0.0"}
    else:
        config |= place | options
    centred, plain = (
        build("SAE x", config, tensors()),
        make("standard", apply_b_dec_to_input=apply_b_dec, k=None),
    )
    plain = build(
        "SAE y",
        SIX | {key: config[key] for key in ("apply_b_dec_to_input", "normalize_activations")},
        tensors(),
    )
    x = 3 * torch.randn(50, D_IN) + 2
    want = dense(plain, x - x.mean(-1, keepdim=True))
    torch.testing.assert_close(dense(centred, x), want, atol=1e-4, rtol=1e-4)
    assert norm == "layer_norm" or not torch.allclose(dense(plain, x), want, atol=1e-2)
    assert "model_from_pretrained_kwargs" not in centred.cfg.metadata  # so that saving does not centre twice


CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
LIMIT = {"threshold": threshold()}
REFUSED = [
    (dict(subtract_mean=True), {}, "has subtract_mean=True in its configuration"),
    (dict(use_error_term=True), {}, "has use_error_term=True"),
    (dict(activation_fn="tanh-relu", metadata={}), {}, "activation_fn='tanh-relu'"),
    (dict(activation_fn_str="tanh-relu", metadata={}), {}, "activation_fn='tanh-relu'"),
    (
        dict(activation_fn="topk", activation_fn_kwargs={"k": 3, "signed": True}, metadata={}),
        {},
        "signed=True",
    ),
    (
        dict(activation_fn="topk", activation_fn_kwargs={"k": 3, "postact_fn": "Identity"}, metadata={}),
        {},
        "postact_fn=Identity",
    ),
    (dict(finetuning_scaling_factor=True, metadata={}), {}, "finetuning_scaling_factor"),
    (dict(rescale_acts_by_decoder_norm=True), {}, "rescale_acts_by_decoder_norm is for topk"),
    (
        dict(rescale_acts_by_decoder_norm=True, architecture="jumprelu"),
        {"threshold": threshold()},
        "is for topk",
    ),
    (dict(apply_b_dec_to_input="decoder"), {}, "apply_b_dec_to_input='decoder', which must be true or false"),
    (dict(normalize_activations="covariance_whitening"), {}, "normalize_activations='covariance_whitening'"),
    (dict(normalize_activations="expected_average_only_in"), {}, "times a factor that its files do not hold"),
    (dict(normalize_activations=True, metadata={}), {}, "times a factor that its files do not hold"),
    (dict(reshape_activations="hook_z"), {}, "reshaped attention heads"),
    (dict(hook_head_index=3), {}, "hook_head_index=3"),
    (dict(architecture="jumprelu", d_in=99), LIMIT, "d_in=99 but its weights have 12"),
    (dict(), {"scaling_factor": torch.full((D_SAE,), 2.0)}, "scaling_factor other than 1"),
    (dict(), {"finetuning_scaling_factor": torch.full((D_SAE,), 2.0)}, "scaling_factor other than 1"),
    (dict(), {"W_skip": torch.ones(D_IN, D_IN)}, "has the tensor W_skip"),
    (dict(k=4), {}, "has k=4, which a standard SAE does not use; is its architecture topk"),
    (dict(architecture="topk", k=True), {}, "has k=True, which must be a whole number above 0"),
    (dict(architecture="topk", k="4"), {}, "has k='4', which must be a whole number"),
    (dict(architecture="topk", k=4.5), {}, "has k=4.5, which must be a whole number"),
    (dict(activation_fn_str="topk", metadata={}), {}, "has k=None, which must be a whole number"),
    (dict(metadata={"hook_name": 3}), {}, "hook_name=3, which must be one hook point"),
    (dict(metadata={"hook_name": None, "hook_layer": 3}), {}, "hook_layer=3 but no hook_name"),
    (dict(), {"W_enc": torch.ones(D_IN, D_SAE, dtype=torch.int8)}, "W_enc holds int8"),
    (dict(), LIMIT, "has the tensor threshold, which a standard SAE"),
    (dict(), {"b_enc": torch.full((D_SAE,), float("inf"))}, "b_enc holds NaN or infinite"),
    (
        dict(metadata={"hook_name_out": "blocks.3.hook_mlp_out"}),
        {},
        "is a transcoder to blocks.3.hook_mlp_out",
    ),
    (dict(metadata={"model_from_pretrained_kwargs": {"fold_ln": True, "n_ctx": 9}}), {}, "n_ctx=9"),
    (
        dict(
            metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}, "model_name": "llama"}
        ),
        {},
        "center_writing_weights=True at .* of llama",
    ),
    (
        dict(
            normalize_activations="constant_norm_rescale",
            metadata=CENTRED | {"model_name": "gpt2"},
        ),
        {},
        "center_writing_weights=True",
    ),
]


@pytest.mark.parametrize(("change", "more", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_what_is_not_followed_is_refused_by_name(
    change: dict[str, Any], more: dict[str, torch.Tensor], message: str
) -> None:
    config = {"architecture": "standard"} | SIX | change
    if change.get("metadata"):
        config["metadata"] = SIX["metadata"] | change["metadata"]
    with pytest.raises(SaerlError, match=message) as caught:
        build("SAE x", config, tensors() | more)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("SAE x")


def test_neutral_flags_and_factors_of_one_are_no_hindrance() -> None:
    quiet = dict(subtract_mean=False, odd=None, other=[], finetuning_scaling_factor=False, lp_norm=1.0)
    weights = tensors() | {"scaling_factor": torch.ones(D_SAE)}
    x = torch.randn(9, D_IN)
    assert torch.equal(
        dense(build("SAE x", SIX | quiet, weights), x), dense(build("SAE x", dict(SIX), tensors()), x)
    )


@pytest.mark.parametrize("scale", ["2", -1, 0, float("nan"), True])
def test_a_scale_must_be_a_number(scale: Any) -> None:
    config = {"architecture": "standard", "normalize_activations": "expected_average_only_in"} | SIX
    with pytest.raises(SaerlError, match="scaling_factor=.* must be a number above 0"):
        build("SAE x", config, tensors(), scale=scale)
    with pytest.raises(SaerlError, match="which normalize_activations=none does not use"):
        build("SAE x", config | {"normalize_activations": "none"}, tensors(), scale=2.0)
    with pytest.raises(SaerlError, match="metadata in its configuration must be an object, not 'x'"):
        build("SAE x", config | {"metadata": "x"}, tensors())


def test_one_threshold_is_that_of_every_feature() -> None:
    config, x = {"architecture": "jumprelu"} | SIX, torch.randn(20, D_IN)
    one = build("SAE x", config, tensors() | {"threshold": torch.tensor(0.5)})
    each = build("SAE x", config, tensors() | {"threshold": torch.full((D_SAE,), 0.5)})
    assert torch.equal(dense(one, x), dense(each, x))


def test_a_scale_of_a_training_checkpoint_is_folded(tmp_path: Path) -> None:
    save_sae(make("jumprelu", k=None), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["normalize_activations"] = "expected_average_only_in"
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    x = 8 * torch.randn(40, D_IN)
    ours, plain = load_sae(tmp_path), make("jumprelu", k=None)
    torch.testing.assert_close(dense(ours, x), dense(plain, x / 4), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(x), plain(x / 4) * 4, atol=1e-3, rtol=1e-3)


def test_an_old_jumprelu_checkpoint_has_a_logarithm(tmp_path: Path) -> None:
    save_sae(make("jumprelu", k=None), tmp_path)
    weights = {name: w.clone() for name, w in load_file(tmp_path / "sae_weights.safetensors").items()}
    limit = weights.pop("threshold")  # copies: older safetensors map the file that is written below
    save_file(weights | {"log_threshold": limit.log()}, tmp_path / "sae_weights.safetensors")
    loaded = load_sae(tmp_path).threshold
    assert loaded is not None
    torch.testing.assert_close(loaded.detach(), limit)
