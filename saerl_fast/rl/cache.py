"""The key-value caches of generation, made with the public interface of transformers' caches alone.

How a layer of a cache is made and what it keeps beside its keys and values changes between releases of
transformers, so nothing here reads or sets it: a layer is filled by its own ``update``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # the first since transformers 5.24


class Growing(DynamicLayer):
    """A plain layer that gets room for the whole completion, so that a step writes one column, not all.

    It is filled with the prompts of a prefill as any other. ``batch_repeat_interleave`` then gives each
    prompt's states to its group, and makes the room.
    """

    def __init__(self, room: int) -> None:
        """``room``: tokens that follow the prompts."""
        super().__init__()
        self.room = room
        self.states: tuple[Tensor, ...] = ()  # keys and values, each [rows, heads, tokens, head_dim]
        self.buffers: tuple[Tensor, ...] = ()  # the same with the room, once it has been made

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.buffers:
            self.states = super().update(key_states, value_states, *args, **kwargs)
            return self.states
        start = self.get_seq_length()
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : start + new.shape[-2]] = new
        return self._show(start + key_states.shape[-2])

    def get_seq_length(self) -> int:
        return self.states[0].shape[-2] if self.states else 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        buffers = []
        for states in self.states:
            rows, heads, length, dim = states.shape
            buffer = states.new_zeros(rows * repeats, heads, length + self.room, dim)
            buffer[:, :, :length] = states.repeat_interleave(repeats, 0)
            buffers.append(buffer)
        self.buffers = tuple(buffers)
        self._show(self.get_seq_length())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.buffers = tuple(buffer[indices] for buffer in self.buffers)
        self._show(self.get_seq_length())

    def _show(self, length: int) -> tuple[Tensor, ...]:
        self.states = tuple(buffer[:, :, :length] for buffer in self.buffers)
        self.keys, self.values = self.states
        return self.states


def has_plain_layers(model: Any) -> bool:
    """Whether every layer of the model's cache keeps all keys and values, without windows or other states."""
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # a configuration that transformers' own caches do not know
        return False
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def prompt_cache(model: Any, room: int) -> DynamicCache:
    """An empty cache for prompts; its plain layers get room for ``room`` more tokens once it is expanded."""
    cache = DynamicCache(config=model.config)
    cache.layers = [Growing(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """``cache`` under the name that the model's ``forward`` has for it: ``cache`` since transformers 5.24."""
    found = next((name for name in CACHE_NAMES if name in _parameters(model)), "past_key_values")
    return {found: cache, "use_cache": True}


def own_cache(model: Any, output: Any) -> dict[str, Any]:
    """The cache that the model made in a prefill, under the name that it takes it back by."""
    for name in (*CACHE_NAMES, "state"):
        value = getattr(output, name, None)
        if value is not None and name in _parameters(model):
            return {name: value, "use_cache": True}
    raise TypeError("it returns no cache")


def caller(model: Any) -> Callable[..., Any]:
    """The model, called without those of the keyword arguments that its ``forward`` has no parameter for."""
    known = _parameters(model)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return model
    return lambda **inputs: model(**{name: value for name, value in inputs.items() if name in known})


def holds_tokens(cache: Any) -> bool:
    """Whether a layer keeps something for every token, which a mask can hide; else there are only states."""
    layers = getattr(cache, "layers", None)
    return layers is None or any(getattr(layer, "keys", None) is not None for layer in layers)


def repeat_rows(cache: Any, rows: int, repeats: int) -> None:
    """Give every one of the cache's ``rows`` to ``repeats`` adjacent copies."""
    _rearrange(cache, rows, repeats=repeats)


def take_rows(cache: Any, rows: int, indices: Tensor) -> None:
    """Keep the cache's rows at ``indices`` int64 [n]; it has ``rows``."""
    _rearrange(cache, rows, indices=indices)


def _rearrange(cache: Any, rows: int, *, repeats: int = 1, indices: Tensor | None = None) -> None:
    """Layers do it by their ``reorder_cache``, the one method that all of them have (beam search needs it);
    a kind of cache that overrides the methods for whole caches by those; anything else by the tensors that
    it holds."""
    if isinstance(cache, Cache) and type(cache).batch_select_indices is not Cache.batch_select_indices:
        if indices is None:
            cache.batch_repeat_interleave(repeats)
        else:
            cache.batch_select_indices(indices)
        return
    chosen = indices

    def pick(device: Any) -> Tensor:
        nonlocal chosen
        if chosen is None:
            chosen = torch.arange(rows, device=device).repeat_interleave(repeats)
        return chosen.to(device)

    if not isinstance(cache, Cache):
        _walk(cache, rows, pick, set())
        return
    for layer in cache.layers:
        if isinstance(layer, Growing):
            if indices is None:
                layer.batch_repeat_interleave(repeats)
            else:
                layer.batch_select_indices(indices)
        elif hasattr(layer, "reorder_cache"):
            first = next(_tensors(layer), None)
            if first is not None:
                layer.reorder_cache(pick(first.device))  # type: ignore[arg-type]  # an index is a LongTensor
        else:
            _walk(layer, rows, pick, set())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an object's attributes, also those in lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for part in value.values() for t in _tensors(part))
    elif isinstance(value, (list, tuple)):
        yield from (t for part in value for t in _tensors(part))
    elif type(value).__module__.partition(".")[0] == "transformers" and hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def _walk(value: Any, rows: int, pick: Callable[[Any], Tensor], seen: set[int]) -> Any:
    """``value`` with the chosen rows of every tensor in it whose first dimension is ``rows``, in place where
    it can be changed."""
    if isinstance(value, Tensor):
        return value[pick(value.device)] if value.ndim > 1 and len(value) == rows else value
    if isinstance(value, tuple):
        return type(value)(_walk(part, rows, pick, seen) for part in value)
    if id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, dict):
        for key in value:
            value[key] = _walk(value[key], rows, pick, seen)
    elif isinstance(value, list):
        value[:] = [_walk(part, rows, pick, seen) for part in value]
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        for name, part in list(vars(value).items()):
            if isinstance(part, (Tensor, dict, list, tuple)):
                setattr(value, name, _walk(part, rows, pick, seen))
    return value


def _parameters(model: Any) -> Mapping[str, Parameter]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return signature(inner.forward).parameters
