"""Hidden states as a model's blocks pass them on: a hook on one block, a forward pass that ends there, and
the proof that what a block returns is the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from saerl_fast.errors import SaerlError
from saerl_fast.models.layout import decoder, hidden_size, n_blocks

_proved: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()


class LayerReached(Exception):
    """Ends a forward pass whose remaining blocks nobody needs."""


def forward_to(model: nn.Module, layer: int, ids: Tensor) -> Tensor:
    """Hidden states [B, T, d_in] of a layer, by leaving the forward pass as soon as they exist."""
    body, layers = decoder(model)
    kept: list[Tensor] = []

    def stop(hidden: Tensor) -> None:
        kept.append(hidden)
        raise LayerReached

    handle = on_layer(layers, layer, stop)
    try:
        body(input_ids=ids, use_cache=False)
    except LayerReached:
        pass
    finally:
        handle.remove()
    if not kept:
        raise SaerlError(f"{type(model).__name__} runs other blocks than those found; it cannot be read off")
    return kept[0]


def forward_through(model: nn.Module, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [B, T, d_in] of a layer, and logits [B, T, V], of one forward pass."""
    kept: list[Tensor] = []
    handle = on_layer(decoder(model)[1], layer, kept.append)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return kept[0], logits


def on_layer(layers: nn.ModuleList, layer: int, use: Callable[[Tensor], Tensor | None]) -> Any:
    """Call ``use`` with the hidden states of a layer whenever a forward pass makes them.

    What it returns, unless None, is passed on in their place.
    """
    if layer == 0:

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = use(args[0] if args else kwargs["hidden_states"])
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

        return layers[0].register_forward_pre_hook(before, with_kwargs=True)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        whole = isinstance(output, (tuple, list))  # older blocks return tuples
        new = use(output[0] if whole else output)
        return new if new is None or not whole else (new, *output[1:])

    return layers[layer - 1].register_forward_hook(after)


@torch.no_grad()
def check_stream(model: Any, layer: int) -> None:
    """SaerlError when hooks on the blocks would read anything but the residual stream [B, T, hidden_size].

    Compared once a model and layer, on four tokens, with the ``hidden_states`` that transformers shows (the
    last layer, shown after the final norm, by its shape alone).
    """
    if layer in _proved.setdefault(model, set()):
        return
    name, width = type(model).__name__, hidden_size(model)
    parameter = next(model.parameters())
    was_training = model.training
    model.eval()
    try:
        embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        rows = getattr(getattr(embeddings, "weight", None), "shape", (4,))[0]
        ids = (torch.arange(1, 5, device=parameter.device) % rows)[None]
        found = forward_to(model, layer, ids)
        shown: Any = None
        if found.shape == (1, 4, width) and layer < n_blocks(model):
            shown = _shown(model, ids)
    finally:
        model.train(was_training)
    if found.shape != (1, 4, width):
        raise SaerlError(
            f"layer {layer} of {name} is {list(found.shape)} for 4 tokens, not one residual stream of "
            f"width {width}; SAE features cannot be read off this model"
        )
    if not bool(found.isfinite().all()):
        return  # nothing to compare; whoever reads it will say so
    if shown:
        # Mamba's tuple starts behind the first block
        near = [shown[i].to(found) for i in (layer, layer - 1) if 0 <= i < len(shown)]
        scale = max(float(found.abs().max()), 1e-6)
        if not any(s.shape == found.shape and float((s - found).abs().max()) <= 0.02 * scale for s in near):
            raise SaerlError(
                f"what block {layer} of {name} returns is not its hidden state; "
                "SAE features cannot be read off this model"
            )
    _proved[model].add(layer)


def _shown(model: nn.Module, ids: Tensor) -> Any:
    """The hidden states that the model shows of itself; None where it shows none."""
    try:
        return model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a body without a head, say, or one that has no such option
        return None
