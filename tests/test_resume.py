"""Runs that are killed or interrupted, and go on as if nothing had happened."""

import os
import random
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from saerl_fast.config import (
    LossConfig,
    WarmupConfig,
)
from saerl_fast.errors import SaerlError
from saerl_fast.records.lock import lock
from saerl_fast.records.log import read_metrics
from saerl_fast.records.runs import load_runs
from saerl_fast.rl.checkpoint import load_latest
from saerl_fast.rl.interrupt import Stopped, graceful_interrupt
from tests.tiny_lm import tiny_model
from tests.training import (
    adaptive_plan,
    assert_same_run,
    dying_reward,
    run,
    same_weights,
    small,
    sums,
    vowels,
)


@pytest.mark.parametrize(("warm", "beta", "every"), [(0, 0.0, 3), (3, 0.1, 3), (3, 0.0, 100)])
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, warm: int, beta: float, every: int) -> None:
    cfg = small(
        warmup=WarmupConfig(steps=warm, batch_size=4, lr=1e-3), loss=LossConfig(beta=beta), save_every=every
    )
    straight, plan, summary = run(tmp_path / "one", cfg)
    with pytest.raises(SaerlError, match="Die"):  # in the fifth step: step 4 is logged and must be undone
        run(tmp_path / "two", cfg, reward=dying_reward(7))
    assert read_metrics(tmp_path / "two")[-1]["step"] == 4
    for file in (tmp_path / "two" / "checkpoints").glob("step-000004-*"):
        file.unlink()  # a kill leaves none
    resumed, plan_again, again = run(tmp_path / "two", cfg, resume=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert same_weights(straight, resumed)
    assert torch.equal(plan.told, plan_again.told)
    summary.pop("seconds"), again.pop("seconds")
    assert summary == again
    assert not same_weights(straight, tiny_model())  # training did something


def test_rewards_that_draw_at_random_resume_too(tmp_path: Path) -> None:
    def noisy(prompts, completions, **columns):
        return [random.random() + np.random.rand() + float(torch.rand(1)) for _ in completions]

    straight, _, _ = run(tmp_path / "one", small(save_every=3), reward=noisy)
    with pytest.raises(SaerlError, match="Die"):
        run(tmp_path / "two", small(save_every=3), reward=dying_reward(7, noisy))
    resumed, _, _ = run(tmp_path / "two", small(save_every=3), reward=noisy, resume=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert same_weights(straight, resumed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_saves_the_step(tmp_path: Path, number: int) -> None:
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(1)
        if len(calls) == 4:  # evaluation, steps 1 and 2, evaluation
            os.kill(os.getpid(), number)
        return vowels(prompts, completions)

    said: list[str] = []
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught:
        run(tmp_path / "two", small(save_every=0), reward=reward, echo=said.append)
    assert caught.value.number == number and signal.getsignal(number) is before
    assert not (tmp_path / "two" / ".saerl.lock").exists()
    assert "step 2 is saved" in said[-1]
    resumed, _, _ = run(tmp_path / "two", small(save_every=0), resume=True)
    straight, _, _ = run(tmp_path / "one", small(save_every=0))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert same_weights(straight, resumed)


def signals(*numbers: int, at: int):
    """A reward in whose call number ``at`` these signals come, one after the other."""
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(1)
        if len(calls) == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        return vowels(prompts, completions)

    return reward


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(Stopped) as caught:
        run(tmp_path, small(), reward=signals(signal.SIGHUP, signal.SIGTERM, at=4))
    assert caught.value.number == signal.SIGTERM
    found = load_latest(tmp_path)
    assert found is not None and found.step == 1  # step 2 is not finished


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _, _, summary = run(tmp_path, small(steps=1), reward=signals(signal.SIGHUP, at=2))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert summary["steps"] == 1


def test_a_signal_in_the_warm_up_or_at_the_end(tmp_path: Path) -> None:
    os_kill = lambda done, steps: os.kill(os.getpid(), signal.SIGTERM) if done == steps else None  # noqa: E731
    with pytest.raises(Stopped):
        run(tmp_path / "end", small(steps=1), progress=os_kill)
    assert (tmp_path / "end" / "summary.json").is_file() and (tmp_path / "end" / "model").is_dir()
    said: list[str] = []
    with pytest.raises(Stopped), graceful_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        warm = small(steps=1, warmup=WarmupConfig(steps=3, batch_size=2))
        run(tmp_path / "warm", warm, echo=said.append)
    assert "nothing is saved before the warm-up has ended" in said[-1]
    assert load_latest(tmp_path / "warm") is None


def test_a_folder_that_is_removed_ends_the_run_within_a_step(tmp_path: Path) -> None:
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(1)
        if len(calls) == 3:
            shutil.rmtree(tmp_path / "run")
        return vowels(prompts, completions)

    with pytest.raises(SaerlError, match="was removed while"):
        run(tmp_path / "run", small(), reward=reward)
    assert len(calls) == 3 and not (tmp_path / "run").exists()


def test_files_have_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run(tmp_path, small(steps=1))
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*") if path.is_file()} == {"0o640"}


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with lock(tmp_path), ThreadPoolExecutor(1) as other, pytest.raises(SaerlError, match="is written by"):
        other.submit(run, tmp_path, small(steps=1)).result()


def test_adaptive_plan_with_captured_features_resumes_bit_for_bit(tmp_path: Path) -> None:
    def go(out: Path, **options):
        model = tiny_model()
        plan, capture = adaptive_plan(model, sums(10))
        return run(out, small(save_every=3), model=model, plan=plan, capture=capture, **options)

    straight, plan, _ = go(tmp_path / "one")
    with pytest.raises(SaerlError, match="Die"):
        go(tmp_path / "two", reward=dying_reward(7))
    resumed, again, _ = go(tmp_path / "two", resume=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert same_weights(straight, resumed)
    assert plan.next_batch() == again.next_batch()
    times = [row["time"] for row in read_metrics(tmp_path / "one") if row["kind"] == "train"]
    assert all(t["capture"] > 0 and t["encode"] > 0 for t in times)


LOST = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
    "edited": lambda path: path.write_text(path.read_text().replace('"step": 2', '"step":  2', 1)),
}


CASES = [
    *(("metrics.jsonl", harm) for harm in LOST),
    ("rollouts.jsonl", "truncated"),
    ("eval_items.jsonl", "deleted"),
]


@pytest.mark.parametrize(("name", "harm"), CASES)
def test_rows_lost_before_a_resume_are_said(tmp_path: Path, caplog, name: str, harm: str) -> None:
    cfg = small(steps=4, save_every=1)
    with pytest.raises(SaerlError, match="Die"):
        run(tmp_path, cfg, reward=dying_reward(4))
    LOST[harm](tmp_path / name)
    _, _, summary = run(tmp_path, cfg, resume=True)
    word = {"deleted": "is missing", "edited": "was changed"}.get(harm, "has ")
    assert summary["damage"][0].startswith(f"{name} {word}") and summary["damage"][0].endswith("(step 2)")
    assert f"{name} {word}" in caplog.text and len(summary["damage"]) == 1
    said: list[str] = []
    load_runs(tmp_path, said.append)
    assert said[0].endswith(summary["damage"][0])
    if name == "metrics.jsonl" and harm in ("emptied", "deleted"):
        assert said[1].endswith("metrics.jsonl lacks the training steps 1 to 2") and len(said) == 2
    caplog.clear()
    _, _, again = run(tmp_path, small(steps=5, save_every=1), resume=True)
    assert again["damage"] == summary["damage"] and name not in caplog.text


def test_a_whole_run_has_no_damage(tmp_path: Path) -> None:
    run(tmp_path / "a", small(steps=2))
    _, _, summary = run(tmp_path / "a", small(steps=4), resume=True)
    said: list[str] = []
    assert "damage" not in summary and load_runs(tmp_path, said.append) and said == []
