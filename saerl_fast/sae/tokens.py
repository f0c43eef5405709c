"""What an SAE is trained on: activations in memory, or captured anew whenever those in memory are used up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saerl_fast.config import SAEConfig
from saerl_fast.errors import SaerlError
from saerl_fast.sae.capture import Progress, iter_hidden_ids
from saerl_fast.sae.partial import Partial

HELD_OUT = 8192  # at most this many tokens, and at most a tenth
_PART = 1 << 16  # rows looked at together


class Tokens:
    """Activations in memory [n, d_in]: every training token once, in random order, before any comes again.

    ``test``: those held out, or all where a handful leaves nothing to spare. Attention sinks are dropped;
    ``max_norm`` is their limit. Raises SaerlError for activations that are empty or not finite.
    """

    found = 0  # captured in all, with those held out and sinks
    sinks = 0
    held = 0
    max_norm: float | None = None
    test: Tensor
    x: Tensor

    def __init__(
        self, activations: Tensor | Iterable[Tensor], cfg: SAEConfig, generator: torch.Generator, device: Any
    ) -> None:
        self.cfg, self.generator = cfg, generator
        x = _gather(activations, cfg.max_tokens)
        x = x if device is None else x.to(device)
        _check(x)
        self.x = self._without_sinks(x)
        order = torch.randperm(len(self.x), generator=generator)
        self.held = min(HELD_OUT, len(self.x) // 10)
        self.train = order[self.held :].to(self.x.device)
        self.test = self.x[order[: self.held].to(self.x.device)] if self.held else self.x
        self.queue = torch.empty(0, dtype=torch.long, device=self.x.device)

    def sample(self, n: int) -> Tensor:
        """``n`` training tokens in random order, or all there are."""
        return self.x[self.train[:n]]

    def batch(self, size: int) -> Tensor:
        """The next ``size`` training tokens, as they were captured."""
        size = min(size, len(self.train))
        if len(self.queue) < size:
            self.queue = self._shuffled()
        rows, self.queue = self.queue[:size], self.queue[size:]
        return self.x[rows]

    def runs_out(self, size: int) -> bool:
        """Whether the next batch has to be captured first."""
        return False

    def figures(self) -> dict[str, float]:
        """Counts of tokens, for the metrics."""
        tokens = float(self.found - self.sinks - self.held)
        return {"tokens": tokens, "held_out_tokens": float(self.held), "sink_tokens": float(self.sinks)}

    def state(self) -> dict[str, Tensor]:
        """What the batches to come depend on."""
        return {"queue": self.queue}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on where ``state`` was taken."""
        self.queue = state["queue"].to(self.x.device)

    def _shuffled(self) -> Tensor:
        order = torch.randperm(len(self.train), generator=self.generator)
        return self.train[order.to(self.x.device)]

    def _without_sinks(self, x: Tensor) -> Tensor:
        """Rows whose norm is at most ``cfg.sink_ratio`` times the median of the first ones."""
        self.found += len(x)
        ratio = self.cfg.sink_ratio
        if ratio <= 0:
            return x
        norms = torch.cat([part.float().norm(dim=1) for part in x.split(_PART)])
        if self.max_norm is None:
            limit = ratio * float(norms.median())
            if limit <= 0:
                return x
            self.max_norm = limit
        keep = norms <= self.max_norm
        if not bool(keep.any()):
            raise SaerlError(f"sae.sink_ratio={ratio} leaves no activations; raise it")
        self.sinks += len(x) - int(keep.sum())
        return x if bool(keep.all()) else x[keep]


