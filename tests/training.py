"""What the tests of training share: a small pool, its reward, a plan that watches, runs that are compared."""

from pathlib import Path

import torch

from saerl_fast.config import (
    EvalConfig,
    PlanConfig,
    RolloutConfig,
    TrainConfig,
)
from saerl_fast.plan.static import StaticPlan
from saerl_fast.prompts.pool import Pool
from saerl_fast.records.log import read_jsonl
from saerl_fast.rl.checkpoint import model_tensors
from saerl_fast.rl.trainer import train
from tests.tiny_lm import char_tokenizer, session_of, tiny_model, token_rows

TOKENIZER = char_tokenizer()


def sums(n: int, first: int = 0) -> Pool:
    pairs = [(i % 5, (3 * i) % 4) for i in range(first, first + n)]
    return Pool(
        {
            "prompt_id": [f"p{i}" for i in range(first, first + n)],
            "prompt": [f"{a}+{'0' * (i % 3)}{b}=" for i, (a, b) in enumerate(pairs, first)],  # 4 to 6 tokens
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
    summary = train(session_of(model, pool, sums(3, 10)), plan, reward, cfg, out, resume=resume, **more)
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


def dying_reward(after: int, living=vowels):
    """``living``, which raises Die after so many calls."""
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(1)
        if len(calls) > after:
            raise Die  # becomes a SaerlError, as for any reward that raises
        return living(prompts, completions, **columns)

    return reward


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


def adaptive_plan(model, pool: Pool):
    """The real plan on real features of the real capture, from a random SAE."""
    from saerl_fast.config import AdaptiveConfig
    from saerl_fast.plan import build_plan
    from saerl_fast.rl.generate import generate
    from saerl_fast.sae.capture import FeatureCapture
    from saerl_fast.sae.model import SAE, SAESpec
    from saerl_fast.signals.scores import Scores

    g = torch.Generator().manual_seed(0)
    W_enc = torch.randn(32, 64, generator=g)
    sae = SAE(W_enc, torch.zeros(64), W_enc.t().contiguous(), torch.zeros(32), cfg=SAESpec(k=4, hook_layer=1))
    capture = FeatureCapture(model, sae)
    one = RolloutConfig(max_new_tokens=1)
    features = generate(model, TOKENIZER, token_rows(pool.column("prompt")), one, capture=capture).features
    cfg = PlanConfig(schedule="adaptive", adaptive=AdaptiveConfig(refresh_features=True, cooldown=1, svd=4))
    scores = Scores({"prompt_id": pool.column("prompt_id")}, features=features)
    return build_plan(scores, cfg, batch_size=4, total_steps=6, seed=0), capture
