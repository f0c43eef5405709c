"""SAE files by their layout: a folder or a file in, a SAELens configuration and SAELens' tensors out.

| layout | files |
|---|---|
| SAELens | cfg.json, sae_weights.safetensors |
| sparsify (EleutherAI) | cfg.json, sae.safetensors |
| Gemma Scope | params.npz |
| Gemma Scope 2 | params.safetensors (config.json) |
| Llama Scope | hyperparams.json, checkpoints/final.safetensors |
| Llama Scope, later (Language-Model-SAEs) | config.json, sae_weights.safetensors |
| dictionary_learning | config.json, ae.pt |
| Qwen-Scope, OpenAI, Goodfire, and any state dict | one .pt, .pth, .bin, .npz or .safetensors file |

Configurations follow SAELens' loaders (``sae_lens/loading/pretrained_sae_loaders.py``), which download and
take much from the names of repositories; here the files say it, or the user. Pickled files are read by
torch.load with weights_only, which runs no code.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from saerl_fast.errors import SaerlError, Unreadable
from saerl_fast.fileio import check_fetched, damaged, read_json, read_tensors
from saerl_fast.sae.saelens import Config, Weights, need, neutral, number

SAELENS_WEIGHTS = "sae_weights.safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
FILES = (*PICKLES, ".npz", ".safetensors")
Found = tuple[Config, Weights, float | None]  # the last: the factor on the input, where the files hold one

_MADE_BY = "saerl sae train"


def read(path: Path) -> Found:
    """What is in a folder or a file; SaerlError where no layout fits or a setting is not followed."""
    if path.is_file():
        return _from_file(path)
    for names, reader in FOLDERS:
        if all((path / name).is_file() for name in names):
            return reader(path)
    single = sorted(file for file in path.iterdir() if file.suffix in FILES)
    if len(single) == 1:
        config, weights, scale = _from_file(single[0])
        if config["architecture"] is None and (path / "cfg.json").is_file():
            config = _config(path / "cfg.json")
        return config, weights, scale
    if any(re.search(r"-\d+-of-\d+$", file.stem) for file in single):
        raise SaerlError(f"SAE folder {path} has its weights in parts, such as {single[0].name}; join them")
    below = ("*/", "*/*/", "*/*/*/")
    marks = {marks[-1] for marks, _ in FOLDERS}
    inside = sorted({p.parents[m.count("/")] for m in marks for deep in below for p in path.glob(deep + m)})
    if inside or single:
        example = (inside or single)[0]
        what = "several SAEs" if single else "SAEs below it"
        raise SaerlError(f"SAE folder {path} holds {what}; pass one of them, for example {example}")
    for names, _ in FOLDERS:  # half of a layout
        absent = [name for name in names if not (path / name).is_file()]
        if len(names) > len(absent) == 1:
            raise SaerlError(
                f"SAE folder {path} has {names[0]} or its weights, but {absent[0]} does not exist"
            )
    known = "; ".join(" and ".join(names) for names, _ in FOLDERS)
    raise SaerlError(f"SAE folder {path} holds no SAE in a known layout ({known}, or one {', '.join(FILES)})")


def _saelens(folder: Path) -> Found:
    scale = None
    if (folder / "activation_scaler.json").is_file():  # of a SAELens training checkpoint
        scale = _config(folder / "activation_scaler.json").get("scaling_factor")
    return _config(folder / "cfg.json"), _tensors(folder / SAELENS_WEIGHTS), scale


def _sparsify(folder: Path) -> Found:
    """``sparsify/sparse_coder.py``: b_dec is subtracted, and the folder is named after the module."""
    where, config, raw = f"SAE {folder}", _config(folder / "cfg.json"), _tensors(folder / "sae.safetensors")
    known = {"d_in", "k", "num_latents", "expansion_factor", "activation", "normalize_decoder", "multi_topk"}
    for flag, value in config.items():
        if flag not in known and not neutral(value):
            raise SaerlError(f"{where} has {flag}={json.dumps(value)}, which is not supported")
    if config.get("activation", "topk") != "topk":
        raise SaerlError(
            f"{where} has activation={config['activation']!r}; only sparsify's topk is supported"
        )
    if "k" not in config:
        raise SaerlError(f"SAE config {folder / 'cfg.json'} has no k; it is not a sparsify checkpoint")
    latents = config.get("num_latents") or (config.get("d_in") or 0) * (config.get("expansion_factor") or 0)
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    weights = _renamed(where, raw, names, turned=("W_enc",))
    made = {
        "architecture": "topk",
        "k": config["k"],
        "d_in": config.get("d_in"),
        "d_sae": latents or None,
    }
    return _six(made, apply_b_dec=True, hook=folder.resolve().name), weights, None


def _gemma_scope(folder: Path) -> Found:
    """JumpReLU (arXiv 2408.05147). Hook and layer stand in the path of the download, not in the file."""
    return _from_file(folder / "params.npz")


def _gemma_scope_2(folder: Path) -> Found:
    where, config = f"SAE {folder}", {}
    if (folder / "config.json").is_file():
        config = _config(folder / "config.json")
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise SaerlError(f"{where} has architecture={config['architecture']!r}, which is not supported")
    place, out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if out not in (None, place):
        raise SaerlError(f"{where} is a transcoder to {out}, which is not supported")
    _no_flags(where, config, "")
    _no_transcoder(where, folder)
    weights = _gemma_names(where, _tensors(folder / "params.safetensors"))
    match = re.fullmatch(r"model\.layers\.(\d+)\.output", str(place))
    hook = f"blocks.{match[1]}.hook_resid_post" if match else place or _hook_in_path(folder)
    made = {"architecture": "jumprelu"}
    return _six(made, apply_b_dec=False, hook=hook, model=config.get("model_name")), weights, None


def _llama_scope(folder: Path) -> Found:
    """arXiv 2410.20526; as SAELens, the factor on the input also multiplies the one threshold."""
    where, config = f"SAE {folder}", _config(folder / "hyperparams.json")
    flags = (
        "use_decoder_bias decoder_exactly_fixed_norm sparsity_include_decoder_norm use_batch_norm_mse "
        "init_encoder_with_decoder_transpose use_ghost_grads apply_decoder_bias_to_pre_encoder"
    )
    _no_flags(where, config, flags)
    _one_place(where, config)
    if config.get("act_fn", "jumprelu") != "jumprelu":
        raise SaerlError(f"{where} has act_fn={config['act_fn']!r}; only jumprelu is supported")
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
    raw = _tensors(folder / "checkpoints" / "final.safetensors")
    weights = _renamed(where, raw, names | {"decoder.bias": "b_dec"}, turned=("W_enc", "W_dec"))
    scale = _dataset_scale(where, config, weights["W_enc"].shape[0])
    threshold = number(where, "jump_relu_threshold", config.get("jump_relu_threshold"))
    weights["threshold"] = torch.tensor(threshold * (1.0 if scale is None else scale))
    normalize = _normalize(config)
    made = {"architecture": "jumprelu", "normalize_activations": normalize}
    before = bool(config.get("apply_decoder_bias_to_pre_encoder"))
    return _six(made, apply_b_dec=before, hook=config.get("hook_point_in")), weights, scale


def _language_model_saes(folder: Path) -> Found:
    where, config = f"SAE {folder}", _config(folder / "config.json")
    _no_flags(where, config, "use_decoder_bias sparsity_include_decoder_norm force_unit_decoder_norm")
    _one_place(where, config)
    raw = _tensors(folder / SAELENS_WEIGHTS)
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
    names |= {"decoder.bias": "b_dec", "log_jumprelu_threshold": "log_threshold"}
    weights = _renamed(where, raw, names, turned=("W_enc", "W_dec"))
    if "log_threshold" not in weights:
        raise SaerlError(f"{where} has no log_jumprelu_threshold; only jumprelu is supported")
    scale = _dataset_scale(where, config, weights["W_enc"].shape[0])
    normalize = _normalize(config)
    made = {"architecture": "jumprelu", "normalize_activations": normalize}
    return _six(made, apply_b_dec=False, hook=config.get("hook_point_in")), weights, scale


def _dictionary_learning(folder: Path) -> Found:
    """``dictionary_learning/dictionary.py`` and ``trainers/*.py`` (arXiv 2501.17148 trained hundreds)."""
    where, config = f"SAE {folder}", _config(folder / "config.json")
    trainer, raw = config.get("trainer"), _tensors(folder / "ae.pt")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise SaerlError(
            f"{folder / 'config.json'} has no trainer.dict_class; it is no dictionary_learning config"
        )
    kind = str(trainer["dict_class"])
    kinds = {
        "AutoEncoder": "standard",
        "AutoEncoderNew": "standard",
        "AutoEncoderTopK": "topk",
        "BatchTopKSAE": "batchtopk",
        "MatryoshkaBatchTopKSAE": "batchtopk",
        "JumpReluAutoEncoder": "jumprelu",
        "GatedAutoEncoder": "gated",
    }
    if kind not in kinds:
        raise SaerlError(f"{where} is a {kind}, which is not supported; use one of {', '.join(kinds)}")
    k = raw.pop("k", trainer.get("k"))
    made: Config = {"architecture": kinds[kind], "k": k if kinds[kind] == "topk" else None}
    made |= {"d_in": trainer.get("activation_dim"), "d_sae": trainer.get("dict_size")}
    raw.pop("group_sizes", None)  # of Matryoshka training
    if kinds[kind] == "topk":  # a threshold that its own encode leaves alone
        raw.pop("threshold", None)
    names = {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc", "bias": "b_dec"}
    names |= {"decoder_bias": "b_dec", "decoder.bias": "b_dec", "mag_bias": "b_mag", "gate_bias": "b_gate"}
    weights = _renamed(where, raw, names, turned=("W_enc", "W_dec"))
    if kinds[kind] == "batchtopk" and float(weights.get("threshold", torch.zeros(1)).min()) < 0:
        raise SaerlError(f"{where} has a threshold below 0, so its training never set one")
    subtracted = kind not in ("JumpReluAutoEncoder", "AutoEncoderNew")
    layer, module = trainer.get("layer"), str(trainer.get("submodule_name") or "resid_post")
    side = {"out": "post", "in": "pre"}.get((config.get("buffer") or {}).get("io", "out"))
    hook = f"{module} of layer {layer}"
    if layer is not None and side is not None and module.startswith("resid_post"):
        hook = f"blocks.{layer}.hook_resid_{side}"
    return _six(made, apply_b_dec=subtracted, hook=hook, model=trainer.get("lm_name")), weights, None


FOLDERS = (
    (("cfg.json", SAELENS_WEIGHTS), _saelens),
    (("cfg.json", "sae.safetensors"), _sparsify),
    (("hyperparams.json", "checkpoints/final.safetensors"), _llama_scope),
    (("config.json", SAELENS_WEIGHTS), _language_model_saes),
    (("config.json", "ae.pt"), _dictionary_learning),
    (("params.safetensors",), _gemma_scope_2),
    (("params.npz",), _gemma_scope),
)


# --- single files ------------------------------------------------------------------------------------


def _from_file(file: Path) -> Found:
    """By the names of its tensors; what no name says (k, the architecture) is left for the user to say."""
    where, raw = f"SAE {file}", _tensors(file)
    beside = {
        "sae_weights.safetensors",
        "sae.safetensors",
        "ae.pt",
        "params.safetensors",
        "final.safetensors",
    }
    folder = file.parent.parent if file.name == "final.safetensors" else file.parent
    if file.name in beside and any(all((folder / m).is_file() for m in marks) for marks, _ in FOLDERS):
        return read(folder)
    path, stem = str(file.resolve()), file.name
    if "pre_bias" in raw and "latent_bias" in raw:
        return _openai(where, raw, file)
    if "encoder_linear.weight" in raw:  # Goodfire: ReLU
        names = {"encoder_linear.weight": "W_enc", "decoder_linear.weight": "W_dec"}
        names |= {"encoder_linear.bias": "b_enc", "decoder_linear.bias": "b_dec"}
        weights = _renamed(where, raw, names, turned=("W_enc", "W_dec"))
        found = re.search(r"-l(\d+)", stem)
        hook = f"blocks.{found[1]}.hook_resid_post" if found else None
        return _six({"architecture": "standard"}, apply_b_dec=False, hook=hook), weights, None
    if file.suffix == ".npz" and "threshold" in raw:
        _no_transcoder(where, file)
        weights = _gemma_names(where, raw)
        hook = _hook_in_path(file)
        if hook == "hook_embed":  # trained on embeddings before Gemma multiplies them by sqrt(d_in)
            root = math.sqrt(weights["W_enc"].shape[0])
            weights |= {"W_enc": weights["W_enc"] / root, "W_dec": weights["W_dec"] * root}
        return _six({"architecture": "jumprelu"}, apply_b_dec=False, hook=hook), weights, None
    names = {
        "encoder.weight": "W_enc",
        "encoder.bias": "b_enc",
        "decoder.weight": "W_dec",
        "decoder.bias": "b_dec",
    }
    weights = _renamed(where, raw, names, turned=("W_enc", "W_dec"))
    need(where, weights, ("W_enc", "W_dec", "b_dec"))
    config: Config = {
        "architecture": None,
        "apply_b_dec_to_input": None,
        "metadata": {"sae_lens_version": "6"},
    }
    d_in = weights["b_dec"].shape[0]
    if weights["W_enc"].shape[0] != d_in and weights["W_enc"].shape[-1] == d_in and "W_enc" in raw:
        weights |= {name: weights[name].t().contiguous() for name in ("W_enc", "W_dec")}
        layer, k = re.search(r"layer(\d+)\.sae\.pt$", stem), re.search(r"L0_(\d+)", path)
        if layer and k:  # Qwen-Scope, whose k stands in the name of the repository
            config = _six({"architecture": "topk", "k": int(k[1])}, apply_b_dec=False, hook=None)
        if layer:
            config["metadata"]["hook_name"] = f"blocks.{layer[1]}.hook_resid_post"
    return config, weights, None


def _openai(where: str, raw: dict[str, Any], file: Path) -> Found:
    """``sparse_autoencoder/model.py`` of openai/sparse_autoencoder (arXiv 2406.04093): TopK normalises."""
    kind, state = raw.pop("activation", "ReLU"), dict(raw.pop("activation_state_dict", {}))
    for name in ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"):
        raw.pop(name, None)
    post = state.pop("postact_fn", "ReLU")
    if kind not in ("TopK", "ReLU") or post != "ReLU":
        said = f"activation={kind!r}" if kind not in ("TopK", "ReLU") else f"postact_fn={post!r}"
        raise SaerlError(f"{where} has {said}, which is not supported")
    if "decoder.linear.weight" in raw:  # tied
        raw["decoder.weight"] = raw.pop("decoder.linear.weight").t()
    raw.setdefault("decoder.weight", raw["encoder.weight"].t())
    names = {
        "encoder.weight": "W_enc",
        "decoder.weight": "W_dec",
        "latent_bias": "b_enc",
        "pre_bias": "b_dec",
    }
    weights = _renamed(where, raw, names, turned=("W_enc", "W_dec"))
    made: Config = {"architecture": "standard"}
    if kind == "TopK":
        made = {"architecture": "topk", "k": state.get("k"), "normalize_activations": "layer_norm"}
    hook = None
    if "resid_post_mlp" in str(file) and re.fullmatch(r"\d+", file.stem):
        hook = f"blocks.{file.stem}.hook_resid_post"
    return _six(made, apply_b_dec=True, hook=hook), weights, None


# --- parts -------------------------------------------------------------------------------------------


def _six(config: Config, *, apply_b_dec: bool, hook: str | None, model: str | None = None) -> Config:
    """``config`` as SAELens 6 would have written it."""
    metadata = {"sae_lens_version": "6", "hook_name": hook, "model_name": model}
    return config | {"apply_b_dec_to_input": apply_b_dec, "metadata": metadata}


def _renamed(where: str, raw: dict[str, Any], names: dict[str, str], turned: tuple[str, ...]) -> Weights:
    """Tensors under SAELens' names; ``turned``: transposed where the name was another one."""
    odd = next((name for name, value in raw.items() if not isinstance(value, torch.Tensor)), None)
    if odd is not None:
        raise SaerlError(f"{where} holds {odd}={str(raw[odd])[:40]!r}, which is not understood")
    weights: Weights = {}
    for name, tensor in raw.items():
        if tensor.layout != torch.strided:
            raise SaerlError(f"{where}: {name} is a sparse tensor; save it with to_dense()")
        name = re.sub(r"^(_orig_mod\.|module\.)+", "", name)  # of torch.compile and of data parallelism
        new = names.get(name, name)
        weights[new] = tensor.t().contiguous() if new in turned and name != new else tensor
    return weights


def _gemma_names(where: str, raw: dict[str, Any]) -> Weights:
    if "affine_skip_connection" in raw:
        raise SaerlError(
            f"{where} has the tensor affine_skip_connection, so it is a transcoder: not supported"
        )
    weights = _renamed(where, raw, {"w_enc": "W_enc", "w_dec": "W_dec"}, turned=())
    if "W_dec" in weights and weights["W_dec"].dim() != 2:
        raise SaerlError(
            f"{where} decodes to several layers (W_dec {tuple(weights['W_dec'].shape)}): not supported"
        )
    return weights


def _hook_in_path(path: Path) -> str | None:
    """The hook point that Gemma Scope's folders name, as far as they do."""
    text = path.resolve().as_posix()
    layer = re.search(r"layer_(\d+)", text)
    if re.search(r"/embedding/", text):
        return "hook_embed"
    if layer and re.search(r"resid_post|(pt|it)-res", text):
        return f"blocks.{layer[1]}.hook_resid_post"
    if layer and re.search(r"mlp_out|(pt|it)-mlp", text):
        return f"blocks.{layer[1]}.hook_mlp_out"
    if layer and re.search(r"attn_out|(pt|it)-att", text):
        return f"blocks.{layer[1]}.attn.hook_z"
    return None


def _no_transcoder(where: str, path: Path) -> None:
    if re.search(r"transcoder|clt", path.resolve().as_posix()):
        raise SaerlError(f"{where} is a transcoder by its path, which is not supported")


def _one_place(where: str, config: Config) -> None:
    out = config.get("hook_point_out")
    if out not in (None, config.get("hook_point_in")):
        raise SaerlError(f"{where} is a transcoder to {out}, which is not supported")


def _no_flags(where: str, config: Config, fine: str) -> None:
    for name, value in config.items():
        if value is True and name not in fine.split():
            raise SaerlError(f"{where} has {name}=true in its configuration, which is not supported")


def _normalize(config: Config) -> str:
    return "none" if neutral(config.get("norm_activation", "dataset-wise")) else "expected_average_only_in"


def _dataset_scale(where: str, config: Config, d_in: int) -> float | None:
    """sqrt(d_in) over the average norm of the training data, which Llama Scope's files hold."""
    kind = config.get("norm_activation", "dataset-wise")
    if neutral(kind):
        return None
    if kind != "dataset-wise":
        raise SaerlError(f"{where} has norm_activation={kind!r}; only dataset-wise is supported")
    norms = config.get("dataset_average_activation_norm") or {}
    if isinstance(norms, dict):
        norms = norms.get("in", norms.get(config.get("hook_point_in")))
    if norms is None:
        return None
    return math.sqrt(d_in) / number(where, "dataset_average_activation_norm", norms)


def _config(file: Path) -> Config:
    return read_json(file, _MADE_BY)


def _tensors(file: Path) -> dict[str, Any]:
    """The named tensors (and, in OpenAI's files, a few plain values) of a file."""
    check_fetched(file)
    if file.suffix == ".safetensors":
        return _safetensors(file)
    if file.suffix == ".npz":
        return _arrays(file)
    if file.suffix not in PICKLES:
        raise SaerlError(f"{file} is of a kind that holds no SAE; pass a folder or one of {', '.join(FILES)}")
    try:
        value = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as err:  # a cut or crafted pickle raises what it likes; torch advises to run it
        if isinstance(fault := damaged(file, err, ""), Unreadable):
            raise fault from err
        raise SaerlError(
            f"SAE weights {file} do not load as plain tensors (the file is cut off, or a pickle of something "
            "else, which may run code); save its state_dict() with torch.save where it came from"
        ) from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise SaerlError(f"SAE weights {file} hold a {type(value).__name__}, not a dict of named tensors")
    nested = [key for key in ("state_dict", "model_state_dict") if isinstance(value.get(key), dict)]
    return value[nested[0]] if nested and len(value) == 1 else value


def _safetensors(file: Path) -> dict[str, Any]:
    return read_tensors(file, "copy these SAE weights again")[0]


def _arrays(file: Path) -> dict[str, Any]:
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as data:
            return {name: torch.from_numpy(data[name]) for name in data.files}
    except Exception as err:  # of the archive, of an array, or of a dtype that torch lacks
        if isinstance(fault := damaged(file, err, ""), Unreadable):
            raise fault from err
        why = "it has no arrays, or pickled objects" if "allow_pickle" in str(err) else err
        raise SaerlError(f"SAE weights {file} are no readable arrays ({why}); copy them again") from None
