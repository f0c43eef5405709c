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
from saerl_fast.errors import SaerlError, no_memory
from saerl_fast.models.layout import check_fit
from saerl_fast.rl.decode import CHECK_EVERY, Sampling, StaticDecoder, sample, use_static
from saerl_fast.rl.logprobs import completion_logprobs
from saerl_fast.rl.rollouts import Rollouts, decoded, left_pad, stop_tokens
from saerl_fast.rl.ways import Decoding, decoding, equal_lengths, short, telling_rows, tolerance

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
    sizes = [len(row) for row in prompts]
    state = decoding(model, _takes_ready_masks(model))
    todo = _batches(state, range(len(prompts)), sizes, width)
    parts: list[tuple[Tensor, Tensor, Tensor, Any]] = []
    order: list[int] = []  # of the prompts in them
    timings = {"generate": 0.0, "capture": 0.0, "encode": 0.0}
    decoders: dict[int, StaticDecoder] = {}  # the latest, by its rows; its memory is free for training after
    was_training = model.training
    model.eval()
    try:
        while todo:
            chunk = todo.pop(0)
            mine = torch.tensor(chunk, device=ids.device)
            longest = sizes[chunk[0]] if state.way.equal else ids.shape[1]
            inputs = ids[mine][:, ids.shape[1] - longest :], lens[mine]
            rows = (mine[:, None] * group + torch.arange(group, device=ids.device)).flatten()
            try:
                made = _decode(model, *inputs, uniforms[rows], stops, cfg, capture, timings, decoders, state)
                if not bool(made[1].isfinite().all()):
                    raise SaerlError(
                        f"the logits of {type(model).__name__} are NaN or infinite; check its weights and "
                        "model.dtype or, where training did it, start again with a lower train.lr"
                    )
                off = _off(model, state, *inputs, made, cfg.temperature)
            except torch.OutOfMemoryError:
                decoders.clear()
                if len(chunk) == 1:
                    raise
                half = len(chunk) // 2
                log.warning("out of memory generating for %d prompts; trying %d", len(chunk), half)
                todo[:0] = [chunk[:half], chunk[half:]]
                continue
            except SaerlError:
                raise
            except Exception as error:  # whatever a model's code raises at what this way hands it
                if no_memory(error):
                    raise
                state.give_up(model, f"failed ({short(error)})", error)
                todo = _batches(state, [*chunk, *(i for rest in todo for i in rest)], sizes, width)
                continue
            if off is not None:
                state.give_up(model, f"is off by {off:.2g} per token from the plain forward pass")
                todo = _batches(state, [*chunk, *(i for rest in todo for i in rest)], sizes, width)
                continue
            parts.append((*made, _features(capture, timings)))
            order += chunk
    finally:
        model.train(was_training)
    longest = max(part[0].shape[1] for part in parts)
    tokens, logprobs, mask = (
        torch.cat([torch.nn.functional.pad(part[i], (0, longest - part[i].shape[1])) for part in parts])
        for i in range(3)
    )
    features = _join([part[3] for part in parts])
    if order != sorted(order):
        back = torch.tensor(order).argsort()
        rows = (back[:, None] * group + torch.arange(group)).flatten().to(tokens.device)
        tokens, logprobs, mask = tokens[rows], logprobs[rows], mask[rows]
        features = None if features is None else features.select_rows(back)
    finished, texts = decoded(tokenizer, tokens, mask, stops)
    return Rollouts(ids, lens, tokens, mask, logprobs, texts, finished, group, features, timings)


def prove(model: Any, tokenizer: Any) -> None:
    """Decode a few made-up tokens, so that a model that cannot be decoded is refused at once."""
    rows = model.get_input_embeddings().weight.shape[0]
    prompts = [[token % rows for token in range(2, 2 + length)] for length in (5, 2)]
    settings = Sampling.of(RolloutConfig(), group_size=2, max_new_tokens=4, decode="dynamic")
    generate(model, tokenizer, prompts, settings)


def _takes_ready_masks(model: Any) -> bool:
    """Whether a ready-made boolean mask [N, 1, 1, T] should be right for every layer."""
    from saerl_fast.rl.cache import has_plain_layers

    return getattr(model.config, "_attn_implementation", None) == "sdpa" and has_plain_layers(model)


def _batches(state: Decoding, rows: Sequence[int], sizes: list[int], width: int) -> list[list[int]]:
    if state.way.equal:
        return equal_lengths(rows, sizes, width)
    return [list(rows[i : i + width]) for i in range(0, len(rows), width)]


