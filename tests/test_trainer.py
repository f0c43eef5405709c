import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from saerl_fast.config import (
    EvalConfig,
    LossConfig,
    PlanConfig,
)
from saerl_fast.errors import SaerlError
from saerl_fast.plan.rivals import RIVALS
from saerl_fast.plan.static import StaticPlan
from saerl_fast.records.log import read_jsonl, read_metrics
from saerl_fast.rl import update as module
from saerl_fast.rl.checkpoint import model_tensors
from saerl_fast.rl.evaluate import answer_probabilities
from saerl_fast.rl.trainer import train
from tests.tiny_lm import session_of, tiny_model
from tests.training import (
    PHASES,
    TOKENIZER,
    Features,
    WatchfulPlan,
    assert_same_run,
    dying_reward,
    run,
    same_weights,
    small,
    sums,
    vowels,
)


@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo", "gspo", "cispo"])
def test_micro_batches_give_the_same_update(tmp_path: Path, kind: str) -> None:
    loss = LossConfig(kind=kind)
    whole, _, _ = run(tmp_path / "one", small(steps=1, loss=loss, warmup_steps=0))
    split, _, _ = run(tmp_path / "two", small(steps=1, loss=loss, warmup_steps=0, micro_tokens=12))
    one, two = (read_metrics(tmp_path / name)[1] for name in ("one", "two"))
    for key in ("loss", "grad_norm", "entropy"):
        assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-7)
    for a, b in zip(model_tensors(whole).values(), model_tensors(split).values(), strict=True):
        # Adam's first step is lr * sign(gradient): where that is nearly 0 its sign is noise
        assert ((a - b).abs() < 1e-4).float().mean() > 0.99


def test_out_of_memory_halves_the_micro_batch(tmp_path: Path, monkeypatch, caplog) -> None:
    real, sizes = module.completion_logprobs, []

    def tight(model, ids, starts, lengths, **options):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("no room")
        return real(model, ids, starts, lengths, **options)

    free, _, _ = run(tmp_path / "one", small(steps=1))
    monkeypatch.setattr(module, "completion_logprobs", tight)
    tightened, _, summary = run(tmp_path / "two", small(steps=1))
    assert "micro_tokens is now" in caplog.text and max(sizes) > 2 >= sizes[-1]
    one, two = (read_metrics(tmp_path / name)[1] for name in ("one", "two"))
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)

    def none(*args, **options):
        raise torch.OutOfMemoryError("no room at all")

    monkeypatch.setattr(module, "completion_logprobs", none)
    with pytest.raises(SaerlError, match="single sequence"):
        run(tmp_path / "three", small(steps=1))


def test_grpo_learns_to_emit_a_letter(tmp_path: Path) -> None:
    cfg = small(steps=30, lr=1e-2, save_every=0, eval=EvalConfig(every=30, samples=4))
    model, _, summary = run(tmp_path, cfg, plan=WatchfulPlan(sums(10), steps=30))
    rows = [row for row in read_metrics(tmp_path) if row["kind"] == "train"]
    rewards = [row["reward"] for row in rows]
    noise = np.std(rewards[:5])
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + max(0.4, 5 * noise)
    assert summary["accuracy"] > summary["accuracy_first"] + 0.4
    entropy = [row["entropy"] for row in rows if row["groups_used"]]
    assert entropy[-1] < entropy[0]


