"""SAE checkpoints: SAELens and sparsify folders in, SAELens folders out. Safetensors only.

SAELens (``sae_lens/saes/sae.py``, ``loading/pretrained_sae_loaders.py``): cfg.json and
sae_weights.safetensors with W_enc, b_enc, W_dec, b_dec (and threshold). sparsify
(``sparsify/sparse_coder.py``): cfg.json and sae.safetensors with encoder.weight [d_sae, d_in],
encoder.bias, W_dec, b_dec; it subtracts b_dec from the input and numbers hook points by module name.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import atomic_path, read_json, write_json
from saerl_fast.sae.model import SAE, SAESpec

SAELENS_WEIGHTS = "sae_weights.safetensors"
SPARSIFY_WEIGHTS = "sae.safetensors"
_SAELENS_VERSION = "6.54.12"  # whose configuration layout save_sae writes
_RESIDUAL_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_BLOCK_MODULE = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)")
_LLM_KEYS = ("hook_name", "model_name", "dataset_path", "context_size")  # top-level before SAELens 6
_SPEC_KEYS = tuple(field.name for field in fields(SAESpec))  # of SAELens' metadata, those with a field here
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_MADE_BY = "saerl sae train"


def find_folder(path: str | Path) -> Path:
    """The folder of an SAE; SaerlError when there is none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise SaerlError(
            f"SAE folder {folder} does not exist; pass one that holds cfg.json and safetensors weights"
        )
    return folder


def load_sae(path: str | Path) -> SAE:
    """The SAE in a SAELens or sparsify folder, float32 on the CPU.

    Raises SaerlError on a missing or incomplete folder, pickled weights, wrong shapes, and on
    architectures or settings whose encoding would not be reproduced exactly.
    """
    folder = find_folder(path)
    if (folder / SAELENS_WEIGHTS).is_file():
        return _from_saelens(folder, _read_config(folder), _read_weights(folder / SAELENS_WEIGHTS))
    if (folder / SPARSIFY_WEIGHTS).is_file():
        return _from_sparsify(folder, _read_config(folder), _read_weights(folder / SPARSIFY_WEIGHTS))
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickled:
        raise SaerlError(
            f"SAE folder {folder} holds pickled weights ({pickled[0]}), which may run code when loaded; "
            "convert them to safetensors"
        )
    inside = sorted(p.parent.name for p in folder.glob("*/cfg.json"))
    if inside:
        raise SaerlError(
            f"SAE folder {folder} holds several SAEs; pass one of them, for example {folder / inside[0]}"
        )
    raise SaerlError(
        f"SAE folder {folder} holds neither {SAELENS_WEIGHTS} nor {SPARSIFY_WEIGHTS}; check the path"
    )


