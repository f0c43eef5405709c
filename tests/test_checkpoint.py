import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.rl.checkpoint import (
    load_latest,
    load_model_tensors,
    load_reference,
    model_tensors,
    restore_rng,
    save_checkpoint,
    save_reference,
    set_aside,
)
from saerl_fast.rl.optimizer import Optimizer
from tests.tiny_lm import tiny_model

PLAN = {
    "schedule": "adaptive",
    "step": 3,
    "P": torch.eye(3, dtype=torch.float64),
    "seen": np.arange(4),
    "x": 0.1,
}


def save(out: Path, step: int, model=None, keep: int = 2) -> Path:
    model = model if model is not None else tiny_model(seed=step)
    optimizer = Optimizer(model, 1e-3)
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    optimizer.step(1e-3, 1.0)
    return save_checkpoint(
        out,
        step,
        model=model,
        optimizer=optimizer.state_dict(),
        plan=PLAN,
        counters={"tokens": step},
        keep=keep,
    )


def names(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    save(tmp_path, 7, model)
    found = load_latest(tmp_path)
    assert found is not None and found.step == 7 and found.counters == {"tokens": 7}
    assert ("lm_head.weight" in found.model) != tied
    other = tiny_model(seed=9, tie_word_embeddings=tied)
    load_model_tensors(other, found.model)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert (other.lm_head.weight is other.get_input_embeddings().weight) == tied
    again = Optimizer(other, 1e-3)
    again.load_state_dict(found.optimizer)
    assert all(torch.equal(v, found.optimizer[k]) for k, v in again.state_dict().items())
    assert len(found.optimizer) == 3 * len(list(model.parameters()))
    assert torch.equal(found.plan["P"], PLAN["P"]) and found.plan["P"].dtype == torch.float64
    assert isinstance(found.plan["seen"], np.ndarray) and found.plan["seen"].tolist() == [0, 1, 2, 3]
    assert found.plan["x"] == 0.1 and found.plan["schedule"] == "adaptive"


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    random.gauss(0, 1), np.random.normal()  # leaves half of a pair behind in both
    save(tmp_path, 1)
    after = random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), torch.rand(1)
    found = load_latest(tmp_path)
    assert found is not None
    restore_rng(found.rng)
    assert after == (random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), torch.rand(1))


def test_keeps_the_latest(tmp_path: Path) -> None:
    for step in (2, 10, 100):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-000010", "step-000100"]
    save(tmp_path, 101, keep=1)
    assert names(tmp_path) == ["step-000101"]


def test_going_on_from_an_earlier_one_removes_the_later(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-000002"]
    set_aside(tmp_path)
    assert load_latest(tmp_path) is None and (tmp_path / "checkpoints.previous" / "step-000002").is_dir()
    save(tmp_path, 1)
    set_aside(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints.previous").iterdir()] == ["step-000001"]


def test_an_unfinished_one_is_not_read_and_is_cleared_away(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / "checkpoints" / "step-000002.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    found = load_latest(tmp_path)
    assert found is not None and found.step == 1
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001", "step-000002"]


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "extra.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_the_previous_one_used(tmp_path: Path, file: str, damage: str, caplog) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes(content) if damage == "flip" else path.read_bytes()[:-1])
    found = load_latest(tmp_path)
    assert found is not None and found.step == 1
    assert "step-000002 is damaged" in caplog.text and file in caplog.text


def test_a_damaged_manifest_and_nothing_left(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    first = save(tmp_path, 1)
    (first / "manifest.json").write_text('{"format": 1, "ste')
    with pytest.raises(SaerlError, match="every checkpoint"):
        load_latest(tmp_path)
    manifest = json.dumps({"format": 99, "step": 1, "files": {}})
    (first / "manifest.json").write_text(manifest)
    with pytest.raises(SaerlError, match="every checkpoint"):
        load_latest(tmp_path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found = load_latest(tmp_path)
    assert found is not None
    with pytest.raises(SaerlError, match="another model"):
        load_model_tensors(tiny_model("neox"), found.model)
    with pytest.raises(SaerlError, match="another model"):
        load_model_tensors(tiny_model(width=64), found.model)


def test_nothing_is_written_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(SaerlError, match="cannot write checkpoint"):
        save(tmp_path, 1)


def test_reference(tmp_path: Path) -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    with pytest.raises(SaerlError, match="reference"):
        load_reference(tmp_path, other)
    path = save_reference(tmp_path, model)
    load_reference(tmp_path, other)
    for a, b in zip(model_tensors(model).values(), model_tensors(other).values(), strict=True):
        assert torch.equal(a, b)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(SaerlError, match="reference"):
        load_reference(tmp_path, other)