def test_records_and_honest_counters(tmp_path: Path) -> None:
    said: list[str] = []
    done: list[tuple[int, int]] = []
    cfg = small(steps=3, eval=EvalConfig(every=2, samples=2))
    model, plan, summary = run(tmp_path, cfg, echo=said.append, progress=lambda *p: done.append(p))
    rows = read_metrics(tmp_path)
    assert [(r["kind"], r["step"]) for r in rows] == [
        ("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("eval", 3)
    ]  # fmt: skip
    first = rows[1]
    assert first["rollouts"] == 16 and first["groups"] == 4 and 0 < first["tokens"] <= 96
    assert first["lr"] == pytest.approx(1.5e-3) and rows[2]["lr"] == pytest.approx(3e-3)
    assert first["time"].keys() >= PHASES and rows[0]["time"].keys() == {"eval"}
    assert first["mismatch"] < 1e-4 and first["clipped"] == 0
    assert first["plan"]["told"] == pytest.approx(4 * first["pass_rate"])
    trained = [r for r in rows if r["kind"] == "train"]
    for key in ("rollouts", "tokens", "groups", "groups_used"):
        assert summary[key] == sum(r[key] for r in trained)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert len(said) == 6 and done == [(0, 3), (1, 3), (2, 3), (3, 3)]
    items = read_jsonl(tmp_path / "eval_items.jsonl")
    assert len(items) == 9 and {"step", "prompt_id", "score", "completion"} <= items[0].keys()
    assert rows[0]["accuracy"] == pytest.approx(np.mean([i["score"] for i in items[:3]]))
    saved = read_jsonl(tmp_path / "rollouts.jsonl")
    assert len(saved) == 6 and len(saved[0]["completions"]) == len(saved[0]["rewards"]) == 4
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert same_weights(loaded, model)


def test_groups_without_signal_are_counted_but_not_trained_on(tmp_path: Path) -> None:
    def constant(prompts, completions, **columns):
        return [0.0] * len(completions)

    model, _, summary = run(tmp_path, small(steps=2), reward=constant)
    assert same_weights(model, tiny_model())
    row = read_metrics(tmp_path)[1]
    assert row["groups_used"] == 0 and row["rollouts"] == 16 and row["loss"] is None
    assert summary["groups_used"] == 0 and summary["rollouts"] == 32


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_shaped_length_never_earns_by_itself(tmp_path: Path, value: float) -> None:
    def constant(prompts, completions, **columns):
        return [value] * len(completions)

    cfg = small(steps=2, dynamic_sampling=3, loss=LossConfig(overlong_window=4))
    model, _, summary = run(tmp_path, cfg, reward=constant, plan=WatchfulPlan(sums(10), steps=8))
    assert same_weights(model, tiny_model()) and summary["groups_used"] == 0
    rows = [row for row in read_metrics(tmp_path) if row["kind"] == "train"]
    assert [row["draws"] for row in rows] == [4, 4]  # all that it may: no group has a signal


def test_rewards_that_judge_some_rows(tmp_path: Path) -> None:
    def some(prompts, completions, answer, log_extra, log_metric, trainer_state, **columns):
        log_extra("seen", [trainer_state.global_step] * len(completions))
        log_metric("calls", 1.0)
        return [None if a == "0" or i % 4 == 3 else float(i % 4) for i, a in enumerate(answer)]

    plan = WatchfulPlan(sums(10))
    _, plan, summary = run(tmp_path, small(steps=3, pass_threshold=2.0), reward=some, plan=plan)
    rows = [row for row in read_metrics(tmp_path) if row["kind"] == "train"]
    assert all(row["reward"] == 1.0 and row["pass_rate"] == pytest.approx(1 / 3) for row in rows)
    assert all(row["loss"] is not None and row["reward_metrics"] == {"calls": 1.0} for row in rows)
    unseen = [i for i, answer in enumerate(sums(10).column("answer")) if answer == "0"]
    assert unseen and all(plan.told[i] == 0 for i in unseen)
    saved = read_jsonl(tmp_path / "rollouts.jsonl")
    assert saved[0]["extra_seen"] == [0] * 4 and saved[-1]["extra_seen"] == [2] * 4
    assert saved[0]["rewards"][3] is None


def test_several_rewards_are_logged_one_by_one(tmp_path: Path) -> None:
    from saerl_fast.rl.rewards import get_reward

    both = get_reward(["exact", "tests.training:vowels"], [1.0, 2.0])
    run(tmp_path, small(steps=2), reward=both)
    for row in read_metrics(tmp_path)[1:3]:
        if row["kind"] == "train":
            parts = row["reward_parts"]
            assert row["reward"] == pytest.approx(parts["exact"] + 2 * parts["vowels"])


def test_rewards_that_the_plan_cannot_see_are_pointed_out_once(tmp_path: Path, caplog) -> None:
    def length(prompts, completions, **columns):
        return [float(len(text)) for text in completions]

    run(tmp_path, small(steps=2), reward=length)
    assert caplog.text.count("set train.pass_threshold") == 1


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path: Path, monkeypatch, caplog) -> None:
    real = module.policy_loss
    monkeypatch.setattr(module, "policy_loss", lambda *args: (real(*args)[0] * float("nan"), real(*args)[1]))
    model, _, _ = run(tmp_path, small(steps=1))
    assert same_weights(model, tiny_model()) and "this update is skipped" in caplog.text
    assert read_metrics(tmp_path)[1]["grad_norm"] is None


def test_features_reach_the_plan_and_phases_the_log(tmp_path: Path) -> None:
    _, plan, _ = run(tmp_path, small(steps=2), capture=Features())
    assert plan.features == ["features of prefill 1", "features of prefill 2"]
    assert read_metrics(tmp_path)[1]["time"]["encode"] == 0.25
    assert read_metrics(tmp_path)[1]["time"]["capture"] == 0.5


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, _, _ = run(tmp_path / "one", small(steps=2))
    saving, _, _ = run(tmp_path / "two", small(steps=2, gradient_checkpointing=True))
    one, two = (read_metrics(tmp_path / name)[1] for name in ("one", "two"))
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    assert not saving.training and not saving.is_gradient_checkpointing


