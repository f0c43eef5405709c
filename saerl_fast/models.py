"""Loading a causal language model, and the few facts about its layout that the rest needs.

Everything that reads a model's insides (hidden-state capture, SAE training, rollouts) goes through
``decoder`` and ``blocks``, so a new architecture is supported in one place.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from saerl_fast.config import ModelConfig
from saerl_fast.errors import SaerlError, halved
from saerl_fast.fileio import check_fetched
from saerl_fast.hub import at_home, hub_access, is_local

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_BLOCK_LISTS = ("layers", "h", "blocks", "block", "layer")  # Llama/Qwen/Gemma/NeoX; GPT-2; others; BERT
_MERGE = "merge the adapter into its model first (peft's merge_and_unload, then save_pretrained)"
_OTHER_HEAD = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice|RewardModel)$")
_OF_A_WEIGHT = re.compile(r"\.(weight[._]\w+|SCB)$")  # scales and the like, which from_pretrained leaves out
# What forward is to give, whatever the configuration asks for: the loss of a router's balance, computed with
# masks of other shapes than ours, fails in the middle of decoding; the others only take memory.
_OUTPUTS = {
    "return_dict": True,
    **dict.fromkeys(("output_router_logits", "output_hidden_states", "output_attentions"), False),
}
# How far a token may move the logits before it, relative to the largest: rounding. In a bidirectional model
# it moves them by .005 (tiny, untrained) to 1.
_AHEAD = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.05}


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
        _check_stored(cfg.path, sorted(Path(source).glob("model*.safetensors")))

    common: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
    if gguf_file is not None:
        common["gguf_file"] = gguf_file
    _check_attention(cfg.attn)
    extra: dict[str, Any] = {} if cfg.attn is None else {"attn_implementation": cfg.attn}
    extra |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which are refused by name
    with hub_access(not is_local(source)) as reached:
        try:
            if gguf_file is None:
                _check_kind(cfg.path, AutoConfig.from_pretrained(source, **common))
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
    _check_weights(cfg.path, found)
    if getattr(model, "is_quantized", False):
        raise SaerlError(f"model {cfg.path} is quantised; use a copy with plain weights")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise SaerlError(f"model {cfg.path} has an adapter beside its weights; {_MERGE}, or remove it")
    _prepare_tokenizer(tokenizer, model, cfg.path)
    _check_embeddings(model, tokenizer, cfg.path)
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(device)
    _check_finite(model, cfg.path)
    check_causal(model.eval(), cfg.path)
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


def decoder(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """The module that embeds ids and runs the blocks (no language-model head), and its blocks in order.

    Hidden state L is the output of block L - 1.
    """
    n_layers = n_blocks(model)
    of = getattr(model, "get_input_embeddings", None)
    embeds = of() if callable(of) else None
    path = next((name for name, module in model.named_modules() if module is embeds), "").split(".")
    for depth in range(len(path), -1, -1):  # outwards from the embeddings, which no encoder of pictures has
        body = model.get_submodule(".".join(path[:depth]))
        for module in body.modules():
            for name in _BLOCK_LISTS:
                found = getattr(module, name, None)
                if isinstance(found, nn.ModuleList) and len(found) == n_layers:
                    return (module if embeds is None else body), found
    raise SaerlError(
        f"{type(model).__name__} has no list of {n_layers} decoder blocks named {', '.join(_BLOCK_LISTS)}; "
        "use a decoder-only transformers model"
    )


def n_blocks(model: nn.Module) -> int:
    """Number of decoder blocks, from the model's text configuration."""
    return int(_text_config(model).num_hidden_layers)


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream, the ``d_in`` an SAE must have."""
    return int(_text_config(model).hidden_size)


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


def max_positions(model: nn.Module) -> int | None:
    """Longest sequence the model has position embeddings for; None where it has no such limit.

    LongRoPE turns every position by other angles once a sequence is longer than the original limit, so that
    the log-probabilities of its first tokens change, too: there the original limit is the longest.
    """
    config = _text_config(model)
    limit = getattr(config, "max_position_embeddings", None)
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):  # one for all layers, or one for each type
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            first = rope.get("original_max_position_embeddings")
            limit = min(filter(None, (limit, first)), default=None)
    return int(limit) if limit and limit > 0 else None


def check_fit(model: nn.Module, rows: Sequence[Sequence[int]], room: int = 0, what: str = "prompt") -> None:
    """SaerlError when a row of token ids is empty, or longer than the model's positions less ``room``."""
    limit = max_positions(model)
    for number, row in enumerate(rows):
        if not row:
            raise SaerlError(f"{what} {number} has no tokens; remove it from the pool")
        if limit is not None and len(row) + room > limit:
            new = f" and {room} new ones" if room else ""
            raise SaerlError(
                f"{what} {number} has {len(row)} tokens{new}, the model reads {limit}; "
                "lower data.max_prompt_tokens" + (" or train.rollout.max_new_tokens" if room else "")
            )


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = True
) -> list[list[int]]:
    """Token ids of each text, unpadded.

    ``special`` adds the special tokens that the tokenizer puts in front (such as a beginning-of-sequence
    token, once if the text already starts with it). What it puts behind is left out, whether or not it is
    declared as special: a text that ends in an end-of-sequence token (``add_eos_token``) has nothing to be
    continued with.
    """
    if not texts:
        return []
    if halved("".join(texts)):
        text = next(text for text in texts if halved(text))
        raise SaerlError(f"the text {text[:60]!r} holds half of a surrogate pair, no character; mend it")
    if not special:
        return [list(row) for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    *ids, probe = (list(row) for row in tokenizer([*texts, "a"], add_special_tokens=True)["input_ids"])
    letter = list(tokenizer(["a"], add_special_tokens=False)["input_ids"][0])
    fits = (at for at in range(len(probe), 0, -1) if probe[at - len(letter) : at] == letter)
    behind = len(probe) - next(fits, len(probe)) if letter else 0
    if behind:
        ids = [row[:-behind] for row in ids]
    bos = tokenizer.bos_token_id
    if bos is not None:
        ids = [row[1:] if len(row) > 1 and row[0] == bos and row[1] == bos else row for row in ids]
    return ids


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise SaerlError(f"{type(model).__name__} has no config; pass a transformers model")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


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


def _check_attention(name: str | None) -> None:
    """SaerlError for an attention that transformers lacks; kernels of the hub ("a/b") are left to it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as KNOWN

    names = ["eager", *KNOWN.valid_keys()]
    if name is not None and "/" not in name and name not in names:
        raise SaerlError(f"model.attn={name} is unknown; choose one of {', '.join(sorted(names))}")


def _check_kind(path: str, settings: Any) -> None:
    """SaerlError for a configuration of anything but a causal language model with plain weights.

    Some quantised weights can be made plain when they are loaded; ``save_pretrained`` then writes them
    quantised, beside a configuration that does not say so.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    own = "AutoModelForCausalLM" in (getattr(settings, "auto_map", None) or {})
    head = next((n for n in getattr(settings, "architectures", None) or () if _OTHER_HEAD.search(n)), None)
    kind = f"has the head of a {head}" if head else None
    if getattr(settings, "is_encoder_decoder", False):
        kind = f"is an encoder-decoder ({settings.model_type})"
    elif not own and type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = f"is a {settings.model_type}, of which transformers has no causal language model"
    if quantised := getattr(settings, "quantization_config", None):
        method = (isinstance(quantised, dict) and quantised.get("quant_method")) or "by no named method"
        raise SaerlError(f"model {path} is quantised ({method}); use a copy with plain weights")
    if kind:
        raise SaerlError(f"model {path} {kind}; use a decoder-only causal language model")


def _check_stored(path: str, files: Sequence[Path]) -> None:
    """SaerlError for a weight that is no floating-point number in its file, which from_pretrained would make
    one of without its scale."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        with suppress(SafetensorError, OSError), safe_open(file, framework="pt") as stored:  # said by loading
            names = stored.keys()
            for name in names:
                kind = stored.get_slice(name).get_dtype()
                if name.endswith(".weight") and not kind.startswith(("F", "BF")):
                    raise SaerlError(
                        f"the files of model {path} hold {name} as {kind}: it is quantised, which its "
                        "configuration does not say; use a copy with plain weights"
                    )


def _check_weights(path: str, found: dict[str, Any]) -> None:
    """SaerlError for weights that the files lack, which would be random; a warning for those left over."""
    wrong = {name[0]: f"is {tuple(name[1])}, not {tuple(name[2])}" for name in found["mismatched_keys"]}
    wrong |= dict.fromkeys(found["missing_keys"], "is missing")
    if wrong:
        name = min(wrong)
        more = f" (and {len(wrong) - 1} more are wrong)" if len(wrong) > 1 else ""
        raise SaerlError(
            f"the files of model {path} do not fit its configuration: the weight {name} {wrong[name]}{more}; "
            "use a complete checkpoint of a causal language model"
        )
    extra = sorted(found["unexpected_keys"])
    if scale := next(filter(_OF_A_WEIGHT.search, extra), None):
        raise SaerlError(
            f"the files of model {path} hold {scale}, which its configuration does not name: the weight "
            "beside it is quantised, or to be made from several; use a copy with plain weights"
        )
    if extra:
        log.warning("model %s: %d weights in its files are not used, such as %s", path, len(extra), extra[0])


@torch.no_grad()
def check_causal(model: Any, path: str) -> None:
    """SaerlError when the model ``path`` cannot read ids, or a token changes the predictions before it."""
    rows = model.get_input_embeddings().weight.shape[0]
    pad = getattr(_text_config(model), "pad_token_id", None) or 0
    *row, other = [token for token in range(1, 8) if token != pad][:6]
    padded = [*row[:2], pad, *row[3:]]
    ids = torch.tensor([row, [*row[:4], other], padded], device=model.device) % rows
    try:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        shorter = model(input_ids=ids[2:, :4], use_cache=False).logits.float()
    except torch.OutOfMemoryError:
        raise
    except Exception as err:
        reason = (str(err).strip() or type(err).__name__).splitlines()[0][:150].rstrip(".")
        raise SaerlError(
            f"model {path} cannot read a row of tokens ({reason}); use a decoder-only causal language model"
        ) from err
    ahead = (logits[0, :-1] - logits[1, :-1]).abs().max() / logits.abs().max()
    if ahead > _AHEAD.get(model.dtype, 0.05):
        raise SaerlError(
            f"model {path} is no causal language model: a token changes the predictions before it; "
            "use a decoder-only one"
        )
    if (logits[2, 3] - shorter[0, 3]).abs().max() > 0.3 * logits.abs().max():  # XLM counts what is no padding
        raise SaerlError(
            f"model {path} takes its pad token ({pad}) for padding also where it is sampled: what it "
            "predicts then changes with the tokens that follow; use another model"
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


def _check_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """A tokenizer with more ids than embedding rows would index out of bounds in the middle of a run."""
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    rows = embeddings.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise SaerlError(
            f"the tokenizer of {path} has ids up to {largest} but the model embeds {rows}; "
            "use the tokenizer the model was trained with, or resize the embeddings and save the model again"
        )
    output = model.get_output_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and output is not None and output.weight is not embeddings:
        model.tie_weights()


def _check_finite(model: nn.Module, path: str) -> None:
    """One NaN makes every logit NaN. Sums are looked at first: they cost one pass and no memory."""
    named = [(name, p.data) for name, p in model.named_parameters() if p.is_floating_point()]
    for name, weight in named:
        exact = weight if weight.element_size() > 1 else weight.float()  # float8 cannot be summed
        if not exact.sum(dtype=torch.float32).isfinite() and not exact.isfinite().all():
            count = int((~exact.isfinite()).sum())
            raise SaerlError(
                f"model {path}: {count} of {weight.numel()} values of {name} are NaN or infinite; copy it "
                "again, or use another checkpoint"
            )
