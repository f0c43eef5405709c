"""Time and memory of plans, scoring and records as a pool grows from 10 thousand to 10 million prompts.

    pytest benchmarks/bench_scale.py --benchmark-json=benchmarks/results/cpu/scale.json

``test_plan``: an adaptive plan over synthetic features [rows, d] that lie in a file, followed by a learner of
known skill. "next batch" is a pool of which the learner solves half, "next batch, hard pool" one of
which it solves few, so that few lie near the target; "scan" is the choice of smaller
pools, which looks at every row where it has to.
"slowest batch" is the slowest of a hundred, the first one included; "no noise": the hard pool without noise;
"fresh features": observe is told those of the rollouts, too, 512 a prompt of an SAE of 16384.
held_ratio and peak_ratio: what is resident after a hundred steps with the loaded plan, and at most while a
plan is built, saved, loaded and followed, over rows x d x 4 bytes; in pools of some MB most of it is not the
plan's. Pages of mapped files count, though they can be given back.
``test_scoring``, in a process of its own: the way from a pool of prompts of some 400 characters and shards of
sparse features over copies, probes, clusters and files to a plan and its first batches. Difficulty is
predicted from the SAE features, since to read the texts of so many prompts takes half a millisecond each.
``scoring_mb`` is what is resident at most from the file of the pool to the written scores, beyond what the
process held before, ``anonymous_mb`` the same without pages of files, which the system takes back when it
needs them; ``anonymous_bytes_a_row`` the same by row. ``recall``: of the near-copies of some rows, those that
were found (more than 131,072 rows are not all compared).
``test_runs``: the records of a long run, read by ``load_runs`` (the time of its first thread), and by the
whole commands ``saerl report`` and ``saerl watch`` in processes of their own: CPU time of all threads, start
and imports included, and all that was resident. Rows that the machine has no room for are skipped.

SAERL_BENCH_GRID=tiny: one small shape, to see that it runs. How time is taken: harness.py.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from benchmarks.harness import DEVICE, bench_threads, environment, grid, peak_memory, process_mb, timed
from saerl_fast.config import Config, DataConfig, PlanConfig
from saerl_fast.plan import build_plan, load_plan, save_plan
from saerl_fast.plan.adaptive import AdaptivePlan
from saerl_fast.plan.embedding import Embedding
from saerl_fast.plan.sampler import PlanBatchSampler
from saerl_fast.prompts.pool import load_split
from saerl_fast.records import packed
from saerl_fast.records.log import JsonlLog, write_logs
from saerl_fast.records.packed import Packed
from saerl_fast.records.runs import load_runs
from saerl_fast.records.spilled import full, permutation
from saerl_fast.signals.bank import Bank
from saerl_fast.signals.clusters import cluster_prompts
from saerl_fast.signals.copies import find_copies
from saerl_fast.signals.difficulty import fit_difficulty
from saerl_fast.signals.scores import Scores
from saerl_fast.signals.shards import Shards
from saerl_fast.signals.text import Plain
from saerl_kernels import CSR

BATCH, STEPS = 64, 100
BLOCK = 1 << 16
NAMES = ["".join(chr(97 + (i // 26**k) % 26) for k in range(4)) for i in range(3002)]  # digits are one word


class Shape(NamedTuple):
    rows: int
    d: int


class Sparse(NamedTuple):
    rows: int
    columns: int
    active: int  # features of a prompt


PLANS = [Shape(10**4, 96), Shape(10**5, 96), Shape(10**6, 96), Shape(10**7, 96)]
SCORES = [Sparse(10**n, 4096, 32) for n in (4, 5, 6, 7)]
FRESH = Sparse(BATCH, 1 << 14, 512)
LINES = [10**4, 10**5, 10**6]


def room(path: Path, megabytes: float) -> None:
    """Skip a shape that memory or disk has no room for."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) / 2**10
    if free < 1.5 * megabytes or shutil.disk_usage(path).free / 2**20 < 3 * megabytes:
        pytest.skip(f"needs {1.5 * megabytes:.0f} MB of memory and {3 * megabytes:.0f} MB of disk")


