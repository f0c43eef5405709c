"""Steps saved by arms on three pools: easy, the demo's, and hard for the demo's model.

    python -m benchmarks.evidence [--pools easy,demo,hard] [--arms vanilla,sae,...] [--seeds 200:212]
    python -m benchmarks.evidence --tables      # nothing but the tables, from what is kept

The pools differ in one number of their generator, the share of clean problems that are beyond the model.
Targets were fixed beforehand, at 60 and 80 % of vanilla's gain on seeds 11 to 14, the easy pool's being the
demo's; each pool has an SAE of its own. A call makes the runs that the work folder lacks, one after the
other, and goes on where it was interrupted. Runs other than vanilla's and the default's end as soon as they
are past the last target and no later evaluation can change where.

results/evidence/POOL.json: the curves of every arm, which share one SAE, its labels and clusters;
summary.json: a line for each pool, arm and target; differences.json: ``adaptive`` (the default, which reads
SAE features) against the same rule with other features. benchmarks/README.md has the tables between markers.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.evidence_tables import draw_law, tables
from benchmarks.report import insert
from examples.demo_pool import make_pool
from saerl_fast.config import Config, apply_overrides, load_config
from saerl_fast.fileio import write_json, write_text
from saerl_fast.records.runs import RunRecord, open_run
from saerl_fast.records.stats import PairedRatio, holm, paired_ratio, past, steps_to_target
from saerl_fast.stages.compare import parse_arm
from saerl_fast.stages.console import Echo
from saerl_fast.stages.pipeline import sae_stage
from saerl_fast.stages.train import train_stage

POOLS = {"easy": (0.0, (0.463, 0.511)), "demo": (0.4, (0.463, 0.511)), "hard": (0.75, (0.436, 0.476))}
STEPS, SMOOTH = 80, 3
EARLY = 30  # steps whose share of informative groups is compared


class Arm(NamedTuple):
    """``text`` as compare.arms has it; what the rule reads; all steps made; difficulty without the answer."""

    text: str
    features: str | None = None
    whole: bool = False
    prompt: bool = False


def _adaptive(features: str, more: str = "") -> Arm:
    return Arm(f"x:plan.schedule=adaptive;plan.adaptive.features=[{features}]{more}", features)


ARMS = {
    "vanilla": Arm("vanilla", whole=True),
    "adaptive": Arm("adaptive", "sae", whole=True),
    "hidden": _adaptive("hidden"),
    "tfidf": _adaptive("tfidf"),
    "length": _adaptive("length"),
    "scalars": _adaptive("scalars"),
    "none": _adaptive("none"),
    "random": _adaptive("random"),
    "answer": _adaptive("answer_logprob"),
    "cell": _adaptive("columns", ";plan.adaptive.columns=[task,level,kind]"),
    "shuffled": _adaptive("sae", ";plan.adaptive.shuffle_clusters=true"),
    "noquota": _adaptive("sae", ";plan.adaptive.quota=null"),
    "mopps": Arm("mopps"),
    "bots": Arm("bots"),
    "greso": Arm("x:plan.schedule=greso;train.dynamic_sampling=3"),
    "dapo": Arm("x:plan.schedule=vanilla;train.dynamic_sampling=3"),
    "speed": Arm("x:plan.schedule=vanilla;train.rollout.screen=4;train.dynamic_sampling=3"),
    "twice": Arm("x:plan.schedule=vanilla;train.rollout.prompts_per_step=32"),
    "filtered": Arm("x:plan.schedule=vanilla;plan.filter=true"),
    "literal": Arm("literal"),
    "literal_prompt": Arm("literal", prompt=True),
    "global_prompt": Arm("global", prompt=True),
    "medium_prompt": Arm("medium", prompt=True),
}
PROMPT = "[length,text,tfidf,sae,hidden]"  # what difficulty reads by default, without the answer's text
ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "evidence"
Runs = dict[str, dict[str, dict[str, Any]]]  # arm -> seed -> curves


def configured(pool: str, arm: str, seed: int, work: Path) -> Config:
    """The demo's config with another pool, arm and seed; the pool is written to ``work``."""
    data = work / f"{pool}.jsonl"
    if not data.is_file():
        write_text(data, "".join(json.dumps(row) + "\n" for row in make_pool(0, hard=POOLS[pool][0])))
    settings: dict[str, Any] = {
        "run_dir": work / pool,
        "data.train": data,
        "data.eval": ROOT / "examples" / "demo" / "eval.jsonl",
        "model.path": ROOT / "examples" / "demo" / "model",
        "score.features": "[sae,sae_mean,hidden,scalars,answer_logprob]",
        "train.seed": seed,
        "train.steps": STEPS,
        "train.save_every": 0,
        "train.save_model": "false",
    }
    if ARMS[arm].prompt:  # scores of their own, by the SAE of the others
        settings["run_dir"] = work / f"{pool}-prompt"
        settings |= {"sae.path": work / pool / "sae", "difficulty.features": PROMPT}
    config = load_config(
        ROOT / "examples" / "demo.yaml", [f"{key}={value}" for key, value in settings.items()]
    )
    return apply_overrides(config, parse_arm(ARMS[arm].text)[1])


