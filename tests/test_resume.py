"""Runs that are killed or interrupted, and go on as if nothing had happened."""

import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from saerl_fast.config import (
    LossConfig,
    WarmupConfig,
)
from saerl_fast.errors import SaerlError
from saerl_fast.records.log import read_metrics
from tests.tiny_lm import tiny_model
from tests.training import (
    Die,
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

    def dying(prompts, completions, **columns):
        calls.append(1)
        if len(calls) > 7:
            raise Die
        return noisy(prompts, completions)

    calls: list[int] = []
    straight, _, _ = run(tmp_path / "one", small(save_every=3), reward=noisy)
    with pytest.raises(SaerlError, match="Die"):
        run(tmp_path / "two", small(save_every=3), reward=dying)
    resumed, _, _ = run(tmp_path / "two", small(save_every=3), reward=noisy, resume=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert same_weights(straight, resumed)


def test_interrupt_saves_the_step(tmp_path: Path) -> None:
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(1)
        if len(calls) == 4:  # evaluation, steps 1 and 2, evaluation
            os.kill(os.getpid(), signal.SIGINT)
        return vowels(prompts, completions)

    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "two", small(save_every=0), reward=reward, echo=said.append)
    assert signal.getsignal(signal.SIGINT) is before
    assert "step 2 is saved" in said[-1]
    resumed, _, _ = run(tmp_path / "two", small(save_every=0), resume=True)
    straight, _, _ = run(tmp_path / "one", small(save_every=0))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert same_weights(straight, resumed)


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
