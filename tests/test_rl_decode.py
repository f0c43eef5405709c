import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saerl_fast.config import RolloutConfig
from saerl_fast.rl import decode
from saerl_fast.rl.decode import Sampling, StaticDecoder
from saerl_fast.rl.generate import generate
from saerl_fast.rl.rollouts import Rollouts
from tests.tiny_lm import char_tokenizer, tiny_model, token_rows

PROMPTS = token_rows(["1+1=", "what is 12+30?", "a", "copy: xyz.", "12"])
KINDS = ["llama", "qwen2", "qwen3", "neox", "gpt2"]
TOKENIZER = char_tokenizer()
CFG = RolloutConfig(group_size=3, max_new_tokens=21, temperature=0.8, decode="static")


def ending_model(kind: str = "llama", **extra: Any) -> Any:
    """One whose completions end by themselves, at different places."""
    model = tiny_model(kind, spread=1.5, **extra)
    with torch.no_grad():
        model.get_output_embeddings().weight[1] *= 1.5
    return model


def check_same(found: Rollouts, wanted: Rollouts) -> None:
    assert found.completion_ids.tolist() == wanted.completion_ids.tolist()
    assert found.completion_mask.equal(wanted.completion_mask)
    assert found.finished.equal(wanted.finished) and found.texts == wanted.texts
    torch.testing.assert_close(found.logprobs, wanted.logprobs, atol=1e-4, rtol=0)


def dynamic(
    model: Any, prompts: list[list[int]] = PROMPTS, cfg: RolloutConfig | Sampling = CFG, **rest: Any
) -> Rollouts:
    return generate(model, TOKENIZER, prompts, Sampling.of(cfg, decode="dynamic"), **rest)


def spy(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The first argument of every call of ``owner.name`` from now on."""
    real, calls = getattr(owner, name), []

    def recorded(*args: Any) -> Any:
        calls.append(args[0])
        return real(*args)

    monkeypatch.setattr(owner, name, recorded)
    return calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [{}, {"top_p": 0.9}, {"temperature": 0.0}, {"max_new_tokens": 1}])
def test_same_as_dynamic(kind: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, cfg = ending_model(kind), Sampling.of(CFG, **change)
    runs = spy(monkeypatch, StaticDecoder, "run")
    for prompts in (PROMPTS, token_rows(["12+3=", "45-6="])):  # padded, and not
        wanted = dynamic(model, prompts, cfg, seed=3)
        assert not runs
        check_same(generate(model, TOKENIZER, prompts, cfg, seed=3), wanted)
        assert len(runs) == 1 and len(wanted.lengths.unique()) > 2 * (
            cfg.max_new_tokens > 1 < cfg.temperature
        )
        runs.clear()


class NoHost(TorchDispatchMode):
    """Forbids what reads from the device or gives a shape that depends on data; counts the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        banned = ("_local_scalar", "nonzero", "unique", "masked_select", "is_nonzero", "equal")
        assert not any(name.removeprefix("aten::").startswith(word) for word in banned), name
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_the_same_and_asks_the_host_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = set(), StaticDecoder._advance

    def watched(self: StaticDecoder) -> None:
        with NoHost() as mode:
            real(self)
        state = [v for v in vars(self).values() if isinstance(v, torch.Tensor)]
        state += [part for layer in self.cache.layers for part in (layer.keys, layer.values)]
        seen.add((mode.count, *((tensor.data_ptr(), tensor.shape) for tensor in state)))

    monkeypatch.setattr(StaticDecoder, "_advance", watched)
    generate(tiny_model(kind), TOKENIZER, PROMPTS, replace(CFG, top_p=0.9))
    assert len(seen) == 1


def test_it_stops_when_all_rows_have_ended() -> None:
    model, sizes = ending_model(), []
    model.generation_config.eos_token_id = list(range(1, 40, 4))
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    made = generate(model, TOKENIZER, PROMPTS, replace(CFG, max_new_tokens=60))
    longest = int(made.lengths.max())
    assert made.finished.all() and 2 < longest < 40
    assert sizes[:longest] == [5] + [15] * (longest - 1)
    assert set(sizes[longest:]) <= {1}  # the proof, once


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "eager"])
@pytest.mark.parametrize("mode", ["static", "auto"])
def test_unfit_models_decode_dynamically(kind: str, mode: str, monkeypatch, caplog) -> None:
    if mode == "auto":
        monkeypatch.setattr(decode, "GRAPHS", ("cpu",))
    model = tiny_model("llama", attn_implementation="eager") if kind == "eager" else tiny_model(kind)
    runs, cfg = spy(monkeypatch, StaticDecoder, "run"), replace(CFG, decode=mode)
    for _ in range(2):
        check_same(generate(model, TOKENIZER, PROMPTS, cfg), dynamic(model))
    assert not runs
    assert [record.message[:21] for record in caplog.records] == ["rollout.decode=static"] * (
        mode == "static"
    )


