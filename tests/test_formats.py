"""Every layout that SAE files come in, against SAELens' own loaders and the formulas of the projects."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from saerl_fast.errors import SaerlError
from saerl_fast.sae.files import load_sae
from tests.sae_parts import D_IN, D_SAE, assert_equal, by_saelens, dense, serve, tensors, threshold

RES = "layer_20/width_16k/average_l0_71"


def gemma_scope(folder: Path, **more: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    np.savez(
        folder / "params.npz",
        **{k: v.numpy() for k, v in (tensors() | {"threshold": threshold()} | more).items()},
    )
    return folder


def gemma_scope_2(folder: Path, config: dict[str, Any] | None = None, **more: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    renamed = {name.replace("W_", "w_"): tensor for name, tensor in tensors().items()}
    save_file(renamed | {"threshold": threshold()} | more, folder / "params.safetensors")
    place = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "l0": 60, "width": D_SAE}
    place["hf_hook_point_in"] = "model.layers.9.output"
    (folder / "config.json").write_text(json.dumps(place | (config or {})))
    return folder


def linear() -> dict[str, torch.Tensor]:
    """As two nn.Linear modules have them."""
    parts = tensors()
    return {
        "encoder.weight": parts["W_enc"].t().contiguous(),
        "encoder.bias": parts["b_enc"],
        "decoder.weight": parts["W_dec"].t().contiguous(),
        "decoder.bias": parts["b_dec"],
    }


def llama_scope(folder: Path, **config: Any) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    save_file(linear(), folder / "checkpoints" / "final.safetensors")
    made = dict(d_model=D_IN, d_sae=D_SAE, jump_relu_threshold=0.8, act_fn="jumprelu", use_glu_encoder=False)
    made |= dict(hook_point_in="blocks.15.hook_resid_post", hook_point_out="blocks.15.hook_resid_post")
    made |= dict(norm_activation="dataset-wise", dataset_average_activation_norm={"in": 7.0, "out": 7.0})
    made |= dict(sparsity_include_decoder_norm=True, use_decoder_bias=True)
    (folder / "hyperparams.json").write_text(json.dumps(made | config))
    return folder


def dictionary_learning(folder: Path, kind: str, state: dict[str, Any], **trainer: Any) -> Path:
    folder.mkdir(parents=True)
    torch.save(state, folder / "ae.pt")
    made = dict(dict_class=kind, layer=3, activation_dim=D_IN, dict_size=D_SAE, lm_name="org/tiny", lr=1e-3)
    made |= dict(submodule_name="resid_post_layer_3") | trainer
    config = {"trainer": made, "buffer": {"ctx_len": 128, "io": "out", "d_submodule": D_IN}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_gemma_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "models--google--gemma-scope-2b-pt-res"
    ours = load_sae(gemma_scope(root / RES))
    theirs = by_saelens(serve(monkeypatch, root), "gemma_2", "google/gemma-scope-2b-pt-res", RES)
    assert_equal(ours, theirs)
    assert ours.layer == 21 and ours.architecture == "jumprelu" and not ours.cfg.apply_b_dec_to_input
    assert_equal(load_sae(root / RES / "params.npz"), theirs)
    assert load_sae(gemma_scope(tmp_path / "elsewhere" / RES)).layer is None  # res, mlp and att look alike
    mlp = load_sae(gemma_scope(tmp_path / "gemma-scope-2b-pt-mlp" / RES))
    assert mlp.cfg.hook_name == "blocks.20.hook_mlp_out" and mlp.layer is None


def test_gemma_scope_of_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "embedding/width_4k/average_l0_6"
    ours = load_sae(gemma_scope(tmp_path / name))
    theirs = by_saelens(serve(monkeypatch, tmp_path), "gemma_2", "google/gemma-scope-2b-pt-res", name)
    assert_equal(ours, theirs, 9 * torch.randn(50, D_IN))
    assert ours.layer == 0


def test_gemma_scope_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "resid_post/layer_9_width_16k_l0_big"
    ours = load_sae(gemma_scope_2(tmp_path / name))
    theirs = by_saelens(serve(monkeypatch, tmp_path), "gemma_3", "google/gemma-scope-2-1b-pt", name)
    assert_equal(ours, theirs)
    assert ours.layer == 10 and ours.cfg.model_name == "google/gemma-3-1b-pt"
    (tmp_path / name / "config.json").unlink()
    assert load_sae(tmp_path / name).layer == 10  # by the path


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        (
            {"hf_hook_point_out": "model.layers.9.mlp.output"},
            {},
            "is a transcoder to model.layers.9.mlp.output",
        ),
        ({"affine_connection": True}, {}, "affine_connection=true"),
        ({}, {"affine_skip_connection": torch.ones(D_IN, D_IN)}, "affine_skip_connection"),
        ({}, {"w_dec": torch.ones(D_SAE, 3, D_IN)}, "decodes to several layers"),
        ({}, {"extra": torch.ones(2)}, "has the tensor extra"),
        ({"architecture": "topk"}, {}, "architecture='topk'"),
    ],
)
def test_what_gemma_scope_2_adds_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], more: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(SaerlError, match=message):
        load_sae(gemma_scope_2(tmp_path / "sae", config, **more))


def test_transcoders_are_known_by_their_path(tmp_path: Path) -> None:
    for maker, name in ((gemma_scope, "gemma-scope-2b-pt-transcoders"), (gemma_scope_2, "transcoder_all")):
        with pytest.raises(SaerlError, match="is a transcoder by its path"):
            load_sae(maker(tmp_path / name / "layer_1"))


def test_llama_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = load_sae(llama_scope(tmp_path / "L15R"))
    loaders = serve(monkeypatch, tmp_path)
    theirs = by_saelens(loaders, "llama_scope", "fnlp/Llama3_1-8B-Base-LXR-8x", "L15R", math.sqrt(D_IN) / 7)
    assert_equal(ours, theirs, 5 * torch.randn(80, D_IN))
    assert ours.layer == 16
    assert_equal(load_sae(tmp_path / "L15R" / "checkpoints" / "final.safetensors"), theirs)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_glu_encoder": True}, "use_glu_encoder=true"),
        ({"act_fn": "topk"}, "act_fn='topk'"),
        ({"norm_activation": "token-wise"}, "norm_activation='token-wise'"),
        ({"hook_point_out": "blocks.15.hook_mlp_out"}, "is a transcoder to blocks.15.hook_mlp_out"),
        ({"dataset_average_activation_norm": None}, "inputs times a factor that its files do not hold|lacks"),
    ],
)
def test_what_llama_scope_does_otherwise_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(SaerlError, match=message):
        load_sae(llama_scope(tmp_path / "sae", **config))


def test_llama_scope_as_language_model_saes_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "L9R"
    folder.mkdir()
    log_threshold = {"log_jumprelu_threshold": threshold().log()}
    save_file(linear() | log_threshold, folder / "sae_weights.safetensors")
    config = dict(d_model=D_IN, expansion_factor=D_SAE / D_IN, hook_point_in="blocks.9.hook_resid_post")
    config |= dict(hook_point_out="blocks.9.hook_resid_post", norm_activation="dataset-wise")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SaerlError, match="factor that its files do not hold"):
        load_sae(folder)
    norms = {"dataset_average_activation_norm": {"blocks.9.hook_resid_post": 7.0}}
    (folder / "config.json").write_text(json.dumps(config | norms))
    ours = load_sae(folder)
    loaders = serve(monkeypatch, tmp_path)
    name, repo = "llama_scope_r1_distill", "fnlp/Llama-Scope-R1-Distill"
    assert_equal(ours, by_saelens(loaders, name, repo, "L9R", math.sqrt(D_IN) / 7), 5 * torch.randn(80, D_IN))
    assert ours.layer == 10


def states() -> dict[str, dict[str, Any]]:
    """What ``state_dict`` of each class of dictionary_learning holds."""
    parts, lin = tensors(), linear()
    encoder = {name: lin[name] for name in ("encoder.weight", "encoder.bias", "decoder.weight")}
    batch = {"k": torch.tensor(4, dtype=torch.int), "threshold": torch.tensor(1.5)}
    gate = {"gate_bias": torch.randn(D_SAE), "mag_bias": torch.randn(D_SAE), "r_mag": torch.randn(D_SAE) / 2}
    bare = {name: tensor for name, tensor in encoder.items() if name != "encoder.bias"}
    return {
        "AutoEncoder": encoder | {"bias": parts["b_dec"]},
        "AutoEncoderTopK": encoder | {"b_dec": parts["b_dec"]} | batch,
        "BatchTopKSAE": encoder | {"b_dec": parts["b_dec"]} | batch,
        "MatryoshkaBatchTopKSAE": parts | batch | {"group_sizes": torch.tensor([20, 20])},
        "JumpReluAutoEncoder": parts | {"threshold": threshold()},
        "GatedAutoEncoder": bare | gate | {"decoder_bias": parts["b_dec"]},
    }


@pytest.mark.parametrize("kind", list(states()))
def test_dictionary_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    k = {"k": 4} if "TopK" in kind else {}
    ours = load_sae(dictionary_learning(tmp_path / "trainer_0", kind, states()[kind], **k))
    loaders = serve(monkeypatch, tmp_path)
    assert_equal(ours, by_saelens(loaders, "dictionary_learning_1", "canrager/lm_sae", "trainer_0"))
    assert ours.layer == 4 and ours.cfg.model_name == "org/tiny"


def test_dictionary_learning_of_the_april_update_subtracts_nothing(tmp_path: Path) -> None:
    parts = tensors()
    ours = load_sae(dictionary_learning(tmp_path / "ae", "AutoEncoderNew", linear()))
    x = torch.randn(9, D_IN)
    want = (x @ parts["W_enc"] + parts["b_enc"]).relu()
    torch.testing.assert_close(dense(ours, x), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours(x).detach(), want @ parts["W_dec"] + parts["b_dec"], atol=1e-4, rtol=1e-4)


def test_other_places_and_classes_of_dictionary_learning(tmp_path: Path) -> None:
    state = states()["AutoEncoder"]
    mlp = load_sae(
        dictionary_learning(tmp_path / "mlp", "AutoEncoder", state, submodule_name="mlp_out_layer_3")
    )
    assert mlp.layer is None and "mlp_out_layer_3" in (mlp.cfg.hook_name or "")
    with pytest.raises(SaerlError, match="is a CrossCoder, which is not supported"):
        load_sae(dictionary_learning(tmp_path / "cross", "CrossCoder", state))
    with pytest.raises(SaerlError, match="has the tensor b_skip"):
        load_sae(dictionary_learning(tmp_path / "skip", "AutoEncoder", state | {"b_skip": torch.ones(2)}))


def test_qwen_scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
    root.mkdir()
    parts = tensors()
    turned = {name: parts[name].t().contiguous() for name in ("W_enc", "W_dec")}
    torch.save(parts | turned, root / "layer7.sae.pt")
    ours = load_sae(root / "layer7.sae.pt")
    theirs = by_saelens(serve(monkeypatch, root), "qwen_scope", f"Qwen/{root.name}", "layer7.sae.pt")
    assert_equal(ours, theirs)
    assert ours.layer == 8 and ours.k == 5
    assert_equal(load_sae(root), theirs)  # the one file of a folder
    (tmp_path / "layer7.sae.pt").write_bytes((root / "layer7.sae.pt").read_bytes())
    with pytest.raises(SaerlError, match="does not say how it encodes .*saerl sae convert"):
        load_sae(tmp_path / "layer7.sae.pt")  # k stood in the name of the repository


def openai(x: torch.Tensor, state: dict[str, Any], k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, reconstruction) as sparse_autoencoder/model.py computes them."""
    mean, std = torch.zeros(1), torch.ones(1)
    if k is not None:
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    latents = (x - state["pre_bias"]) @ state["encoder.weight"].t() + state["latent_bias"]
    if k is not None:
        values, indices = latents.topk(k)
        latents = torch.zeros_like(latents).scatter_(-1, indices, values.relu())
    latents = latents.relu()
    return latents, (latents @ state["decoder.weight"].t() + state["pre_bias"]) * std + mean


