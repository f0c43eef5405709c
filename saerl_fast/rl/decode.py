"""Sampling, and decoding in steps of one shape, so that a GPU can replay a captured step.

Decoding keeps a GPU waiting for Python, which launches some ten kernels a block for one token a row. Here
cache, mask and random numbers have their full size from the start and the step's number lies on the device,
so one CUDA graph of forward, sampling and bookkeeping serves every step. The price: finished rows stay in
the batch, and attention reads the cache's full width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from saerl_fast.config import RolloutConfig

log = logging.getLogger(__name__)

GRAPHS = ("cuda",)  # types of device that have them
WARM_UP = 2  # steps before the capture: libraries set themselves up in their first calls
CHECK_EVERY = 8  # steps between asking whether all rows have ended, which waits for the GPU

_refused: WeakSet[Any] = WeakSet()  # models already found unfit, so that it is said, and tried, once


class Sampling(NamedTuple):
    """What is sampled and how: `RolloutConfig` for other purposes than training, where one completion of a
    prompt (``group_size`` 1) and the likeliest tokens (``temperature`` 0) make sense.
    """

    group_size: int
    max_new_tokens: int
    temperature: float
    top_p: float
    batch_size: int | None
    decode: str

    @classmethod
    def of(cls, cfg: RolloutConfig | Sampling, **changes: Any) -> Sampling:
        """``cfg`` with ``changes``."""
        return cls(**{name: getattr(cfg, name) for name in cls._fields} | changes)


def sample(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token per row of ``logits`` [n, V] by inverting the distribution function at ``uniforms`` [n].

    Returns tokens int64 [n] and their log-probabilities float32 [n] at this temperature (before top-p;
    temperature 0: the likeliest token, and its log-probability at temperature 1).
    """
    scaled = logits.float() / (temperature or 1.0)
    total = scaled.logsumexp(-1, keepdim=True)
    if temperature == 0:
        token = scaled.argmax(-1, keepdim=True)
    else:
        probs = (scaled - total).exp_()
        order = None
        if top_p < 1:
            probs, order = probs.sort(-1, descending=True)
        reach = probs.cumsum(-1)
        mass = reach[:, -1:]
        if top_p < 1:  # the smallest set of likeliest tokens that holds top_p of the mass
            mass = reach.gather(1, (reach < top_p).sum(-1, keepdim=True).clamp_(max=reach.shape[1] - 1))
        # strictly below the mass, so a token of probability 0 can never be picked
        point = torch.minimum(uniforms[:, None] * mass, mass.nextafter(torch.zeros_like(mass)))
        token = torch.searchsorted(reach, point, right=True)
        token.clamp_(max=reach.shape[1] - 1)  # past the end where logits are NaN, which `generate` refuses
        if order is not None:
            token = order.gather(1, token)
    return token[:, 0], (scaled.gather(1, token) - total)[:, 0]


def use_static(mode: str, model: Any, plain: bool) -> bool:
    """Whether ``rollout.decode=mode`` means static decoding; ``plain``: one mask serves all of its layers."""
    if mode == "static" and not plain:
        _refuse(model, "rollout.decode=static needs sdpa attention over plain caches; decoding dynamically")
    on_gpu = model.device.type in GRAPHS and model not in _refused
    return plain and (mode == "static" or (mode == "auto" and on_gpu))


