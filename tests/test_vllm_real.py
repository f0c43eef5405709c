"""Rollouts by vLLM itself: what it computes is what the policy says, also after updates. `make test-vllm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from saerl_fast.config import LoRAConfig, ModelConfig, RolloutConfig
from saerl_fast.errors import SaerlError
from saerl_fast.models import load_model
from saerl_fast.rl.logprobs import completion_logprobs
from saerl_fast.rl.lora import add_adapters
from saerl_fast.rl.vllm import VllmEngine

pytest.importorskip(
    "vllm", reason="vLLM is not installed; make test-vllm installs it into its own environment"
)

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["3+4=\nA:", "12 + 5 =\nA:", "what is 2*3?\nA:"]
SIZES = RolloutConfig(group_size=4, max_new_tokens=8)


class Loaded:
    """A model, its tokenizer and an engine beside it."""

    def __init__(self, path: str) -> None:
        self.model, self.tokenizer = load_model(ModelConfig(path=path, dtype="float32"))
        self.engine = VllmEngine(self.model, SIZES)
        self.prompts = [self.tokenizer(text).input_ids for text in TEXTS]

    def gap(self, model: Any = None, cfg: RolloutConfig = SIZES) -> float:
        """Mean |difference| of the engine's log-probabilities from the policy's."""
        model = model or self.model
        made = self.engine.generate(model, self.tokenizer, self.prompts, cfg, seed=4)
        with torch.no_grad():
            wanted, _ = completion_logprobs(model, *made.sequences(), temperature=cfg.temperature)
        return float((made.logprobs[made.completion_mask] - wanted).abs().mean())


@torch.no_grad()
def shake(model: Any, seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=source))


@pytest.fixture(scope="module")
def demo() -> Loaded:
    import numba

    numba.njit(lambda x: x)(1)  # whose wrapper of LLVM vLLM's start trips over
    return Loaded(str(ROOT / "examples/demo/model"))


def test_the_engine_says_what_the_policy_says_after_every_update(demo: Loaded) -> None:
    assert demo.model.get_output_embeddings().weight is demo.model.get_input_embeddings().weight
    assert demo.gap() < 1e-4
    for seed in range(2):
        shake(demo.model, seed)
        assert demo.gap() < 1e-4
    assert demo.gap(cfg=RolloutConfig(group_size=2, max_new_tokens=4, temperature=0.7)) < 1e-4


def test_a_seed_gives_the_same_tokens_and_a_share_those_of_the_whole(demo: Loaded) -> None:
    whole, again, part = (
        demo.engine.generate(demo.model, demo.tokenizer, demo.prompts[k:], SIZES, seed=9, first=k)
        for k in (0, 0, 1)
    )
    assert whole.texts == again.texts and part.texts == whole.texts[SIZES.group_size :]


def test_an_output_layer_that_was_left_behind_is_noticed(demo: Loaded, monkeypatch: Any) -> None:
    """Reloading alone leaves a tied output layer as it was packed at the start."""
    runner = demo.engine.llm.llm_engine.model_executor.driver_worker.model_runner
    reload = lambda pairs: runner.reload_weights(weights_iterator=((n, t.clone()) for n, t in pairs))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(demo.engine, "load", reload)
        shake(demo.model, 5)
        with pytest.raises(SaerlError, match=r"vLLM are off by 0\.\d+ a token"):
            demo.gap()
    assert demo.gap() < 1e-4  # not taken for synced


def test_adapters_come_over_merged(demo: Loaded) -> None:
    adapted = add_adapters(demo.model, LoRAConfig(rank=2), 0)
    shake(adapted, 7)
    try:
        assert demo.gap(adapted) < 1e-4
    finally:
        adapted.unload()


def test_an_output_layer_of_its_own(tmp_path: Path, demo: Loaded) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = demo.model.config.vocab_size
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes))
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    demo.tokenizer.save_pretrained(tmp_path)
    found = Loaded(str(tmp_path))
    assert found.gap() < 1e-4
    shake(found.model, 1)
    assert found.gap() < 1e-4


def test_the_demo_trains(tmp_path: Path) -> None:
    settings = ["train.rollout.engine=vllm", "train.steps=6", "sae.steps=50", "difficulty.n_labels=8"]
    settings += ["diversity.n_clusters=4", "data.limit=400", "train.save_every=3"]
    command = [sys.executable, "-m", "saerl_fast.cli", "train", "--config", "examples/demo.yaml"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels/torch-ext")])
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path), *settings],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = (tmp_path / "adaptive" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    assert len(rows) == 6
    gaps = [row["mismatch"] for row in rows if row["mismatch"] is not None]
    assert len(gaps) >= 3 and max(gaps) < 1e-4, gaps
