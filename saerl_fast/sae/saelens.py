"""What a SAELens configuration and its tensors mean, and which of them are followed exactly.

Every other format is first written as a SAELens 6 configuration with SAELens' tensor names
(``sae_lens/saes/*.py``, ``loading/pretrained_sae_loaders.py``), so that one list says what is understood: a
key or a tensor outside it is refused by its name, never dropped.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from saerl_fast.errors import SaerlError
from saerl_fast.sae.model import ARCHITECTURES, SAE, SAESpec

Weights = dict[str, Tensor]
Config = dict[str, Any]

_RESIDUAL_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_BLOCK_MODULE = re.compile(
    r"(?:.*\.)?(?:layers|h|blocks)(?:\.(\d+)|\[(\d+)\])(?:\.(output|input)(?:\[0\])?)?"
)
_NAMED_RESIDUAL = re.compile(r"resid_(pre|post)_layer_(\d+)")  # of dictionary_learning
_SPEC_KEYS = tuple(field.name for field in fields(SAESpec))  # of SAELens' metadata, those with a field here
LLM_KEYS = ("hook_name", "model_name", "dataset_path", "context_size", "model_from_pretrained_kwargs")
_LLM_KEYS = (*LLM_KEYS, "hook_head_index", "hook_name_out", "hf_hook_name", "neuronpedia_id", "prepend_bos")

# What the encoding depends on. The rest of a configuration is how it was trained, logged and stored.
_UNDERSTOOD = """
architecture d_in d_sae dtype device apply_b_dec_to_input normalize_activations reshape_activations
metadata k rescale_acts_by_decoder_norm
"""
# of SAELens 6's training classes
_OF_CLASSES = """
decoder_init_norm l1_coefficient lp_norm l1_warm_up_steps l0_coefficient l0_warm_up_steps target_l0
pre_act_loss_coefficient jumprelu_init_threshold jumprelu_bandwidth jumprelu_sparsity_loss_mode
jumprelu_tanh_scale jumprelu_ste_to_input topk_threshold_lr aux_loss_coefficient use_sparse_activations
matryoshka_widths use_matryoshka_aux_loss
"""
# metadata, which stood at the top level before version 6
_AT_THE_TOP = """
model_name hook_name hook_layer hook_point hook_point_layer hook_eval model_class_name prepend_bos
context_size dataset_path dataset_trust_remote_code neuronpedia_id sae_lens_version hf_hook_name
sae_lens_training_version seqpos_slice exclude_special_tokens model_kwargs
"""
# of the training run, all of which earlier versions wrote into cfg.json
_OF_RUNS = """
streaming is_dataset_tokenized use_cached_activations cached_activations_path b_dec_init_method
expansion_factor normalize_sae_decoder noise_scale from_pretrained_path decoder_orthogonal_init
decoder_heuristic_init decoder_heuristic_init_norm init_encoder_as_decoder_transpose n_batches_in_buffer
training_tokens total_training_tokens finetuning_tokens store_batch_size store_batch_size_prompts
train_batch_size train_batch_size_tokens act_store_device llm_device seed autocast autocast_lm
compile_llm llm_compilation_mode compile_sae sae_compilation_mode adam_beta1 adam_beta2
mse_loss_normalization scale_sparsity_penalty_by_decoder_norm lr lr_scheduler_name lr_warm_up_steps
lr_end lr_decay_steps n_restart_cycles finetuning_method use_ghost_grads feature_sampling_window
feature_sampling_method dead_feature_window dead_feature_threshold dead_feature_estimation_method
feature_reinit_scale resample_batches n_eval_batches eval_batch_size_prompts log_to_wandb logger
log_activations_store_to_wandb log_optimizer_state_to_wandb wandb_project wandb_id run_name wandb_entity
wandb_log_frequency eval_every_n_wandb_logs resume n_checkpoints checkpoint_path verbose
tokens_per_buffer use_activations_store n_running_sparsity sparsity_weight_init_method
activations_mixing_fraction save_final_checkpoint output_path resume_from_checkpoint
disable_concat_sequences sequence_separator_token prefetch_llm_batches
"""
_BEFORE_6 = ("activation_fn", "activation_fn_str", "activation_fn_kwargs", "finetuning_scaling_factor")
_NO_TWIN = {  # architectures that are refused, and why
    "abstopk": "keeps negative activations",
    "matching_pursuit": "encodes by iteration",
    "temporal": "reads earlier tokens by attention",
    "transcoder": "is a transcoder, which predicts another place of the model",
    "skip_transcoder": "is a transcoder, which predicts another place of the model",
    "jumprelu_transcoder": "is a transcoder, which predicts another place of the model",
    "jumprelu_skip_transcoder": "is a transcoder, which predicts another place of the model",
}
_SAME_STREAM = {"fold_ln", "fold_value_biases", "center_unembed", "refactor_factored_attn_matrices", "dtype"}
_SAME_STREAM |= {
    "device",
    "n_devices",
    "move_to_device",
    "trust_remote_code",
    "revision",
    "default_prepend_bos",
}
_LAYER_NORM = re.compile(r"(.*/)?(gpt2|pythia|gpt-neo|gelu-|solu-|tiny-stories|opt-)")


def build(where: str, config: Config, weights: Weights, *, scale: float | None = None) -> SAE:
    """The SAE of a SAELens configuration (of any version) and its tensors, float32 on the CPU.

    ``scale``: the factor on the input that ``expected_average_only_in`` stands for; it is folded in. Raises
    SaerlError, which ``where`` ("SAE /x/y") opens, for what would not be followed exactly.
    """
    said = config.get("metadata") or {}
    if not isinstance(said, dict):
        raise SaerlError(f"{where}: metadata in its configuration must be an object, not {said!r}")
    weights, metadata = dict(weights), dict(said)
    version = metadata.get("sae_lens_version") or config.get("sae_lens_version")
    if config.get("architecture") in _NO_TWIN:
        name = config["architecture"]
        raise SaerlError(f"{where} {_NO_TWIN[name]} ({name}), which is not supported")
    _check_keys(where, config)
    if not version or int(re.match(r"\d*", str(version)).group() or 0) < 6:  # type: ignore[union-attr]
        config, top = _modern(where, config)
        metadata = top | metadata
    metadata = {key: config[key] for key in _LLM_KEYS if config.get(key) is not None} | metadata
    _check_place(where, config, metadata)
    _check_k(where, config)
    architecture = str(config.get("architecture", "standard"))
    if architecture not in (*ARCHITECTURES, "matryoshka_batchtopk"):
        raise SaerlError(
            f"{where}: architecture {architecture!r} is not supported; use one of {', '.join(ARCHITECTURES)}"
        )
    architecture = "batchtopk" if architecture == "matryoshka_batchtopk" else architecture
    b_enc_needed = () if architecture == "gated" else ("b_enc",)
    need(where, weights, ("W_enc", "W_dec", "b_dec", *b_enc_needed))
    weights = {name: tensor.float() for name, tensor in weights.items()}
    for name, size, axis in (
        ("d_in", weights["W_enc"].shape[0], 0),
        ("d_sae", weights["W_enc"].shape[-1], 1),
    ):
        if config.get(name) not in (None, size):
            units = ("inputs", "features")[axis]
            raise SaerlError(
                f"{where}: its configuration says {name}={config[name]} but its weights have {size} {units}"
            )
    _no_scaling(where, weights)
    normalize = config.get("normalize_activations") or "none"
    if normalize == "expected_average_only_in":
        if scale is None:
            raise SaerlError(
                f"{where} was trained on inputs times a factor that its files do not hold "
                "(normalize_activations=expected_average_only_in); fold it in with SAELens' "
                'fold_activation_norm_scaling_factor, or put {"scaling_factor": ...} into '
                "activation_scaler.json beside cfg.json"
            )
        weights, normalize = _scaled(weights, number(where, "scaling_factor", scale)), "none"
    elif scale is not None:
        raise SaerlError(
            f"{where} has a factor on its input, which normalize_activations={normalize} does not use; "
            "delete activation_scaler.json if it is folded in"
        )
    apply_b_dec = config.get("apply_b_dec_to_input", True)
    rescale = config.get("rescale_acts_by_decoder_norm", False)
    for name, value in (("apply_b_dec_to_input", apply_b_dec), ("rescale_acts_by_decoder_norm", rescale)):
        if not isinstance(value, bool):
            raise SaerlError(f"{where} has {name}={value!r}, which must be true or false")
    if architecture == "gated":
        weights = _fold_gated(where, weights)
    elif architecture == "batchtopk" and "topk_threshold" in weights and "threshold" not in weights:
        weights, rescale = _fold_batchtopk(weights, rescale), False
    elif architecture == "jumprelu" and "log_threshold" in weights and "threshold" not in weights:
        weights["threshold"] = weights.pop("log_threshold").exp()
    if "threshold" in weights and weights["threshold"].numel() == 1:
        weights["threshold"] = weights["threshold"].reshape(1).expand(weights["W_enc"].shape[1]).clone()
    weights = _centred(where, weights, metadata, apply_b_dec, normalize)
    _none_left(where, architecture, weights)
    hook_name = metadata.get("hook_name")
    spec = SAESpec(
        architecture=architecture,
        k=config.get("k"),
        apply_b_dec_to_input=apply_b_dec,
        rescale_acts_by_decoder_norm=rescale,
        normalize_activations=normalize,
        hook_name=hook_name,
        hook_layer=metadata.get("saerl_hook_layer", layer_of_hook(hook_name)),
        model_name=metadata.get("model_name"),
        max_norm=metadata.get("saerl_max_norm"),
        metadata={key: value for key, value in metadata.items() if key not in _SPEC_KEYS},
    )
    try:
        return SAE(**weights, cfg=spec)
    except SaerlError as err:
        raise SaerlError(f"{where}: {err}") from None


def need(where: str, weights: Weights, names: tuple[str, ...]) -> None:
    """SaerlError for a missing tensor, and for one that is not finite."""
    missing = [name for name in names if name not in weights]
    if missing:
        raise SaerlError(
            f"{where} lacks {', '.join(missing)} (it has {', '.join(sorted(weights)) or 'nothing'})"
        )
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise SaerlError(f"{where}: {name} holds {kind}, not floating-point numbers; dequantise it first")
        if not torch.isfinite(tensor.float()).all():
            raise SaerlError(f"{where}: {name} holds NaN or infinite values; copy the checkpoint again")


def neutral(value: Any) -> bool:
    """Whether a setting says that nothing is to be done."""
    return value in (None, False, 0, "", "none", "None") or value in ([], {}, [None])


def layer_of_hook(name: str | None) -> int | None:
    """The residual stream a hook point or module name stands for; None if it is another place.

    "blocks.5.hook_resid_post" and the module "model.layers.5" (or its ".output") are 6 (after six blocks),
    "blocks.5.hook_resid_pre" and "model.layers.5.input" are 5, "hook_embed" and "embed_tokens" are 0.
    """
    name = re.sub(r"\.hook_sae_\w+$", "", (name or "").strip())  # which TransformerLens hangs behind a hook
    if name in ("hook_embed", "embed_tokens", "model.embed_tokens"):
        return 0
    if match := _RESIDUAL_HOOK.fullmatch(name):
        return int(match[1]) + (match[2] == "post")
    if match := _NAMED_RESIDUAL.fullmatch(name):
        return int(match[2]) + (match[1] == "post")
    if match := _BLOCK_MODULE.fullmatch(name):
        return int(match[1] or match[2]) + (match[3] != "input")
    return None


def number(where: str, name: str, value: Any, *, whole: bool = False) -> float:
    """A setting that is a finite number above 0 (``whole``: 1, 2, ...), also where it is a tensor."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
    if not fine or (whole and value != int(value)):
        raise SaerlError(f"{where} has {name}={value!r}, which must be a {'whole ' * whole}number above 0")
    return int(value) if whole else float(value)


