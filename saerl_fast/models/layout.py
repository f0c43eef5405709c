"""The few facts about a model's layout, and its tokens, that the rest needs.

Everything that reads a model's insides (hidden-state capture, SAE training, rollouts) goes through
``decoder``, so a new architecture is supported in one place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from saerl_fast.errors import SaerlError, halved

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCK_LISTS = ("layers", "h", "blocks", "block", "layer")  # Llama/Qwen/Gemma/NeoX; GPT-2; others; BERT


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
    return int(text_config(model).num_hidden_layers)


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream, the ``d_in`` an SAE must have."""
    return int(text_config(model).hidden_size)


def max_positions(model: nn.Module) -> int | None:
    """Longest sequence the model has position embeddings for; None where it has no such limit.

    LongRoPE turns every position by other angles once a sequence is longer than the original limit, so that
    the log-probabilities of its first tokens change, too: there the original limit is the longest.
    """
    config = text_config(model)
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


def text_config(model: nn.Module) -> Any:
    """The configuration of the part that reads text."""
    config = getattr(model, "config", None)
    if config is None:
        raise SaerlError(f"{type(model).__name__} has no config; pass a transformers model")
    return config.get_text_config() if hasattr(config, "get_text_config") else config
