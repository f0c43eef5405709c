"""Rollouts by another engine: a stand-in with vLLM's calls here, vLLM itself in ``test_vllm_real``."""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from saerl_fast.config import Config, LoRAConfig, LossConfig, RolloutConfig
from saerl_fast.errors import SaerlError
from saerl_fast.records.log import read_metrics
from saerl_fast.rl.engine import Engine, Sample
from saerl_fast.rl.generate import generate
from saerl_fast.rl.logprobs import completion_logprobs
from saerl_fast.rl.vllm import VllmEngine
from saerl_fast.sae.capture import FeatureCapture
from saerl_fast.stages.console import Echo
from saerl_fast.stages.train import _engine
from tests.test_capture import sae_for
from tests.tiny_lm import char_tokenizer, tiny_model, token_rows
from tests.training import run, small

TOKENIZER = char_tokenizer()
PROMPTS = token_rows(["1+1=", "what is 12+30?", "a"])


class LLM:
    """Weights of its own until some are loaded; samples with a generator per request."""

    made: list[LLM] = []
    bias = 0.0  # added to every reported log-probability: an engine that computes differently
    stale = "no weight is left behind"

    def __init__(self, model: str, **options: Any) -> None:
        assert options["logprobs_mode"] == "processed_logprobs" and options["dtype"] == "float32"
        self.policy, self.synced, self.resets = tiny_model(seed=99), 0, 0
        worker = SimpleNamespace(model_runner=self)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
        LLM.made.append(self)

    def reload_weights(self, weights_iterator: Any) -> None:
        pairs = {name: tensor for name, tensor in weights_iterator if LLM.stale not in name}
        self.policy.load_state_dict(pairs, strict=False)
        self.synced += 1

    def get_model(self) -> Any:
        return self.policy

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def generate(self, prompts: list[dict], sampling_params: list[Any], use_tqdm: bool) -> list[Any]:
        return [self._one(p["prompt_token_ids"], s) for p, s in zip(prompts, sampling_params, strict=True)]

    def _one(self, prompt: list[int], params: Any) -> Any:
        assert params.logprobs == 0 and not params.detokenize
        source = torch.Generator().manual_seed(params.seed)
        outputs = []
        for index in range(params.n):
            tokens: list[int] = []
            logprobs: list[dict] = []
            while len(tokens) < params.max_tokens and not (tokens and tokens[-1] in params.stop_token_ids):
                logits = self.policy(torch.tensor([prompt + tokens])).logits[0, -1] / params.temperature
                logp = logits.log_softmax(-1)
                token = int(torch.multinomial(logp.exp(), 1, generator=source))
                tokens.append(token)
                logprobs.append({token: SimpleNamespace(logprob=float(logp[token]) + LLM.bias)})
            outputs.append(SimpleNamespace(index=index, token_ids=tokens, logprobs=logprobs))
        return SimpleNamespace(outputs=outputs[::-1])  # in no particular order


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(LLM, "made", [])
    return LLM


def test_rollouts_of_the_current_weights(vllm: type[LLM]) -> None:
    model, cfg = tiny_model(), RolloutConfig(group_size=3, max_new_tokens=8, temperature=0.7)
    engine = VllmEngine(model, cfg)

    def check() -> Any:
        made = engine.generate(model, TOKENIZER, PROMPTS, cfg, seed=4)
        with torch.no_grad():
            again, _ = completion_logprobs(model, *made.sequences(), temperature=0.7)
        torch.testing.assert_close(made.logprobs[made.completion_mask], again, atol=1e-4, rtol=0)
        assert (made.logprobs[~made.completion_mask] == 0).all()
        return made

    one, two = check(), check()
    assert torch.equal(one.completion_ids, two.completion_ids) and one.completion_ids.shape[0] == 9
    assert vllm.made[0].synced == vllm.made[0].resets == 1  # nothing had changed in between
    ends = [row[n - 1] == 1 for row, n in zip(one.completion_ids, one.lengths, strict=True)]
    assert one.finished.tolist() == ends and one.texts[0] in TOKENIZER.decode(one.completion_ids[0])
    part = engine.generate(model, TOKENIZER, PROMPTS[1:], cfg, seed=4, first=1)
    assert part.texts == one.texts[3:]  # a process's share is that of the whole
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    check()
    assert vllm.made[0].synced == 2