class Pool:
    """Features of falling variance in a file, and a learner whose pass rates follow from them."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.shape, self.path = shape, folder / "rows.npy"
        rng = np.random.default_rng(0)
        scale = np.arange(1, shape.d + 1, dtype=np.float32) ** -0.5
        scale /= np.linalg.norm(scale)
        rows = np.lib.format.open_memmap(self.path, "w+", np.float32, tuple(shape))
        for at in range(0, shape.rows, BLOCK):
            part = rows[at : at + BLOCK]
            part[:] = rng.standard_normal(part.shape, dtype=np.float32) * scale
        rows.flush()
        self.skill = rng.standard_normal(shape.d) * 2.0

    def plan(self, columns: int = 0) -> AdaptivePlan:
        """``columns``: of the sparse features that rollouts may bring."""
        rows = np.asarray(np.load(self.path, mmap_mode="c"))
        ids = Packed.of(f"prompt-{i}" for i in range(self.shape.rows))
        made = np.random.default_rng(2).standard_normal((self.shape.d, columns), dtype=np.float32)
        mean, idf = np.zeros(self.shape.d, dtype=np.float32), np.ones(columns, dtype=np.float32)
        embedding = Embedding(rows, idf, made, mean, 1.0)
        table = {"quality": np.full(self.shape.rows, 0.5, dtype=np.float32)}
        return AdaptivePlan(
            ids, PlanConfig(), embedding=embedding, batch_size=BATCH, total_steps=STEPS, seed=0, table=table
        )

    def follow(
        self, plan: AdaptivePlan, ease: float, steps: int, fresh: CSR | None = None
    ) -> tuple[list[float], list[float]]:
        """Seconds of every next_batch and observe; ``ease``: log-odds of a middling prompt; ``fresh``: what a
        batch's rollouts have for features."""
        rng = np.random.default_rng(1)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(steps):
            ids: list[str] = []
            seconds[0].append(timed(lambda: ids.extend(plan.next_batch()), DEVICE, None))  # noqa: B023
            rows = np.array([int(name[7:]) for name in ids])
            solved = 1 / (1 + np.exp(-(plan.embedding.rows[rows] @ self.skill + ease)))
            rates = rng.binomial(8, solved) / 8
            seconds[1].append(timed(lambda: plan.observe(ids, rates, fresh), DEVICE, None))  # noqa: B023
        return seconds


def figures(seconds: list[float]) -> dict[str, float]:
    p20, p50, p80 = np.quantile(seconds, [0.2, 0.5, 0.8]) * 1e3
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80}


