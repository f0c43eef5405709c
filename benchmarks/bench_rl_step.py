"""A training step of this project's loop against TRL's GRPOTrainer, and what the signals add to ours.

    pytest benchmarks/bench_rl_step.py --benchmark-json=benchmarks/results/cpu/rl_step.json

Same model, prompts in the same order, rollouts, new tokens, loss (dapo, beta 0), dtype, one micro-batch and
plain sampling at temperature 1; no evaluation and no checkpoint in a timed step. Every contender is a whole
trainer in a process of its own (rl_contenders.py); they take a step in turn, so that a busy machine slows all
of them alike, and ratios are medians over rounds. On one CPU thread the clock is the process's CPU time.
Before anything is timed, advantages, loss and gradients of TRL's first rollouts are computed by both and must
agree; afterwards both must have generated as many tokens, within 5 % where completions end by themselves.

SAERL_BENCH_GRID=tiny: a smoke test. SAERL_BENCH_MODEL: another model than the demo's (folder, hub id, GGUF).
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import DEVICE, environment, summary
from benchmarks.rl_contenders import DEMO, Job, work

TINY = os.environ.get("SAERL_BENCH_GRID") == "tiny"
ROUNDS = 2 if TINY else 15
SHAPE = (2, 4, 4) if TINY else (16, 8, 8) if DEVICE.type == "cpu" else (64, 8, 128)  # the first: the demo's
Reports = dict[str, list[dict[str, Any]]]


def make_job(folder: Path, **changes: Any) -> Job:
    prompts, group, new_tokens = SHAPE
    job = Job(
        model=os.environ.get("SAERL_BENCH_MODEL", str(DEMO / "demo/model")),
        dtype="auto",
        threads=int(os.environ.get("SAERL_BENCH_THREADS", "1")) if DEVICE.type == "cpu" else None,
        prompts=prompts,
        group=group,
        new_tokens=new_tokens,
        ends=True,
        reward="exact",
        folder=str(folder),
        limit=64 if TINY else None,
    )
    return replace(job, **changes)


@contextmanager
def contender(kind: str, job: Job) -> Iterator[Callable[..., dict[str, Any]]]:
    """A process that runs ``kind``; the call takes a step (in the order given) and returns its report."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=work, args=(kind, job, other))
    process.start()
    other.close()

    def answer(seconds: float = 600) -> dict[str, Any]:
        if not pipe.poll(seconds):
            raise TimeoutError(f"{kind} has said nothing for {seconds} s")
        report = pipe.recv()
        if "error" in report:
            raise RuntimeError(f"{kind}: {report['error']}")
        return report

    def step(order: list[str] | None = None) -> dict[str, Any]:
        pipe.send(order or [])
        return answer()

    try:
        step.ready = answer()  # type: ignore[attr-defined]
        yield step
        if process.is_alive():
            pipe.send(None)
            process.join(60)
    finally:
        process.kill()
        process.join()


def once(kind: str, job: Job) -> dict[str, Any]:
    """What a process that takes no steps has to say."""
    with contender(kind, job) as step:
        return step.ready  # type: ignore[attr-defined]


def tabulate(reports: Reports, job: Job, base: str) -> dict[str, dict[str, Any]]:
    """p20_ms, p50_ms, p80_ms and ratio as everywhere; memory; samples and tokens per second at the median."""
    table: dict[str, dict[str, Any]] = summary(
        {name: [row["seconds"] for row in rows] for name, rows in reports.items()}, base
    )
    for name, rows in reports.items():
        tokens = statistics.mean(row["tokens"] for row in rows)
        seconds = table[name]["p50_ms"] / 1e3
        table[name] |= {
            "peak_mb": rows[-1]["peak_mb"],
            "tokens_per_step": tokens,
            "samples_per_s": job.prompts * job.group / seconds,
            "tokens_per_s": tokens / seconds,
        }
        if "phases" in rows[0]:  # in wall time, unlike the rest: as shares
            names = sorted({phase for row in rows for phase in row["phases"]})
            medians = [statistics.median(row["phases"].get(phase, 0.0) for row in rows) for phase in names]
            table[name]["phases"] = {
                phase: value / sum(medians) for phase, value in zip(names, medians, strict=True)
            }
    return table


def record(benchmark: Any, job: Job, base: str, table: dict[str, dict[str, Any]], **more: Any) -> None:
    fields = asdict(job)
    shape = {key: fields[key] for key in ("prompts", "group", "new_tokens", "ends", "reward")}
    found = environment(DEVICE)
    for module in ("transformers", "trl"):
        found[module] = __import__(module).__version__
    model = Path(job.model)
    shape["model"] = str(model.relative_to(DEMO.parent)) if DEMO in model.parents else model.name
    benchmark.extra_info.update(shape, base=base, contenders=table, environment=found, **more)


@pytest.mark.parametrize(
    ("ends", "reward"), [(False, "spread"), (True, "exact")], ids=["equal work", "as in the demo"]
)
def test_step_against_trl(benchmark: Any, tmp_path: Path, ends: bool, reward: str) -> None:
    """Equal work: every completion has new_tokens tokens, every group has a signal.

    As in the demo: completions end by themselves, groups whose rewards are all equal have no gradient.
    """
    pytest.importorskip("trl")
    job = make_job(tmp_path, ends=ends, reward=reward)
    found = once("agreement", job)
    limits = {"advantages": 1e-5, "loss": 1e-5, "gradients": 1e-3 if DEVICE.type == "cpu" else 3e-2}
    wrong = {name: found[name] for name, limit in limits.items() if not found[name] <= limit}
    assert not wrong, f"the two trainers do not compute the same: {found}"
    reports: Reports = {"TRL GRPOTrainer": [], "saerl_fast": []}
    with contender("trl", job) as theirs, contender("ours", job) as ours:
        calls = {"TRL GRPOTrainer": theirs, "saerl_fast": ours}
        for step in range(ROUNDS + 2):  # two to warm up
            for name, call in calls.items():
                reports[name].append(call())
                if step < 2:
                    reports[name].clear()
        table = tabulate(reports, job, base="TRL GRPOTrainer")
        generated = {name: row["tokens_per_step"] for name, row in table.items()}
        off = generated["saerl_fast"] / generated["TRL GRPOTrainer"] - 1
        assert abs(off) <= (0.05 if ends and not TINY else 0.5 if ends else 0.0), generated
        record(benchmark, job, "TRL GRPOTrainer", table, agreement=found)
        benchmark.pedantic(ours, rounds=1)


def test_signals_against_the_same_order_without(benchmark: Any, tmp_path: Path) -> None:
    """The adaptive plan with features captured in every step, and a run that is told the order so found.

    Both must report the same rewards, losses and gradient norms to the last bit: it is the same training.
    """
    job = make_job(tmp_path)
    once("prepare", job)
    reports: Reports = {"plan only": [], "with capture and signals": []}
    with contender("ours", replace(job, signals=True)) as full, contender("ours", job) as plain:
        for step in range(ROUNDS + 2):
            found = full()
            again = plain(found["order"])
            assert again["result"] == found["result"], "not the same training"
            if step >= 2:
                reports["with capture and signals"].append(found)
                reports["plan only"].append(again)
        table = tabulate(reports, job, base="plan only")
        record(benchmark, job, "plan only", table)
        benchmark.pedantic(full, rounds=1)
