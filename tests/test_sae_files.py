from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saerl_fast.errors import SaerlError
from saerl_fast.sae.files import layer_of_hook, load_sae, save_sae
from saerl_fast.sae.model import SAE, SAESpec
from saerl_kernels import TopK

D_IN, D_SAE = 12, 40


def make(architecture: str = "topk", **cfg: Any) -> SAE:
    gen = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    weights = {name: torch.randn(shape, generator=gen) for name, shape in shapes.items()}
    threshold = torch.rand(D_SAE, generator=gen) if architecture in ("jumprelu", "batchtopk") else None
    cfg.setdefault("k", 4)
    return SAE(**weights, threshold=threshold, cfg=SAESpec(architecture, **cfg))


def dense(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    codes = sae.encode(x)
    return codes.to_dense(sae.d_sae) if isinstance(codes, TopK) else codes.to_dense()


FLAGS = [
    ("topk", dec, rescale, norm)
    for dec, rescale, norm in itertools.product(
        [True, False],
        [True, False],
        ["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale"],
    )
] + [
    (arch, dec, False, norm)
    for arch, dec, norm in itertools.product(
        ["jumprelu", "batchtopk", "standard"], [True, False], ["none", "layer_norm"]
    )
]


@pytest.mark.parametrize(("architecture", "dec", "rescale", "norm"), FLAGS)
def test_saelens_loads_what_we_save_with_equal_encodings(
    tmp_path: Path, architecture: str, dec: bool, rescale: bool, norm: str
) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    flags = dict(apply_b_dec_to_input=dec, rescale_acts_by_decoder_norm=rescale, normalize_activations=norm)
    sae = make(architecture, hook_layer=3, model_name="tiny", **flags)
    save_sae(sae, tmp_path / "sae")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    ours = load_sae(tmp_path / "sae")
    assert theirs.cfg.metadata.hook_name == "blocks.2.hook_resid_post" and ours.layer == 3
    x = 2 * torch.randn(64, D_IN) + 0.5
    with torch.no_grad():
        want, recon = theirs.encode(x), theirs(x)
    for mine in (sae, ours):
        got = dense(mine, x)
        assert torch.equal(got != 0, want != 0)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mine(x).detach(), recon, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_what_saelens_trains_and_saves_loads_here(tmp_path: Path, architecture: str, rescale: bool) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    config, kind = {
        "topk": (sae_lens.TopKTrainingSAEConfig, sae_lens.TopKTrainingSAE),
        "batchtopk": (sae_lens.BatchTopKTrainingSAEConfig, sae_lens.BatchTopKTrainingSAE),
    }[architecture]
    theirs = kind(config(d_in=D_IN, d_sae=D_SAE, k=4, rescale_acts_by_decoder_norm=rescale))
    with torch.no_grad():
        theirs.W_dec.mul_(1 + torch.rand(D_SAE, 1))
        theirs.b_enc.normal_()
        theirs.b_dec.normal_()
        if architecture == "batchtopk":
            theirs.topk_threshold.fill_(0.7)
    theirs.save_inference_model(tmp_path / "inference")
    theirs.save_model(tmp_path / "training")
    reference = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    x = torch.randn(64, D_IN)
    with torch.no_grad():
        want = reference.encode(x)
    for name in ("inference", "training"):
        got = dense(load_sae(tmp_path / name), x)
        assert torch.equal(got != 0, want != 0), name
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    sae = make(hook_layer=2, model_name="m", max_norm=12.5, metadata={"fvu": 0.1})
    save_sae(sae, tmp_path)
    again = load_sae(tmp_path)
    assert again.cfg.max_norm == 12.5 and again.cfg.metadata["fvu"] == 0.1
    assert again.layer == 2 and again.cfg.model_name == "m"
    for name, weight in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    save_sae(make(hook_layer=1), tmp_path)  # overwriting works and leaves no temporary files
    assert load_sae(tmp_path).layer == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_configuration_from_before_saelens_6(tmp_path: Path) -> None:
    save_sae(make(), tmp_path)
    old = dict(architecture="standard", activation_fn_str="topk", activation_fn_kwargs={"k": 7}, d_in=D_IN)
    old |= dict(
        d_sae=D_SAE, hook_name="blocks.4.hook_resid_pre", model_name="gpt2", normalize_activations=False
    )
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    sae = load_sae(tmp_path)
    assert (sae.k, sae.layer, sae.cfg.model_name) == (7, 4, "gpt2") and sae.cfg.apply_b_dec_to_input


def sparsify_folder(folder: Path, **cfg: Any) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        "encoder.weight": torch.randn(D_SAE, D_IN),
        "encoder.bias": torch.randn(D_SAE),
        "W_dec": torch.randn(D_SAE, D_IN),
        "b_dec": torch.randn(D_IN),
    }
    save_file(weights, folder / "sae.safetensors")
    config = dict(
        d_in=D_IN, expansion_factor=32, num_latents=D_SAE, k=5, normalize_decoder=True, signed=False
    )
    (folder / "cfg.json").write_text(json.dumps(config | cfg))
    return weights


