"""Features from the prefill that generation runs anyway, against a prefill of their own, in one process.

    pytest benchmarks/bench_capture.py --benchmark-json=benchmarks/results/cpu/capture.json

Every contender generates the rollouts of a batch. "generate without capture" stops there and is what the
ratios are taken to; "capture" reads the SAE's layer off that prefill and encodes it; "own prefill" runs the
prompts through the model up to that layer first (an early stop: the cheapest separate pass there is), then
encodes. On a GPU the capture encodes beside the decoding. SAERL_BENCH_GRID=tiny: one small shape, to see
that it runs.

How time is taken: harness.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.harness import DEVICE, Contender, bench_threads, environment, grid, measure
from saerl_fast.config import RolloutConfig
from saerl_fast.rl.generate import generate
from saerl_fast.sae.capture import FeatureCapture
from saerl_fast.sae.model import SAE, SAESpec
from saerl_fast.sae.pooled import pooled_features

BASE = "generate without capture"


class Shape(NamedTuple):
    d_in: int
    blocks: int
    d_sae: int
    k: int
    prompts: int
    prompt_tokens: int
    group: int
    new_tokens: int


TINY = [Shape(32, 2, 128, 4, 4, 12, 2, 4)]
CPU_GRID = [
    Shape(128, 4, 1024, 16, 16, 32, 8, 16),  # about the size of the demo
    Shape(128, 4, 1024, 16, 16, 128, 8, 16),
    Shape(256, 6, 4096, 32, 8, 128, 8, 32),
]
GPU_GRID = [
    Shape(576, 30, 16384, 32, 64, 128, 8, 128),  # SmolLM2-135M
    Shape(576, 30, 65536, 32, 64, 512, 8, 128),
    Shape(1536, 28, 65536, 64, 64, 256, 8, 256),  # Qwen2.5-Math-1.5B
]


class Problem:
    """A random Llama and SAE of one shape, and prompts of random tokens."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        heads = max(1, shape.d_in // 64)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=shape.d_in,
            intermediate_size=4 * shape.d_in,
            num_hidden_layers=shape.blocks,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.shape, self.device = shape, device
        self.model = LlamaForCausalLM(config).to(device, dtype).eval()
        with torch.no_grad():
            self.model.lm_head.weight[1] = 0  # ends are rare: every contender decodes to the limit
        weights = torch.randn(shape.d_in, shape.d_sae) / shape.d_in**0.5
        sae = SAE(
            weights,
            torch.zeros(shape.d_sae),
            weights.t().contiguous(),
            torch.zeros(shape.d_in),
            cfg=SAESpec(k=shape.k, hook_layer=shape.blocks // 2),
        )
        self.sae = sae.to(device, dtype)
        self.capture = FeatureCapture(self.model, self.sae)
        self.prompts = torch.randint(2, 512, (shape.prompts, shape.prompt_tokens)).tolist()
        self.cfg = RolloutConfig(group_size=shape.group, max_new_tokens=shape.new_tokens)

    def contenders(self) -> dict[str, Contender]:
        return {BASE: self.generate, "capture": self.captured, "own prefill": self.separate}

    def generate(self) -> Any:
        return generate(self.model, Numbers(), self.prompts, self.cfg)

    def captured(self) -> Any:
        return generate(self.model, Numbers(), self.prompts, self.cfg, capture=self.capture)

    def separate(self) -> Any:
        features, _ = pooled_features(self.model, self.sae, self.prompts)
        made = self.generate()
        made.features = features
        return made

    def check(self, name: str, result: Any) -> None:
        """The same rollouts and, where there are any, the same features for all."""
        if name == BASE:
            self.reference = result
            return
        assert torch.equal(result.completion_ids, self.reference.completion_ids)
        features = result.features.to_dense()
        assert features.any()
        if self.device.type == "cpu":  # in bfloat16 two batch shapes may choose different features
            other = pooled_features(self.model, self.sae, self.prompts)[0]
            torch.testing.assert_close(features, other.to_dense(), rtol=1e-3, atol=1e-4)


class Numbers:
    """A tokenizer whose texts are the token ids."""

    pad_token_id, eos_token_id = 0, 1

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool = True) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


@pytest.mark.parametrize("shape", grid(TINY, CPU_GRID, GPU_GRID), ids=lambda s: "x".join(map(str, s)))
def test_capture(benchmark: Any, shape: Shape) -> None:
    enabled = not benchmark.disabled
    with bench_threads():
        problem = Problem(shape, DEVICE)
        table = measure(problem.contenders(), DEVICE, 9 if enabled else 2, base=BASE, check=problem.check)
        benchmark.extra_info.update(
            shape._asdict(), base=BASE, contenders=table, environment=environment(DEVICE)
        )
        benchmark.pedantic(problem.captured, rounds=3, warmup_rounds=1)