def test_features_take_a_prefill_of_their_own(vllm: type[LLM]) -> None:
    model, cfg = tiny_model(), RolloutConfig(group_size=2, max_new_tokens=3)
    capture = FeatureCapture(model, sae_for(32, hook_layer=1))
    made = VllmEngine(model, cfg).generate(model, TOKENIZER, PROMPTS, cfg, capture=capture)
    with capture:
        for prompt in PROMPTS:
            model(torch.tensor([prompt]))
    torch.testing.assert_close(made.features.to_dense(), capture.features().to_dense(), atol=1e-4, rtol=1e-4)
    assert made.timings["capture"] > 0


@pytest.mark.parametrize(("cap", "moved"), [(2.0, 0.25), (0.5, 0.25), (0.0, 1.0)])
def test_training_corrects_for_the_other_engine(
    vllm, monkeypatch, tmp_path, cap: float, moved: float
) -> None:
    """vLLM reports 4 times the probability: the loss is weighed by 1/4, unless told not to."""
    cfg = small(steps=1, lr=0.0, grad_norm=0.0, loss=LossConfig(importance_cap=cap))
    cfg.rollout.engine = "vllm"
    monkeypatch.setattr("saerl_fast.rl.engine.LIMIT", 10.0)  # it would stop the run
    norms = []
    for bias in (0.0, torch.tensor(4.0).log().item()):
        monkeypatch.setattr(LLM, "bias", bias)
        model = tiny_model()
        engine = VllmEngine(model, cfg.rollout).generate
        run(tmp_path / str(bias), copy.deepcopy(cfg), model=model, engine=engine)
        row = next(r for r in read_metrics(tmp_path / str(bias)) if r["kind"] == "train")
        assert row["mismatch"] == pytest.approx(bias, abs=1e-4)
        norms.append(row["grad_norm"])
    if cap == 0:
        assert norms[1] != pytest.approx(norms[0], rel=0.1)  # as if the policy had moved: partly clipped
    else:
        assert norms[1] / norms[0] == pytest.approx(moved / min(1.0, cap), rel=1e-3)


def test_without_vllm_without_the_engine_and_with_lora(tmp_path, monkeypatch) -> None:
    cfg = small(steps=1)
    cfg.rollout.engine = "vllm"
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SaerlError, match="pip install vllm"):
        VllmEngine(tiny_model(), cfg.rollout)
    with pytest.raises(SaerlError, match="engine=vllm is not the engine"):
        run(tmp_path / "a", cfg)
    with pytest.raises(SaerlError, match="pip install vllm"):
        _engine(Config(train=cfg), Echo(), SimpleNamespace(model=tiny_model()))
    assert not list(tmp_path.iterdir())


def test_weights_left_behind_stop_the_run(vllm, monkeypatch, tmp_path) -> None:
    """As with a packed output layer: all weights but one come over, after the first step."""
    cfg, model = small(steps=3, lr=0.05), tiny_model()
    cfg.rollout.engine = "vllm"
    engine = VllmEngine(model, cfg.rollout)
    engine.sync(model)
    monkeypatch.setattr(LLM, "stale", "lm_head")
    with pytest.raises(SaerlError, match=r"of vLLM are off by 0\.\d+ a token .*engine=transformers"):
        run(tmp_path, cfg, model=model, engine=engine.generate)
    assert vllm.made[0].synced == 2 and len(read_metrics(tmp_path)) == 2  # step 0's evaluation, step 1


def test_adapters_are_merged_into_what_the_engine_gets(vllm, tmp_path) -> None:
    pytest.importorskip("peft")
    cfg, model = small(steps=2, lr=0.05, lora=LoRAConfig(rank=2)), tiny_model()
    cfg.rollout.engine = "vllm"
    run(tmp_path, cfg, model=model, engine=VllmEngine(model, cfg.rollout).generate)
    rows = [row for row in read_metrics(tmp_path) if row["kind"] == "train"]
    assert len(rows) == 2 and all(row["mismatch"] < 1e-5 for row in rows)
    assert vllm.made[0].synced == 2


