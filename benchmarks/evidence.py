"""Steps saved by the adaptive order on three pools: easy, the demo's, and hard for the demo's model.

    python -m benchmarks.evidence [--pools easy,demo,hard] [--seeds 200:212] [--work runs/evidence]

Per pool one `saerl compare` of vanilla and adaptive, paired by seed, which goes on where it was interrupted.
The pools differ in one number of their generator, the share of clean problems that are beyond the model.
Targets were fixed beforehand, at 60 and 80 % of vanilla's gain on seeds 11 to 14, the easy pool's being the
demo's; each pool has an SAE of its own.
Curves are kept in results/evidence/POOL.json, the lines of the table in results/evidence/summary.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from examples.demo_pool import make_pool
from saerl_fast.config import Config, load_config
from saerl_fast.fileio import write_json, write_text
from saerl_fast.records.runs import RunRecord, load_runs
from saerl_fast.records.stats import paired_ratio, steps_to_target
from saerl_fast.stages.compare import compare
from saerl_fast.stages.console import Echo

POOLS = {"easy": (0.0, (0.463, 0.511)), "demo": (0.4, (0.463, 0.511)), "hard": (0.75, (0.436, 0.476))}
ARMS = ("vanilla", "adaptive")
ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "evidence"


def configured(pool: str, seeds: list[int], work: Path) -> Config:
    """The demo's config with another pool and other seeds; the pool is written to ``work``."""
    hard, targets = POOLS[pool]
    data = work / f"{pool}.jsonl"
    write_text(data, "".join(json.dumps(row) + "\n" for row in make_pool(0, hard=hard)))
    settings: dict[str, Any] = {
        "run_dir": work / pool,
        "data.train": data,
        "data.eval": ROOT / "examples" / "demo" / "eval.jsonl",
        "model.path": ROOT / "examples" / "demo" / "model",
        "compare.arms": f"[{','.join(ARMS)}]",
        "compare.seeds": f"[{','.join(map(str, seeds))}]",
        "compare.target_values": f"[{','.join(map(str, targets))}]",
    }
    return load_config(ROOT / "examples" / "demo.yaml", [f"{key}={value}" for key, value in settings.items()])


def curves(runs: list[RunRecord]) -> dict[str, Any]:
    """arm -> seed -> evaluations and the share of groups with a gradient in the run."""
    found: dict[str, Any] = {}
    for run in runs:
        used = round(float(np.nanmean(run.train["used"])), 4)
        kept = {"steps": run.eval_steps, "accuracy": [round(a, 6) for a in run.accuracy], "used": used}
        found.setdefault(run.arm, {})[str(run.seed)] = kept
    return found


def lines(pool: str, found: dict[str, Any], window: int) -> list[dict[str, Any]]:
    """A line for each target: what the adaptive arm saved against vanilla, with its 95 % interval."""
    made = []
    for target in POOLS[pool][1]:
        reached = {
            arm: [steps_to_target(run["steps"], run["accuracy"], target, window) for run in runs.values()]
            for arm, runs in found.items()
        }
        result = paired_ratio(reached["vanilla"], reached["adaptive"])
        line: dict[str, Any] = {"pool": pool, "arm": "adaptive", "features": "sae", "target": target}
        if result is not None:
            line |= {"pairs": result.pairs, "left_out": result.censored + result.zero}
            line["saved"] = round(1 - result.ratio, 4)
            if result.interval is not None:
                line["low"], line["high"] = (round(1 - edge, 4) for edge in result.interval[::-1])
        for arm, runs in found.items():
            line[f"used_{arm}"] = round(float(np.mean([run["used"] for run in runs.values()])), 4)
            line[f"final_{arm}"] = round(float(np.mean([run["accuracy"][-1] for run in runs.values()])), 4)
        made.append(line)
    return made


def row(line: dict[str, Any]) -> str:
    """A line as the table of benchmarks/README.md has it."""
    saved = f"{line['saved']:.0%} [{line['low']:.0%}, {line['high']:.0%}]"
    used = f"{line['used_vanilla']:.0%} | {line['used_adaptive']:.0%}"
    final = f"{line['final_vanilla']:.3f} | {line['final_adaptive']:.3f}"
    return f"| {line['pool']} | {line['target']} | {line['pairs']} | {saved} | {used} | {final} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pools", default=",".join(POOLS))
    parser.add_argument("--seeds", default="200:212", help="FIRST:END")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    seeds = list(range(*map(int, args.seeds.split(":"))))
    args.work.mkdir(parents=True, exist_ok=True)
    for pool in args.pools.split(","):
        config = configured(pool, seeds, args.work)
        compare(config, Echo(quiet=True))
        write_json(args.out / f"{pool}.json", curves(load_runs(args.work / pool)))
    found = []
    for pool in POOLS:
        if (args.out / f"{pool}.json").is_file():
            found += lines(pool, json.loads((args.out / f"{pool}.json").read_text()), config.compare.smooth)
    write_json(args.out / "summary.json", found)
    print("\n".join(map(row, found)))


if __name__ == "__main__":
    main()