def test_auto_on_a_cpu_is_dynamic(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = spy(monkeypatch, StaticDecoder, "run")
    generate(tiny_model(), TOKENIZER, PROMPTS, replace(CFG, decode="auto"))
    assert not runs


class Replayed:
    """What a CUDA graph does, as far as the decoder can tell: recording runs nothing, a replay the step."""

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self.step, self.replays = step, 0

    def replay(self) -> None:
        self.step()
        self.replays += 1


def test_one_capture_for_each_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Replayed] = []
    monkeypatch.setattr(decode, "GRAPHS", ("cpu",))
    monkeypatch.setattr(decode, "_record", lambda *args: graphs.append(Replayed(*args)) or graphs[-1])
    model, cfg = tiny_model(), replace(CFG, decode="auto", batch_size=6)
    with torch.no_grad():
        model.lm_head.weight[1] = model.lm_head.weight[3:].mean(0)  # seldom the likeliest
    check_same(generate(model, TOKENIZER, PROMPTS, cfg, seed=2), dynamic(model, seed=2))
    assert [graph.replays for graph in graphs] == [18 + 20, 18]  # 6 rows, 6 again, then 3


def test_a_failing_capture_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    tried = []

    def fail(*_: Any) -> None:
        tried.append(1)
        try:
            raise RuntimeError("operation not permitted\nwhen capturing")
        finally:
            raise ValueError("the capture ended badly")

    monkeypatch.setattr(decode, "GRAPHS", ("cpu",))
    monkeypatch.setattr(decode, "_record", fail)
    runs = spy(monkeypatch, StaticDecoder, "run")
    model = ending_model()
    for mode in ("auto", "auto", "static"):
        check_same(generate(model, TOKENIZER, PROMPTS, replace(CFG, decode=mode)), dynamic(model))
    assert len(runs) == 2 and len(tried) == 1
    (record,) = caplog.records
    assert "(operation not permitted)" in record.message and record.levelno == logging.WARNING


def test_the_tokens_do_not_depend_on_chunks_or_memory(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    model = ending_model()
    whole = dynamic(model, seed=5)
    check_same(generate(model, TOKENIZER, PROMPTS, replace(CFG, batch_size=6), seed=5), whole)
    real = StaticDecoder._advance

    def tight(self: StaticDecoder) -> None:
        if len(self.done) > 6 and int(self.step) == 4:
            raise torch.OutOfMemoryError("no room")
        real(self)

    monkeypatch.setattr(StaticDecoder, "_advance", tight)
    check_same(generate(model, TOKENIZER, PROMPTS, CFG, seed=5), whole)
    assert caplog.text.count("out of memory") == 2  # 5 prompts, then 3 of them


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_replays_equal_the_steps_they_recorded(kind: str, top_p: float, monkeypatch) -> None:
    model = ending_model(kind).cuda()
    cfg = replace(CFG, top_p=top_p, decode="auto", batch_size=6)
    recorded = spy(monkeypatch, decode, "_record")
    found = generate(model, TOKENIZER, PROMPTS, cfg, seed=3)
    assert len(recorded) == 2 and model not in decode._refused
    check_same(found, dynamic(model, cfg=cfg, seed=3))
    monkeypatch.setattr(decode, "WARM_UP", cfg.max_new_tokens)
    plain = generate(model, TOKENIZER, PROMPTS, cfg, seed=3)
    assert len(recorded) == 2
    check_same(found, plain)


@pytest.mark.gpu
def test_a_graph_leaves_no_memory_behind_and_sees_new_weights() -> None:
    model, cfg = tiny_model().cuda(), replace(CFG, decode="auto", max_new_tokens=40)
    sizes = []
    for seed in range(4):
        check_same(generate(model, TOKENIZER, PROMPTS, cfg, seed=seed), dynamic(model, cfg=cfg, seed=seed))
        with torch.no_grad():
            model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight), alpha=0.2)
        sizes.append(torch.cuda.memory_allocated())
    assert model not in decode._refused
    assert sizes[3] == sizes[1]  # the first call leaves the libraries' workspaces


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_on_a_gpu(caplog) -> None:
    model = ending_model().cuda()
    model.register_forward_pre_hook(
        lambda module, args, kwargs: bool(kwargs["position_ids"].max() > 0) and None, with_kwargs=True
    )
    before = torch.cuda.current_stream()
    check_same(generate(model, TOKENIZER, PROMPTS, replace(CFG, decode="auto")), dynamic(model))
    assert torch.cuda.current_stream() == before and model in decode._refused
    assert len(caplog.records) == 1
    torch.ones(8, device="cuda").sum().item()  # the device still works


@pytest.mark.gpu
def test_features_are_made_beside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    from saerl_fast.sae.capture import FeatureCapture
    from tests.test_capture import sae_for

    model = tiny_model().cuda()
    capture = FeatureCapture(model, sae_for(32, hook_layer=1).cuda())
    capture.warm_up()
    recorded = spy(monkeypatch, decode, "_record")
    wanted = dynamic(model, capture=capture)
    for _ in range(5):
        found = generate(model, TOKENIZER, PROMPTS, replace(CFG, decode="auto"), capture=capture)
        check_same(found, wanted)
        torch.testing.assert_close(found.features.to("cpu").to_dense(), wanted.features.to("cpu").to_dense())
    assert len(recorded) == 5 and model not in decode._refused
