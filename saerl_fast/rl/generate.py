"""Batched, KV-cached sampling that keeps what training needs: token ids, masks and log-probabilities.

The loop is our own rather than ``model.generate`` because a GRPO step wants four things together: each
prompt is prefetched once and its cache expanded to the group, a capture object sees exactly that
prefill, every sampled token's log-probability is recorded, and finished rows leave the batch (rl/decode.py
has the other way: on a GPU steps of one shape, which a CUDA graph replays).

Randomness: one uniform number per (row, position), drawn up front from a CPU generator. A row's tokens
therefore do not depend on chunking, on when other rows finish, or on the device's own generator.
"""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saerl_fast.config import RolloutConfig
from saerl_fast.errors import SaerlError
from saerl_fast.models import max_positions, token_ids
from saerl_fast.rl.decode import CHECK_EVERY, Sampling, StaticDecoder, sample, use_static
from saerl_fast.rl.rollouts import Rollouts, decoded, left_pad, stop_tokens

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    cfg: RolloutConfig | Sampling,
    *,
    seed: int = 0,
    first: int = 0,
    capture: Any | None = None,
) -> Rollouts:
    """Sample ``cfg.group_size`` completions of every prompt; temperature 0 takes the likeliest token.

    ``first``: how many prompts of the same batch come before these, in other processes; each prompt gets
    the random numbers that it would get if they were all here.

    ``capture`` is entered around each prefill and asked for ``features()`` after the decoding, a CSR with one
    row per prompt of that prefill, or None. The model is put into eval mode and back.
    Raises SaerlError on an empty batch, an empty prompt or one that does not fit the model's context.
    """
    if not prompts:
        raise SaerlError("there are no prompts to generate from; pass at least one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    ids, lens = left_pad(
        encode_prompts(model, tokenizer, prompts, cfg), tokenizer.pad_token_id or 0, model.device
    )
    group, n_rows = cfg.group_size, len(prompts) * cfg.group_size
    rows_before = first * group
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(rows_before + n_rows, cfg.max_new_tokens, generator=generator)[rows_before:]
    uniforms = uniforms.to(model.device)
    stops = torch.tensor(stop_tokens(model, tokenizer), device=model.device, dtype=torch.long)

    width = max(1, (cfg.batch_size or n_rows) // group)
    todo = [(i, min(i + width, len(prompts))) for i in range(0, len(prompts), width)]
    parts: list[tuple[Tensor, Tensor, Tensor, Any]] = []
    timings = {"generate": 0.0, "capture": 0.0, "encode": 0.0}
    decoders: dict[int, StaticDecoder] = {}  # the latest, by its rows; its memory is free for training after
    was_training = model.training
    model.eval()
    try:
        while todo:
            start, end = todo.pop(0)
            try:
                rows = slice(start * group, end * group)
                inputs = ids[start:end], lens[start:end], uniforms[rows]
                part = _decode(model, *inputs, stops, cfg, capture, timings, decoders)
            except torch.OutOfMemoryError:
                decoders.clear()
                if end - start == 1:
                    raise
                middle = (start + end) // 2
                log.warning("out of memory generating for %d prompts; trying %d", end - start, middle - start)
                todo[:0] = [(start, middle), (middle, end)]
                continue
            parts.append(part)
    finally:
        model.train(was_training)
    longest = max(part[0].shape[1] for part in parts)
    tokens, logprobs, mask = (
        torch.cat([torch.nn.functional.pad(part[i], (0, longest - part[i].shape[1])) for part in parts])
        for i in range(3)
    )
    finished, texts = decoded(tokenizer, tokens, mask, stops)
    features = _join([part[3] for part in parts])
    return Rollouts(ids, lens, tokens, mask, logprobs, texts, finished, group, features, timings)


def _decode(
    model: Any,
    ids: Tensor,
    lens: Tensor,
    uniforms: Tensor,
    stops: Tensor,
    cfg: RolloutConfig | Sampling,
    capture: Any | None,
    timings: dict[str, float],
    decoders: dict[int, StaticDecoder],
) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Prefill P prompts, expand them to N rows, decode. Returns tokens, log-probs, mask [N, C], features."""
    from transformers import DynamicCache

    width, n_rows = ids.shape[1], len(uniforms)
    positions = torch.arange(width, device=ids.device) - (width - lens)[:, None]
    seen = positions >= 0  # [P, S]: False on the left padding
    cache = DynamicCache(config=model.config)
    if capture is not None and hasattr(capture, "reset_timings"):
        capture.reset_timings()
    started = time.perf_counter()
    with capture if capture is not None else nullcontext():
        output = model(
            input_ids=ids,
            attention_mask=seen.long(),
            position_ids=positions.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    started += sum(getattr(capture, "timings", {}).values())  # hooks are not generation
    logits = output.logits[:, -1]
    plain = _takes_ready_mask(model, cache)
    if use_static(cfg.decode, model, plain):
        if n_rows not in decoders:
            decoders.clear()
            decoders[n_rows] = StaticDecoder(model, cache, uniforms, stops, cfg, width)
        made = decoders[n_rows].run(cache, logits, seen, lens, uniforms)
    else:
        made = _dynamic(model, cache, logits, seen, lens, uniforms, stops, cfg, plain)
    used = max(int(made[2].any(0).sum()), 1)
    timings["generate"] += time.perf_counter() - started
    features = None
    if capture is not None:  # asked for last: on a GPU they are made beside the decoding
        features = capture.features()
        for name, seconds in getattr(capture, "timings", {}).items():
            timings[name] = timings.get(name, 0.0) + seconds
    tokens, logprobs, kept = (part[:, :used] for part in made)
    return tokens, logprobs, kept, features


def _dynamic(
    model: Any,
    cache: Any,
    logits: Tensor,
    seen: Tensor,
    lens: Tensor,
    uniforms: Tensor,
    stops: Tensor,
    cfg: RolloutConfig | Sampling,
    plain: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``StaticDecoder.run``, with a cache that grows and rows that leave once half have ended."""
    (n_rows, limit), device, width = uniforms.shape, uniforms.device, seen.shape[1]
    _expand(cache, cfg.group_size, limit)
    logits = logits.repeat_interleave(cfg.group_size, 0)
    next_position = lens.repeat_interleave(cfg.group_size)[:, None]
    mask = None
    if not bool(seen.all()):
        mask = torch.nn.functional.pad(seen, (0, limit), value=True).repeat_interleave(cfg.group_size, 0)
        if plain:
            mask = mask[:, None, None, :]  # used as it is, so no mask is built from it in every step
    tokens = torch.zeros(n_rows, limit, dtype=torch.long, device=device)
    logprobs = torch.zeros(n_rows, limit, device=device)
    kept = torch.zeros(n_rows, limit, dtype=torch.bool, device=device)
    alive = torch.arange(n_rows, device=device)  # rows still in the batch ...
    done = torch.zeros(n_rows, dtype=torch.bool, device=device)  # ... and which of those have ended
    sync_every = 1 if device.type == "cpu" else CHECK_EVERY  # asking whether all have ended waits for a GPU
    for step in range(limit):
        token, logprob = sample(logits, uniforms[alive, step], cfg.temperature, cfg.top_p)
        tokens[alive, step] = token.masked_fill(done, 0)
        logprobs[alive, step] = logprob.masked_fill(done, 0.0)
        kept[alive, step] = ~done
        done |= torch.isin(token, stops)
        if step + 1 == limit:
            break
        if (step + 1) % sync_every == 0:
            left = len(alive) - int(done.sum())
            if left == 0:
                break
            if 2 * left <= len(alive):
                stay = (~done).nonzero()[:, 0]
                cache.batch_select_indices(stay)
                alive, done, token, next_position = alive[stay], done[stay], token[stay], next_position[stay]
                mask = None if mask is None else mask[stay]
        output = model(
            input_ids=token[:, None],
            attention_mask=None if mask is None else mask[..., : width + step + 1],
            position_ids=next_position + step,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1]
    return tokens, logprobs, kept


@lru_cache(maxsize=1)
def _growing_layer() -> type:
    """A cache layer with room for the whole completion, so that a step writes one column, not all."""
    from transformers.cache_utils import DynamicLayer

    class Growing(DynamicLayer):
        def __init__(self, source: Any, repeats: int, room: int) -> None:
            super().__init__()
            self.dtype, self.device, self.is_initialized = source.dtype, source.device, True
            self.buffers: list[Tensor] = []
            for tensor in (source.keys, source.values):
                batch, heads, length, dim = tensor.shape
                buffer = tensor.new_zeros(batch * repeats, heads, length + room, dim)
                buffer[:, :, :length] = tensor.repeat_interleave(repeats, 0)
                self.buffers.append(buffer)
            self.length = source.keys.shape[-2]
            self._view()

        def _view(self) -> None:
            self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
            start, self.length = self.length, self.length + key_states.shape[-2]
            for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[:, :, start : self.length] = new
            self._view()
            return self.keys, self.values

        def batch_select_indices(self, indices: Tensor) -> None:
            self.buffers = [buffer[indices] for buffer in self.buffers]
            self._view()

    return Growing


def _expand(cache: Any, repeats: int, room: int) -> None:
    """Give every prompt's cache to its group; plain layers also get room for ``room`` more tokens."""
    from transformers.cache_utils import DynamicLayer

    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = _growing_layer()(layer, repeats, room)
        else:
            layer.batch_repeat_interleave(repeats)


def _takes_ready_mask(model: Any, cache: Any) -> bool:
    """Whether a ready-made boolean mask [N, 1, 1, T] is right for every layer of this model."""
    from transformers.cache_utils import DynamicLayer

    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    return plain and getattr(model.config, "_attn_implementation", None) == "sdpa"


def encode_prompts(
    model: Any, tokenizer: Any, prompts: list[str], cfg: RolloutConfig | Sampling
) -> list[list[int]]:
    """Token ids of each prompt; SaerlError for one that is empty or does not fit the context."""
    rows = token_ids(tokenizer, prompts)
    limit = max_positions(model)
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise SaerlError(f"prompt {prompt[:40]!r} has no tokens; remove it from the pool")
        if limit is not None and len(row) + cfg.max_new_tokens > limit:
            raise SaerlError(
                f"prompt {prompt[:40]!r} has {len(row)} tokens, which with "
                f"rollout.max_new_tokens={cfg.max_new_tokens} exceeds the model's {limit} positions; "
                "lower data.max_prompt_tokens or rollout.max_new_tokens"
            )
    return rows


def _join(parts: list[Any]) -> Any:
    if any(part is None for part in parts):
        return None
    if len(parts) == 1:
        return parts[0]
    from saerl_kernels import CSR

    return CSR.concat(parts)
