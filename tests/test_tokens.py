"""Activations that are captured as training goes on: whole epochs, held-out texts, the same after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from saerl_fast.cli import main
from saerl_fast.config import SAEConfig
from saerl_fast.errors import SaerlError
from saerl_fast.sae import partial
from saerl_fast.sae.partial import Partial
from saerl_fast.sae.tokens import Stream, Tokens
from saerl_fast.sae.train import _Trainer, collect_activations, train_sae
from tests.sae_parts import interrupted_after
from tests.tiny_lm import tiny_model

ROWS = [[1 + (7 * i + j * j) % 40 for j in range(3 + i % 9)] for i in range(60)]
CFG = {"d_sae": 48, "k": 3, "steps": 30, "batch_size": 32, "lr": 1e-2, "dead_after": 3, "aux_k": 8}
SMALL = SAEConfig(**CFG, max_tokens=100, stream=True)


def stream(cfg: SAEConfig = SMALL, **options: Any) -> Stream:
    return Stream(tiny_model(), ROWS, 1, cfg, batch_tokens=32, **options)


def keys(x: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in x.mul(1e4).round().tolist()}


def test_every_text_comes_once_an_epoch_and_held_out_ones_never() -> None:
    source = stream()
    source.begin("cpu", None)
    held = sum(len(ROWS[i]) for i in source.held_rows)
    everything = sum(map(len, ROWS))
    assert 0.1 * everything <= held < 0.1 * everything + 12 and len(source.test) == held == source.held
    epoch, total = [], source.total
    while len(source.x) and sum(map(len, epoch)) + 20 <= total:
        assert len(source.x) < 100 + 12  # whole texts
        epoch.append(source.batch(20))
    rest = total - sum(map(len, epoch))
    seen = torch.cat([*epoch, source.batch(rest)])
    want = torch.cat([collect_activations(source.model, [ROWS[i]], 1) for i in source.order])
    torch.testing.assert_close(seen.sum(0), want.sum(0), atol=1e-2, rtol=1e-4)  # each token once
    again = torch.cat([source.batch(total)])
    torch.testing.assert_close(again.sum(0), want.sum(0), atol=1e-2, rtol=1e-4)
    assert not torch.allclose(again, seen)  # in another order
    assert source.figures() == {"tokens": 2.0 * total, "held_out_tokens": float(held), "sink_tokens": 0.0}


def test_a_pool_that_fits_is_captured_once(monkeypatch) -> None:
    captured = []
    real = Stream._capture
    monkeypatch.setattr(Stream, "_capture", lambda self, rows: captured.append(len(rows)) or real(self, rows))
    source = stream(SAEConfig(**CFG, stream=True))
    source.begin("cpu", None)
    first = torch.cat([source.batch(64) for _ in range(40)])
    assert len(captured) == 2 and len(first) == 40 * 64 > 3 * source.total  # texts to train on and held out
    assert not source.runs_out(10**6)


def test_streamed_training_is_as_good_as_from_memory() -> None:
    model = tiny_model()
    cfg = SAEConfig(**CFG | {"steps": 120})
    _, memory = train_sae(collect_activations(model, ROWS, 1), cfg)
    sae, figures = train_sae(stream(SAEConfig(**CFG | {"steps": 120}, max_tokens=100)), cfg)
    assert abs(figures["fvu"] - memory["fvu"]) < 0.1 and memory["fvu"] < 0.5
    assert figures["tokens"] > 120 * 32 and sae.cfg.max_norm is not None
    again, _ = train_sae(stream(SAEConfig(**CFG | {"steps": 120}, max_tokens=100)), cfg)
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), again.parameters(), strict=True))


def test_a_stream_stopped_anywhere_ends_the_same(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(partial, "EVERY", 1e9)
    straight, figures = train_sae(stream(), SMALL)
    pressed: list[int] = []
    real = Stream._capture
    calls = []

    def capture(self, rows):
        calls.append(1)
        if len(calls) in (4, 9):  # while texts are being captured
            pressed.append(1)
        return real(self, rows)

    real_step, steps = _Trainer.step, []

    def step(self, number):
        steps.append(number)
        if len(steps) in (2, 12):
            pressed.append(1)
        return real_step(self, number)

    monkeypatch.setattr(Stream, "_capture", capture)
    monkeypatch.setattr(_Trainer, "step", step)
    stops = 0
    while True:
        keep = Partial(tmp_path, "mark", lambda: list(pressed))
        try:
            sae, resumed = train_sae(stream(keep=keep), SMALL, keep=keep)
            break
        except KeyboardInterrupt:
            stops += 1
            pressed.clear()
            assert not list(keep.folder.glob("activations*"))  # nothing but the state is on the disk
    assert stops >= 3 and len(steps) < 30 + 3 * 5
    assert all(torch.equal(a, b) for a, b in zip(sae.parameters(), straight.parameters(), strict=True))
    assert resumed | {"seconds": 0} == figures | {"seconds": 0}


def test_the_command_streams_and_goes_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(partial, "EVERY", 1e9)
    words = ["sae", "train", "--config", "examples/demo.yaml", "--quiet", "data.limit=60", "sae.stream=true"]
    words += ["data.eval_limit=4", "sae.steps=12", "sae.d_sae=64", "sae.k=4", "sae.max_tokens=400"]
    words += ["sae.batch_size=128"]
    assert main([*words, f"run_dir={tmp_path / 'one'}"]) == 0
    steps = interrupted_after(monkeypatch, 5)
    assert main([*words, f"run_dir={tmp_path / 'two'}"]) == 130
    assert main([*words, f"run_dir={tmp_path / 'two'}"]) == 0
    assert steps == list(range(1, 6)) + list(range(6, 13))
    one, two = (tmp_path / name / "sae" / "sae_weights.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(SaerlError, match="no text with a token"):
        Stream(tiny_model(), [[], []], 1, SMALL)
    with pytest.raises(SaerlError, match="leaves no activations; raise it"):
        stream(SAEConfig(**CFG, sink_ratio=1e-6)).begin("cpu", None)
    with pytest.raises(SaerlError, match="leaves no activations; raise it"):
        Tokens(torch.randn(50, 4), SAEConfig(**CFG, sink_ratio=1e-6), torch.Generator(), None)
    one = Stream(tiny_model(), [[1, 2, 3]], 1, SMALL)
    one.begin("cpu", None)
    assert one.held == 0 and len(one.batch(32)) == 3