def test_nothing_drops_out_while_activations_are_recomputed(tmp_path: Path) -> None:
    for name, kind, rates in (
        ("llama", "llama", {"attention_dropout": 0.5}),
        ("gpt2", "gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    ):
        model = tiny_model(kind, **rates)
        run(tmp_path / name, small(steps=2, gradient_checkpointing=True), model=model)
        rows = [row for row in read_metrics(tmp_path / name) if row["kind"] == "train"]
        assert all(row["mismatch"] < 1e-4 for row in rows), name


def test_half_precision_weights_move_by_small_updates(tmp_path: Path) -> None:
    start = tiny_model().bfloat16()
    model, _, _ = run(tmp_path / "a", small(steps=6, lr=1e-4, save_every=3), model=tiny_model().bfloat16())
    assert model.dtype == torch.bfloat16 and not same_weights(model, start)
    with pytest.raises(SaerlError, match="Die"):
        run(
            tmp_path / "b",
            small(steps=6, lr=1e-4, save_every=3),
            model=tiny_model().bfloat16(),
            reward=dying_reward(7),
        )
    again, _, _ = run(
        tmp_path / "b", small(steps=6, lr=1e-4, save_every=3), model=tiny_model().bfloat16(), resume=True
    )
    assert same_weights(model, again)


def test_a_pool_smaller_than_a_batch(tmp_path: Path) -> None:
    pool = sums(2)
    plan = StaticPlan("vanilla", pool.column("prompt_id"), PlanConfig(), batch_size=4, total_steps=2, seed=0)
    summary = train(session_of(tiny_model(), pool, sums(2, 5)), plan, vowels, small(steps=2), tmp_path)
    assert summary["rollouts"] == 32


def test_a_plan_of_another_pool(tmp_path: Path) -> None:
    with pytest.raises(SaerlError, match="'p30'"):
        run(tmp_path / "out", small(), plan=WatchfulPlan(sums(5, 30)))


def test_an_oracle_is_told_what_the_model_knows_before_each_step(tmp_path: Path, monkeypatch) -> None:
    def exact(prompts, completions, answer, **columns):
        return [float(text.startswith(a)) for text, a in zip(completions, answer, strict=True)]

    def plan():
        ids = sums(10).column("prompt_id")
        return RIVALS["oracle"](ids, PlanConfig(), batch_size=4, total_steps=6, seed=0, group_size=4)

    told, know = [], RIVALS["oracle"].know
    monkeypatch.setattr(RIVALS["oracle"], "know", lambda self, rates: (told.append(rates), know(self, rates)))
    straight, whole, _ = run(tmp_path / "one", small(), plan=plan(), reward=exact)
    start = answer_probabilities(
        tiny_model(), TOKENIZER, session_of(tiny_model(), sums(10), sums(3, 10)).train
    )
    np.testing.assert_allclose(told[0], start, rtol=1e-6)
    assert len(told) == 6 and not np.allclose(told[0], told[-1])
    with pytest.raises(SaerlError, match="Die"):
        run(tmp_path / "two", small(), plan=plan(), reward=dying_reward(5, exact))
    resumed, _, _ = run(tmp_path / "two", small(), plan=plan(), reward=exact, resume=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert same_weights(straight, resumed) and whole.metrics()["worth"] >= 0


def test_a_reward_that_hangs_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    def endless(prompts, completions, **columns):
        calls.append(1)
        if len(calls) > 2:
            time.sleep(60)
        return vowels(prompts, completions)

    calls: list[int] = []
    cfg = small(reward_timeout=0.2, save_every=1)
    with pytest.raises(SaerlError, match="took more than train.reward_timeout=0.2 s for completion 0"):
        run(tmp_path / "two", cfg, reward=endless)
    resumed, _, _ = run(tmp_path / "two", small(reward_timeout=30), resume=True)
    straight, _, _ = run(tmp_path / "one", small())
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert same_weights(straight, resumed)


def test_a_mismatch_beyond_rounding_is_said_and_counted(tmp_path: Path, monkeypatch, caplog) -> None:
    real = module.completion_logprobs
    monkeypatch.setattr(
        module, "completion_logprobs", lambda *args, **rest: (real(*args, **rest)[0] - 0.2, real(*args)[1])
    )
    _, _, summary = run(tmp_path / "off", small(steps=3))
    assert summary["mismatch_steps"] == 3
    said = [r.message for r in caplog.records if "(mismatch)" in r.message]
    assert (
        len(said) == 1 and said[0].startswith("step 1: mismatch: ") and "differ by 0.2 per token" in said[0]
    )
    assert summary["warnings"] == {"mismatch": {"first": 1, "times": 1, "steps": 3}}
    monkeypatch.undo()
    caplog.clear()
    assert run(tmp_path / "fine", small(steps=1))[2]["mismatch_steps"] == 0
    assert "(mismatch)" not in caplog.text


def test_a_file_where_the_model_should_go_is_said(tmp_path):
    """transformers would write nothing, without an error."""
    (tmp_path / "model").write_text("in the way")
    with pytest.raises(SaerlError, match="cannot write .*/model: File exists"):
        run(tmp_path, small(steps=1))
    assert not (tmp_path / "summary.json").exists()
