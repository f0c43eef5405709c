"""The share of informative groups under each plan on real pass rates, without training.

    python -m benchmarks.replay POOL.jsonl [--work DIR] [--seeds 8] --out benchmarks/results/replay.json

POOL: rows with id, problem and pass_rate, which is taken for the truth: a group of 8 rollouts of a prompt
passes so often by chance. Two regimes, of 150 steps with 16 prompts: the whole pool, where a prompt is hardly
seen twice, and 300 prompts of it, each seen eight times. In each the policy stays as it is, or improves:
every logit rises by .02 a step. With ``--work``, a folder that `bench_signals` has filled, the rule also
reads the model's features. Plans start without labels and without a quota, for the pool has no clusters.
``oracle`` picks by the true chance of a gradient, never a prompt of the last 60 steps (or as many as the pool
allows).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import DEVICE, environment
from saerl_fast.config import AdaptiveConfig, PlanConfig
from saerl_fast.fileio import write_json
from saerl_fast.plan.adaptive import AdaptivePlan
from saerl_fast.plan.base import Plan
from saerl_fast.plan.embedding import embed_kinds
from saerl_fast.plan.rivals import RIVALS
from saerl_fast.plan.static import StaticPlan
from saerl_fast.records.stats import mean_difference
from saerl_fast.signals.bank import Bank

BATCH, GROUP, STEPS, FEW, DRIFT = 16, 8, 150, 300, 0.02
TEXTS = ("none", "random", "length", "tfidf")
STORED = ("hidden", "sae", "scalars", "answer_logprob")
WINDOWS = {"all steps": (0, STEPS), "first 40": (0, 40), "last 40": (STEPS - 40, STEPS)}


def informative(rates: np.ndarray) -> np.ndarray:
    """The chance that a group of ``GROUP`` rollouts carries a gradient."""
    return 1 - rates**GROUP - (1 - rates) ** GROUP


class Oracle(Plan):
    """The prompts whose group is most likely informative in truth, none twice within the cooldown."""

    schedule = "oracle"

    def __init__(self, ids: list[str], cfg: PlanConfig, truth: Callable[[int], np.ndarray], **sizes: Any):
        super().__init__(ids, cfg, **sizes)
        self.truth, self.last = truth, np.full(len(ids), -(10**9))
        self.cooldown = min(cfg.adaptive.cooldown, len(ids) // 2 // self.batch_size - 1)

    def next_batch(self) -> list[str]:
        worth = informative(self.truth(self.step)) - 2.0 * (self.step - self.last <= self.cooldown)
        rows = np.argsort(-worth, kind="stable")[: self.batch_size]
        self.last[rows] = self.step
        self.step += 1
        return [self.prompt_ids[row] for row in rows]

    def state_dict(self) -> dict[str, Any]:
        return self._base_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_state(state)


def truths(rates: np.ndarray, drift: float) -> Callable[[int], np.ndarray]:
    """step -> pass rates, whose logits rise by ``drift`` a step."""
    p = np.clip(rates, 1e-3, 1 - 1e-3)
    logit = np.log(p / (1 - p))
    return lambda step: rates if not drift else 1 / (1 + np.exp(-(logit + drift * step)))


def plans(bank: Bank, rows: np.ndarray, truth: Callable[[int], np.ndarray], seed: int) -> dict[str, Plan]:
    """Every rule by name; ``rows`` of the bank are its prompts."""
    ids = [f"p{row}" for row in rows]
    sizes: dict[str, Any] = {"batch_size": BATCH, "total_steps": STEPS, "seed": seed}

    def adaptive(kind: str, **settings: Any) -> Plan:
        cfg = PlanConfig(adaptive=AdaptiveConfig(refresh_features=False, **settings))
        embedding = embed_kinds(bank, [kind], rows, cfg.adaptive, seed=seed)
        return AdaptivePlan(ids, cfg, embedding=embedding, group_size=GROUP, **sizes)

    made: dict[str, Plan] = {"uniform": StaticPlan("vanilla", ids, PlanConfig(schedule="vanilla"), **sizes)}
    made |= {
        name: kind(ids, PlanConfig(schedule=name), group_size=GROUP, **sizes) for name, kind in RIVALS.items()
    }
    kinds = [kind for kind in (*TEXTS, *STORED, "truth") if kind in bank.kinds]
    made |= {f"adaptive, {kind}": adaptive(kind) for kind in kinds}
    made["adaptive, tfidf, predictions alone"] = adaptive("tfidf", kappa=1e6)
    made["adaptive, tfidf, no cooldown"] = adaptive("tfidf", cooldown=0)
    made["oracle"] = Oracle(ids, PlanConfig(), truth, **sizes)
    return made


def follow(
    plan: Plan, rows: np.ndarray, truth: Callable[[int], np.ndarray], seed: int
) -> tuple[np.ndarray, int]:
    """Which groups carried a gradient, bool [STEPS, BATCH], and of how many prompts they were."""
    rng = np.random.default_rng([seed, 7])
    place = {f"p{row}": i for i, row in enumerate(rows)}
    found, drawn = np.zeros((STEPS, BATCH), dtype=bool), set[str]()
    for step in range(STEPS):
        batch = plan.next_batch()
        drawn.update(batch)
        passed = rng.binomial(GROUP, truth(step)[[place[name] for name in batch]])
        found[step] = (passed > 0) & (passed < GROUP)
        plan.observe(batch, passed / GROUP)
    return found, len(drawn)


def replay(bank: Bank, rates: np.ndarray, seeds: int) -> dict[str, Any]:
    """regime -> rule -> prompts drawn, and by window the share and how much it is above uniform (paired)."""
    result: dict[str, Any] = {}
    for regime, few in (("one visit", False), ("many visits", True)):
        for policy, drift in (("fixed", 0.0), ("improving", DRIFT)):
            shares: dict[str, list[list[float]]] = {}
            prompts: dict[str, list[int]] = {}
            for seed in range(seeds):
                order = np.random.default_rng([seed, 8]).permutation(bank.n_rows)
                rows = np.sort(order[:FEW]) if few else np.arange(bank.n_rows)
                truth = truths(rates[rows], drift)
                for name, plan in plans(bank, rows, truth, seed).items():
                    found, drawn = follow(plan, rows, truth, seed)
                    prompts.setdefault(name, []).append(drawn)
                    shares.setdefault(name, []).append([found[a:b].mean() for a, b in WINDOWS.values()])
            base = np.array(shares["uniform"])
            result[f"{regime}, {policy} policy"] = {
                name: {"prompts": round(float(np.mean(prompts[name])))}
                | {
                    window: {
                        "share": round(float(np.mean(column)), 4),
                        "more": mean_difference(column - base[:, i]) if name != "uniform" else None,
                    }
                    for i, (window, column) in enumerate(zip(WINDOWS, np.array(values).T, strict=True))
                }
                for name, values in shares.items()
            }
            print(f"{regime}, {policy} policy", flush=True)
    return result


def markdown(result: dict[str, Any]) -> str:
    """A row for a rule: its share over all steps by regime, the difference to uniform, the prompts drawn."""
    regimes = result["shares"]
    lines = [f"| rule | {' | '.join(regimes)} |", "|---" * (len(regimes) + 1) + "|"]
    for name in next(iter(regimes.values())):
        told = []
        for row in regimes.values():
            cell = row[name]["all steps"]
            more = f" ({cell['more']})" if cell["more"] else ""
            told.append(f"{cell['share']:.3f}{more}; {row[name]['prompts']}")
        lines.append("| " + " | ".join([name, *told]) + " |")
    return "\n".join(lines)


def section(result: dict[str, Any]) -> str:
    """The table as benchmarks/README.md has it, between its markers."""
    return f"<!-- replay:begin -->\n\n{markdown(result)}\n\n<!-- replay:end -->"


def opened(pool: Path, work: Path | None) -> tuple[Bank, np.ndarray]:
    """The features and pass rates of the pool's rows; ``truth`` is a kind of features, too."""
    if work is not None:
        from benchmarks.bench_signals import load

        bank, failed, _ = load(pool, work)
        rates = 1.0 - failed
    else:
        rows = [json.loads(line) for line in pool.read_text().splitlines()]
        rates = np.array([row["pass_rate"] for row in rows])
        bank = Bank(None, [row["problem"] for row in rows])  # type: ignore[arg-type]
        del bank.kinds["sae"]
    bank.kinds["truth"] = lambda rows: rates[rows][:, None]
    return bank, rates


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool", type=Path)
    parser.add_argument("--work", type=Path, help="features of bench_signals; without, of texts alone")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    bank, rates = opened(args.pool, args.work)
    result: dict[str, Any] = {"pool": args.pool.name, "prompts": len(rates), "seeds": args.seeds}
    result |= {"shares": replay(bank, rates, args.seeds), "environment": environment(DEVICE)}
    if args.out:
        write_json(args.out, result)
    print(section(result))


if __name__ == "__main__":
    main()
