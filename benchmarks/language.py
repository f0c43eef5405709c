"""Orders compared on a real language model, in pieces that fit where a machine is lent for minutes.

    python -m benchmarks.language --model MODEL --out FOLDER [--seconds 480] [--size cpu|gpu] [key=value ...]
    bash benchmarks/gpu.sh training --model MODEL --out FOLDER      # the same with --size gpu --seconds 480
    python -m benchmarks.language --power                           # how many pairs a claim takes
    python -m benchmarks.language --table CURVES                    # the table of a curves.json

One call goes on with the comparison of examples/language.yaml in FOLDER/runs (SAE, labels, scores, then arms
x seeds) until it is done or the seconds are over: then the step at hand is ended and saved. The same call
goes on from there; a call that is killed loses what came after the last checkpoint, every two minutes or so.
MODEL is a hub id or a folder: SmolLM2-135M(-Instruct), Qwen2.5-0.5B, Qwen2.5-1.5B; for the last one, where
checkpoints of 21 GB do not fit, add train.lora.rank=32 train.lr=1e-4. FOLDER holds, small enough to be copied
after every call, curves.json (of every run so far) and, once all have begun, report.md.

Exit codes: 0 done, 3 to be called again, 2 or 1 as `saerl` ends.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence import FIRST, beside, kept
from benchmarks.evidence_runs import POOLS, ROOT, SMOOTH, curve
from benchmarks.run_all import heed_interrupts
from saerl_fast.fileio import write_json
from saerl_fast.records.runs import find_runs, open_run
from saerl_fast.records.stats import ALPHA, MIN_PAIRS, holm, mean_difference, steps_to_target

SAVING = 45.0  # seconds that a step, its checkpoint and the end of the process may take
TASKS = "syllogism,isomorphic_strings,ransom_note,calendar_arithmetic,aiw,course_schedule"
SIZES = {
    "cpu": [],
    # Levels from what a model of 135M solves to what one of 1.5B does not.
    "gpu": [
        f"data.train=reasoning-gym:{TASKS},chain_sum@0,chain_sum@1,chain_sum@2,products@0,products@1,products@2",
        *("data.size=4800", "data.eval_size=384", "difficulty.n_labels=128", "diversity.n_clusters=12"),
        *("sae.max_tokens=200000", "sae.steps=1500", "sae.batch_size=2048", "score.batch_tokens=32768"),
        *(
            "train.steps=100",
            "train.micro_tokens=32768",
            "train.save_every=25",
            "train.keep=1",
            "train.lr=5e-6",
        ),
        *(
            "train.rollout.prompts_per_step=32",
            "train.rollout.group_size=16",
            "train.rollout.max_new_tokens=16",
        ),
    ],
}


def piece(command: list[str], seconds: float | None, saving: float = SAVING) -> int | None:
    """Run ``command`` until it ends, its exit status, or the seconds are over: then None, after a SIGINT.

    ``saving``: of these seconds, what ending may take; a process that takes longer is killed.
    """
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=heed_interrupts)
    try:
        return process.wait(None if seconds is None else max(seconds - saving, 1.0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        code = process.wait(saving)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None
    return 0 if code == 0 else None


def collect(runs: Path, out: Path) -> str:
    """Write curves.json, copy report.md, drop checkpoints of runs that have ended; what there is so far."""
    found: dict[str, dict[str, object]] = {}
    ended = steps = 0
    for folder in find_runs(runs) if runs.is_dir() else []:
        run = open_run(folder)
        run.read(whole=True)
        done = bool(run.summary)
        if len(run.train):
            found.setdefault(run.arm, {})[str(run.seed)] = curve(run) | {"ended": done}
        ended, steps = ended + done, steps + len(run.train)
        if done and (folder / "checkpoints").is_dir():
            shutil.rmtree(folder / "checkpoints")
    write_json(out / "curves.json", found)
    if (runs / "report.md").is_file():
        shutil.copy(runs / "report.md", out / "report.md")
    return f"{ended} runs ended, {steps} steps in all; in {out}"


def deviations() -> dict[tuple[str, float], float]:
    """(pool, target) -> deviation of the logarithm of steps over vanilla's, of the evidence's default."""
    found = {}
    for pool, draws in kept().items():
        arms = dict(beside(draws))[FIRST]
        for target in POOLS[pool][1]:
            both = [
                [
                    steps_to_target(runs[seed]["steps"], runs[seed]["accuracy"], target, SMOOTH)
                    for seed in runs
                ]
                for runs in (arms["vanilla"], arms["adaptive"])
            ]
            logs = [math.log(a / b) for b, a in zip(*both, strict=True) if a and b]
            found[pool, target] = float(np.std(logs, ddof=1))
    return found


def pairs_needed(deviation: float, difference: float, power: float = 0.8) -> int:
    """Pairs of which a two-sided t test at 5 % finds so large a mean of differences with this chance."""
    from scipy.stats import nct, t

    for pairs in range(3, 1000):
        edge, far = t.ppf(1 - ALPHA / 2, pairs - 1), abs(difference) / deviation * math.sqrt(pairs)
        if nct.sf(edge, pairs - 1, far) + nct.cdf(-edge, pairs - 1, far) >= power:
            return pairs
    return 1000


def power_table() -> str:
    """Pairs that a claim takes, by the deviation of the demo's pools and what is saved in truth."""
    savings = (0.1, 0.2, 0.3)
    lines = ["| pool | target | deviation | " + " | ".join(f"{saved:.0%} saved" for saved in savings) + " |"]
    lines.append("|---" * (3 + len(savings)) + "|")
    for (pool, target), deviation in deviations().items():
        pairs = [str(pairs_needed(deviation, math.log(1 - saved))) for saved in savings]
        lines.append(f"| {pool} | {target} | {deviation:.3f} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def told(curves: dict[str, Any]) -> str:
    """Runs that ended, by arm: mean accuracies, and those after the start beside vanilla's pairs.

    The last two columns: chances by Holm over the arms, and how many pairs would find the difference.
    """
    from scipy.stats import ttest_1samp

    ended = {arm: {s: run for s, run in runs.items() if run["ended"]} for arm, runs in curves.items()}
    base = ended.pop("vanilla")
    mean = {seed: np.mean(run["accuracy"][1:]) for seed, run in base.items()}
    more = {
        arm: np.array([np.mean(runs[seed]["accuracy"][1:]) - mean[seed] for seed in runs if seed in mean])
        for arm, runs in ended.items()
    }
    tested = [arm for arm, found in more.items() if len(found) >= MIN_PAIRS]
    chances = dict(zip(tested, holm([ttest_1samp(more[arm], 0).pvalue for arm in tested]), strict=True))
    steps = [f"step {step}" for step in next(iter(base.values()))["steps"]]
    heads = ["arm", "runs", *steps, "mean after the start", "groups with a gradient", "tokens"]
    heads += ["beside vanilla", "p", "pairs needed"]
    lines = [heads, ["---"] * len(heads)]
    for arm, runs in {"vanilla": base, **ended}.items():
        accuracy = np.array([run["accuracy"] for run in runs.values()])
        used = np.mean([run["used"] for run in runs.values()])
        tokens = np.mean([run["tokens"][-1] for run in runs.values()])
        line = [arm, str(len(runs)), *(f"{value:.3f}" for value in accuracy.mean(0))]
        line += [f"{accuracy[:, 1:].mean():.3f}", f"{used:.0%}", f"{tokens:.0f}"]
        line.append(mean_difference(more[arm]) if arm in more else "")
        if arm in chances:
            needed = pairs_needed(float(more[arm].std(ddof=1)), float(more[arm].mean()))
            line += [f"{chances[arm]:.2g}", str(needed)]
        lines.append(line + [""] * (len(heads) - len(line)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--power", action="store_true", help="print how many pairs a claim takes, and end")
    parser.add_argument("--table", type=Path, metavar="CURVES", help="print the table of a file, and end")
    parser.add_argument("--model", help="hub id or folder")
    parser.add_argument("--out", type=Path, help="folder of the runs, curves.json and report.md")
    parser.add_argument("--seconds", type=float, help="of this call; without, until it is done")
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--config", default=str(ROOT / "examples" / "language.yaml"))
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as of `saerl compare`")
    args = parser.parse_intermixed_args(argv)
    if args.power:
        print(power_table())
        return 0
    if args.table:
        print(told(json.loads(args.table.read_text())))
        return 0
    if not args.model or not args.out:
        parser.error("--model and --out are needed")
    if args.seconds is not None and args.seconds <= SAVING:
        parser.error(f"--seconds must be above {SAVING:.0f}, which ending may take")
    out, begun = args.out.resolve(), time.time()
    out.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "saerl_fast.cli",
        "compare",
        "--config",
        args.config,
        "--model",
        args.model,
    ]
    command += [f"run_dir={out / 'runs'}", *SIZES[args.size], *args.settings]
    code = piece(command, args.seconds)
    print(f"{collect(out / 'runs', out)} ({time.time() - begun:.0f} s)")
    if code is None:
        print("not finished: the same command goes on")
    return 3 if code is None else code


if __name__ == "__main__":
    sys.exit(main())