def _check_keys(where: str, config: Config) -> None:
    listed = " ".join((_UNDERSTOOD, _OF_CLASSES, _AT_THE_TOP, _OF_RUNS))
    known = {*listed.split(), *_BEFORE_6, *_LLM_KEYS, "hook_point_head_index"}
    for name, value in config.items():
        if name not in known and not neutral(value):
            raise SaerlError(
                f"{where} has {name}={value!r} in its configuration, which is not understood; remove it if "
                "it does not change the encoding"
            )
    if not neutral(config.get("finetuning_scaling_factor")):
        raise SaerlError(f"{where} has finetuning_scaling_factor, which is not supported")


def _check_k(where: str, config: Config) -> None:
    """Make k of a TopK SAE an int; a k that would be dropped is refused."""
    architecture, k = config.get("architecture", "standard"), config.get("k")
    if architecture == "topk":
        config["k"] = number(where, "k", k, whole=True)
    elif k is not None and architecture == "standard":
        raise SaerlError(f"{where} has k={k!r}, which a standard SAE does not use; is its architecture topk?")


def _check_place(where: str, config: Config, metadata: Config) -> None:
    name = metadata.get("hook_name")
    if name is not None and not isinstance(name, str):
        raise SaerlError(f"{where} has hook_name={name!r}, which must be one hook point")
    if name is None and metadata.get("hook_layer", config.get("hook_layer")) is not None:
        layer = metadata.get("hook_layer", config.get("hook_layer"))
        raise SaerlError(
            f"{where} has hook_layer={layer!r} but no hook_name: before or after that block? Say it "
            f"once: `saerl sae convert ... hook_name=blocks.{layer}.hook_resid_post`, for example"
        )
    head = metadata.get("hook_head_index", config.get("hook_point_head_index"))
    if head is not None:
        raise SaerlError(f"{where} reads one attention head (hook_head_index={head}), not a residual stream")
    if not neutral(config.get("reshape_activations")):
        raise SaerlError(f"{where} reads reshaped attention heads (hook_z), not a residual stream")
    out = metadata.get("hook_name_out")
    if out not in (None, metadata.get("hook_name")):
        raise SaerlError(f"{where} is a transcoder to {out}, which is not supported")


