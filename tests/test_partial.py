"""SAE training that was stopped anywhere ends with the SAE of training that was not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from saerl_fast import fileio
from saerl_fast.cli import main
from saerl_fast.config import SAEConfig
from saerl_fast.sae import partial
from saerl_fast.sae.partial import Partial
from saerl_fast.sae.train import _Trainer, collect_activations, train_sae
from tests.sae_parts import interrupted_after
from tests.tiny_lm import tiny_model

X = torch.randn(600, 16, generator=torch.Generator().manual_seed(3)).relu()
CFG = {"d_sae": 48, "k": 3, "steps": 40, "batch_size": 64, "lr": 1e-2, "dead_after": 3, "aux_k": 8}


class Die(BaseException):
    pass


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(partial, "EVERY", 0.0)
    monkeypatch.setattr(partial, "_SHARE", 0)


def die_in(monkeypatch, owner, name: str, call: int) -> None:
    """The ``call``-th call of a function ends the program."""
    real, calls = getattr(owner, name), []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise Die
        return real(*args, **options)

    monkeypatch.setattr(owner, name, counted)


def equal(one, two) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_training_killed_again_and_again(tmp_path: Path, activation: str) -> None:
    cfg = SAEConfig(activation=activation, **CFG)
    straight, figures = train_sae(X, cfg)
    steps = []
    for place in (
        *((_Trainer, "step", call) for call in (2, 9, 1, 12)),
        (os, "replace", 4),
        (os, "fsync", 3),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Die):
            die_in(patch, *place)
            train_sae(X, cfg, keep=Partial(tmp_path, "mark"))
        steps.append(int(Partial(tmp_path, "mark").saved("state")[-1]["step"]))
    assert steps == sorted(steps) and steps[0] == 1 and 20 < steps[-1] < 40
    again, resumed = train_sae(X, cfg, keep=Partial(tmp_path, "mark"))
    assert equal(straight, again)
    assert resumed | {"seconds": 0} == figures | {"seconds": 0}
    assert len(list(Partial(tmp_path, "mark").folder.iterdir())) == 1  # the latest state, no leftovers


def test_an_interrupt_saves_the_step_and_damage_is_not_used(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(partial, "EVERY", 1e9)
    cfg, pressed = SAEConfig(**CFG), []
    steps = []
    real = _Trainer.step

    def step(self, number):
        steps.append(number)
        if number == 7:
            pressed.append(1)
        return real(self, number)

    monkeypatch.setattr(_Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        train_sae(X, cfg, keep=Partial(tmp_path, "mark", lambda: pressed))
    (file,) = Partial(tmp_path, "mark").folder.iterdir()
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    (tmp_path / "sae.partial-mark" / "state-000000009-0123456789abcdef.safetensors").write_bytes(data)
    steps.clear()
    again, _ = train_sae(X, cfg, keep=Partial(tmp_path, "mark"))
    assert steps[0] == 8 and equal(again, train_sae(X, cfg)[0])
    assert Partial(tmp_path, "other").saved("state") == [] and not file.exists()  # of other settings


def test_a_full_disk_does_not_end_the_training(tmp_path: Path, monkeypatch, caplog) -> None:
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    again, _ = train_sae(X, SAEConfig(**CFG), keep=Partial(tmp_path, "mark"))
    assert equal(again, train_sae(X, SAEConfig(**CFG))[0])
    assert caplog.text.count("an interruption would lose this SAE") == 1


def test_captured_activations_are_not_captured_again(tmp_path: Path, monkeypatch) -> None:
    model = tiny_model()
    rows = [[1 + (i * j) % 20 for j in range(1 + i % 9)] for i in range(60)]
    straight = collect_activations(model, rows, 1, 200, batch_tokens=32)
    calls = []
    for call in (3, 4, 7):  # each saving renames twice
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Die):
            die_in(patch, fileio.os, "replace", call)
            collect_activations(model, rows, 1, 200, batch_tokens=32, keep=Partial(tmp_path, "mark"))
        calls.append(Partial(tmp_path, "mark").shards()[0])
    assert 0 < calls[0] < calls[1] < calls[2]
    seen = []
    again = collect_activations(
        model,
        rows,
        1,
        200,
        batch_tokens=32,
        keep=Partial(tmp_path, "mark"),
        on_progress=lambda *a: seen.append(a),
    )
    assert torch.equal(straight, again) and seen[0][0] == calls[2]


def test_the_command_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(partial, "EVERY", 1e9)
    words = ["sae", "train", "--config", "examples/demo.yaml", "--quiet", "data.limit=40"]
    words += ["data.eval_limit=4", "sae.steps=12", "sae.d_sae=64", "sae.k=4", "sae.max_tokens=600"]
    assert main([*words, f"run_dir={tmp_path / 'one'}"]) == 0
    steps = interrupted_after(monkeypatch, 5)
    assert main([*words, f"run_dir={tmp_path / 'two'}"]) == 130
    assert [path.name[:11] for path in (tmp_path / "two").iterdir()] == ["sae.partial"]
    assert main([*words, f"run_dir={tmp_path / 'two'}"]) == 0
    assert steps == [*range(1, 6), *range(6, 13)]
    one, two = (tmp_path / name / "sae" / "sae_weights.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert not list((tmp_path / "two").glob("sae.partial-*"))
    (tmp_path / "two" / "sae.partial-old").mkdir()
    assert main([*words, "--redo", f"run_dir={tmp_path / 'two'}"]) == 0
    assert not list((tmp_path / "two").glob("sae.partial-*"))
