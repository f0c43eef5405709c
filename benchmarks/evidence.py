"""Steps saved by arms on three pools: easy, the demo's, and hard for the demo's model.

    python -m benchmarks.evidence [--pools easy,...] [--arms vanilla,...] [--seeds 200:212] --draw NAME
    python -m benchmarks.evidence --tables      # nothing but the tables, from what is kept

The pools differ in one number of their generator, the share of clean problems that are beyond the model.
Targets were fixed beforehand, at 60 and 80 % of vanilla's gain on seeds 11 to 14, the easy pool's being the
demo's; each pool has an SAE of its own. A call makes the runs that the work folder lacks, one after the
other, and goes on where it was interrupted. Runs other than vanilla's and the default's end as soon as they
are past the last target and no later evaluation can change where.

results/evidence/POOL.json: the curves of every arm under the draw that it is of, an SAE with its labels,
scores and clusters, all made anew (``no SAE``: arms that read none of these); summary.json: a line for each
pool, arm, draw and target, against vanilla; differences.json: ``adaptive`` (the default, which reads SAE
features) against other arms of the same draw. benchmarks/README.md has the tables between markers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence_runs import ARMS, NO_SAE, POOLS, ROOT, SMOOTH, STEPS, Runs, collect, make, pack
from benchmarks.evidence_tables import OTHERS, draw_law, tables
from benchmarks.report import insert
from saerl_fast.fileio import write_json, write_text
from saerl_fast.records.stats import PairedRatio, holm, paired_ratio, steps_to_target

OUT = ROOT / "benchmarks" / "results" / "evidence"
FIRST = "first"  # the draw of the SAE that the default's lines were registered for


def kept(out: Path = OUT) -> dict[str, dict[str, Runs]]:
    """pool -> draw of the SAE -> arm -> seed -> curve, of all that was measured."""
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


def beside(draws: dict[str, Runs]) -> Iterator[tuple[str, Runs]]:
    """Draw and its arms, each with vanilla, which reads no SAE and stands beside all of them."""
    for draw, arms in draws.items():
        yield draw, {"vanilla": draws[NO_SAE]["vanilla"]} | arms


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


def arm_lines(found: dict[str, dict[str, Runs]], window: int) -> list[dict[str, Any]]:
    """The lines of all arms, with rollouts and tokens saved; p is Holm's over all of them."""
    made = []
    for pool, draws in found.items():
        drawn = list(beside(draws))
        for arm, (draw, arms) in ((arm, each) for arm in ARMS for each in drawn if arm in each[1]):
            for line in lines(pool, arms, window, arm) if arm != "vanilla" else ():
                line |= {"draw": draw, "used_early": _mean(arms[arm], "used_early")}
                for unit in ("rollouts", "tokens"):
                    result = paired(arms["vanilla"], arms[arm], line["target"], window, unit)
                    if result is not None and result.pairs == line["pairs"]:
                        line[f"{unit}_saved"] = round(1 - result.ratio, 4)
                made.append(line)
    return _corrected(made)


def differences(found: dict[str, dict[str, Runs]], window: int) -> list[dict[str, Any]]:
    """Steps that ``adaptive`` needs fewer than others on the same draw of the SAE; p is Holm's."""
    made = []
    for pool, draws in found.items():
        for other in OTHERS:
            for draw, arms in draws.items():
                for target in POOLS[pool][1] if "adaptive" in arms and other in arms else ():
                    line = {"pool": pool, "against": other, "draw": draw, "target": target}
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
    parser.add_argument("--draw", help="what to call the draw of the SAE in the work folder")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tables", action="store_true", help="from what is kept, without runs")
    args = parser.parse_args(argv)
    if not args.tables:
        if not args.draw:
            parser.error("--draw must name the draw of the SAE in the work folder, as --draw fourth")
        for pool in args.pools.split(","):
            for seed in range(*map(int, args.seeds.split(":"))):
                for arm in args.arms.split(","):
                    make(pool, arm, seed, args.work.resolve())
        pack(collect(args.work.resolve(), args.draw), args.out)
    summarise(args.out)


if __name__ == "__main__":
    main()