class Own(Engine):
    """An engine of one's own: the policy itself."""

    name = "own"

    def __init__(self, model: Any, cfg: RolloutConfig) -> None:
        self.policy = copy.deepcopy(model)

    def load(self, weights: Any) -> None:
        self.policy.load_state_dict(dict(weights), strict=False)

    def sample(self, prompts: Any, cfg: Any, seeds: Any, stops: Any) -> Any:
        made = generate(self.policy, TOKENIZER, prompts, cfg, seed=seeds[0])
        rows = zip(made.completion_ids, made.logprobs, made.lengths.tolist(), strict=True)
        samples = [Sample(ids[:n].tolist(), logprobs[:n].tolist()) for ids, logprobs, n in rows]
        return [samples[i : i + cfg.group_size] for i in range(0, len(samples), cfg.group_size)]


class Wrong(Own):
    """An engine whose `sample` gives ``spoilt`` of what it should."""

    def sample(self, *args: Any) -> Any:
        return self.spoilt(super().sample(*args))


@pytest.mark.parametrize(
    "spoilt, says",
    [
        (lambda groups: groups[:-1], "one a prompt, of 4 completions each; it gave .4, 4"),
        (lambda groups: [group[:-1] for group in groups], "of 4 completions each; it gave .3, 3"),
        (lambda groups: [one for group in groups for one in group], "it gave .2, 2"),
        (lambda groups: None, "it gave NoneType"),
        (lambda groups: [[Sample([5, 5], [-1.0])] * 4 for _ in groups], "got 1 with .5, 5"),
        (lambda groups: [[Sample([], [])] * 4 for _ in groups], "got 0 with "),
        (lambda groups: [[Sample([5] * 99, [-1.0] * 99)] * 4 for _ in groups], "1 to 6 tokens.* got 99"),
        (lambda groups: [[Sample([10**6], [-1.0])] * 4 for _ in groups], "below 45.* 1 with .1000000"),
    ],
)
def test_an_engine_that_breaks_its_contract_is_told(tmp_path, spoilt, says) -> None:
    model, cfg = tiny_model(), small(steps=1)
    cfg.rollout.group_size, cfg.rollout.engine = 4, "tests.test_vllm:Wrong"
    engine = Wrong(model, cfg.rollout)
    engine.spoilt = spoilt
    with pytest.raises(SaerlError, match=f"engine own must .*{says}"):
        run(tmp_path, cfg, model=model, engine=engine.generate)


class Raising(Own):
    """An engine with a bug in ``at``."""

    at = "load"

    def load(self, weights: Any) -> None:
        return {}["gone"] if self.at == "load" else super().load(weights)

    def sample(self, *args: Any) -> Any:
        return None + 1 if self.at == "sample" else [[(1, 2)] * 4] * len(args[0])  # type: ignore[operator]


@pytest.mark.parametrize(
    "at, says",
    [
        ("load", "load of engine own raised KeyError: 'gone' .*test_vllm.py line"),
        ("sample", "sample of engine own raised TypeError: .*test_vllm.py line"),
        ("return", "sample of engine own raised AttributeError: 'tuple' object"),
    ],
)
def test_an_exception_inside_an_engine_is_the_users_to_mend(tmp_path, at, says) -> None:
    model, cfg = tiny_model(), small(steps=1)
    cfg.rollout.group_size, cfg.rollout.engine = 4, "tests.test_vllm:Raising"
    engine = Raising(model, cfg.rollout)
    engine.at = at
    with pytest.raises(SaerlError, match=f"{says}.*; mend it"):
        run(tmp_path, cfg, model=model, engine=engine.generate)


def nothing(model: Any, cfg: Any) -> None: ...


def broken(model: Any, cfg: Any) -> None:
    raise ZeroDivisionError("no engine")


def test_an_engine_of_ones_own_is_named_like_any_function(tmp_path) -> None:
    model, cfg = tiny_model(), small(steps=2)
    cfg.rollout.engine = "tests.test_vllm:Own"
    said = Echo(quiet=True)
    engine = _engine(Config(train=cfg), said, SimpleNamespace(model=model))
    run(tmp_path, cfg, model=model, engine=engine)
    assert len([row for row in read_metrics(tmp_path) if row["kind"] == "train"]) == 2
    for name, match in [
        ("tiny_model", "must take .model, cfg."),
        ("nothing", "is no Engine; derive it"),
        ("broken", "train.rollout.engine=tests.test_vllm:broken raised ZeroDivisionError"),
    ]:
        cfg.rollout.engine = f"tests.test_vllm:{name}"
        with pytest.raises(SaerlError, match=match):
            _engine(Config(train=cfg), said, SimpleNamespace(model=model))
