"""Hidden states out of vLLM's batches: prompts in pieces, shared beginnings, decoding in between."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from saerl_fast.rl.prefill import Prefill

D = 3


def state(prefix: list[int]) -> Tensor:
    """What a causal model makes of a token and all before it, made up."""
    return torch.tensor(
        [sum((i + 1) ** k * token for i, token in enumerate(prefix)) for k in range(D)]
    ).float()


class Layer(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return (x / 4, x * 3 / 4) if self.apart else x


class Runner:
    """A model of two layers and the batches of a scheduler; requests are {name: (tokens, prompt length)}."""

    def __init__(self, apart: bool) -> None:
        self.model = SimpleNamespace(model=SimpleNamespace(layers=[Layer(), Layer()]))
        for layer in self.model.model.layers:
            layer.apart = apart

    def get_model(self) -> Any:
        return self.model

    def run(self, *pieces: tuple[list[int], int, int, int]) -> None:
        """A forward pass over tokens first to last of each (tokens, prompt length, first, last)."""
        ids = np.zeros((8, 32), dtype=np.int32)
        for row, (tokens, *_) in zip(ids, pieces, strict=False):
            row[: len(tokens)] = tokens
        self.input_batch = SimpleNamespace(
            num_reqs=len(pieces),
            token_ids_cpu=ids,
            num_prompt_tokens=np.array([n for _, n, *_ in pieces]),
            num_computed_tokens_cpu=np.array([first for *_, first, _ in pieces]),
        )
        counts = [last - first for *_, first, last in pieces]
        self.query_start_loc = SimpleNamespace(np=np.array([0, *np.cumsum(counts)]))
        x = torch.stack([state(t[: i + 1]) for t, _, first, last in pieces for i in range(first, last)])
        self.model.model.layers[1](torch.cat([x, torch.full((2, D), 99.0)]))  # padded, as for a graph


@pytest.mark.parametrize("apart", [True, False])
def test_rows_are_found_by_what_they_depend_on(apart: bool) -> None:
    runner = Runner(apart)
    watch = Prefill(runner, 2)
    one, two, three = [5, 6, 7, 8, 9], [5, 6, 7, 1], [2]
    with watch.watching():
        runner.run((one, 5, 0, 3), (three, 1, 0, 1))  # the first in two pieces
        runner.run((one, 5, 3, 5), (two, 4, 3, 4), ([*three, 4], 1, 1, 2))  # a shared beginning; decoding
        runner.run(([*one, 3], 5, 5, 6), ([*two, 8], 4, 4, 5))
        runner.run((one, 5, 4, 5))  # again, for another sample
    runner.run(([4, 4], 2, 0, 2))  # not watched any more
    prompts = [two, one, three, one[:2]]
    wanted = torch.stack([state(prompt[: i + 1]) for prompt in prompts for i in range(len(prompt))])
    assert torch.equal(watch.rows(prompts), wanted)
    for unseen in ([4, 4], [5, 6, 8], [*three, 4]):  # never, another end, a completion
        assert watch.rows([one, unseen]) is None
    with watch.watching():
        pass
    assert watch.rows([one]) is None  # a new watch begins afresh