def test_sparsify_checkpoint(tmp_path: Path) -> None:
    w = sparsify_folder(tmp_path / "layers.6")
    sae = load_sae(tmp_path / "layers.6")
    assert (sae.k, sae.layer, sae.architecture) == (5, 7, "topk")
    x = torch.randn(20, D_IN)
    # sparsify: relu(encoder(x - b_dec)), then top-k
    pre = torch.nn.functional.linear(x - w["b_dec"], w["encoder.weight"], w["encoder.bias"]).relu()
    values, indices = pre.topk(5)
    want = torch.zeros(20, D_SAE).scatter_(1, indices, values)
    torch.testing.assert_close(dense(sae, x), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sae(x).detach(), want @ w["W_dec"] + w["b_dec"], atol=1e-4, rtol=1e-4)
    sparsify_folder(tmp_path / "layers.6.mlp")
    assert load_sae(tmp_path / "layers.6.mlp").layer is None  # not a residual stream


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.5.hook_resid_post", 6),
        ("blocks.5.hook_resid_pre", 5),
        ("model.layers.5", 6),
        ("transformer.h.0", 1),
        ("embed_tokens", 0),
        ("blocks.5.hook_mlp_out", None),
        ("layers.5.mlp", None),
        (None, None),
    ],
)
def test_hook_names(name: str | None, layer: int | None) -> None:
    assert layer_of_hook(name) == layer


def broken(folder: Path, case: str) -> None:
    save_sae(make(), folder)
    weights, config = folder / "sae_weights.safetensors", json.loads((folder / "cfg.json").read_text())
    tensors = load_file(weights)
    if case == "pickled":
        weights.unlink()
        torch.save(tensors, folder / "ae.pt")
    elif case == "no weights":
        weights.unlink()
    elif case == "no config":
        (folder / "cfg.json").unlink()
        return
    elif case == "truncated":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif case == "shape":
        save_file(tensors | {"b_dec": torch.zeros(3)}, weights)
    elif case == "missing":
        del tensors["W_dec"]
        save_file(tensors, weights)
    elif case == "nan":
        save_file(tensors | {"b_enc": torch.full((D_SAE,), float("nan"))}, weights)
    elif case == "width":
        config["d_in"] = 99
    elif case == "whitening":
        config["normalize_activations"] = "covariance_whitening"
    elif case == "no k":
        del config["k"]
    else:
        config["architecture"] = case
    (folder / "cfg.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("pickled", r"pickled weights \(ae.pt\).*convert them to safetensors"),
        ("no weights", "holds neither sae_weights.safetensors nor sae.safetensors"),
        ("no config", "cfg.json does not exist"),
        ("truncated", "not readable safetensors"),
        ("shape", r"b_dec has shape \(3,\), expected \(12,\)"),
        ("missing", "lacks W_dec"),
        ("nan", "b_enc holds NaN"),
        ("width", "cfg.json says d_in=99 but the weights have 12"),
        ("whitening", "normalize_activations='covariance_whitening' is not supported"),
        ("no k", "k=None must be an integer"),
        ("gated", "architecture 'gated' is not supported"),
        ("jumprelu", "needs its threshold"),
        ("batchtopk", "needs its threshold"),
    ],
)
def test_broken_folders_are_one_sentence(tmp_path: Path, case: str, message: str) -> None:
    broken(tmp_path, case)
    with pytest.raises(SaerlError, match=message) as caught:
        load_sae(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", [dict(signed=True), dict(transcode=True), dict(activation="groupmax")])
def test_other_sparsify_coders_are_refused(tmp_path: Path, flag: dict[str, Any]) -> None:
    sparsify_folder(tmp_path, **flag)
    with pytest.raises(SaerlError, match=next(iter(flag))):
        load_sae(tmp_path)


def test_missing_folder_and_parent_folder(tmp_path: Path) -> None:
    with pytest.raises(SaerlError, match="does not exist"):
        load_sae(tmp_path / "nowhere")
    sparsify_folder(tmp_path / "layers.2")
    with pytest.raises(SaerlError, match="holds several SAEs; pass one of them, for example .*layers.2"):
        load_sae(tmp_path)
