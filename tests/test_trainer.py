import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from saerl_fast.config import (
    EvalConfig,
    LoRAConfig,
    LossConfig,
    PlanConfig,
    RolloutConfig,
    TrainConfig,
    WarmupConfig,
)
from saerl_fast.data.plan import StaticPlan
from saerl_fast.errors import SaerlError
from saerl_fast.log import read_jsonl, read_metrics
from saerl_fast.prompts import Pool
from saerl_fast.rl import update as module
from saerl_fast.rl.checkpoint import load_latest, model_tensors
from saerl_fast.rl.trainer import train
from tests.tiny_lm import char_tokenizer, tiny_model

TOKENIZER = char_tokenizer()


def sums(n: int, first: int = 0) -> Pool:
    pairs = [(i % 5, (3 * i) % 4) for i in range(first, first + n)]
    return Pool(
        {
            "prompt_id": [f"p{i}" for i in range(first, first + n)],
            "prompt": [f"{a}+{b}=" for a, b in pairs],
            "answer": [str(a + b) for a, b in pairs],
        }
    )


def vowels(prompts, completions, **columns):
    """Share of the letter a: graded, and learnt in a few steps."""
    return [text.count("a") / max(len(text), 1) for text in completions]


class WatchfulPlan(StaticPlan):
    """Keeps what it was told, as the adaptive plan does."""

    def __init__(self, pool: Pool, batch: int = 4, steps: int = 6) -> None:
        super().__init__(
            "vanilla", pool.column("prompt_id"), PlanConfig(), batch_size=batch, total_steps=steps, seed=0
        )
        self.told = torch.zeros(len(pool), dtype=torch.float64)
        self.features: list = []

    def observe(self, prompt_ids, pass_rates, features=None):
        self._check(prompt_ids, pass_rates)
        for name, rate in zip(prompt_ids, pass_rates, strict=True):
            self.told[self._row[name]] += rate
        self.features.append(features)

    def state_dict(self):
        return super().state_dict() | {"told": self.told.clone()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.told = state["told"]

    def metrics(self):
        return {"told": float(self.told.sum())}


def small(**change) -> TrainConfig:
    base = TrainConfig(
        steps=6,
        lr=3e-3,
        warmup_steps=2,
        save_every=1,
        rollout=RolloutConfig(prompts_per_step=4, group_size=4, max_new_tokens=6),
        eval=EvalConfig(every=2, samples=2),
    )
    for name, value in change.items():
        setattr(base, name, value)
    return base


def run(out: Path, cfg: TrainConfig, *, reward=vowels, model=None, resume: bool = False, **more):
    model = model if model is not None else tiny_model()
    pool = sums(10)
    plan = more.pop("plan", None) or WatchfulPlan(pool)
    summary = train(model, TOKENIZER, pool, sums(3, 10), plan, reward, cfg, out, resume=resume, **more)
    return model, plan, summary


def timeless(path: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "time"} for row in read_jsonl(path)]


def same_weights(a, b) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(model_tensors(a).values(), model_tensors(b).values(), strict=True)
    )


PHASES = {"generate", "plan", "reward", "logprob", "update"}
FILES = ("metrics.jsonl", "eval_items.jsonl", "rollouts.jsonl")


def assert_same_run(one: Path, two: Path) -> None:
    for name in FILES:
        assert timeless(one / name) == timeless(two / name), name


class Die(Exception):
    pass


def dying_reward(after: int):
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(1)
        if len(calls) > after:
            raise Die  # becomes a SaerlError, as for any reward that raises
        return vowels(prompts, completions)

    return reward


@pytest.mark.parametrize(("warm", "beta", "every"), [(0, 0.0, 3), (3, 0.1, 3), (3, 0.0, 100)])
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, warm: int, beta: float, every: int) -> None:
    cfg = small(
        warmup=WarmupConfig(steps=warm, batch_size=4, lr=1e-3), loss=LossConfig(beta=beta), save_every=every
    )
    straight, plan, summary = run(tmp_path / "one", cfg)
    with pytest.raises(SaerlError, match="Die"):  # in the fifth step: step 4 is logged and must be undone
        run(tmp_path / "two", cfg, reward=dying_reward(7))
    assert read_metrics(tmp_path / "two")[-1]["step"] == 4
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


