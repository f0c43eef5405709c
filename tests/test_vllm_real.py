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
from saerl_fast.models.load import load_model
from saerl_fast.rl.logprobs import completion_logprobs
from saerl_fast.rl.lora import add_adapters
from saerl_fast.rl.vllm import BATCH, VllmEngine
from saerl_fast.sae.capture import FeatureCapture
from tests.test_capture import sae_for

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


def test_more_tokens_of_prompts_than_a_step_takes(demo: Loaded) -> None:
    """vLLM would cut the last one in two, and on a CPU stop with an error."""
    long = demo.tokenizer("12 + 5 and 3 * 7 " * 6).input_ids
    prompts = [long[: 60 + i % 7] for i in range(BATCH // 60 + 20)]
    assert sum(map(len, prompts)) > BATCH
    cfg = RolloutConfig(group_size=2, max_new_tokens=2)
    made = demo.engine.generate(demo.model, demo.tokenizer, prompts, cfg, seed=1)
    with torch.no_grad():
        wanted, _ = completion_logprobs(demo.model, *made.sequences(), temperature=1.0)
    assert float((made.logprobs[made.completion_mask] - wanted).abs().mean()) < 1e-4


class Watched(FeatureCapture):
    """Counts the forward passes that are made for features, and keeps the hidden states pooled."""

    passes = 0
    seen: list[Any] = []

    def __enter__(self) -> Any:
        self.passes += 1
        return super().__enter__()

    def pool(self, x: Any, offsets: Any, rows: Any) -> Any:
        self.seen.append((x, offsets))
        return super().pool(x, offsets, rows)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_features_come_from_the_engines_own_prefill(demo: Loaded, layer: int) -> None:
    """Also of prompts that share their beginnings, with each other and with those of the call before."""
    long = demo.tokenizer("12 + 5 and 3 * 7 " * 6).input_ids
    prompts = [*demo.prompts, long, [*long[:40], 5, 6, 7], long[:60]]
    sae = sae_for(demo.model.config.hidden_size, hook_layer=layer)
    capture = Watched(demo.model, sae, "max", layer=layer)
    for seed in range(2):
        shake(demo.model, seed)
        for _ in range(2):  # the second time without a sync
            capture.seen = []
            made = demo.engine.generate(demo.model, demo.tokenizer, prompts, SIZES, capture=capture)
            ((x, offsets),) = capture.seen
            assert capture.passes == 0 and offsets.tolist()[-1] == sum(map(len, prompts)) == len(x)
            for i, prompt in enumerate(prompts):
                with torch.no_grad():
                    states = demo.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
                wanted, found = states[layer][0], x[offsets[i] : offsets[i + 1]]
                assert float((found - wanted).norm() / wanted.norm()) < 1e-5
            assert made.features.n_rows == len(prompts)


def test_hidden_states_that_are_others_are_not_taken(demo: Loaded, monkeypatch: Any, caplog: Any) -> None:
    from saerl_fast.rl.prefill import Prefill

    seen = Prefill.rows
    monkeypatch.setattr(Prefill, "rows", lambda self, prompts: seen(self, prompts) * 1.01)
    capture = Watched(demo.model, sae_for(demo.model.config.hidden_size, hook_layer=2), layer=2)
    shake(demo.model, 9)
    try:
        for passes in (1, 2):
            demo.engine.generate(demo.model, demo.tokenizer, demo.prompts, SIZES, capture=capture)
            assert capture.passes == passes
        assert [m for m in caplog.messages if "off by 0.01 of their norm" in m] == caplog.messages[-1:]
    finally:
        demo.engine.observes = True


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
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = (tmp_path / "adaptive" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    assert len(rows) == 6
    gaps = [row["mismatch"] for row in rows if row["mismatch"] is not None]
    assert len(gaps) >= 3 and max(gaps) < 1e-4, gaps
