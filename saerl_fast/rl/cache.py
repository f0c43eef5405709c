"""The key-value caches of generation, made with the public interface of transformers' caches alone.

How a layer of a cache is made and what it keeps beside its keys and values changes between releases of
transformers, so nothing here reads or sets it: a layer is filled by its own ``update``.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


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
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def prompt_cache(model: Any, room: int) -> DynamicCache:
    """An empty cache for prompts; its plain layers get room for ``room`` more tokens once it is expanded."""
    cache = DynamicCache(config=model.config)
    cache.layers = [Growing(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """``cache`` under the name that the model's ``forward`` has for it: ``cache`` since transformers 5.24."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = "cache" if "cache" in signature(inner.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}
