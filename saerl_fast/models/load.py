"""Loading a causal language model and its tokenizer."""

from __future__ import annotations

import logging
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saerl_fast.config import ModelConfig
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import check_fetched
from saerl_fast.hub import at_home, hub_access, is_local
from saerl_fast.models import checks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_MERGE = "merge the adapter into its model first (peft's merge_and_unload, then save_pretrained)"
# What forward is to give, whatever the configuration asks for: the loss of a router's balance, computed with
# masks of other shapes than ours, fails in the middle of decoding; the others only take memory.
_OUTPUTS = {
    "return_dict": True,
    **dict.fromkeys(("output_router_logits", "output_hidden_states", "output_attentions"), False),
}


def load_model(cfg: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in ``eval()`` mode on its device, and its tokenizer, ready for batched generation.

    ``cfg.path`` is a hub id, a folder in transformers format, a ``.gguf`` file, or a folder (or hub id)
    whose GGUF is named by ``cfg.gguf_file``; a folder with one GGUF and no ``config.json`` needs no name.
    The tokenizer pads on the left and has a pad token (its end-of-sequence token where it had none).
    Raises SaerlError when nothing loadable is found or the tokenizer does not fit the model.
    """
    source, gguf_file = _locate(cfg)
    device = resolve_device(cfg.device)
    dtype = resolve_dtype(cfg.dtype, device)
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise SaerlError(
            'transformers is not installed; run `pip install -e ".[all]"` in the clone of saerl-fast'
        ) from None
    if gguf_file is not None:
        try:
            import gguf
        except ImportError:
            raise SaerlError(f"reading {gguf_file} needs the gguf package; run `pip install gguf`") from None
        if not hasattr(gguf, "__version__"):  # transformers asks; Python 3.10 has no other record
            gguf.__version__ = version("gguf")  # type: ignore[attr-defined]

    for file in sorted(Path(source).glob("*.*")):  # none of a hub id
        check_fetched(file)
    if gguf_file is None:
        checks.check_stored(cfg.path, sorted(Path(source).glob("model*.safetensors")))

    common: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
    if gguf_file is not None:
        common["gguf_file"] = gguf_file
    checks.check_attention(cfg.attn)
    extra: dict[str, Any] = {} if cfg.attn is None else {"attn_implementation": cfg.attn}
    extra |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which are refused by name
    with hub_access(not is_local(source)) as reached:
        try:
            if gguf_file is None:
                checks.check_kind(cfg.path, AutoConfig.from_pretrained(source, **common))
            tokenizer = AutoTokenizer.from_pretrained(source, **common)
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **common, **extra)
        except SaerlError:
            raise
        except Exception as err:  # OSError, ValueError, KeyError, ImportError, hub errors ...
            raise SaerlError(_load_failure(cfg.path, source, err, reached)) from err

    model, found = loaded
    if gguf_file is not None:  # the weights are ordinary tensors now; the mark would forbid saving them
        for name, value in (("hf_quantizer", None), ("is_quantized", False)):
            setattr(model, name, value)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config

    for part in (model.config, model.config.get_text_config()):
        for name, value in _OUTPUTS.items():
            if getattr(part, name, value) != value:
                setattr(part, name, value)
    checks.check_weights(cfg.path, found)
    if getattr(model, "is_quantized", False):
        raise SaerlError(f"model {cfg.path} is quantised; use a copy with plain weights")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise SaerlError(f"model {cfg.path} has an adapter beside its weights; {_MERGE}, or remove it")
    _prepare_tokenizer(tokenizer, model, cfg.path)
    checks.check_embeddings(model, tokenizer, cfg.path)
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(device)
    checks.check_finite(model, cfg.path)
    checks.check_causal(model.eval(), cfg.path)
    return model, tokenizer


def resolve_device(name: str) -> torch.device:
    """``auto`` (CUDA when there is one), ``cpu``, ``cuda`` or ``cuda:N`` as a device that exists."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise SaerlError(f"device {name!r} does not exist here ({found} CUDA devices found); use auto or cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU and bfloat16 on a GPU; the other names are torch's."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def named_width(cfg: ModelConfig) -> int | None:
    """The hidden size in the configuration of the model ``cfg``, without its weights; None: unknown."""
    return _named(cfg, "hidden_size")


def check_named_layer(cfg: ModelConfig, layer: int | None) -> None:
    """SaerlError for a layer (sae.layer) beyond the blocks in the configuration of the model ``cfg``."""
    blocks = None if layer is None else _named(cfg, "num_hidden_layers")
    if layer is not None and blocks is not None and layer > blocks:
        raise SaerlError(f"sae.layer={layer} does not exist in a model of {blocks} blocks; use 0 to {blocks}")


def _named(cfg: ModelConfig, name: str) -> int | None:
    source, gguf_file = _locate(cfg)
    if gguf_file is not None:
        return None
    from transformers import AutoConfig

    with hub_access(not is_local(source)):
        try:
            found = AutoConfig.from_pretrained(source, trust_remote_code=cfg.trust_remote_code)
            return int(getattr(found.get_text_config(), name))
        except Exception:  # loading the model itself says what is wrong
            return None


def _locate(cfg: ModelConfig) -> tuple[str, str | None]:
    """(folder or hub id, GGUF file name or None), checked as far as the local disk allows."""
    if not cfg.path:
        raise SaerlError("model.path is empty; set it to a hub id, a folder or a .gguf file")
    path = at_home(cfg.path)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SaerlError(
                f"model file {path} is not a .gguf; pass the folder that holds config.json instead"
            )
        return str(path.parent), path.name
    if path.is_dir():
        if cfg.gguf_file is not None:
            if not (path / cfg.gguf_file).is_file():
                raise SaerlError(f"model folder {path} holds no {cfg.gguf_file}; correct model.gguf_file")
            return str(path), cfg.gguf_file
        if (path / "config.json").is_file():
            return str(path), None
        files = sorted(p.name for p in path.glob("*.gguf"))
        if len(files) == 1:
            return str(path), files[0]
        if files:
            raise SaerlError(
                f"model folder {path} holds {len(files)} GGUF files; set model.gguf_file={files[0]}"
            )
        if (path / "adapter_config.json").is_file():
            raise SaerlError(f"model folder {path} holds an adapter; {_MERGE}")
        raise SaerlError(
            f"model folder {path} holds neither config.json nor a .gguf file; pass a model's folder"
        )
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(cfg.path) or cfg.path.count("/") > 1:
        raise SaerlError(
            f"model {cfg.path} does not exist; pass an existing folder, a .gguf file or a hub id"
        )
    return cfg.path, cfg.gguf_file


def _load_failure(path: str, source: str, err: Exception, reached: bool) -> str:
    whole = " ".join(str(err).split())
    first = whole[:200] or type(err).__name__
    if isinstance(err, (KeyError, AttributeError)):  # which say no more than the word that is unknown
        first = f"{type(err).__name__}: {first}"
    if "trust_remote_code" in whole or "contains custom code" in whole:
        return f"model {path} runs its own code; set model.trust_remote_code=true if you trust it"
    if "attn_implementation" in whole or "FlashAttention" in whole:
        return f"model {path} cannot be loaded with this model.attn ({first}); set model.attn=sdpa or eager"
    if Path(source).is_dir():
        advice = "check that its files are complete, and the values in its config.json"
        if (Path(source) / "adapter_config.json").is_file():
            advice = _MERGE
        elif "does not recognize this architecture" in whole:
            advice = "another version of transformers may know it"
        elif isinstance(err, ImportError) or "pip install" in whole:
            advice = "install that, or use a copy with plain weights"
        elif "tokenizer" in first:
            advice = "put the tokenizer's files into the folder"
        return f"model {path} could not be loaded ({first}); {advice}"
    if not reached:
        first = "it cannot be reached from here, and its cache does not hold the model"
    return (
        f"model {path} is no local folder and could not be fetched from the hub ({first}); "
        "check the spelling and the network, or pass a folder"
    )


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, path: str) -> None:
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends] * (ends is not None)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None and not ends:
            raise SaerlError(
                f"the tokenizer of {path} has neither a pad nor an end token; give it one of them"
            )
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(ends[0])
    if tokenizer.eos_token_id is None and not ends:
        log.warning("model %s has no end token: every completion runs to its limit of tokens", path)
    tokenizer.padding_side = "left"
