"""Tiny random language models and a character tokenizer for the tests of the training loop."""

from __future__ import annotations

from typing import Any

import torch

from saerl_fast.prompts.pool import Pool
from saerl_fast.prompts.render import Prompts, prepare
from saerl_fast.session import Session

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789+=?: ."


def char_tokenizer() -> Any:
    """One token per character; <pad> 0, <eos> 1, <unk> 2; pads on the left."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(ALPHABET)}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def token_rows(texts: list[str]) -> list[list[int]]:
    """Token ids of texts, as `generate` and its like take them."""
    return [[ALPHABET.index(c) + 3 if c in ALPHABET else 2 for c in text] for text in texts]


def prompts_of(texts: list[str], answers: list[str] | None = None, ids: list[str] | None = None) -> Prompts:
    """Prepared prompts with these texts."""
    names = ids or [str(i) for i in range(len(texts))]
    columns = {"prompt_id": names, "prompt": texts, "answer": answers or [""] * len(texts)}
    return prepare(Pool(columns), char_tokenizer())


def session_of(model: Any, train: Pool, evaluation: Pool | None = None) -> Session:
    """A session with the character tokenizer."""
    return Session.of(model, char_tokenizer(), train, evaluation or train)


def tiny_model(
    kind: str = "llama", *, seed: int = 0, width: int = 32, spread: float = 1.0, **extra: Any
) -> Any:
    """A random model of two blocks; ``spread`` scales its output layer, so that sampling is not uniform."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": len(ALPHABET) + 3,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    size = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
    }
    grouped = size | {"num_key_value_heads": 2}
    make = {
        "llama": ("LlamaConfig", grouped),
        "qwen2": ("Qwen2Config", grouped),
        "qwen3": ("Qwen3Config", grouped | {"head_dim": 8}),
        "gemma3": (
            "Gemma3TextConfig",
            grouped
            | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "num_hidden_layers": 6},
        ),
        "neox": ("GPTNeoXConfig", size | {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
        "gpt2": ("GPT2Config", {"n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": 128}),
        "gemma2": (
            "Gemma2Config",
            grouped | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
        ),
    }
    name, shape = make[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**(common | shape | extra))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0 * spread)
    return model.eval()
