"""Engines of one's own: named like any function, and told by class and method where they do wrong."""

from __future__ import annotations

import copy
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from saerl_fast.config import Config, RolloutConfig
from saerl_fast.errors import SaerlError, no_memory
from saerl_fast.records.log import read_metrics
from saerl_fast.rl.decode import Sampling
from saerl_fast.rl.engine import Engine, Sample
from saerl_fast.rl.generate import generate
from saerl_fast.stages.console import Echo
from saerl_fast.stages.train import _engine
from tests.test_examples import load_example
from tests.tiny_lm import char_tokenizer, tiny_model, token_rows
from tests.training import Features, run, small

TOKENIZER = char_tokenizer()
PROMPTS = token_rows(["1+1=", "what is 12+30?"])


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


def each(tokens: Any, logprobs: Any) -> Any:
    return lambda groups: [[Sample(tokens, logprobs)] * 2 for _ in groups]


def made(engine: Engine, **more: Any) -> Any:
    model, cfg = tiny_model(), RolloutConfig(group_size=2, max_new_tokens=3)
    return engine.generate(model, TOKENIZER, PROMPTS, cfg, **more)


NAN, THREE = float("nan"), [5, 5, 5]


@pytest.mark.parametrize(
    "spoilt, says",
    [
        (lambda groups: groups[:-1], "one a prompt, of 2 completions each; it gave .2."),
        (lambda groups: [*groups, groups[0]], "it gave .2, 2, 2"),
        (lambda groups: [group[:-1] for group in groups], "of 2 completions each; it gave .1, 1"),
        (lambda groups: [groups[0], groups[1][:1]], "it gave .2, 1"),
        (lambda groups: [one for group in groups for one in group], "it gave .2, 2, 2, 2"),
        (lambda groups: [7, 8], "it gave .'int', 'int'"),
        (lambda groups: None, "it gave NoneType"),
        (lambda groups: (group for group in groups), "it gave generator"),
        (lambda groups: [["abc", "abc"]] * 2, "Sample.token ids.*it gave 'abc'"),
        (lambda groups: [[None, None]] * 2, "it gave None"),
        (each([5, 5], [-1.0]), "it gave 1 with .5, 5"),
        (each([], []), "it gave 0 with "),
        (each([5] * 99, [-1.0] * 99), "1 to 3 tokens.* it gave 99"),
        (each([10**6], [-1.0]), "below 45.* 1 with .1000000"),
        (each([-1, 5, 5], [-1.0] * 3), "below 45.* 3 with .-1"),
        (each([5.0, 5.0, 5.0], [-1.0] * 3), "Sample.token ids.*it gave Sample.tokens=.5.0"),
        (each(["a", "b", "c"], [-1.0] * 3), "Sample.token ids.*it gave"),
        (each(THREE, [-1.0, NAN, -1.0]), "finite log-probabilities; it gave .-1.0, nan"),
        (each(THREE, [-1.0, -float("inf"), -1.0]), "finite log-probabilities; it gave .-1.0, -inf"),
        (each(THREE, [-1.0, None, -1.0]), "Sample.token ids.*None"),
        (
            each([5], [-1.0]),
            "3 tokens long, or end with its first stop token .one of .1..; it gave 1",
        ),
        (each([5, 1, 5], [-1.0] * 3), "3 tokens long, or end with its first stop token"),
        (each([1, 1], [-1.0] * 2), "or end with its first stop token"),
    ],
)
def test_an_engine_that_breaks_its_contract_is_told(spoilt: Any, says: str) -> None:
    engine = Wrong(tiny_model(), RolloutConfig())
    engine.spoilt = spoilt
    with pytest.raises(SaerlError, match=f"Wrong.sample must .*{says}"):
        made(engine)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, tuple])
def test_tensors_arrays_and_tuples_are_taken(kind: Any) -> None:
    engine, plain = Wrong(tiny_model(), RolloutConfig()), Own(tiny_model(), RolloutConfig())
    engine.spoilt = lambda groups: [[(kind(t), kind(p)) for t, p in group] for group in groups]
    one, two = made(engine), made(plain)
    assert one.texts == two.texts and torch.equal(one.logprobs, two.logprobs)


def raising(error: BaseException) -> Any:
    def method(self: Any, *args: Any) -> Any:
        raise error

    return method


@pytest.mark.parametrize("method", ["load", "sample", "features"])
def test_what_an_engine_raises_is_said_of_its_class_and_method(tmp_path: Any, method: str) -> None:
    broken = type("Broken", (Own,), {method: raising(ConnectionError("no server"))})
    model, cfg = tiny_model(), small(steps=2)
    cfg.rollout.engine = "mine:Broken"
    with pytest.raises(
        SaerlError,
        match=rf"^Broken.{method} raised ConnectionError: no server .*test_engine.py line \d+.; mend it",
    ):
        run(tmp_path, cfg, model=model, engine=broken(model, cfg.rollout), capture=Features())
    full = type("Full", (Own,), {method: raising(MemoryError())})
    with pytest.raises(SaerlError) as caught:
        made(full(model, cfg.rollout), capture=Features())
    assert no_memory(caught.value)  # the command line says so