def _modern(where: str, config: Config) -> tuple[Config, Config]:
    """(a configuration from before SAELens 6 with the names and defaults of 6, its metadata)."""
    renames = {"activation_fn_str": "activation_fn", "hook_point": "hook_name"}
    config = {renames.get(key, key): value for key, value in config.items()}
    kwargs = dict(config.get("activation_fn_kwargs") or {})
    activation = config.get("activation_fn") or "relu"
    if activation == "topk":
        config["architecture"], config["k"] = "topk", kwargs.pop("k", None) or config.get("k")
    elif activation != "relu":
        raise SaerlError(f"{where} has activation_fn={activation!r}; only relu and topk are supported")
    kwargs = {name: value for name, value in kwargs.items() if name not in ("k", "use_sparse_activations")}
    post = str(kwargs.pop("postact_fn", "ReLU"))
    odd = {name: value for name, value in kwargs.items() if not neutral(value)}
    if odd or "relu" not in post.lower():
        said = ", ".join(f"{key}={value!r}" for key, value in odd.items()) or f"postact_fn={post}"
        raise SaerlError(f"{where} has activation_fn_kwargs with {said}, which is not supported")
    if isinstance(config.get("normalize_activations"), bool):
        on = config["normalize_activations"]
        config["normalize_activations"] = "expected_average_only_in" if on else "none"
    if "hook_z" in (config.get("hook_name") or ""):
        config.setdefault("reshape_activations", "hook_z")
    metadata = {key: config[key] for key in _LLM_KEYS if config.get(key) is not None}
    return config, metadata


