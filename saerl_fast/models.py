"""Loading a causal language model, and the few facts about its layout that the rest needs.

Everything that reads a model's insides (hidden-state capture, SAE training, rollouts) goes through
``decoder`` and ``blocks``, so a new architecture is supported in one place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from saerl_fast.config import LoRAConfig, ModelConfig
from saerl_fast.errors import SaerlError, halved
from saerl_fast.hub import at_home, hub_access, is_local

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_BLOCK_LISTS = ("layers", "h", "blocks", "block")  # Llama/Qwen/Gemma/NeoX; GPT-2; others


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
        from transformers import AutoModelForCausalLM, AutoTokenizer
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

    common: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
    if gguf_file is not None:
        common["gguf_file"] = gguf_file
    extra = {} if cfg.attn is None else {"attn_implementation": cfg.attn}
    with hub_access(not is_local(source)) as reached:
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **common)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **common, **extra)
        except SaerlError:
            raise
        except Exception as err:  # OSError, ValueError, KeyError, ImportError, hub errors ...
            raise SaerlError(_load_failure(cfg.path, source, err, reached)) from err

    if gguf_file is not None:  # the weights are ordinary tensors now; the mark would forbid saving them
        for name, value in (("hf_quantizer", None), ("is_quantized", False)):
            setattr(model, name, value)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config

    _prepare_tokenizer(tokenizer, cfg.path)
    _check_embeddings(model, tokenizer, cfg.path)
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(device)  # type: ignore[arg-type]  # the stub of this method is wrong
    _check_finite(model, cfg.path)
    return model.eval(), tokenizer


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
    for module in model.modules():
        for name in _BLOCK_LISTS:
            found = getattr(module, name, None)
            if isinstance(found, nn.ModuleList) and len(found) == n_layers:
                return module, found
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
    source, gguf_file = _locate(cfg)
    if gguf_file is not None:
        return None
    from transformers import AutoConfig

    with hub_access(not is_local(source)):
        try:
            found = AutoConfig.from_pretrained(source, trust_remote_code=cfg.trust_remote_code)
            return int(found.get_text_config().hidden_size)
        except Exception:  # loading the model itself says what is wrong
            return None


def max_positions(model: nn.Module) -> int | None:
    """Longest sequence the model has position embeddings for; None where it has no such limit."""
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    return int(limit) if limit else None


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
    token, once if the text already starts with it). What it puts behind is left out: a text that ends in an
    end-of-sequence token (``add_eos_token``) has nothing to be continued with.
    """
    if not texts:
        return []
    if halved("".join(texts)):
        text = next(text for text in texts if halved(text))
        raise SaerlError(f"the text {text[:60]!r} holds half of a surrogate pair, no character; mend it")
    if not special:
        return [list(row) for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    *ids, probe = (list(row) for row in tokenizer([*texts, "a"], add_special_tokens=True)["input_ids"])
    behind = _specials_behind(tokenizer, probe)
    if behind:
        ids = [row[:-behind] for row in ids]
    bos = tokenizer.bos_token_id
    if bos is not None:
        ids = [row[1:] if len(row) > 1 and row[0] == bos and row[1] == bos else row for row in ids]
    return ids


def _specials_behind(tokenizer: PreTrainedTokenizerBase, row: list[int]) -> int:
    """How many special tokens end ``row``, the ids of a letter."""
    known = {tokenizer.bos_token_id, getattr(tokenizer, "eos_token_id", None)}
    known |= set(getattr(tokenizer, "all_special_ids", ()))
    known.discard(getattr(tokenizer, "unk_token_id", None))  # which the letter itself may be
    real = [at for at, token in enumerate(row) if token not in known]
    return len(row) - 1 - real[-1] if real else 0


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
        raise SaerlError(
            f"model folder {path} holds neither config.json nor a .gguf file; pass a model's folder"
        )
    if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(cfg.path) or cfg.path.count("/") > 1:
        raise SaerlError(
            f"model {cfg.path} does not exist; pass an existing folder, a .gguf file or a hub id"
        )
    return cfg.path, cfg.gguf_file


def _load_failure(path: str, source: str, err: Exception, reached: bool) -> str:
    first = " ".join(str(err).split())[:200] or type(err).__name__
    if "trust_remote_code" in first:
        return f"model {path} runs its own code; set model.trust_remote_code=true if you trust it"
    if Path(source).is_dir():
        return f"model {path} could not be loaded ({first}); check that its files are complete"
    if not reached:
        first = "it cannot be reached from here, and its cache does not hold the model"
    return (
        f"model {path} is no local folder and could not be fetched from the hub ({first}); "
        "check the spelling and the network, or pass a folder"
    )


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise SaerlError(
                f"the tokenizer of {path} has neither a pad nor an end token; give it one of them"
            )
        tokenizer.pad_token = tokenizer.eos_token
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


def add_adapters(model: Any, cfg: LoRAConfig, seed: int) -> Any:
    """``model`` itself when ``cfg.rank`` is 0, else a peft model around it that trains LoRA adapters
    (arXiv 2106.09685) alone.

    Adapters of half-precision models are float32; they start as no change at all. No dropout: the
    log-probabilities of an update must be those of the rollouts. Raises SaerlError without peft and on
    target names that the model lacks.
    """
    if cfg.rank == 0:
        return model
    try:
        import peft
    except ImportError:
        raise SaerlError(
            f"train.lora.rank={cfg.rank} needs peft; run `pip install peft` or set it to 0"
        ) from None
    check_targets(model, cfg)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = peft.LoraConfig(
            r=cfg.rank,
            lora_alpha=cfg.alpha,  # type: ignore[arg-type]  # a float works
            target_modules="all-linear" if "all-linear" in cfg.targets else list(cfg.targets),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        return peft.get_peft_model(model, settings).eval()


def check_targets(model: Any, cfg: LoRAConfig) -> None:
    """SaerlError when adapters are asked for on modules that ``model`` lacks."""
    if cfg.rank == 0:
        return
    named = [name for name, _ in model.named_modules()]
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = inputs is not None and outputs is not None and inputs.weight is outputs.weight
    shared = {name.split(".")[-1] for name, m in model.named_modules() if tied and m in (inputs, outputs)}
    for target in cfg.targets:
        if target in shared:
            raise SaerlError(
                f"train.lora.targets={target!r}: this model's embeddings and output layer share their "
                "weights, and merging would change both; leave it out"
            )
        if target != "all-linear" and not any(name.split(".")[-1] == target for name in named):
            raise SaerlError(
                f"train.lora.targets={target!r} names no module of {type(model).__name__}; use all-linear or "
                "names such as q_proj"
            )