def test_a_sync_that_fails_halfway_is_made_again() -> None:
    class Flaky(Own):
        failed = False

        def load(self, weights: Any) -> None:
            name, tensor = next(weights)
            if not self.failed:
                self.failed = True
                self.policy.get_parameter(name).data.copy_(tensor)
                raise ConnectionError("lost on the way")
            super().load([(name, tensor), *weights])

    model, cfg = tiny_model(), RolloutConfig(group_size=2, max_new_tokens=3)
    engine = Flaky(tiny_model(seed=3), cfg)
    with pytest.raises(SaerlError, match="Flaky.load raised ConnectionError: lost on the way"):
        engine.generate(model, TOKENIZER, PROMPTS, cfg)
    engine.generate(model, TOKENIZER, PROMPTS, cfg)  # compared with the policy, as after any sync


@pytest.mark.parametrize("given, says", [(None, "NoneType of None"), (torch.zeros(2, 3), "Tensor of None")])
def test_features_that_do_not_fit_the_prompts_are_told(given: Any, says: str) -> None:
    engine = type("Seen", (Own,), {"features": lambda *_: given})(tiny_model(), RolloutConfig())
    with pytest.raises(SaerlError, match=f"Seen.features must give a CSR of 2 rows.*it gave {says}"):
        made(engine, capture=Features())


class Half(Engine):
    def __init__(self, model: Any, cfg: Any) -> None: ...


def nothing(model: Any, cfg: Any) -> None: ...


def broken(model: Any, cfg: Any) -> None:
    raise ZeroDivisionError("no engine")


def test_an_engine_of_ones_own_is_named_like_any_function(tmp_path: Any) -> None:
    model, cfg = tiny_model(), small(steps=2)
    cfg.rollout.engine = "tests.test_engine:Own"
    said = Echo(quiet=True)
    engine = _engine(Config(train=cfg), said, SimpleNamespace(model=model))
    run(tmp_path, cfg, model=model, engine=engine)
    assert len([row for row in read_metrics(tmp_path) if row["kind"] == "train"]) == 2
    for name, match in [
        ("tiny_model", "must take .model, cfg."),
        ("nothing", "is no Engine; derive it"),
        ("Half", "raised TypeError: Can't instantiate abstract class Half .*load.*sample"),
        ("broken", "train.rollout.engine=tests.test_engine:broken raised ZeroDivisionError"),
    ]:
        cfg.rollout.engine = f"tests.test_engine:{name}"
        with pytest.raises(SaerlError, match=match):
            _engine(Config(train=cfg), said, SimpleNamespace(model=model))


@pytest.fixture
def server(monkeypatch: Any, tmp_path: Any) -> Any:
    """A server that answers as SGLang's does; ``policy``: its model, ``broken``: whether updates fail."""
    state = SimpleNamespace(policy=tiny_model(seed=9), updates=0, broken=False, seeds=set())

    def update(asked: dict) -> dict:
        if state.broken:
            return {"success": False, "message": "no space left on the server"}
        state.policy.load_state_dict(load_file(f"{asked['model_path']}/model.safetensors"))
        state.updates += 1
        return {"success": True, "message": "Succeeded to update model weights."}

    def one(prompt: list[int], params: dict) -> dict:
        told = {"group_size": 1, "max_new_tokens": params["max_new_tokens"]}
        cfg = Sampling.of(RolloutConfig(), temperature=params["temperature"], **told)
        found = generate(state.policy, TOKENIZER, [prompt], cfg, seed=params["sampling_seed"] % 2**32)
        state.seeds.add(params["sampling_seed"])
        n = int(found.lengths[0])
        pairs = zip(found.logprobs[0, :n].tolist(), found.completion_ids[0, :n].tolist(), strict=True)
        return {"text": "", "meta_info": {"output_token_logprobs": [[p, t, None] for p, t in pairs]}}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path == "/update_weights_from_disk":
                told: Any = update(asked)
            else:
                assert self.path == "/generate" and asked["return_logprob"]
                told = [one(*pair) for pair in zip(asked["input_ids"], asked["sampling_params"], strict=True)]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(told).encode())

        def log_message(self, *_: Any) -> None: ...

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setenv("SERVER", f"http://127.0.0.1:{http.server_port}")
    monkeypatch.setenv("WEIGHTS", str(tmp_path / "weights"))
    yield state
    http.shutdown()
    http.server_close()


def test_the_example_trains_by_a_server(server: Any, tmp_path: Any, monkeypatch: Any) -> None:
    model, cfg = tiny_model(), small(steps=2, lr=0.05)
    cfg.rollout.engine = "examples/own_engine.py:ServerEngine"
    engine = load_example("own_engine").ServerEngine(model, cfg.rollout)
    run(tmp_path / "run", cfg, model=model, engine=engine)
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert len(rows) == server.updates == 2 and all(row["mismatch"] < 1e-4 for row in rows)
    assert len(server.seeds) == 2 * 4 * 4  # no two completions share one
    server.broken = True
    with pytest.raises(
        SaerlError, match="ServerEngine.load raised RuntimeError: no space left on the server"
    ):
        run(tmp_path / "two", cfg, model=model, engine=engine)
    monkeypatch.setattr(engine, "url", "http://127.0.0.1:1")
    with pytest.raises(SaerlError, match="ServerEngine.load raised URLError: .*refused"):
        run(tmp_path / "three", cfg, model=model, engine=engine)
