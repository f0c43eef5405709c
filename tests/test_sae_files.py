from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saerl_fast.errors import SaerlError
from saerl_fast.sae.files import convert_sae, load_sae, save_sae
from tests.sae_parts import D_IN, D_SAE, assert_equal, dense, make, tensors

FLAGS = [
    ("topk", dec, rescale, norm)
    for dec, rescale, norm in itertools.product(
        [True, False],
        [True, False],
        ["none", "layer_norm", "constant_norm_rescale"],
    )
] + [
    (arch, dec, False, norm)
    for arch, dec, norm in itertools.product(
        ["jumprelu", "batchtopk", "gated", "standard"], [True, False], ["none", "layer_norm"]
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


def broken(folder: Path, case: str) -> None:
    save_sae(make(), folder)
    weights, config = folder / "sae_weights.safetensors", json.loads((folder / "cfg.json").read_text())
    tensors = load_file(weights)
    if case == "no weights":
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
        ("no weights", "but sae_weights.safetensors does not exist"),
        ("no config", "does not say how it encodes"),
        ("truncated", "is damaged .*; copy these SAE weights again"),
        ("shape", r"b_dec has shape \(3,\), expected \(12,\)"),
        ("missing", "lacks W_dec"),
        ("nan", "b_enc holds NaN"),
        ("width", "says d_in=99 but its weights have 12 inputs"),
        ("whitening", "normalize_activations='covariance_whitening' is not supported"),
        ("no k", "k=None, which must be a whole number"),
        ("gated", "lacks b_gate, b_mag, r_mag"),
        ("sorted", "architecture 'sorted' is not supported"),
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
    with pytest.raises(SaerlError, match="holds SAEs below it; pass one of them, for example .*layers.2"):
        load_sae(tmp_path)


def test_a_pickle_beside_a_saelens_configuration(tmp_path: Path) -> None:
    want = make()
    save_sae(want, tmp_path)
    torch.save(load_file(tmp_path / "sae_weights.safetensors"), tmp_path / "sae_weights.pt")
    (tmp_path / "sae_weights.safetensors").unlink()
    x = torch.randn(9, D_IN)
    assert torch.equal(dense(load_sae(tmp_path), x), dense(want, x))


def test_convert_writes_what_saelens_loads(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    torch.save(tensors(), tmp_path / "raw.pt")
    said = ["architecture=jumprelu", "apply_b_dec_to_input=false", "hook_name=blocks.3.hook_resid_post"]
    with pytest.raises(SaerlError, match="needs its threshold"):
        convert_sae(tmp_path / "raw.pt", tmp_path / "new", said)
    torch.save(tensors() | {"threshold": torch.ones(D_SAE)}, tmp_path / "raw.pt")
    sae = convert_sae(tmp_path / "raw.pt", tmp_path / "new", [*said, "model_name=m"])
    assert sae.layer == 4 and sae.cfg.model_name == "m" and not sae.cfg.apply_b_dec_to_input
    assert_equal(load_sae(tmp_path / "new"), sae_lens.SAE.load_from_disk(tmp_path / "new"))
    at = (tmp_path / "new" / "cfg.json").stat().st_mtime_ns
    convert_sae(tmp_path / "raw.pt", tmp_path / "new", [*said, "model_name=m"])  # done already
    assert (tmp_path / "new" / "cfg.json").stat().st_mtime_ns == at
    with pytest.raises(SaerlError, match="holds another SAE, converted before"):
        convert_sae(tmp_path / "raw.pt", tmp_path / "new", said)
    (tmp_path / "new" / "notes.txt").write_text("mine")
    with pytest.raises(SaerlError, match="exists and is not empty"):
        convert_sae(tmp_path / "raw.pt", tmp_path / "new", [*said, "model_name=m"])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("size=3", "'size=3' is nothing to say about an SAE; use architecture, k"),
        ("k=many", "k='many' must be a number"),
        ("apply_b_dec_to_input=1", "must be true or false"),
    ],
)
def test_what_is_said_is_checked(tmp_path: Path, item: str, message: str) -> None:
    torch.save(tensors(), tmp_path / "raw.pt")
    with pytest.raises(SaerlError, match=message):
        convert_sae(tmp_path / "raw.pt", tmp_path / "new", [item])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [1, 2, 3])  # the manifest, two files
def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: Any, number: int) -> None:
    save_sae(make(), tmp_path / "from")
    replace, left = os.replace, itertools.count(1)

    def interrupted(old: Any, new: Any) -> None:
        replace(old, new)
        if next(left) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_sae(tmp_path / "from", tmp_path / "to")
    assert not (tmp_path / "to").exists()
    convert_sae(tmp_path / "from", tmp_path / "to")


def test_a_folder_that_a_killed_conversion_left_is_taken(tmp_path: Path) -> None:
    save_sae(make(), tmp_path / "from")
    replace = os.replace
    for number in (1, 2, 3):  # the renames: the manifest, two files
        to, child = tmp_path / f"to{number}", os.fork()
        if not child:
            left = itertools.count(1)

            def last(old: Any, new: Any, number: int = number, left: Any = left) -> None:
                os.kill(os.getpid(), signal.SIGKILL) if next(left) == number else replace(old, new)

            os.replace = last  # type: ignore[assignment]
            convert_sae(tmp_path / "from", to)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert any(to.iterdir())
        convert_sae(tmp_path / "from", to)
        load_sae(to)
        convert_sae(tmp_path / "from", to)
        assert sorted(file.name for file in to.iterdir() if file.suffix == ".json") == [
            "cfg.json",
            "manifest.json",
        ]
    (to / "cfg.json").unlink()
    (to / "notes.txt").touch()
    with pytest.raises(SaerlError, match="not empty"):
        convert_sae(tmp_path / "from", to)