def make(pool: str, arm: str, seed: int, work: Path) -> None:
    """The run, up to where nothing after it can matter; one that has ended is kept."""
    out = work / pool / f"{arm}.seed-{seed}"
    if (out / "summary.json").is_file():
        return
    enough = None if ARMS[arm].whole else partial(_enough, POOLS[pool][1][-1])
    config = configured(pool, arm, seed, work)
    if ARMS[arm].prompt and not (work / pool / "sae").exists():
        sae_stage(configured(pool, "adaptive", seed, work), Echo(quiet=True))
    train_stage(config, Echo(quiet=True), out=out, arm=arm, resume=out.exists(), enough=enough)


def _enough(target: float, evaluations: Sequence[tuple[int, float]]) -> bool:
    steps, values = zip(*evaluations, strict=True)
    return past(steps, values, target, SMOOTH)


def curve(run: RunRecord) -> dict[str, Any]:
    """Of a run its evaluations, rollouts and tokens until each, and the share of groups with a gradient."""
    early = run.train["step"] <= EARLY
    return {
        "steps": run.eval_steps,
        "accuracy": [round(a, 5) for a in run.accuracy],
        "rollouts": run.spent("rollouts").astype(int).tolist(),
        "tokens": run.spent("tokens").astype(int).tolist(),
        "used": round(float(np.nanmean(run.train["used"])), 4),
        "used_early": round(float(np.nanmean(run.train["used"][early])), 4),
    }


def collect(work: Path) -> dict[str, Runs]:
    """pool -> arm -> seed -> curve, of the finished runs in ``work``."""
    found: dict[str, Runs] = {}
    for pool in POOLS:
        for arm in ARMS:
            folders = sorted((work / pool).glob(f"{arm}.seed-*"))
            for out in (folder for folder in folders if (folder / "summary.json").is_file()):
                run = open_run(out)
                run.read(whole=True)
                found.setdefault(pool, {}).setdefault(arm, {})[out.name.rpartition("-")[2]] = curve(run)
    return found


def kept(out: Path = OUT) -> dict[str, Runs]:
    """pool -> arm -> seed -> curve, of all that was measured."""
    return {pool: json.loads((out / f"{pool}.json").read_text()) for pool in POOLS}


def _cost(run: dict[str, Any], target: float, window: int, unit: str) -> float | None:
    """Steps, rollouts or tokens until the target."""
    hit = steps_to_target(run["steps"], run["accuracy"], target, window)
    return hit if hit is None or unit == "steps" else float(np.interp(hit, run["steps"], run[unit]))


def paired(base: Any, arm: Any, target: float, window: int, unit: str = "steps") -> PairedRatio | None:
    """Cost of ``arm`` over that of ``base``, by the seeds of which both have it."""
    seeds = [seed for seed in base if seed in arm and unit in base[seed] and unit in arm[seed]]
    both = [[_cost(runs[seed], target, window, unit) for seed in seeds] for runs in (base, arm)]
    return paired_ratio(*both)


def _told(result: PairedRatio | None) -> dict[str, Any]:
    """A comparison as a line has it; ``p`` is of this line alone, and missing where a pair was left out."""
    if result is None:
        return {}
    left = result.censored + result.zero
    line: dict[str, Any] = {"pairs": result.pairs, "left_out": left, "saved": round(1 - result.ratio, 4)}
    if result.interval is not None:
        line["low"], line["high"] = (round(1 - edge, 4) for edge in result.interval[::-1])
    return line if left or result.p is None else line | {"p": result.p}


def _mean(runs: dict[str, Any], name: str) -> float:
    return round(float(np.mean([run[name] for run in runs.values() if name in run])), 4)