class Stream(Tokens):
    """Activations of texts, ``cfg.max_tokens`` at a time: those in memory are used once, then replaced.

    ``rows``: token ids. Texts come in a new seeded order every epoch; within what is in memory tokens are
    shuffled. Whole texts are held out, a tenth of the tokens at most. Nothing is written: where a training
    goes on, what was in memory is captured again. A pool that fits is captured once.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Sequence[int]],
        layer: int,
        cfg: SAEConfig,
        *,
        batch_tokens: int = 8192,
        on_progress: Progress | None = None,
        keep: Partial | None = None,
    ) -> None:
        self.rows = [rows[i] for i in with_tokens(rows)]
        self.model, self.layer, self.cfg, self.batch_tokens = model, layer, cfg, batch_tokens
        self.on_progress, self.keep = on_progress, keep
        self.order = self._permutation(len(self.rows), 0)
        wanted, held = min(HELD_OUT, sum(map(len, self.rows)) // 10), 0
        self.held_rows: list[int] = []
        while held < wanted and len(self.order) > 1:
            self.held_rows.append(self.order.pop())
            held += len(self.rows[self.held_rows[-1]])
        self.total = sum(len(self.rows[i]) for i in self.order)

    def begin(self, device: Any, state: dict[str, Tensor] | None) -> None:
        """Capture what is in memory at the start, or was when ``state`` was taken."""
        self.device = device or next(self.model.parameters()).device
        epoch, text, done, found, sinks = state["stream"].tolist() if state else [0] * 5
        if state and bool(state["max_norm"] > 0):
            self.max_norm = float(state["max_norm"])
        self._fill(epoch, text)
        self.queue = self.queue[done:]
        self.test = self._without_sinks(self._capture(self.held_rows)) if self.held_rows else self.x
        self.held = len(self.test) if self.held_rows else 0
        if state:
            self.found, self.sinks = found, sinks

    def sample(self, n: int) -> Tensor:
        return self.x[self.shuffled[:n]]

    def batch(self, size: int) -> Tensor:
        size, parts = min(size, self.total - self.sinks), []
        while True:
            rows, self.queue = self.queue[:size], self.queue[size:]
            parts.append(self.x[rows])
            size -= len(rows)
            if size <= 0:
                return torch.cat(parts)
            self._fill(*self.next)

    def runs_out(self, size: int) -> bool:
        return len(self.queue) < size and self.total > self.cfg.max_tokens

    def state(self) -> dict[str, Tensor]:
        done = len(self.shuffled) - len(self.queue)
        counts = torch.tensor([*self.begun, done, self.found, self.sinks])
        return {"stream": counts, "max_norm": torch.tensor(self.max_norm or 0.0, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Nothing: `begin` has done it."""

    def _fill(self, epoch: int, text: int) -> None:
        """Put the tokens of the epoch's texts from ``text`` on into memory, and shuffle them."""
        whole = self.total <= self.cfg.max_tokens
        order = self.order if whole or epoch == 0 else self._permutation(self.order, epoch)
        begin, count = text, 0
        while text < len(order) and count < self.cfg.max_tokens:
            count += len(self.rows[order[text]])
            text += 1
        if not (whole and hasattr(self, "x")):
            self.x = self.queue = torch.empty(0)  # not held while the next ones are captured
            self.x = self._without_sinks(self._capture(order[begin:text]))
        self.begun = (epoch, begin)
        self.next = (epoch, text) if text < len(order) else (epoch + 1, 0)
        numbers = torch.Generator().manual_seed(_seed(self.cfg.seed, epoch, begin + 1))
        self.shuffled = torch.randperm(len(self.x), generator=numbers).to(self.x.device)
        self.queue = self.shuffled

    def _capture(self, chosen: Sequence[int]) -> Tensor:
        texts, parts = [self.rows[i] for i in chosen], []
        captured = iter_hidden_ids(self.model, texts, self.layer, self.batch_tokens, self.on_progress)
        for _, x, _ in captured:
            parts.append(x.to(self.device))
            if self.keep is not None:
                self.keep.check()
        self.on_progress = None  # the first ones are waited for
        return torch.cat(parts)

    def _permutation(self, of: int | list[int], epoch: int) -> list[int]:
        texts = list(range(of)) if isinstance(of, int) else of
        numbers = torch.Generator().manual_seed(_seed(self.cfg.seed, epoch, 0))
        return [texts[i] for i in torch.randperm(len(texts), generator=numbers).tolist()]


def with_tokens(rows: Sequence[Sequence[int]]) -> list[int]:
    """The numbers of the rows of ids that have a token; SaerlError where none has."""
    full = [i for i, row in enumerate(rows) if row]
    if not full:
        raise SaerlError("no activations to collect: there is no text with a token; check data.train")
    return full


def _seed(seed: int, epoch: int, text: int) -> int:
    """A seed of its own for every order; torch takes 64 bits."""
    return (seed * 1_000_003 + epoch) * 1_000_003 + text & (1 << 63) - 1


def _gather(activations: Tensor | Iterable[Tensor], max_tokens: int) -> Tensor:
    if not isinstance(activations, Tensor):
        parts, count = [], 0
        for part in activations:
            parts.append(part)
            count += len(part)
            if count >= max_tokens:
                break
        activations = torch.cat(parts)[:max_tokens] if parts else torch.empty(0, 0)
    if activations.dim() != 2 or activations.numel() == 0:
        shape = tuple(activations.shape)
        raise SaerlError(
            f"there are no activations to train an SAE on (shape {shape}); collect some from texts"
        )
    return activations.detach()


def _check(x: Tensor) -> None:
    bad = sum(int((~torch.isfinite(part)).any(1).sum()) for part in x.split(_PART))
    if bad:
        raise SaerlError(f"{bad} of {len(x)} activations are not finite; check the model and its dtype")
