import errno
import os
import pathlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saerl_fast.config import TrainConfig
from saerl_fast.errors import SaerlError
from saerl_fast.records import manifest
from saerl_fast.rl import checkpoint as module
from saerl_fast.rl.checkpoint import (
    load_latest,
    load_model_tensors,
    model_tensors,
    save_checkpoint,
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


def save(out: Path, step: int, model=None, **options) -> Path:
    model = model if model is not None else tiny_model(seed=step)
    optimizer = Optimizer(model, TrainConfig())
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    optimizer.step(1e-3, 1.0)
    return save_checkpoint(
        out,
        step,
        model=model,
        optimizer=optimizer.state_dict(),
        plan=PLAN,
        counters={"tokens": step},
        **options,
    )


def steps(out: Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in (out / "checkpoints").glob("step-*-*.safetensors"))


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
    again = Optimizer(other, TrainConfig())
    again.load_state_dict(found.optimizer)
    assert all(torch.equal(v, found.optimizer[k]) for k, v in again.state_dict().items())
    assert len(found.optimizer) == 3 * len(list(model.parameters()))
    assert torch.equal(found.plan["P"], PLAN["P"]) and found.plan["P"].dtype == torch.float64
    assert isinstance(found.plan["seen"], np.ndarray) and found.plan["seen"].tolist() == [0, 1, 2, 3]
    assert found.plan["x"] == 0.1 and found.plan["schedule"] == "adaptive"


def test_keeps_the_latest(tmp_path: Path) -> None:
    for step in (2, 10, 1_000_000):
        save(tmp_path, step)
    assert steps(tmp_path) == [10, 1_000_000]
    save(tmp_path, 1_000_001, keep=1)
    assert steps(tmp_path) == [1_000_001]


def test_going_on_from_an_earlier_one_removes_the_later(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    save(tmp_path, 2, model=tiny_model(seed=9), keep=2)
    assert steps(tmp_path) == [1, 2]
    set_aside(tmp_path)
    assert load_latest(tmp_path) is None
    assert len(list((tmp_path / "checkpoints.previous").iterdir())) == 2
    save(tmp_path, 1)
    set_aside(tmp_path)
    assert len(list((tmp_path / "checkpoints.previous").iterdir())) == 1


def test_an_unfinished_one_is_not_read_and_is_cleared_away(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-000002.tmp").write_bytes(b"half")
    found = load_latest(tmp_path)
    assert found is not None and found.step == 1
    save(tmp_path, 3)
    assert steps(tmp_path) == [1, 3] and len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("place", [4, 100, -1, None])
def test_damage_is_found_and_the_previous_one_used(tmp_path: Path, place: int | None, caplog) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    content = bytearray(path.read_bytes())
    if place is not None:
        content[place] ^= 1
    path.write_bytes(content if place is not None else content[:-1])
    found = load_latest(tmp_path)
    assert found is not None and found.step == 1
    assert path.name in caplog.text and "is damaged" in caplog.text


def test_nothing_intact_is_left(tmp_path: Path, monkeypatch) -> None:
    assert load_latest(tmp_path) is None
    path = save(tmp_path, 1)
    monkeypatch.setattr(module, "FORMAT", "99")
    with pytest.raises(SaerlError, match="every checkpoint"):
        load_latest(tmp_path)
    monkeypatch.undo()
    assert load_latest(tmp_path) is not None
    path.write_bytes(b"")
    with pytest.raises(SaerlError, match="every checkpoint"):
        load_latest(tmp_path)


def test_what_cannot_be_read_is_no_reason_to_make_the_run_again(tmp_path: Path, monkeypatch, caplog) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    digest = module.digest

    def failing(all_of_them: bool) -> None:
        def read(file: Path) -> str:
            if all_of_them or file == newest:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return digest(file)

        monkeypatch.setattr(module, "digest", read)

    failing(all_of_them=True)
    with pytest.raises(SaerlError, match=r"cannot read .*step-000002.*ulimit -n\)$"):
        load_latest(tmp_path)
    failing(all_of_them=False)  # what comes of the one before is the same run
    found = load_latest(tmp_path)
    assert found is not None and found.step == 1 and "cannot read" in caplog.text


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
    with pytest.raises(SaerlError, match="cannot write a checkpoint"):
        save(tmp_path, 1)


def test_the_reference_policy_is_kept_beside_the_model(tmp_path: Path) -> None:
    model, frozen = tiny_model(), tiny_model(seed=1).requires_grad_(False)
    save(tmp_path, 1, model, reference=frozen)
    found = load_latest(tmp_path)
    assert found is not None and found.reference.keys() == found.model.keys()
    for name, tensor in model_tensors(frozen).items():
        assert torch.equal(tensor, found.reference[name])


def test_checkpoints_on_another_disk_stay_there(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk")
    for _ in range(2):
        save(tmp_path, 1)
        set_aside(tmp_path)
        assert (tmp_path / "checkpoints").is_symlink() and load_latest(tmp_path) is None
        assert len(list((tmp_path / "disk.previous").iterdir())) == 1


def test_a_full_disk_is_told_from_other_faults(tmp_path: Path, monkeypatch) -> None:
    for number, advice in (
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "allow reading and writing there"),
    ):

        def fail(path: Path, *_: Any, number: int = number) -> None:
            path.write_bytes(b"half")
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("saerl_fast.rl.checkpoint._write", fail)
        with pytest.raises(SaerlError, match=advice):
            save(tmp_path, 1)
        assert not list((tmp_path / "checkpoints").iterdir())


def test_another_runs_checkpoint_is_not_taken(tmp_path: Path, caplog) -> None:
    for name in ("one", "two"):
        manifest.record(tmp_path / name, "run", [], {"resumable": name, "plan": None})
    path = save(tmp_path / "one", 1)
    save(tmp_path / "two", 1)
    shutil.copy(path, tmp_path / "two" / "checkpoints" / path.name.replace("000001", "000009"))
    found = load_latest(tmp_path / "two")
    assert found is not None and found.step == 1 and "it is of a run with other settings" in caplog.text
    shutil.copytree(tmp_path / "one" / "checkpoints", tmp_path / "bare" / "checkpoints")
    assert load_latest(tmp_path / "bare") is not None  # nothing says whose folder it is


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_values_that_are_no_numbers_are_not_taken(tmp_path: Path, part: str, value: float, caplog) -> None:
    save(tmp_path, 1)
    model = tiny_model()
    if part == "model":
        with torch.no_grad():
            model.lm_head.weight[0, 0] = value
        save(tmp_path, 2, model, reference=None)
    else:
        save_checkpoint(
            tmp_path, 2, model=model, optimizer={"m": torch.tensor([0.0, value])}, plan=PLAN, counters={}
        )
    found = load_latest(tmp_path)
    assert found is not None and found.step == 1 and "NaN or infinite" in caplog.text


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, 1)

    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    if hasattr(pathlib, "_NormalAccessor"):  # Python 3.10 has taken them over by then
        monkeypatch.setattr(pathlib._NormalAccessor, "scandir", staticmethod(refuse))
        monkeypatch.setattr(pathlib._NormalAccessor, "listdir", staticmethod(refuse))
    with pytest.raises(PermissionError):
        load_latest(tmp_path)


def test_a_full_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def full(path: Path) -> str:
        raise MemoryError

    monkeypatch.setattr(module, "digest", full)
    with pytest.raises(MemoryError):
        load_latest(tmp_path)
    assert "damaged" not in caplog.text and steps(tmp_path) == [1, 2]