def _off(
    model: Any,
    state: Decoding,
    ids: Tensor,
    lens: Tensor,
    made: tuple[Tensor, Tensor, Tensor],
    temperature: float,
) -> float | None:
    """By how much decoding is off from the plain forward pass, where that is more than rounding explains."""
    tokens, logprobs, kept = made
    group = len(tokens) // len(lens)
    starts, lengths = lens.repeat_interleave(group), kept.sum(1)
    sizes = int(lens.max()), ids.shape[1] - int(lens.min()), int(lengths.max())
    if state.proof.covers(*sizes):
        return None
    for row in telling_rows(starts, lengths).tolist():
        start, length = int(starts[row]), int(lengths[row])
        sequence = torch.cat([ids[row // group, ids.shape[1] - start :], tokens[row, :length]])[None]
        try:
            options: dict[str, Any] = {"temperature": temperature, "with_entropy": False}
            wanted, _ = completion_logprobs(
                model, sequence, starts[row : row + 1], lengths[row : row + 1], **options
            )
        except Exception as error:
            if no_memory(error):
                raise
            name = type(model).__name__
            raise SaerlError(
                f"{name} cannot be trained: its forward pass over a whole sequence failed ({short(error)}); "
                "use a decoder-only causal language model"
            ) from error
        off = float((logprobs[row, :length] - wanted).abs().mean())
        if not off <= tolerance(model, temperature) and bool(wanted.isfinite().all()):
            return off
    state.proof.extend(*sizes)
    return None


def _features(capture: Any | None, timings: dict[str, float]) -> Any:
    """Asked for last: on a GPU they are made beside the decoding."""
    if capture is None:
        return None
    features = capture.features()
    for name, seconds in getattr(capture, "timings", {}).items():
        timings[name] = timings.get(name, 0.0) + seconds
    return features


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
    state: Decoding,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prefill P prompts, expand them to N rows, decode. Returns tokens, log-probs, mask [N, C]."""
    from saerl_fast.rl.cache import cache_argument, caller, own_cache, prompt_cache

    way, width, n_rows = state.way, ids.shape[1], len(uniforms)
    positions = torch.arange(width, device=ids.device) - (width - lens)[:, None]
    seen = positions >= 0  # [P, S]: False on the left padding
    cache: Any = prompt_cache(model, cfg.max_new_tokens) if way.cached and not way.own else None
    if capture is not None and hasattr(capture, "reset_timings"):
        capture.reset_timings()
    started = time.perf_counter()
    named: dict[str, Any] = {"use_cache": way.cached} if cache is None else cache_argument(model, cache)
    if way.cached:  # else there is no padding, and the model counts by itself as in the steps that follow
        named |= {"attention_mask": seen.long(), "position_ids": positions.clamp(min=0)}
    with capture if capture is not None else nullcontext():
        output = caller(model)(input_ids=ids, logits_to_keep=1, **named)
    for name in ("attention_mask", "position_ids"):
        named.pop(name, None)
    started += sum(getattr(capture, "timings", {}).values())  # hooks are not generation
    logits = output.logits[:, -1]
    if way.own:
        named = own_cache(model, output)
        (cache,) = (value for name, value in named.items() if name != "use_cache")
    del output
    if use_static(cfg.decode, model, way.ready):
        if n_rows not in decoders:
            decoders.clear()
            decoders[n_rows] = StaticDecoder(model, uniforms, stops, cfg, width)
        made = decoders[n_rows].run(cache, logits, seen, lens, uniforms)
    else:
        steps: _Cached | _Whole = _Whole(model, ids, cfg)
        if way.cached:
            steps = _Cached(model, cache, named, seen, lens, cfg, way.ready)
        made = _dynamic(steps, logits, uniforms, stops, cfg)
    used = max(int(made[2].any(0).sum()), 1)
    timings["generate"] += time.perf_counter() - started
    tokens, logprobs, kept = (part[:, :used] for part in made)
    return tokens, logprobs, kept


class _Cached:
    """Steps of one token on the cache of the prompts' prefill, expanded to their groups."""

    def __init__(
        self, model: Any, cache: Any, named: dict[str, Any], seen: Tensor, lens: Tensor, cfg: Any, ready: bool
    ) -> None:
        from saerl_fast.rl.cache import caller, holds_tokens, repeat_rows

        (prompts, self.width), group = seen.shape, cfg.group_size
        self.call, self.cache, self.named, self.rows = caller(model), cache, named, prompts * group
        repeat_rows(cache, prompts, group)
        self.position = lens.repeat_interleave(group)[:, None]
        self.mask = None
        if not bool(seen.all()) and holds_tokens(cache):
            limit = cfg.max_new_tokens
            self.mask = torch.nn.functional.pad(seen, (0, limit), value=True).repeat_interleave(group, 0)
            if ready:
                self.mask = self.mask[:, None, None, :]  # used as it is: no step builds a mask from it

    def keep(self, stay: Tensor) -> None:
        from saerl_fast.rl.cache import take_rows

        take_rows(self.cache, self.rows, stay)
        self.rows = len(stay)
        self.position, self.mask = self.position[stay], None if self.mask is None else self.mask[stay]

    def logits(self, token: Tensor, step: int) -> Tensor:
        output = self.call(
            input_ids=token[:, None],
            attention_mask=None if self.mask is None else self.mask[..., : self.width + step + 1],
            position_ids=self.position + step,
            logits_to_keep=1,
            **self.named,
        )
        return output.logits[:, -1]


class _Whole:
    """The plain forward pass over everything so far, in every step, for prompts of one length."""

    def __init__(self, model: Any, ids: Tensor, cfg: RolloutConfig | Sampling) -> None:
        from saerl_fast.rl.cache import caller

        self.call, self.ids = caller(model), ids.repeat_interleave(cfg.group_size, 0)

    def keep(self, stay: Tensor) -> None:
        self.ids = self.ids[stay]

    def logits(self, token: Tensor, step: int) -> Tensor:
        self.ids = torch.cat([self.ids, token[:, None]], 1)
        return self.call(input_ids=self.ids, use_cache=False, logits_to_keep=1).logits[:, -1]


def _dynamic(
    steps: _Cached | _Whole, logits: Tensor, uniforms: Tensor, stops: Tensor, cfg: RolloutConfig | Sampling
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``StaticDecoder.run``, with steps that grow and rows that leave once half have ended."""
    (n_rows, limit), device = uniforms.shape, uniforms.device
    logits = logits.repeat_interleave(cfg.group_size, 0)
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
                steps.keep(stay)
                alive, done, token = alive[stay], done[stay], token[stay]
        logits = steps.logits(token, step)
    return tokens, logprobs, kept


def _join(parts: list[Any]) -> Any:
    if any(part is None for part in parts):
        return None
    if len(parts) == 1:
        return parts[0]
    from saerl_kernels import CSR

    return CSR.concat(parts)
