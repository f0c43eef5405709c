import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import ModuleType

import pytest

from saerl_fast.config import Config
from saerl_fast.errors import SaerlError
from saerl_fast.records.lock import NAME, lock
from saerl_fast.stages.preflight import check_packages, clear, set_up
from saerl_fast.stages.train import folder_name


def test_many_may_set_up_in_one_folder_at_once(tmp_path):
    set_up(Config(run_dir=str(tmp_path)))  # transformers is imported by one
    with ThreadPoolExecutor(8) as workers:
        list(workers.map(lambda _: set_up(Config(run_dir=str(tmp_path / "run"))), range(400)))
    assert not list(tmp_path.iterdir())


def test_a_missing_sae_is_said_before_the_model_is_loaded(tmp_path):
    config = Config(run_dir=str(tmp_path / "run"))
    config.sae.path = tmp_path / "nowhere"
    with pytest.raises(SaerlError, match="SAE .*nowhere does not exist"):
        set_up(config)
    assert not list(tmp_path.iterdir())


def test_settings_assigned_one_by_one_are_asked_again_whether_they_go_together():
    config = Config()
    config.score.features = ["sae"]
    config.difficulty.features = ["hidden"]
    with pytest.raises(SaerlError, match="names hidden, which is not kept"):
        check_packages(config)


def test_a_run_is_cleared_and_its_link_and_lock_stay(tmp_path):
    disk, out = tmp_path / "disk", tmp_path / "arm"
    (disk / "checkpoints").mkdir(parents=True)
    out.symlink_to(disk)
    for name in ("run.json", "summary.json", "metrics.jsonl", "checkpoints/step-1", "plan.json"):
        (disk / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (disk / "model").symlink_to(tmp_path / "elsewhere")
    with lock(out):
        clear(out)
        assert out.is_symlink() and [path.name for path in disk.iterdir()] == [NAME]
    assert (tmp_path / "elsewhere" / "kept").exists()


@pytest.mark.parametrize("last", range(1, 7))
def test_a_run_that_is_cleared_in_part_is_still_a_run_and_not_a_finished_one(tmp_path, monkeypatch, last):
    """Killed at any removal, the folder holds no summary and no checkpoint without its metrics."""
    names = ("run.json", "summary.json", "metrics.jsonl", "checkpoints", "plan.json", "eval_items.jsonl")
    for name in names:
        (tmp_path / name).touch()
    calls = []

    def die(path):
        calls.append(path.name)
        if len(calls) == last:
            raise KeyboardInterrupt
        path.unlink()

    monkeypatch.setattr("saerl_fast.stages.preflight.remove", die)
    with pytest.raises(KeyboardInterrupt):
        clear(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert "run.json" in left
    assert "summary.json" not in left or left == set(names)
    assert "checkpoints" not in left or "metrics.jsonl" in left


@pytest.mark.parametrize("name", ["../../x", "", "..", "/", "sae", "-", "é" * 150])
def test_no_schedule_names_a_folder_outside_or_in_use(name):
    try:
        found = folder_name(name)
    except SaerlError as err:
        assert "cannot be called" in str(err)
    else:
        assert found == "x"


def test_settings_changed_in_place_are_checked_before_a_stage():
    config = Config()
    config.train.reward.append("")
    with pytest.raises(SaerlError, match="train.reward='' is unknown"):
        check_packages(config)


@pytest.mark.parametrize(
    ("key", "mode", "refused"), [(True, None, False), (False, None, True), (False, "offline", False)]
)
def test_wandb_without_a_key_is_refused_before_anything_slow(monkeypatch, key, mode, refused):
    module = ModuleType("wandb")
    module.login = lambda prompt=True, verify=True: key and not prompt and not verify
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    config = Config()
    config.train.trackers = ["wandb"]
    with pytest.raises(SaerlError, match="wandb login") if refused else nullcontext():
        check_packages(config)