@pytest.mark.parametrize("k", [6, None])
def test_openai(tmp_path: Path, k: int | None) -> None:
    lin = linear()
    state: dict[str, Any] = {
        "pre_bias": lin["decoder.bias"],
        "latent_bias": lin["encoder.bias"],
        "encoder.weight": lin["encoder.weight"],
        "decoder.weight": lin["decoder.weight"],
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
        "activation": "ReLU" if k is None else "TopK",
    }
    if k is not None:
        state["activation_state_dict"] = {"k": k, "postact_fn": "ReLU"}
    folder = tmp_path / "resid_post_mlp_v5_32k" / "autoencoders"
    folder.mkdir(parents=True)
    torch.save(state, folder / "8.pt")
    ours = load_sae(folder / "8.pt")
    x = 4 * torch.randn(40, D_IN) + 1
    want, recon = openai(x, state, k)
    torch.testing.assert_close(dense(ours, x), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(x).detach(), recon, atol=1e-3, rtol=1e-3)
    assert ours.layer == 9
    for odd in ({"activation": "Identity"}, {"activation_state_dict": {"k": 2, "postact_fn": "Identity"}}):
        torch.save(state | odd, folder / "8.pt")
        with pytest.raises(SaerlError, match="'Identity', which is not supported"):
            load_sae(folder / "8.pt")