def _no_scaling(where: str, weights: Weights) -> None:
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        factor = weights.pop(name, None)
        if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
            raise SaerlError(f"{where} has a tensor {name} other than 1, which is not supported")


def _scaled(weights: Weights, scale: float) -> Weights:
    """The SAE of x * scale as one of x, as SAELens' ``fold_activation_norm_scaling_factor``."""
    changed = {"W_enc": weights["W_enc"] * scale, "W_dec": weights["W_dec"] / scale}
    return weights | changed | {"b_dec": weights["b_dec"] / scale}


def _fold_gated(where: str, weights: Weights) -> Weights:
    """A gated SAE (arXiv 2404.16014) as the JumpReLU SAE that it is.

    The gate x W + b_gate > 0 and the magnitude relu(x W exp(r_mag) + b_mag) read one product, so the gate
    is a threshold on the magnitude's pre-activation p: p > b_mag - b_gate exp(r_mag).
    """
    need(where, weights, ("b_gate", "b_mag", "r_mag"))
    rest = {name: tensor for name, tensor in weights.items() if name not in ("b_gate", "b_mag", "r_mag")}
    factor = weights["r_mag"].exp()
    threshold = weights["b_mag"] - weights["b_gate"] * factor
    return rest | {"W_enc": weights["W_enc"] * factor, "b_enc": weights["b_mag"], "threshold": threshold}