def lines(pool: str, found: Runs, window: int, arm: str = "adaptive") -> list[dict[str, Any]]:
    """A line for each target: what the arm saved against vanilla, with its 95 % interval."""
    made = []
    for target in POOLS[pool][1]:
        line: dict[str, Any] = {"pool": pool, "arm": arm, "features": ARMS[arm].features, "target": target}
        line |= _told(paired(found["vanilla"], found[arm], target, window))
        for name in ("vanilla", arm):
            line[f"used_{name}"] = _mean(found[name], "used")
            if all(run["steps"][-1] == STEPS for run in found[name].values()):
                line[f"final_{name}"] = round(
                    float(np.mean([run["accuracy"][-1] for run in found[name].values()])), 4
                )
        made.append(line)
    return made


def arm_lines(found: dict[str, Runs], window: int) -> list[dict[str, Any]]:
    """The lines of all arms, with rollouts and tokens saved; p is Holm's over all of them."""
    made = []
    for pool, arms in found.items():
        for arm in (name for name in ARMS if name in arms and name != "vanilla"):
            for line in lines(pool, arms, window, arm):
                line["used_early"] = _mean(arms[arm], "used_early")
                for unit in ("rollouts", "tokens"):
                    result = paired(arms["vanilla"], arms[arm], line["target"], window, unit)
                    if result is not None and result.pairs == line["pairs"]:
                        line[f"{unit}_saved"] = round(1 - result.ratio, 4)
                made.append(line)
    return _corrected(made)


def differences(found: dict[str, Runs], window: int) -> list[dict[str, Any]]:
    """Steps that ``adaptive`` needs fewer than the same rule with other features; p is Holm's."""
    made = []
    for pool, arms in found.items():
        for other in (name for name in ("none", "hidden", "tfidf", "random", "answer") if name in arms):
            for target in POOLS[pool][1]:
                line = {"pool": pool, "against": other, "target": target}
                made.append(line | _told(paired(arms[other], arms["adaptive"], target, window)))
    return _corrected(made)


def _corrected(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines with their p after the correction."""
    adjusted = holm([line.get("p") for line in made])
    return [line if p is None else line | {"p": round(p, 4)} for line, p in zip(made, adjusted, strict=True)]


def row(line: dict[str, Any]) -> str:
    """A line of the default as the table of benchmarks/README.md has it."""
    saved = f"{line['saved']:.0%} [{line['low']:.0%}, {line['high']:.0%}]"
    used = f"{line['used_vanilla']:.0%} | {line['used_adaptive']:.0%}"
    final = f"{line['final_vanilla']:.3f} | {line['final_adaptive']:.3f}"
    return f"| {line['pool']} | {line['target']} | {line['pairs']} | {saved} | {used} | {final} |"


def summarise(out: Path = OUT, window: int = SMOOTH) -> None:
    """Write summary.json and differences.json, and the tables and the figure of benchmarks/README.md."""
    found = kept(out)
    arms, against = arm_lines(found, window), differences(found, window)
    write_json(out / "summary.json", arms)
    write_json(out / "differences.json", against)
    if out == OUT:
        readme = ROOT / "benchmarks" / "README.md"
        made = tables(arms, against, [name for name in ARMS if name != "vanilla"])
        write_text(readme, insert(readme.read_text(), made))
        draw_law(arms, ROOT / "benchmarks" / "figures" / "law.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pools", default=",".join(POOLS))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="200:212", help="FIRST:END")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tables", action="store_true", help="from what is kept, without runs")
    args = parser.parse_args(argv)
    if not args.tables:
        for pool in args.pools.split(","):
            for seed in range(*map(int, args.seeds.split(":"))):
                for arm in args.arms.split(","):
                    make(pool, arm, seed, args.work.resolve())
        pack(collect(args.work), args.out)
    summarise(args.out)


def pack(found: dict[str, Runs], out: Path) -> None:
    """Write POOL.json, a line a run; arms that were not run this time stay as they are."""
    for pool, arms in found.items():
        file = out / f"{pool}.json"
        before = json.loads(file.read_text()) if file.is_file() else {}
        text = json.dumps(before | arms, indent=1)
        text = re.sub(
            r"\{\s+\"steps\".*?\}", lambda run: json.dumps(json.loads(run.group())), text, flags=re.DOTALL
        )
        write_text(file, text + "\n")


if __name__ == "__main__":
    main()