class StaticDecoder:
    """Decodes batches of N rows behind prompts of S columns; each ``run`` writes its buffers anew.

    The random numbers are those of dynamic decoding, so the tokens differ by rounding of the logits at most.
    """

    def __init__(
        self, model: Any, uniforms: Tensor, stops: Tensor, cfg: RolloutConfig | Sampling, width: int
    ) -> None:
        """uniforms [N, C]; stops int64 [n]; width: S."""
        from transformers import StaticCache

        from saerl_fast.rl.cache import cache_argument

        self.model, self.cfg, self.stops, self.width = model, cfg, stops, width
        n_rows, limit = uniforms.shape
        columns = -(-(width + limit) // 8) * 8  # attention kernels copy a mask whose rows are not aligned
        self.cache = StaticCache(config=model.config, max_cache_len=columns)
        self.named = cache_argument(model, self.cache)
        self.uniforms, self.logprobs = torch.empty_like(uniforms), torch.empty_like(uniforms)
        self.tokens = torch.empty_like(uniforms, dtype=torch.long)
        self.kept = torch.empty_like(uniforms, dtype=torch.bool)
        self.done = self.kept.new_empty(n_rows)
        self.mask = self.kept.new_empty(n_rows, 1, 1, columns)
        self.starts = self.tokens.new_empty(n_rows)
        self.step = self.tokens.new_empty(1)  # tokens sampled so far
        self.capturable = uniforms.device.type in GRAPHS and model not in _refused
        self.graph: Any = None

    def run(
        self, cache: Any, logits: Tensor, seen: Tensor, lens: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, log-probabilities and mask, each [N, C].

        cache: of the prefill of P prompts (see rl/cache.py); logits [P, V] behind it; seen bool [P, S]:
        False on padding; lens int64 [P]; uniforms [N, C].
        """
        group = len(uniforms) // len(lens)
        self.cache.reset()
        for i, layer in enumerate(cache.layers):
            self.cache.update(*(states.repeat_interleave(group, 0) for states in layer.states), i)
        self.mask.zero_()[:, 0, 0, : self.width] = seen.repeat_interleave(group, 0)
        self.starts.copy_(lens.repeat_interleave(group))
        self.uniforms.copy_(uniforms)
        for state in (self.done, self.step, self.tokens, self.logprobs, self.kept):
            state.zero_()
        check_every = CHECK_EVERY if uniforms.device.type in GRAPHS else 1
        self._pick(logits.repeat_interleave(group, 0))
        for step in range(1, uniforms.shape[1]):
            if step % check_every == 0 and bool(self.done.all()):
                break
            if self.capturable and self.graph is None and step > WARM_UP:
                self._capture()
            (self._advance if self.graph is None else self.graph.replay)()
        return self.tokens.clone(), self.logprobs.clone(), self.kept.clone()

    def _pick(self, logits: Tensor) -> None:
        uniforms = self.uniforms.index_select(1, self.step)[:, 0]
        token, logprob = sample(logits, uniforms, self.cfg.temperature, self.cfg.top_p)
        self.tokens.index_copy_(1, self.step, token.masked_fill(self.done, 0)[:, None])
        self.logprobs.index_copy_(1, self.step, logprob.masked_fill(self.done, 0.0)[:, None])
        self.kept.index_copy_(1, self.step, ~self.done[:, None])
        self.done |= (token[:, None] == self.stops).any(1)
        self.mask.index_fill_(3, self.step + self.width, True)
        self.step += 1

    def _advance(self) -> None:
        output = self.model(
            input_ids=self.tokens.index_select(1, self.step - 1),
            attention_mask=self.mask,
            position_ids=(self.starts + self.step - 1)[:, None],
            logits_to_keep=1,
            **self.named,
        )
        self._pick(output.logits[:, -1])

    def _capture(self) -> None:
        try:
            self.graph = _record(self._advance, self.step.device)
        except Exception as error:  # whatever a model's code may raise; nothing ran, so decoding goes on
            self.capturable = False
            cause = error.__context__ or error  # rather than that of ending a capture that broke off
            reason = (str(cause) or type(cause).__name__).splitlines()[0]
            _refuse(self.model, f"no CUDA graph of this model's decoding step ({reason}); decoding without")


def _refuse(model: Any, message: str) -> None:
    if model not in _refused:
        _refused.add(model)
        log.warning(message)


def _record(step: Callable[[], None], device: torch.device) -> Any:
    """A CUDA graph of ``step``, which does not run meanwhile."""
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    # thread_local: a feature capture's thread and NCCL's watchdog go on calling CUDA; the outer context
    # returns to the current stream when the inner one fails
    with torch.cuda.stream(here), torch.cuda.graph(graph, None, _stream(device), "thread_local"):
        step()
    return graph


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where captures happen: one per device, as cuBLAS keeps a workspace for every stream it has seen."""
    return torch.cuda.Stream(device)
