"""Batches of rollouts, dynamic sampling, and what becomes of completions that are cut off."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saerl_fast.config import EvalConfig, LossConfig
from saerl_fast.errors import SaerlError
from saerl_fast.records.log import read_metrics
from saerl_fast.rl import update as module
from saerl_fast.rl.rollouts import Draw, Rollouts, concat, decoded, join, select, widen
from saerl_kernels import CSR
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


@pytest.fixture
def updates(monkeypatch) -> list:
    """Rollouts, advantages and used groups of every update."""
    batches = []
    real = module.Learner.update

    def watched(self, rollouts, advantage, used, lr, clock):
        batches.append((rollouts, advantage, used))
        return real(self, rollouts, advantage, used, lr, clock)

    monkeypatch.setattr(module.Learner, "update", watched)
    return batches


def test_dynamic_sampling_trains_on_the_useful_groups_of_all_draws(tmp_path: Path, updates: list) -> None:
    run(tmp_path, small(steps=1, dynamic_sampling=5), reward=picky)
    rollouts, advantage, used = updates[0]
    row = next(row for row in read_metrics(tmp_path) if row["kind"] == "train")
    assert row["draws"] > 1 and used.all() and len(used) == row["groups_used"] <= 4
    assert advantage.shape == (len(used), 4) and advantage.abs().sum(1).min() > 0
    texts = TOKENIZER.batch_decode(rollouts.completion_ids.masked_fill(~rollouts.completion_mask, 0))
    for found, text in zip(texts, rollouts.texts, strict=True):
        assert re.sub("<pad>|<eos>|<unk>", "", found) == text
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


def screened(steps: int = 4, **change):
    cfg = small(steps=steps, save_every=1, **change)
    cfg.rollout.screen = 2
    return cfg


def test_the_rest_of_a_group_is_made_only_where_its_first_rollouts_differ(tmp_path: Path) -> None:
    def odd(prompts, completions, **columns):
        told = zip(prompts, completions, strict=True)
        return [float(prompt[0] in "01" and sum(map(ord, text)) % 2) for prompt, text in told]

    def watched(prompts, completions, **columns):
        asked.append((prompts, completions))
        return odd(prompts, completions)

    asked: list[tuple[list[str], list[str]]] = []
    cfg = screened(eval=EvalConfig(every=2, samples=5))
    cfg.rollout.group_size, cfg.rollout.screen = 6, 4
    _, plan, summary = run(tmp_path, cfg, reward=watched)
    rows = [row for row in read_metrics(tmp_path) if row["kind"] == "train"]
    asked = [call for call in asked if len(call[0]) != 15]  # an evaluation
    for row in rows:
        prompts, completions = asked.pop(0)
        groups = zip(prompts[::4], np.reshape(odd(prompts, completions), (4, 4)), strict=True)
        going = [prompt for prompt, rewards in groups if len(set(rewards)) > 1]
        assert row["groups"] == 4 and row["groups_used"] == len(going)
        assert row["rollouts"] == 16 + 2 * len(going)
        if going:
            assert asked.pop(0)[0] == [prompt for prompt in going for _ in range(2)]
    assert not asked and 0 < sum(row["groups_used"] for row in rows) < 16
    assert summary["rollouts"] == sum(row["rollouts"] for row in rows) and plan.step == 4


def test_screened_groups_train_as_whole_groups(tmp_path: Path, updates: list) -> None:
    run(tmp_path, screened(1, dynamic_sampling=5), reward=picky)
    rollouts, advantage, used = updates[0]
    row = next(row for row in read_metrics(tmp_path) if row["kind"] == "train")
    assert row["draws"] > 1 and row["groups"] == 4 * row["draws"]
    assert used.all() and advantage.shape == (len(used), 4) and len(used) == row["groups_used"] <= 4
    assert advantage.sum(1).abs().max() < 1e-4 and row["mismatch"] < 1e-4
    texts = TOKENIZER.batch_decode(rollouts.completion_ids.masked_fill(~rollouts.completion_mask, 0))
    found = [re.sub("<pad>|<eos>|<unk>", "", text) for text in texts]
    assert found == rollouts.texts
    above = torch.tensor([[float("a" in text) for text in rollouts.texts]]).view(-1, 4) > 0.5
    assert torch.equal(advantage > 0, above)  # each completion has the advantage of its own reward


@pytest.mark.parametrize("calls", [2, 5, 8])
def test_a_screened_run_resumes_exactly(tmp_path: Path, calls: int) -> None:
    def dying(prompts, completions, **columns):
        made.append(1)
        if len(made) > calls:
            raise Die
        return picky(prompts, completions)

    made: list[int] = []
    cfg = screened(dynamic_sampling=1)
    straight, _, _ = run(tmp_path / "one", cfg, reward=picky)
    with pytest.raises(SaerlError, match="Die"):
        run(tmp_path / "two", cfg, reward=dying)
    resumed, _, _ = run(tmp_path / "two", cfg, reward=picky, resume=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert same_weights(straight, resumed)


def test_without_any_group_that_differs_a_first_stage_is_all(tmp_path: Path) -> None:
    def constant(prompts, completions, **columns):
        return [0.0] * len(completions)

    model, _, summary = run(tmp_path, screened(1), reward=constant)
    assert same_weights(model, tiny_model())
    assert (summary["rollouts"], summary["groups"], summary["groups_used"]) == (8, 4, 0)


def test_an_order_that_learns_from_whole_groups_is_not_screened(tmp_path: Path) -> None:
    model = tiny_model()
    plan, capture = adaptive_plan(model, sums(10))
    with pytest.raises(
        SaerlError, match="train.rollout.screen=2 ends groups early, and plan.schedule=adaptive"
    ):
        run(tmp_path, screened(1), model=model, plan=plan, capture=capture)


def test_widened_groups_hold_both_samples_in_order() -> None:
    first = batch([[1, 2], [3]], [[4], [5, 6], [7], [8, 9]], 2)
    rest = batch([[1, 2], [3]], [[10, 11, 12], [13]], 1)
    made = widen(first, rest)
    assert made.group_size == 3 and made.prompt_lens.tolist() == [2, 1]
    assert tokens(made) == [[1, 2, 4], [1, 2, 5, 6], [1, 2, 10, 11, 12], [3, 7], [3, 8, 9], [3, 13]]
    assert made.texts == ["[4]", "[5, 6]", "[10, 11, 12]", "[7]", "[8, 9]", "[13]"]


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


def batch(prompt: list[list[int]], completion: list[list[int]], group: int = 1) -> Rollouts:
    """Rollouts of these token ids, padded as ``generate`` does."""

    def padded(rows: list[list[int]], left: bool) -> torch.Tensor:
        width = max(map(len, rows))
        return torch.tensor(
            [[0] * (width - len(r)) + r if left else r + [0] * (width - len(r)) for r in rows]
        )

    lens, ids = torch.tensor([len(row) for row in prompt]), padded(completion, left=False)
    mask, texts = ids > 0, [str(row) for row in completion]
    return Rollouts(padded(prompt, left=True), lens, ids, mask, -0.1 * ids, texts, ids.sum(1) % 2 > 0, group)


def tokens(rollouts: Rollouts) -> list[list[int]]:
    ids, starts, lengths = rollouts.sequences()
    return [row[: s + n] for row, s, n in zip(ids.tolist(), starts.tolist(), lengths.tolist(), strict=True)]


def test_joined_batches_of_other_widths_keep_every_token() -> None:
    short, long = batch([[1, 2]], [[3]]), batch([[4, 5, 6], [7]], [[8, 9], [10, 11]])
    assert tokens(concat([short, long])) == [[1, 2, 3], [4, 5, 6, 8, 9], [7, 10, 11]]
    assert tokens(concat([long, short])) == [[4, 5, 6, 8, 9], [7, 10, 11], [1, 2, 3]]


def test_joined_batches_keep_what_belongs_to_each_row() -> None:
    parts = [batch([[1, 2], [3]], [[4], [5, 6], [7, 8, 9], [1]], 2), batch([[5] * 4], [[6, 6], [2]], 2)]
    whole = concat(parts)
    assert whole.prompt_ids.shape == (3, 4) and whole.completion_ids.shape == (6, 3)
    assert whole.lengths.tolist() == [1, 2, 3, 1, 2, 1]
    torch.testing.assert_close(whole.logprobs, -0.1 * whole.completion_ids)
    assert whole.finished.tolist() == [
        bool(sum(row) % 2) for row in ([4], [5, 6], [7, 8, 9], [1], [6, 6], [2])
    ]
    assert whole.texts == parts[0].texts + parts[1].texts


def test_joined_batches_join_their_features() -> None:
    first, second = (CSR.from_dense(torch.tensor(rows)) for rows in ([[1.0, 0, 2]], [[0.0, 3, 0], [4, 0, 0]]))
    parts = [batch([[1]], [[2]]), batch([[3], [4, 5]], [[6], [7]])]
    whole = concat([replace(part, features=f) for part, f in zip(parts, (first, second), strict=True)])
    assert whole.features.to_dense().tolist() == [[1, 0, 2], [0, 3, 0], [4, 0, 0]]
    assert concat(parts).features is None


def test_chosen_groups_keep_their_prompts_rows_and_texts() -> None:
    made = batch([[1, 2], [3], [4, 5, 6]], [[7], [8, 9], [1], [2, 3, 4], [5, 6], [7, 8]], 2)
    chosen = select(made, torch.tensor([2, 0]))
    assert tokens(chosen) == [[4, 5, 6, 5, 6], [4, 5, 6, 7, 8], [1, 2, 7], [1, 2, 8, 9]]
    assert chosen.texts == ["[5, 6]", "[7, 8]", "[7]", "[8, 9]"]
    assert chosen.finished.tolist() == [True, True, True, True] and chosen.features is None


def test_no_more_groups_are_trained_on_than_a_batch_has() -> None:
    def draw(first: int, useful: int = 3) -> Draw:
        made = batch([[first]] * 3, [[first + i] for i in range(3)])
        used = torch.arange(3) < useful
        return Draw(["a"] * 3, [""] * 3, {}, made, np.zeros((3, 1)), torch.full((3, 1), float(first)), used)

    rollouts, advantage, used = join([draw(1), draw(7)], most=4)
    assert len(used) == len(advantage) == len(rollouts.finished) == 4
    assert advantage[:, 0].tolist() == [1, 1, 1, 7] and tokens(rollouts) == [[1, 1], [1, 2], [1, 3], [7, 7]]
    rollouts, advantage, used = join([draw(1, 0), draw(7, 2)], most=4)
    assert used.all() and tokens(rollouts) == [[7, 7], [7, 8]] and advantage[:, 0].tolist() == [7, 7]
    rollouts, advantage, used = join([draw(1, 0), draw(7, 0)], most=4)  # the first stands for them
    assert not used.any() and tokens(rollouts) == [[1, 1], [1, 2], [1, 3]]


def test_padding_is_no_end_token_even_where_both_have_the_same_id() -> None:
    """As in models whose end token has id 0."""
    tokens = torch.tensor([[5, 6, 0], [5, 0, 0], [7, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    finished, _ = decoded(TOKENIZER, tokens, mask, torch.tensor([0]))
    assert finished.tolist() == [True, False, True]