def test_goodfire(tmp_path: Path) -> None:
    state = {name.replace(".", "_linear."): tensor for name, tensor in linear().items()}
    torch.save(state, tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth")
    ours, parts, x = load_sae(tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth"), tensors(), torch.randn(9, D_IN)
    want = (x @ parts["W_enc"] + parts["b_enc"]).relu()
    torch.testing.assert_close(dense(ours, x), want, atol=1e-5, rtol=1e-4)
    assert ours.layer == 20 and not ours.cfg.apply_b_dec_to_input


class Surprise:
    """Something whose unpickling would run code."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("surprise"),))


def test_pickles_are_read_as_tensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(tensors() | {"odd": Surprise()}, "ae.pt")
    with pytest.raises(SaerlError, match=r"ae.pt do not load as plain tensors .*state_dict\(\)") as caught:
        load_sae("ae.pt")
    assert "\n" not in str(caught.value) and not Path("surprise").exists()
    assert "weights_only" not in str(caught.value)  # torch advises to run its code
    torch.save([torch.ones(2)], "list.pt")
    with pytest.raises(SaerlError, match="hold a list, not a dict of named tensors"):
        load_sae("list.pt")
    Path("bad.pt").write_text("no pickle")
    with pytest.raises(SaerlError, match="do not load as plain tensors"):
        load_sae("bad.pt")
    Path("bad.npz").write_text("no zip")
    with pytest.raises(SaerlError, match="are no readable arrays"):
        load_sae("bad.npz")
    np.savez("objects.npz", W_enc=np.array([{}], dtype=object))
    with pytest.raises(SaerlError, match="are no readable arrays .it has no arrays, or pickled objects"):
        load_sae("objects.npz")
    for name in ("pointer.npz", "pointer.pt", "pointer.safetensors"):
        Path(name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4\n")
        with pytest.raises(SaerlError, match="is a Git LFS pointer, not the file itself; fetch it"):
            load_sae(name)
    Path("notes.txt").write_text("hello")
    with pytest.raises(SaerlError, match="notes.txt is of a kind that holds no SAE"):
        load_sae("notes.txt")


def test_a_bare_state_dict_is_read_once_its_encoding_is_said(tmp_path: Path) -> None:
    for file, state in (("a.pt", tensors()), ("b.pth", {"state_dict": linear()}), ("c.pt", linear())):
        torch.save(state, tmp_path / file)
        with pytest.raises(
            SaerlError, match=r"does not say how it encodes \(architecture, apply_b_dec_to_input\)"
        ):
            load_sae(tmp_path / file)
        said = {"architecture": "topk", "k": 3, "apply_b_dec_to_input": True}
        ours, parts, x = load_sae(tmp_path / file, said), tensors(), torch.randn(9, D_IN)
        want = ((x - parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"]).relu().topk(3)
        torch.testing.assert_close(ours.encode(x).values, want.values, atol=1e-5, rtol=1e-4)


def test_folders_that_hold_none_or_several(tmp_path: Path) -> None:
    with pytest.raises(SaerlError, match="holds no SAE in a known layout .*hyperparams.json"):
        load_sae(tmp_path)
    gemma_scope(tmp_path / "b" / "x")
    with pytest.raises(SaerlError, match="holds SAEs below it; pass one of them, for example .*b/x"):
        load_sae(tmp_path / "b")
    for name in ("layer0.sae.pt", "layer1.sae.pt"):
        torch.save(tensors(), tmp_path / name)
    with pytest.raises(SaerlError, match="several SAEs"):
        load_sae(tmp_path)


def test_k_in_any_form_is_one_whole_number(tmp_path: Path) -> None:
    parts = {name: tensor for name, tensor in linear().items() if name != "decoder.bias"}
    parts["b_dec"] = tensors()["b_dec"]
    for number, k in enumerate((4, torch.tensor(4), torch.tensor([4]), torch.tensor(4.0))):
        ours = load_sae(dictionary_learning(tmp_path / str(number), "AutoEncoderTopK", parts | {"k": k}))
        assert ours.k == 4 and ours.layer == 4
    for name, k in (("half", torch.tensor(4.5)), ("two", torch.tensor([4, 5])), ("none", torch.tensor(0))):
        with pytest.raises(SaerlError, match="has k=.* must be a whole number above 0"):
            load_sae(dictionary_learning(tmp_path / name, "AutoEncoderTopK", parts | {"k": k}))
    openai = {"encoder.weight": tensors()["W_enc"].t(), "latent_bias": torch.zeros(D_SAE)}
    openai |= {"pre_bias": torch.zeros(D_IN), "activation": "TopK", "activation_state_dict": {}}
    torch.save(openai, tmp_path / "5.pt")
    with pytest.raises(SaerlError, match="has k=None"):
        load_sae(tmp_path / "5.pt")


def test_dictionary_learning_settings_that_do_not_fit(tmp_path: Path) -> None:
    parts = linear() | {"k": torch.tensor(4)}
    parts["b_dec"] = parts.pop("decoder.bias")
    with pytest.raises(SaerlError, match="says d_in=7 but its weights have 12"):
        load_sae(dictionary_learning(tmp_path / "a", "AutoEncoderTopK", parts, activation_dim=7))
    unset = parts | {"threshold": torch.tensor(-1.0)}
    with pytest.raises(SaerlError, match="threshold below 0, so its training never set one"):
        load_sae(dictionary_learning(tmp_path / "b", "BatchTopKSAE", unset))
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in parts.items() if name != "k"}
    assert load_sae(dictionary_learning(tmp_path / "c", "AutoEncoderTopK", compiled, k=4)).k == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"jump_relu_threshold": None}, "has jump_relu_threshold=None"),
        ({"dataset_average_activation_norm": {"in": 0}}, "dataset_average_activation_norm=0"),
        ({"dataset_average_activation_norm": {"in": "x"}}, "dataset_average_activation_norm='x'"),
        ({"dataset_average_activation_norm": [7]}, r"dataset_average_activation_norm=\[7\]"),
    ],
)
def test_llama_scope_settings_must_be_numbers(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(SaerlError, match=message):
        load_sae(llama_scope(tmp_path / "sae", **config))
    with pytest.raises(SaerlError, match=f"for example {tmp_path}/sae"):
        load_sae(tmp_path)


def test_weights_that_cannot_be_read_as_they_are(tmp_path: Path) -> None:
    said = {"architecture": "topk", "k": 3, "apply_b_dec_to_input": True}
    torch.save(linear() | {"encoder.weight": torch.eye(D_SAE, D_IN).to_sparse()}, tmp_path / "sparse.pt")
    with pytest.raises(SaerlError, match="encoder.weight is a sparse tensor"):
        load_sae(tmp_path / "sparse.pt", said)
    for number, name in enumerate(("W_enc", "W_dec"), 1):
        save_file({name: tensors()[name]}, tmp_path / f"sae_weights-0000{number}-of-00002.safetensors")
    (tmp_path / "sparse.pt").unlink()
    with pytest.raises(SaerlError, match="has its weights in parts, such as sae_weights-00001-of-00002"):
        load_sae(tmp_path)