class Once:
    """Time and peak memory of calls that are made once; ``highest`` MB were resident at most."""

    def __init__(self) -> None:
        self.table: dict[str, dict[str, float]] = {}
        self.highest = 0.0

    def __call__(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        found: list[Any] = []
        seconds: list[float] = []
        peak = peak_memory(
            lambda: seconds.append(timed(lambda: found.append(call(*args)), DEVICE, None)),
            torch.device("cpu"),
        )
        self.table[name] = figures(seconds) | ({} if peak is None else {"peak_mb": peak})
        self.highest = max(self.highest, process_mb("VmHWM"))
        return found[0]


def write_pool(file: Path, count: int, seed: int = 0) -> None:
    """So many rows as JSON Lines; every 64th prompt is the one before with another word."""
    with open(file, "w") as out:
        for at in range(0, count, BLOCK):
            words = np.random.default_rng([seed, at]).integers(0, 3000, (min(BLOCK, count - at), 80))
            words[63::64] = words[62::64][: len(words[63::64])]
            words[63::64, 7] = 3001
            for row, numbers in enumerate(words.tolist(), at):
                text = " ".join(map(NAMES.__getitem__, numbers))
                out.write(json.dumps({"prompt": text, "answer": str(row % 97), "level": row % 5}) + "\n")


class Anonymous:
    """The most memory of this process that no file backs, MB, from the start of the block on."""

    def __enter__(self) -> Anonymous:
        self.most, self._end = process_mb("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            self.most = max(self.most, process_mb("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def record(benchmark: Any, shape: dict[str, Any], table: dict[str, Any], call: Callable[[], Any]) -> None:
    benchmark.extra_info.update(shape, contenders=table, environment=environment(DEVICE))
    benchmark.pedantic(call, rounds=1)


def ids(shapes: Any) -> str:
    return "x".join(map(str, shapes)) if isinstance(shapes, tuple) else str(shapes)


@pytest.mark.parametrize("shape", grid([Shape(2000, 8)], PLANS, PLANS), ids=ids)
def test_plan(benchmark: Any, shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = shape.rows * shape.d * 4 / 2**20
    room(tmp_path, size)
    with bench_threads():
        pool, once = Pool(tmp_path, shape), Once()
        gc.collect()
        before = process_mb("VmRSS")
        plan = once("build plan", pool.plan)
        once("save", save_plan, plan, tmp_path / "plan.json")
        del plan
        plan = once("load", load_plan, tmp_path / "plan.json")
        taken, observed = once("100 steps", pool.follow, plan, 0.0, STEPS)
        held = process_mb("VmRSS") - before
        table = {name: row for name, row in once.table.items() if name != "100 steps"}
        table |= {"next batch": figures(taken), "observe": figures(observed)}
        state = plan.state_dict()
        table["state_dict"] = figures([timed(plan.state_dict, DEVICE, None) for _ in range(5)])
        del plan
        hard = load_plan(tmp_path / "plan.json")
        slow, _ = pool.follow(hard, -3.0, STEPS)
        table |= {"next batch, hard pool": figures(slow), "slowest batch": figures([max(taken)])}
        hard.cfg.adaptive.noise = 0.0
        silent, _ = pool.follow(hard, -3.0, 20)
        del hard
        table |= {"next batch, no noise": figures(silent), "slowest batch, no noise": figures([max(silent)])}
        table["slowest batch, hard pool"] = figures([max(slow)])
        renewed = pool.plan(FRESH.columns)
        found = Made(FRESH)(0, BATCH, None)["sae"]
        table["observe, fresh features"] = figures(pool.follow(renewed, 0.0, STEPS, found)[1])
        del renewed
        if shape.rows < 10**7:
            monkeypatch.setattr(packed, "LARGE", shape.rows)
            plain = load_plan(tmp_path / "plan.json")
            table["scan"] = figures(pool.follow(plain, 0.0, 20)[0])
        bytes_of = sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
        extra = {"pool_mb": round(size, 1), "state_kb": round(bytes_of / 2**10)}
        extra |= {"held_ratio": round(held / size, 2), "peak_ratio": round((once.highest - before) / size, 2)}
        record(benchmark, shape._asdict() | extra, table, lambda: None)


class Made:
    """Features of so many prompts, by their row: what a model and its SAE would give."""

    def __init__(self, shape: Sparse) -> None:
        self.shape = shape

    def __call__(self, start: int, end: int, _: Any) -> dict[str, CSR]:
        rng, (_, columns, active) = np.random.default_rng(start), self.shape
        width, count = columns // active, end - start
        found = rng.integers(0, width, (count, active)) + np.arange(active) * width
        found[63::64] = found[62::64][: len(found[63::64])]
        values = torch.from_numpy(rng.gamma(4.0, 0.25, count * active).astype(np.float32))
        indptr = torch.arange(0, count * active + 1, active)
        return {"sae": CSR(indptr, torch.from_numpy(found.astype(np.int32).ravel()), values, columns)}


def score_and_plan(shape: Sparse, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of every step, and what was resident."""
    rng = np.random.default_rng(0)
    with bench_threads():
        cfg, once = Config(), Once()
        cfg.difficulty.features = ["sae"]
        cluster_prompts(Made(shape)(0, 2000, None)["sae"], cfg.diversity)  # loads what it needs
        spec = str(folder / "pool.jsonl")
        other = str(folder / "other.jsonl")
        write_pool(folder / "other.jsonl", 2000, seed=1)
        load_split(DataConfig(train=other, eval_size=9))
        write_pool(folder / "pool.jsonl", shape.rows)
        gc.collect()
        before, anonymous = process_mb("VmRSS"), process_mb("RssAnon")
        with Anonymous() as highest:
            pool, _ = once("pool", load_split, DataConfig(train=spec, eval=other))
            ids, n = pool.column("prompt_id"), len(pool)
            rates = full(n, np.nan)
            rates[permutation(rng, n)[:512]] = rng.integers(0, 9, 512) / 8
            shards = Shards(folder, "bench", 1 << 14)
            features = once("shards", shards.collect, ids, Made(shape))["sae"]
            texts = Plain(pool.column("prompt"))
            copies = once("copies", find_copies, features, texts, pool.column("answer"), ids)
            bank = Bank(features, pool.column("prompt"))
            difficulty = once("difficulty", fit_difficulty, bank, rates, cfg.difficulty).scores
            del bank
            labels = once("clusters", cluster_prompts, features, cfg.diversity).labels
            found = {**pool.columns, "saerl_difficulty": difficulty, "saerl_cluster": labels}
            found["saerl_copy_of"] = copies.of
            once("save", Scores(found, {}, features).save, folder)
        recall = copies.metrics["recall"]
        extra: dict[str, Any] = {} if recall is None else {"recall": round(recall, 3)}
        extra |= {"scoring_mb": round(once.highest - before), "anonymous_mb": round(highest.most - anonymous)}
        extra["anonymous_bytes_a_row"] = round((highest.most - anonymous) * 2**20 / n, 1)
        del features, labels, difficulty, found, copies, texts, pool
        shards.clear()
        scores = once("load", Scores.load, folder)
        settings: dict[str, Any] = {"batch_size": BATCH, "total_steps": STEPS, "seed": 0}
        plan = once("build adaptive plan", lambda: build_plan(scores, PlanConfig(), **settings))
        sampler = once("sampler", PlanBatchSampler, plan, ids)
        batches = iter(sampler)
        seconds = [timed(lambda: next(batches), DEVICE, None) for _ in range(10)]
        table = once.table | {"batch of the sampler": figures(seconds)}
    return table, extra


def write_run(folder: Path, lines: int) -> None:
    """A finished run of so many steps as the trainer leaves it, an evaluation every hundred steps."""
    phases = {"generate": 0.1, "reward": 0.001, "logprob": 0.03, "update": 0.2, "plan": 0.001}
    texts = {"prompt": "What is 17 + 25, and what is three times that? " * 2, "answer": "126"}
    texts |= {"completions": ["126", "I do not know"], "rewards": [1.0, 0.0]}
    metrics, rollouts = (JsonlLog(folder / f"{name}.jsonl") for name in ("metrics", "rollouts"))
    for start in range(1, lines + 1, 1000):
        rows: list[dict[str, Any]] = []
        for step in range(start, min(start + 1000, lines + 1)):
            row = {"kind": "train", "step": step, "reward": 0.5, "loss": 0.01, "lr": 1e-6, "time": phases}
            row |= {"pass_rate": 0.5, "entropy": 1.25, "length": 12.5, "rollouts": 128, "tokens": 1600}
            row |= {"groups": 16, "groups_used": 9} | {f"figure_{i}": step / (i + 1) for i in range(8)}
            rows.append(row | ({"alarms": ["no signal"], "begun": ["no signal"]} if step % 1000 == 7 else {}))
            if step % 100 == 0:
                accuracy = 0.3 + step / lines / 2
                rows.append({"kind": "eval", "step": step, "accuracy": accuracy, "mode": "sample"})
        metrics.write(rows)
        asked = range(start, min(start + 1000, lines + 1))
        rollouts.write([{"step": step, "prompt_id": f"p{step % 5000}"} | texts for step in asked])
    write_logs(folder, {log.path.name: log.digest() for log in (metrics, rollouts)}, {})
    metrics.close()
    rollouts.close()
    (folder / "run.json").write_text(json.dumps({"arm": "adaptive", "seed": 0}))
    (folder / "summary.json").write_text(json.dumps({"steps": lines}))


_COMMAND = (  # nothing but the command is imported
    "import sys, time; from saerl_fast.__main__ import main; code = main(); "
    "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM:')); "
    "print(time.process_time(), int(peak.split()[1]) / 2**10, file=sys.stderr); sys.exit(code)"
)


def command(*arguments: str) -> dict[str, float]:
    """CPU time and the most resident memory of ``saerl``, all its threads, from its start to its end."""
    ended = subprocess.run(
        [sys.executable, "-c", _COMMAND, *arguments], stderr=subprocess.PIPE, text=True, check=True
    )
    seconds, megabytes = map(float, ended.stderr.splitlines()[-1].split())
    return figures([seconds]) | {"peak_mb": megabytes}


@pytest.mark.parametrize("lines", grid([], LINES, LINES), ids=ids)
def test_runs(benchmark: Any, lines: int, tmp_path: Path) -> None:
    write_run(tmp_path, lines)
    with bench_threads():
        once = Once()
        once("load_runs", load_runs, tmp_path)
        table = once.table | {f"saerl {name}": command(name, str(tmp_path)) for name in ("report", "watch")}
        size = sum((tmp_path / f"{name}.jsonl").stat().st_size for name in ("metrics", "rollouts"))
        extra = {"lines": lines, "file_mb": round(size / 2**20)}
        record(benchmark, extra, table, lambda: None)


@pytest.mark.parametrize("shape", grid([], SCORES, SCORES), ids=ids)
def test_scoring(benchmark: Any, shape: Sparse, tmp_path: Path) -> None:
    size = shape.rows * shape.active * 8 / 2**20
    room(tmp_path, max(size, shape.rows * 1000 / 2**20))  # the pool is 450 bytes a row, and packed as much
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        table, extra = process.submit(score_and_plan, shape, tmp_path).result()
    record(benchmark, shape._asdict() | {"features_mb": round(size)} | extra, table, lambda: None)
