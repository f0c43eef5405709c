"""What an error leaves behind: the last whole step, from which the run goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from saerl_fast.config import EvalConfig, WarmupConfig
from saerl_fast.errors import SaerlError
from saerl_fast.rl import checkpoint, rescue
from saerl_fast.rl.checkpoint import load_latest
from tests.training import assert_same_run, dying_reward, run, same_weights, small

CFG = dict(
    steps=4,
    save_every=100,
    warmup=WarmupConfig(steps=2, batch_size=4, lr=1e-3),
    eval=EvalConfig(every=2, samples=1),
    dynamic_sampling=1,
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(folder, small(**CFG))


# The reward is called in evaluation 0, then in the draws of steps 1 and 2, in evaluation 2, ...
@pytest.mark.parametrize("calls", range(7))
def test_a_run_whose_reward_failed_goes_on_bit_for_bit(tmp_path: Path, straight, calls: int) -> None:
    lines: list[str] = []
    with pytest.raises(SaerlError, match="Die"):
        run(tmp_path, small(**CFG), reward=dying_reward(calls), echo=lines.append)
    found = load_latest(tmp_path)
    assert found is not None and f"step {found.step} is saved; go on with --resume" in lines[-1]
    assert found.step > 0 or calls < 3
    model, plan, summary = run(tmp_path, small(**CFG), resume=True)
    assert_same_run(straight[0], tmp_path)
    assert same_weights(straight[1][0], model)
    assert summary | {"seconds": 0} == straight[1][2] | {"seconds": 0}


def test_a_full_disk_hides_no_error(tmp_path: Path, monkeypatch, caplog) -> None:
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(SaerlError, match="Die"):
        run(tmp_path, small(save_every=100), reward=dying_reward(3))
    assert "what came before the error could not be saved" in caplog.text and rescue.DUE == "eval_due"