def save_sae(sae: SAE, folder: str | Path) -> Path:
    """Write a folder that SAELens' ``SAE.load_from_disk`` loads with equal encodings, and return it.

    BatchTopK is written as the JumpReLU SAE it is at inference, as SAELens itself does.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    architecture = "jumprelu" if sae.architecture == "batchtopk" else sae.architecture
    weights = {name: getattr(sae, name).detach() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if architecture == "jumprelu":
        assert sae.threshold is not None
        weights["threshold"] = sae.threshold.detach()
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
        "normalize_activations": sae.cfg.normalize_activations,
        "reshape_activations": "none",
        "metadata": _metadata(sae),
    }
    if architecture == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": sae.cfg.rescale_acts_by_decoder_norm}
    with atomic_path(folder / SAELENS_WEIGHTS) as temporary:
        save_file({name: w.float().cpu().contiguous() for name, w in weights.items()}, temporary)
    write_json(folder / "cfg.json", config)
    return folder


def _from_saelens(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> SAE:
    metadata = dict(config.get("metadata") or {})
    version = metadata.get("sae_lens_version") or config.get("sae_lens_version")
    if not version or int(re.match(r"\d*", str(version)).group() or 0) < 6:  # type: ignore[union-attr]
        config = _modern(config)
        metadata = {key: config[key] for key in _LLM_KEYS if key in config} | metadata
    if config.get("reshape_activations", "none") != "none":
        raise SaerlError(f"SAE {folder} reads reshaped attention heads (hook_z), not a residual stream")
    architecture = config.get("architecture", "standard")
    _need(folder, weights, ("W_enc", "b_enc", "W_dec", "b_dec"))
    W_enc, b_enc, W_dec = weights["W_enc"], weights["b_enc"], weights["W_dec"]
    threshold = weights.get("threshold")
    rescale = bool(config.get("rescale_acts_by_decoder_norm", False))
    if architecture == "batchtopk" and threshold is None and "topk_threshold" in weights:
        # a training checkpoint: one threshold, on activations times decoder norms; fold both, as SAELens does
        if rescale:
            norms = W_dec.norm(dim=-1).clamp(min=1e-8)
            W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
        threshold = weights["topk_threshold"].float().expand(W_enc.shape[1]).clone()
    k = config.get("k")
    hook_name = metadata.get("hook_name") or config.get("hook_name")
    cfg = SAESpec(
        architecture=architecture,
        k=int(k) if architecture == "topk" and k is not None else k,
        apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)),
        rescale_acts_by_decoder_norm=rescale and architecture == "topk",
        normalize_activations=config.get("normalize_activations") or "none",
        hook_name=hook_name,
        hook_layer=metadata.get("saerl_hook_layer", layer_of_hook(hook_name)),
        model_name=metadata.get("model_name"),
        max_norm=metadata.get("saerl_max_norm"),
        metadata={key: value for key, value in metadata.items() if key not in _SPEC_KEYS},
    )
    return _build(folder, config, W_enc, b_enc, W_dec, weights["b_dec"], threshold, cfg)


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """A SAELens configuration from before 6.0, with the names and defaults of 6.x."""
    config = {{"activation_fn_str": "activation_fn"}.get(k, k): v for k, v in config.items()}
    kwargs = config.get("activation_fn_kwargs") or {}
    if config.get("activation_fn") == "topk" and kwargs.get("k") is not None:
        config["architecture"], config["k"] = "topk", kwargs["k"]
    if isinstance(config.get("normalize_activations"), bool):
        config["normalize_activations"] = (
            "expected_average_only_in" if config["normalize_activations"] else "none"
        )
    if "hook_z" in (config.get("hook_name") or config.get("hook_point") or ""):
        config.setdefault("reshape_activations", "hook_z")
    config.setdefault("hook_name", config.get("hook_point"))
    keep = ("architecture", "k", "d_in", "d_sae", "apply_b_dec_to_input", "normalize_activations")
    return {key: config[key] for key in (*keep, "reshape_activations", *_LLM_KEYS) if key in config}


def _from_sparsify(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> SAE:
    for flag in ("signed", "transcode", "skip_connection", "embed_skip", "gram_lookup"):
        if config.get(flag):
            raise SaerlError(
                f"SAE {folder} has {flag}=true, which is not supported; use a plain TopK checkpoint"
            )
    if config.get("activation", "topk") != "topk":
        raise SaerlError(
            f"SAE {folder} has activation={config['activation']!r}; only sparsify's topk is supported"
        )
    _need(folder, weights, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
    if "k" not in config:
        raise SaerlError(f"SAE config {folder / 'cfg.json'} has no k; it is not a sparsify checkpoint")
    latents = config.get("num_latents") or config.get("d_in", 0) * config.get("expansion_factor", 0)
    if latents:
        config = {**config, "d_sae": latents}
    hook_name = folder.resolve().name
    cfg = SAESpec(k=int(config["k"]), hook_name=hook_name, hook_layer=layer_of_hook(hook_name))
    encoder = weights["encoder.weight"].t().contiguous()
    return _build(
        folder, config, encoder, weights["encoder.bias"], weights["W_dec"], weights["b_dec"], None, cfg
    )


def _build(
    folder: Path,
    config: dict[str, Any],
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    threshold: Tensor | None,
    cfg: SAESpec,
) -> SAE:
    for name, size, axis in (("d_in", W_enc.shape[0], "inputs"), ("d_sae", W_enc.shape[-1], "features")):
        if config.get(name) not in (None, size):
            raise SaerlError(
                f"SAE {folder}: cfg.json says {name}={config[name]} but the weights have {size} {axis}"
            )
    try:
        return SAE(
            W_enc.float(),
            b_enc.float(),
            W_dec.float(),
            b_dec.float(),
            threshold=None if threshold is None else threshold.float(),
            cfg=cfg,
        )
    except SaerlError as err:
        raise SaerlError(f"SAE {folder}: {err}") from None


def layer_of_hook(name: str | None) -> int | None:
    """The residual stream a hook point or module name stands for; None if it is another place.

    "blocks.5.hook_resid_post" and the module "model.layers.5" are 6 (after six blocks),
    "blocks.5.hook_resid_pre" is 5, "hook_embed" and "embed_tokens" are 0.
    """
    name = name or ""
    if name in ("hook_embed", "embed_tokens"):
        return 0
    if match := _RESIDUAL_HOOK.fullmatch(name):
        return int(match[1]) + (match[2] == "post")
    if match := _BLOCK_MODULE.fullmatch(name):
        return int(match[1]) + 1
    return None


def _metadata(sae: SAE) -> dict[str, Any]:
    layer = sae.layer
    hook = sae.cfg.hook_name
    if hook is None and layer is not None:
        hook = f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"
    own = {"hook_name": hook, "model_name": sae.cfg.model_name, "saerl_max_norm": sae.cfg.max_norm}
    kept = {key: value for key, value in sae.cfg.metadata.items() if not key.startswith("sae_lens_")}
    if hook is not None and layer_of_hook(hook) != layer:
        own["saerl_hook_layer"] = layer
    return {**kept, **{k: v for k, v in own.items() if v is not None}, "sae_lens_version": _SAELENS_VERSION}


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "cfg.json", _MADE_BY)
    if not isinstance(config, dict):
        raise SaerlError(
            f"SAE config {folder / 'cfg.json'} must hold an object, not a {type(config).__name__}"
        )
    return config


def _read_weights(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file, device="cpu")
    except (SafetensorError, OSError) as err:
        raise SaerlError(
            f"SAE weights {file} are not readable safetensors ({err}); copy them again"
        ) from None


def _need(folder: Path, weights: dict[str, Tensor], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in weights]
    if missing:
        raise SaerlError(f"SAE {folder} lacks {', '.join(missing)} (it has {', '.join(sorted(weights))})")
    bad = [name for name in names if not torch.isfinite(weights[name].float()).all()]
    if bad:
        raise SaerlError(f"SAE {folder}: {bad[0]} holds NaN or infinite values; copy the checkpoint again")
