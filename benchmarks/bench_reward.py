"""What ``train.reward_timeout``, rewards in a process of their own, adds to a training step of the demo.

    pytest benchmarks/bench_reward.py --benchmark-json=benchmarks/results/cpu/reward.json

One vanilla run of the demo: the rewards of every step are asked for here and in the child, in turn, of the
same completions. "with the limit" is a step with the child's rewards in place of this process's, its ratio
the median over steps; ``reward_ms`` is the reward's part, ``cpu_ratio`` the ratio of CPU time, the child's
included. The second reward computes for 20 ms, as verifiers do.

SAERL_BENCH_GRID=tiny: a few steps, to see that it runs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import DEVICE, bench_threads, environment, summary
from saerl_fast.config import PlanConfig, load_config
from saerl_fast.plan.static import StaticPlan
from saerl_fast.rl import draws, trainer
from saerl_fast.rl.rewards import get_reward, with_timeout
from saerl_fast.rl.rewards.apart import _workers
from saerl_fast.session import Session

ROOT = Path(__file__).resolve().parents[1]
TINY = os.environ.get("SAERL_BENCH_GRID") == "tiny"
STEPS, SKIPPED = (4, 1) if TINY else (60, 5)


def cpu_of_child(limited: Any) -> float:
    """Seconds that the child has computed so far."""
    child = _workers[limited.key]._process.pid
    return int(Path(f"/proc/{child}/schedstat").read_text().split()[0]) / 1e9


def both_ways(reward: Any, limited: Any) -> tuple[Callable[..., Any], dict[str, list[tuple[float, ...]]]]:
    """`score_rollouts` by both, and the seconds of each: wall, CPU, and CPU of this process."""
    score, spent = draws.score_rollouts, {"here": [], "child": []}

    def scored(made: Any, columns: Any, prompts: Any, _: Any, **how: Any) -> Any:
        found = {}
        order = [("here", reward), ("child", limited)]
        for name, fn in order if len(spent["here"]) % 2 else order[::-1]:
            wall, cpu, child = time.perf_counter(), time.process_time(), cpu_of_child(limited)
            notes = type(how["notes"])()
            found[name] = score(made, columns, prompts, fn, **how | {"notes": notes})
            mine, theirs = time.process_time() - cpu, cpu_of_child(limited) - child
            spent[name].append((time.perf_counter() - wall, mine + theirs, mine))
        assert (found["here"] == found["child"]).all()
        return found["here"]

    return scored, spent


@pytest.mark.parametrize("name", ["exact", "slow reward"])
def test_reward_timeout(benchmark: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config("examples/demo.yaml", [f"run_dir={tmp_path}", f"train.steps={STEPS}"])
    config.train.eval.every = config.train.save_every = STEPS + 1
    spec = "exact" if name == "exact" else "benchmarks.bench_reward:slow"
    with bench_threads():
        session = Session.open(config)
        reward = get_reward([spec])
        limited = with_timeout(reward, 60.0)
        scored, spent = both_ways(reward, limited)
        monkeypatch.setattr(draws, "score_rollouts", scored)
        ended: list[tuple[float, float]] = []
        plan = StaticPlan(
            "vanilla",
            session.train.column("prompt_id"),
            PlanConfig(),
            batch_size=config.train.rollout.prompts_per_step,
            total_steps=STEPS,
            seed=0,
        )

        def progress(step: int, steps: int) -> None:
            ended.append((time.perf_counter(), time.process_time()))

        trainer.train(session, plan, reward, config.train, tmp_path / "run", progress=progress)
    rows: dict[str, dict[str, list[float]]] = {"here": {}, "with the limit": {}}
    for which, clock in enumerate(("wall", "cpu")):
        here, child = ([times[which] for times in spent[where]] for where in ("here", "child"))
        mine = [times[2 * which] for times in spent["child"]]  # of the child's, what this process's clock saw
        both = [b[which] - a[which] for a, b in zip(ended, ended[1:], strict=False)]
        steps = [all_of - a - b for all_of, a, b in zip(both, here, mine, strict=True)]
        rows["here"][clock] = [a + b for a, b in zip(steps, here, strict=True)][SKIPPED:]
        rows["with the limit"][clock] = [a + b for a, b in zip(steps, child, strict=True)][SKIPPED:]
    table = summary({where: row["wall"] for where, row in rows.items()}, "here")
    cpu = summary({where: row["cpu"] for where, row in rows.items()}, "here")
    for where, of in (("here", "here"), ("with the limit", "child")):
        table[where]["reward_ms"] = statistics.median(times[0] for times in spent[of][SKIPPED:]) * 1e3
        table[where]["cpu_ratio"] = cpu[where]["ratio"]
    shape = {
        "reward": name,
        "rollouts": config.train.rollout.prompts_per_step * config.train.rollout.group_size,
    }
    benchmark.extra_info.update(shape, contenders=table, base="here", environment=environment(DEVICE))
    benchmark.pedantic(lambda: None, rounds=1)


def slow(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
    """Twenty milliseconds of arithmetic, then `exact`."""
    end = time.thread_time() + 0.02
    while time.thread_time() < end:
        pass
    return [float(text.strip() == gold) for text, gold in zip(completions, answer, strict=True)]