def test_a_run_killed_by_the_system_resumes_bit_for_bit(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, torch
        from pathlib import Path
        torch.set_num_threads(1)
        from tests.test_trainer import run, small
        run(Path(sys.argv[1]), small(steps=20))
        """
    )
    root = Path(__file__).parents[1]
    path = f"{root}:{root / 'kernels/torch-ext'}"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "two")], cwd=root, env=os.environ | {"PYTHONPATH": path}
    )
    deadline = time.time() + 60
    while not list((tmp_path / "two").glob("checkpoints/step-0000?[3-9]-*")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed, _, _ = run(tmp_path / "two", small(steps=20), resume=True)
        straight, _, _ = run(tmp_path / "one", small(steps=20))
    finally:
        torch.set_num_threads(threads)
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
    assert len(said) == 6 and done == [(1, 3), (2, 3), (3, 3)]
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


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path: Path, monkeypatch, caplog) -> None:
    real = module.policy_loss
    monkeypatch.setattr(module, "policy_loss", lambda *args: (real(*args)[0] * float("nan"), real(*args)[1]))
    model, _, _ = run(tmp_path, small(steps=1))
    assert same_weights(model, tiny_model()) and "this update is skipped" in caplog.text
    assert read_metrics(tmp_path)[1]["grad_norm"] is None


class Features:
    """Stands for the capture of SAE features."""

    def __init__(self) -> None:
        self.made = 0
        self.timings = {"capture": 0.5, "encode": 0.25}

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...

    def features(self):
        self.made += 1
        return f"features of prefill {self.made}"


def test_features_reach_the_plan_and_phases_the_log(tmp_path: Path) -> None:
    _, plan, _ = run(tmp_path, small(steps=2), capture=Features())
    assert plan.features == ["features of prefill 1", "features of prefill 2"]
    assert read_metrics(tmp_path)[1]["time"]["encode"] == 0.25
    assert read_metrics(tmp_path)[1]["time"]["capture"] == 0.5


def adaptive_plan(model, pool: Pool):
    """The real plan on real features of the real capture, from a random SAE."""
    from saerl_fast.config import AdaptiveConfig
    from saerl_fast.data.plan import build_plan
    from saerl_fast.data.score import Scores
    from saerl_fast.rl.rollouts import generate
    from saerl_fast.sae.capture import FeatureCapture
    from saerl_fast.sae.model import TopKSAE

    g = torch.Generator().manual_seed(0)
    W_enc = torch.randn(32, 64, generator=g)
    sae = TopKSAE(
        W_enc, torch.zeros(64), W_enc.t().contiguous(), torch.zeros(32), cfg={"k": 4, "hook_layer": 1}
    )
    capture = FeatureCapture(model, sae)
    one = RolloutConfig(group_size=1, max_new_tokens=1)
    features = generate(model, TOKENIZER, pool.column("prompt"), one, capture=capture).features
    cfg = PlanConfig(schedule="adaptive", adaptive=AdaptiveConfig(refresh_features=True, cooldown=1, svd=4))
    scores = Scores({"prompt_id": pool.column("prompt_id")}, features=features)
    return build_plan(scores, cfg, batch_size=4, total_steps=6, seed=0), capture


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
    summary = train(tiny_model(), TOKENIZER, pool, sums(2, 5), plan, vowels, small(steps=2), tmp_path)
    assert summary["rollouts"] == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": LossConfig(kind="ppo")}, "'ppo'"),
        ({"eval": EvalConfig(mode="guess")}, "'guess'"),
        ({"steps": -1}, "steps=-1"),
        ({"keep": 0}, "keep=0"),
        ({"rollout": RolloutConfig(group_size=1)}, "group_size=1"),
    ],
)
def test_bad_settings_write_nothing(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(SaerlError, match=message):
        run(tmp_path / "out", small(**change))
    assert not (tmp_path / "out").exists()


def test_a_plan_of_another_pool(tmp_path: Path) -> None:
    with pytest.raises(SaerlError, match="'p30'"):
        run(tmp_path / "out", small(), plan=WatchfulPlan(sums(5, 30)))


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
    assert row["groups_used"] > 0  # lengths differ, so there is something to learn


def adapted(**change) -> TrainConfig:
    return small(lora=LoRAConfig(rank=4, alpha=8.0), lr=1e-2, **change)


@pytest.mark.parametrize(("warm", "beta"), [(0, 0.0), (3, 0.1)])
def test_adapters_alone_are_trained_saved_and_resumed(tmp_path: Path, warm: int, beta: float) -> None:
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    cfg = adapted(warmup=WarmupConfig(steps=warm, batch_size=4, lr=1e-3), loss=LossConfig(beta=beta))
    straight, _, summary = run(tmp_path / "one", cfg)
    start = tiny_model()
    with pytest.raises(SaerlError, match="Die"):
        broken = tiny_model()
        run(tmp_path / "two", cfg, model=broken, reward=dying_reward(7))
    assert same_weights(broken, start)  # adapters taken out again
    resumed, _, again = run(tmp_path / "two", cfg, resume=True)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert same_weights(straight, resumed) and not same_weights(straight, start)
    assert type(straight) is type(start) and straight.state_dict().keys() == start.state_dict().keys()
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "model"), straight)
    saved = load_latest(tmp_path / "one")
    assert saved.model and all("lora_" in name for name in saved.model) and not saved.reference
    rows = [row for row in read_metrics(tmp_path / "one") if row["kind"] == "train"]
    assert all((row["kl"] > 0) == (beta > 0) for row in rows[1:])
    assert beta == 0 or warm > 0 or rows[0]["kl"] == pytest.approx(0, abs=1e-6)

    import peft

    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "one" / "adapter").merge_and_unload()
    for a, b in zip(model_tensors(loaded).values(), model_tensors(straight).values(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_reference_of_adapters_is_the_model_without_them(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("peft")
    real, seen = module.policy_loss, []

    def watched(new, old, weight, lengths, size, cfg, ref, *more):
        seen.append((new.detach(), ref))
        return real(new, old, weight, lengths, size, cfg, ref, *more)

    monkeypatch.setattr(module, "policy_loss", watched)
    # with the penalty on and off, the first step's reference is the policy itself: adapters start at 0
    run(tmp_path, adapted(steps=2, loss=LossConfig(beta=0.1), warmup_steps=0))
    torch.testing.assert_close(seen[0][0], seen[0][1])
    assert not torch.allclose(seen[-1][0], seen[-1][1], atol=1e-4)


def test_adapters_with_gradient_checkpointing_and_capture(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    plain, _, _ = run(tmp_path / "one", adapted(steps=2))
    model = tiny_model()
    plan, capture = adaptive_plan(model, sums(10))
    run(tmp_path / "three", adapted(steps=2), model=model, plan=plan, capture=capture)
    times = [row["time"] for row in read_metrics(tmp_path / "three") if row["kind"] == "train"]
    assert times[-1].keys() == {*PHASES, "capture", "encode"}
    assert plan._refreshed.any()  # the features of the prefill reached the plan
    saving, _, _ = run(tmp_path / "two", adapted(steps=2, gradient_checkpointing=True))
    one, two = (read_metrics(tmp_path / name)[1] for name in ("one", "two"))
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    assert not saving.training


def test_adapters_that_cannot_be(tmp_path: Path, monkeypatch) -> None:
    cfg = adapted()
    cfg.lora.targets = ["q_prj"]
    pytest.importorskip("peft")
    with pytest.raises(SaerlError, match="'q_prj' names no module of LlamaForCausalLM"):
        run(tmp_path / "out", cfg)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SaerlError, match=r"needs peft; run `pip install saerl-fast\[lora\]`"):
        run(tmp_path / "out", adapted())
    assert not (tmp_path / "out").exists()


def test_a_reward_that_hangs_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    def endless(prompts, completions, **columns):
        calls.append(1)
        if len(calls) > 2:
            time.sleep(60)
        return vowels(prompts, completions)

    calls: list[int] = []
    cfg = small(reward_timeout=0.2, save_every=1)
    with pytest.raises(SaerlError, match=r"reward endless took more than train.reward_timeout=0.2 s for 16"):
        run(tmp_path / "two", cfg, reward=endless)
    resumed, _, _ = run(tmp_path / "two", small(reward_timeout=30), resume=True)
    straight, _, _ = run(tmp_path / "one", small())
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert same_weights(straight, resumed)