def _fold_batchtopk(weights: Weights, rescale: bool) -> Weights:
    """A training checkpoint has one threshold, on activations times decoder norms: fold both, as SAELens."""
    weights = dict(weights)
    threshold = weights.pop("topk_threshold").expand(weights["W_enc"].shape[1]).clone()
    if rescale:
        norms = weights["W_dec"].norm(dim=-1).clamp(min=1e-8)
        weights |= {"W_enc": weights["W_enc"] * norms, "b_enc": weights["b_enc"] * norms}
        weights["W_dec"] = weights["W_dec"] / norms[:, None]
    return weights | {"threshold": threshold}


def _centred(where: str, weights: Weights, metadata: Config, apply_b_dec: bool, normalize: str) -> Weights:
    """Follow ``center_writing_weights``: the SAE read a residual stream with each token's mean taken off.

    TransformerLens takes it off by changing a LayerNorm model's weights; here x - mean(x) is folded into
    W_enc. Reconstructions stay those of the centred stream. It changes nothing about a model with RMSNorm.
    """
    options = dict(metadata.get("model_from_pretrained_kwargs") or {})
    odd = {name: v for name, v in options.items() if name not in _SAME_STREAM and not neutral(v)}
    centred = odd.pop("center_writing_weights", False)
    if odd:
        said = ", ".join(f"{name}={value!r}" for name, value in odd.items())
        raise SaerlError(
            f"{where} was trained on a model loaded with model_from_pretrained_kwargs {said}, which is not "
            "supported"
        )
    if not centred:
        return weights
    name, hook = str(metadata.get("model_name")), str(metadata.get("hook_name"))
    followed = _LAYER_NORM.match(name.lower()) and layer_of_hook(hook) is not None
    if not followed or normalize == "constant_norm_rescale":
        raise SaerlError(
            f"{where} was trained with model_from_pretrained_kwargs center_writing_weights=True at {hook} of "
            f"{name}; that is followed for residual streams of GPT-2 and Pythia only"
        )
    metadata.pop("model_from_pretrained_kwargs")  # folded: not to be done twice
    W_enc = weights["W_enc"] - weights["W_enc"].mean(0)
    b_enc = weights["b_enc"]
    if apply_b_dec:  # b_dec itself is not centred
        b_enc = b_enc - weights["b_dec"].mean() * weights["W_enc"].sum(0)
    return weights | {"W_enc": W_enc, "b_enc": b_enc}


def _none_left(where: str, architecture: str, weights: Weights) -> None:
    wanted = {"W_enc", "b_enc", "W_dec", "b_dec"}
    if architecture in ("jumprelu", "batchtopk", "gated"):
        wanted.add("threshold")
    extra = sorted(set(weights) - wanted)
    if extra:
        raise SaerlError(
            f"{where} has the tensor {extra[0]}, which a {architecture} SAE does not use here; it would be "
            "dropped"
        )
