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
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from saerl_fast.config import RolloutConfig
from saerl_fast.errors import SaerlError
from saerl_fast.models import check_fit
from saerl_fast.rl.decode import CHECK_EVERY, Sampling, StaticDecoder, sample, use_static
from saerl_fast.rl.rollouts import Rollouts, decoded, left_pad, stop_tokens

log = logging.getLogger(__name__)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    cfg: RolloutConfig | Sampling,
    *,
    seed: int = 0,
    first: int = 0,
    capture: Any | None = None,
) -> Rollouts:
    """Sample ``cfg.group_size`` completions of every prompt; temperature 0 takes the likeliest token.

    ``prompts``: token ids of each, as ``saerl_fast.prompts.render.Prompts`` holds them.

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
    check_fit(model, prompts, cfg.max_new_tokens)
    ids, lens = left_pad(prompts, tokenizer.pad_token_id or 0, model.device)
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
    from saerl_fast.rl.cache import cache_argument, has_plain_layers, prompt_cache

    width, n_rows = ids.shape[1], len(uniforms)
    positions = torch.arange(width, device=ids.device) - (width - lens)[:, None]
    seen = positions >= 0  # [P, S]: False on the left padding
    cache = prompt_cache(model, cfg.max_new_tokens)
    if capture is not None and hasattr(capture, "reset_timings"):
        capture.reset_timings()
    started = time.perf_counter()
    with capture if capture is not None else nullcontext():
        output = model(
            input_ids=ids,
            attention_mask=seen.long(),
            position_ids=positions.clamp(min=0),
            logits_to_keep=1,
            **cache_argument(model, cache),
        )
    started += sum(getattr(capture, "timings", {}).values())  # hooks are not generation
    logits = output.logits[:, -1]
    # whether a ready-made boolean mask [N, 1, 1, T] is right for every layer
    plain = has_plain_layers(model) and getattr(model.config, "_attn_implementation", None) == "sdpa"
    if use_static(cfg.decode, model, plain):
        if n_rows not in decoders:
            decoders.clear()
            decoders[n_rows] = StaticDecoder(model, uniforms, stops, cfg, width)
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
    from saerl_fast.rl.cache import cache_argument

    (n_rows, limit), device, width = uniforms.shape, uniforms.device, seen.shape[1]
    cache.batch_repeat_interleave(cfg.group_size)
    named = cache_argument(model, cache)
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
            logits_to_keep=1,
            **named,
        )
        logits = output.logits[:, -1]
    return tokens, logprobs, kept


def _join(parts: list[Any]) -> Any:
    if any(part is None for part in parts):
        return None
    if len(parts) == 1:
        return parts[0]
    from saerl_kernels import CSR

    return CSR.concat(parts)
