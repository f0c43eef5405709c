"""The hidden states of vLLM's own prefill, for an engine in this process that runs its layers as they are.

A hook on a layer sees every token that is computed, in the order of the batch. Which token of which prompt it
is follows from what the scheduler has set up: a prompt may be cut into pieces, and a part that another prompt
or sample of its shares is computed once. Rows are therefore kept by what a hidden state depends on: the
token with all before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Prefill:
    """The residual stream after ``layer`` blocks (1 or more) of the model in ``runner``."""

    def __init__(self, runner: Any, layer: int) -> None:
        self.runner, self.layer = runner, layer
        self._next: dict[tuple[int, int], int] = {}  # (what is before, token) -> number, from 1
        self._row: dict[int, int] = {}  # number -> row of what was kept
        self._kept: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Forget what was seen, and watch the forward passes in this block."""
        self._next, self._row, self._kept = {}, {}, []
        layer = self.runner.get_model().model.layers[self.layer - 1]
        handle = layer.register_forward_hook(lambda _, __, out: self._see(out))
        try:
            yield
        finally:
            handle.remove()

    def rows(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """The hidden states [n tokens, d] of ``prompts``, one after the other; None: some were not seen."""
        found = []
        for prompt in prompts:
            at = 0
            for token in prompt:
                at = self._next.get((at, token), -1)
                if at not in self._row:
                    return None
                found.append(self._row[at])
        return torch.cat(self._kept)[found]

    def _see(self, out: Any) -> None:
        """One forward pass: its hidden states, residuals apart as vLLM's layers hand them on, or not."""
        batch, starts = self.runner.input_batch, self.runner.query_start_loc.np
        wanted: list[int] = []
        for i in range(batch.num_reqs):
            first, end = int(batch.num_computed_tokens_cpu[i]), int(batch.num_prompt_tokens[i])
            last = min(first + int(starts[i + 1] - starts[i]), end)
            at = 0
            for place, token in enumerate(batch.token_ids_cpu[i, :last].tolist() if first < last else ()):
                at = self._next.setdefault((at, token), len(self._next) + 1)
                if place >= first and at not in self._row:
                    self._row[at] = len(self._row)
                    wanted.append(int(starts[i]) + place - first)
        if wanted:
            hidden, residual = out if isinstance(out, tuple) else (out, None)
            kept = hidden[wanted]  # a copy: the engine goes on in place
            self._kept.append(kept if residual is None else kept + residual[wanted])
