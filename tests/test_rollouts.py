"""Dynamic sampling and what becomes of completions that are cut off."""

from pathlib import Path

import numpy as np
import pytest
import torch

from saerl_fast.config import (
    LossConfig,
)
from saerl_fast.errors import SaerlError
from saerl_fast.records.log import read_metrics
from saerl_fast.rl import update as module
from saerl_fast.rl.rollouts import rows_of
from tests.tiny_lm import tiny_model
from tests.training import TOKENIZER, Die, adaptive_plan, assert_same_run, run, same_weights, small, sums


def picky(prompts, completions, **columns):
    """Differs within a group for about half of the prompts only."""
    return [
        float("a" in text) if prompt[0] in "01" else 0.0
        for prompt, text in zip(prompts, completions, strict=True)
    ]


@pytest.mark.parametrize("adaptive", [False, True])
def test_dynamic_sampling_counts_every_rollout_and_resumes(tmp_path: Path, adaptive: bool) -> None:
    cfg = small(steps=4, dynamic_sampling=3, save_every=1)

    def go(out: Path, reward=picky, **options):
        model = tiny_model()
        more = {}
        if adaptive:
            more["plan"], more["capture"] = adaptive_plan(model, sums(10))
        return run(out, cfg, model=model, reward=reward, **more, **options)

    def dying(prompts, completions, **columns):
        calls.append(1)
        if len(calls) > 7:
            raise Die
        return picky(prompts, completions)

    calls: list[int] = []
    straight, plan, summary = go(tmp_path / "one")
    rows = [row for row in read_metrics(tmp_path / "one") if row["kind"] == "train"]
    assert any(row["draws"] > 1 for row in rows) and all(row["draws"] <= 4 for row in rows)
    for row in rows:
        assert row["groups"] == 4 * row["draws"] and row["rollouts"] == 16 * row["draws"]
        assert row["groups_used"] == 4 or row["draws"] == 4
    assert summary["rollouts"] == sum(row["rollouts"] for row in rows)
    assert plan.step == sum(row["draws"] for row in rows)
    with pytest.raises(SaerlError, match="Die"):
        go(tmp_path / "two", reward=dying)
    resumed, again, _ = go(tmp_path / "two", resume=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert same_weights(straight, resumed) and plan.step == again.step


def test_dynamic_sampling_trains_on_the_useful_groups_of_all_draws(tmp_path: Path, monkeypatch) -> None:
    batches = []
    real = module.Learner.update

    def watched(self, rollouts, advantage, used, lr, clock):
        batches.append((rollouts, advantage, used))
        return real(self, rollouts, advantage, used, lr, clock)

    monkeypatch.setattr(module.Learner, "update", watched)
    run(tmp_path, small(steps=1, dynamic_sampling=5), reward=picky)
    rollouts, advantage, used = batches[0]
    row = next(row for row in read_metrics(tmp_path) if row["kind"] == "train")
    assert row["draws"] > 1 and used.all() and len(used) == row["groups_used"] <= 4
    assert advantage.shape == (len(used), 4) and advantage.abs().sum(1).min() > 0
    texts = TOKENIZER.batch_decode(rollouts.completion_ids.masked_fill(~rollouts.completion_mask, 0))
    for decoded, text in zip(texts, rollouts.texts, strict=True):
        assert decoded.replace("<pad>", "").replace("<eos>", "") == text
    ids, starts, lengths = rollouts.sequences()
    for i, (row_ids, start) in enumerate(zip(ids.tolist(), starts.tolist(), strict=True)):
        prompt = TOKENIZER.decode(row_ids[:start])
        assert prompt[0] in "01" and prompt[-1] == "=" and lengths[i] == rollouts.completion_mask[i].sum()
    assert row["mismatch"] < 1e-4  # the joined log-probabilities belong to the joined tokens


def test_dynamic_sampling_gives_up_at_its_limit(tmp_path: Path) -> None:
    def constant(prompts, completions, **columns):
        return [0.0] * len(completions)

    model, plan, summary = run(tmp_path, small(steps=1, dynamic_sampling=2), reward=constant)
    assert same_weights(model, tiny_model()) and plan.step == 3
    assert summary["rollouts"] == 48 and summary["groups_used"] == 0


def test_truncated_completions_can_be_left_out_of_the_loss(tmp_path: Path, monkeypatch) -> None:
    """The loss is that of the finished completions alone, and its normaliser counts only them."""
    seen = []
    real = module.policy_loss

    def watched(new, old, weight, lengths, size, cfg, ref, *more):
        seen.append((lengths, size))
        return real(new, old, weight, lengths, size, cfg, ref, *more)

    monkeypatch.setattr(module, "policy_loss", watched)
    cfg = small(steps=1, loss=LossConfig(mask_truncated=True))
    cfg.rollout.max_new_tokens = 40
    run(tmp_path, cfg, reward=lambda prompts, completions, **_: list(range(len(completions))))
    row = next(row for row in read_metrics(tmp_path) if row["kind"] == "train")
    assert 0 < row["finished"] < 1 and row["groups_used"] == 4
    assert sum(len(lengths) for lengths, _ in seen) == round(16 * row["finished"])
    size = seen[0][1]
    assert size.completions == round(16 * row["finished"])
    assert size.tokens == sum(int(lengths.sum()) for lengths, _ in seen)
    assert size.tokens == row["tokens"] - 40 * (16 - size.completions)


def test_overlong_completions_lose_reward_but_not_pass_rate(tmp_path: Path) -> None:
    def constant(prompts, completions, **columns):
        return [1.0] * len(completions)

    cfg = small(steps=1, loss=LossConfig(overlong_window=36))
    cfg.rollout.max_new_tokens = 40
    _, plan, _ = run(tmp_path, cfg, reward=constant)
    row = next(row for row in read_metrics(tmp_path) if row["kind"] == "train")
    assert row["reward"] == row["pass_rate"] == 1 and plan.told.sum() == 4
    assert row["groups_used"] == 0  # lengths differ, but no completion did better than another


def test_the_overlong_penalty_changes_what_groups_with_a_signal_learn(tmp_path: Path) -> None:
    def every_other(prompts, completions, **columns):
        return [float(i % 2) for i in range(len(completions))]

    rows = {}
    for window in (0, 36):
        folder = tmp_path / str(window)
        cfg = small(steps=1, loss=LossConfig(overlong_window=window))
        cfg.rollout.max_new_tokens = 40
        run(folder, cfg, reward=every_other)
        rows[window] = next(row for row in read_metrics(folder) if row["kind"] == "train")
    for key in ("reward", "pass_rate", "groups_used", "tokens"):
        assert rows[0][key] == rows[36][key]
    assert rows[0]["groups_used"] == 4 and rows[0]["grad_norm"] != rows[36]["grad_norm"]


def test_rows_of_a_sparse_matrix() -> None:
    from saerl_kernels import CSR

    dense = torch.tensor([[1.0, 0, 2], [0, 0, 0], [0, 3, 0], [4, 5, 6]])
    for rows in ([0, 2, 3], [1], [3, 3, 0]):
        some = rows_of(CSR.from_dense(dense), np.array(rows))
        assert torch.equal(some.to_dense(), dense[rows]) and some.indptr.dtype == torch.int64
