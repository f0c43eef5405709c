"""What arms needed and reached, paired by seed: steps to targets and other costs, equal budgets, a ledger."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saerl_fast.config import CompareConfig
from saerl_fast.fileio import mismatch
from saerl_fast.records.runs import RunRecord, read_object
from saerl_fast.records.samples import Table
from saerl_fast.records.stats import (
    PairedRatio,
    area_under_curve,
    holm,
    left_out,
    mean_difference,
    paired_ratio,
    smooth,
    steps_to_target,
    unclaimed,
)

UNITS = ("steps", "rollouts", "tokens", "seconds")
PAIRED = ("95% interval", "pairs (+left out)", "p (Holm)", "verdict")
USES = (1, 3, 10)  # runs that share the one-off costs
PAIRED_NOTE = (
    "Geometric mean over paired seeds; the interval is Student's t on the logarithms of the ratios. Pairs "
    "in brackets are not in the mean: at least one run never reached the target (censored), or was there "
    "at step 0, where a ratio means nothing. Any such pair rules out a verdict, for the others are a "
    "selection. One or two pairs prove nothing: the same order run twice with other seeds differs by as "
    "much. p and verdict are Holm's over the lines of the table; each interval is of its line alone."
)
COSTS_NOTE = (
    "The same pairs and targets counted in other units. Tokens are those generated in rollouts; seconds "
    "are without evaluation, and of machines that may have had other work."
)
BUDGET_NOTE = (
    "Smoothed accuracy where every run still had it: at the least number of steps, of rollouts and of "
    "generated tokens that some run ended with; and the mean height of the curve, not smoothed, over as many "
    "steps. In brackets the difference to the first arm, a mean over paired seeds with its 95% interval "
    "(Student's t)."
)
LEDGER_NOTE = (
    "Costs before the first step, made once for all runs of a pool and model; an arm whose order and "
    "filter read no scores owes nothing. Net: what an arm saved to the last target, less its share of "
    "these costs where so many runs use them, as a share of what the first arm spent. Shares are of mean "
    "costs, where the tables above have means of ratios; of the same pairs, without those left out."
)


def settings_of(root: Path) -> CompareConfig:
    """What the comparison in ``root`` was made with; the defaults where there is none."""
    recorded = read_object(root / "compare.json")
    known = {key: recorded[key] for key in CompareConfig.__dataclass_fields__ if key in recorded}
    return CompareConfig(**known)


def find_targets(runs: Sequence[RunRecord], settings: CompareConfig) -> dict[str, float]:
    """Accuracies to reach, each by a name of its own: values given, else shares of the first arm's mean gain.

    The gain is from the first evaluation to the mean of the last ``smooth``, the first one left out.
    """
    if settings.target_values:
        return {
            f"{value:.3f}" if value == round(value, 3) else str(value): value
            for value in settings.target_values
        }
    first = [run for run in runs if run.arm == runs[0].arm and len(run.accuracy) > 1]
    if not first:
        return {}
    start = float(np.mean([run.accuracy[0] for run in first]))
    gain = float(np.mean([np.mean(run.accuracy[1:][-settings.smooth :]) for run in first])) - start
    if not gain > 0:
        return {}
    return {
        f"{100 * share:.12g}% of {runs[0].arm}'s gain": start + share * gain for share in settings.targets
    }


def no_target(runs: Sequence[RunRecord]) -> str:
    """Why `find_targets` found none for these runs, and what to do."""
    base = runs[0].arm
    if all(len(run.accuracy) < 2 for run in runs if run.arm == base):
        return f"{base} was evaluated less than twice, so there is no target; set train.eval.every"
    return f"{base} gains nothing, so there is no target; raise train.steps, or give compare.target_values"


def set_late(runs: Sequence[RunRecord], settings: CompareConfig) -> str:
    """The sentence about targets that were not given before all ``runs`` began; "" where nothing shows it."""
    if not settings.target_values or settings.pilots:
        return ""
    given = [run.config["target_values"] or [] for run in runs if "target_values" in run.config]
    late = sum(sorted(values) != sorted(settings.target_values) for values in given)
    return (
        f"{late} of {len(runs)} runs were begun without compare.target_values as they are now: these targets "
        "are not registered, and a verdict by them is as good as their choice"
        if late
        else ""
    )


def ended_early(runs: Sequence[RunRecord]) -> str:
    """What a table of accuracies says of runs that ``compare.until`` ended; "" without any."""
    count = sum(run.steps is not None and 0 < run.summary.get("steps", run.steps) < run.steps for run in runs)
    told = (
        "were ended past the last target (compare.until): after, mean, groups and rollouts are of the steps"
    )
    return f"{count} runs {told} they took." if count else ""


def cost(run: RunRecord, target: float, window: int, unit: str = "steps") -> float | None:
    """What the run had spent when its smoothed curve reached ``target``; None when it never did."""
    hit = steps_to_target(run.eval_steps, run.accuracy, target, window)
    if hit is None or unit == "steps":
        return hit
    return float(np.interp(hit, run.eval_steps, run.spent(unit)))


class Pairs:
    """Runs of a comparison by arm and seed; the first arm is the baseline."""

    def __init__(self, runs: Sequence[RunRecord]) -> None:
        self.arms = list(dict.fromkeys(run.arm for run in runs))
        self.by_key = {(run.arm, run.seed): run for run in runs if run.accuracy}
        self.seeds = sorted({run.seed for run in runs})

    def of(self, arm: str) -> list[tuple[RunRecord, RunRecord]]:
        """(baseline, arm) of every seed that both have."""
        keys = [((self.arms[0], seed), (arm, seed)) for seed in self.seeds]
        return [(self.by_key[a], self.by_key[b]) for a, b in keys if a in self.by_key and b in self.by_key]

    def costs(self, arm: str, target: float, window: int, unit: str) -> list[list[float | None]]:
        """Of baseline and arm, pair by pair."""
        pairs = self.of(arm)
        return [[cost(pair[i], target, window, unit) for pair in pairs] for i in (0, 1)]


class Line(NamedTuple):
    """An arm against the first one of its runs, at one target."""

    base: str
    arm: str
    target: str
    result: PairedRatio | None  # None where no pair has a ratio
    out: tuple[int, int]  # pairs without one, see `left_out`


def paired_lines(runs: Sequence[RunRecord], targets: dict[str, float], settings: CompareConfig) -> list[Line]:
    """Steps to each target relative to the first arm, paired by seed."""
    pairs, lines = Pairs(runs), []
    for arm, (name, target) in itertools.product(pairs.arms[1:], targets.items()):
        both = pairs.costs(arm, target, settings.smooth, "steps")
        lines.append(Line(pairs.arms[0], arm, name, paired_ratio(*both), left_out(*both)))
    return lines


def verdicts(lines: Sequence[Line]) -> list[tuple[float | None, str]]:
    """p of each line, Holm's over all of them, and what it says (see `PairedRatio.verdict`)."""
    clean = [line.result if line.result and not any(line.out) else None for line in lines]
    found: list[tuple[float | None, str]] = []
    for line, p in zip(lines, holm([None if r is None else r.p for r in clean]), strict=True):
        none = unclaimed(*line.out) if any(line.out) else "no claim (no paired seed)"
        found.append((p, none if line.result is None else line.result.verdict(p)))
    return found


def paired_cells(lines: Sequence[Line]) -> list[list[str]]:
    """A row for each line: arm, target, saved, interval, pairs, p and verdict."""
    rows = []
    for line, (p, said) in zip(lines, verdicts(lines), strict=True):
        result = line.result
        saved = "-" if result is None else f"{1 - result.ratio:+.0%}"
        interval = "-" if result is None else _interval(result) or "too few pairs"
        used = f"{result.pairs if result else 0} (+{sum(line.out)})"
        rows.append([line.arm, line.target, saved, interval, used, "-" if p is None else f"{p:.3f}", said])
    return rows


def paired_table(runs: Sequence[RunRecord], targets: dict[str, float], settings: CompareConfig) -> Table:
    """Steps to target relative to the first arm, paired by seed, with a t interval and Holm's p."""
    lines = paired_lines(runs, targets, settings)
    base = f" against {runs[0].arm}" if runs else ""
    header = ["arm", "target", f"steps saved{base}", *PAIRED]
    return ("Paired comparison", header, paired_cells(lines), PAIRED_NOTE)


def _interval(result: PairedRatio) -> str:
    """Of what was saved; empty where there is none."""
    if result.interval is None:
        return ""
    low, high = result.interval
    return f"[{1 - high:+.0%}, {1 - low:+.0%}]"


def costs_table(runs: Sequence[RunRecord], targets: dict[str, float], settings: CompareConfig) -> Table:
    """What each arm saved to each target in rollouts, tokens and seconds."""
    pairs, rows = Pairs(runs), []
    for arm in pairs.arms[1:]:
        for name, target in targets.items():
            cells = []
            for unit in UNITS[1:]:
                result = paired_ratio(*pairs.costs(arm, target, settings.smooth, unit))
                saved = "-" if result is None else f"{1 - result.ratio:+.0%} {_interval(result)}".rstrip()
                cells.append(saved)
            if any(cell != "-" for cell in cells):
                rows.append([arm, name, *cells])
    return ("Saved to a target", ["arm", "target", *UNITS[1:]], rows, COSTS_NOTE)


def budget_table(runs: Sequence[RunRecord], settings: CompareConfig) -> Table:
    """Accuracy of each arm at equal budgets of steps, rollouts, tokens, and its mean over as many steps."""
    pairs = Pairs(runs)
    if len(pairs.arms) < 2 or not pairs.by_key:
        return ("Equal budgets", [], [], "")
    budgets = {unit: min(float(run.spent(unit)[-1]) for run in pairs.by_key.values()) for unit in UNITS[:3]}
    shared = int(budgets["steps"])
    budgets = {unit: budget for unit, budget in budgets.items() if budget > 0}

    def figures(run: RunRecord) -> list[float]:
        curve = smooth(run.accuracy, settings.smooth)
        at = [float(np.interp(budget, run.spent(unit), curve)) for unit, budget in budgets.items()]
        steps = [*(step for step in run.eval_steps if step < shared), shared]
        return [*at, area_under_curve(steps, np.interp(steps, run.eval_steps, run.accuracy).tolist())]

    rows = []
    for arm in pairs.arms:
        mine = np.array([figures(run) for (name, _), run in pairs.by_key.items() if name == arm])
        if not len(mine):
            continue
        cells = [f"{value:.3f}" for value in mine.mean(axis=0)]
        both = pairs.of(arm) if arm != pairs.arms[0] else []
        if both:
            changes = np.array([np.subtract(figures(b), figures(a)) for a, b in both])
            cells = [
                f"{cell} ({mean_difference(column)})" for cell, column in zip(cells, changes.T, strict=True)
            ]
        rows.append([arm, *cells])
    header = ["arm", *(f"after {budget:,.0f} {unit}" for unit, budget in budgets.items())]
    header.append(f"mean over {shared:,} steps")
    return ("Equal budgets", header, rows, BUDGET_NOTE)


def sae_seconds(sae: dict[str, Any]) -> float:
    """What training the SAE took: capture, training, the language model's loss."""
    return sum(_number(sae, name) for name in ("seconds_capture", "seconds", "seconds_ce"))


def one_off(scores: dict[str, Any], sae: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What was spent once, by what on: rollouts, tokens generated and seconds."""
    labels = scores.get("difficulty_labels") or {}
    made = {
        "SAE": {"seconds": sae_seconds(sae)},
        "difficulty labels": {unit: _number(labels, unit) for unit in UNITS[1:]},
        "scoring": {
            "seconds": sum(_number(scores.get("seconds"), name) for name in scores.get("seconds") or ())
        },
    }
    return {name: spent for name, spent in made.items() if any(spent.values())}


def ledger_table(
    runs: Sequence[RunRecord],
    targets: dict[str, float],
    settings: CompareConfig,
    scores: dict[str, Any],
    sae: dict[str, Any],
) -> Table:
    """One-off costs, and what each arm saved to the last target before and after its share of them."""
    spent = one_off(scores, sae)
    if not spent:
        return ("Ledger", [], [], "")
    total = {unit: sum(costs.get(unit, 0.0) for costs in spent.values()) for unit in UNITS[1:]}
    rows = [
        [name, *(f"{costs[unit]:,.0f}" if costs.get(unit) else "-" for unit in UNITS[1:])]
        for name, costs in [*spent.items(), ("together, once", total)]
    ]
    pairs = Pairs(runs)
    last = list(targets.items())[-1:]
    for arm, (name, target) in itertools.product(pairs.arms[1:], last):
        owes = any(_reads_scores(run) for run in runs if run.arm == arm)
        owes_first = any(_reads_scores(run) for run in runs if run.arm == pairs.arms[0])
        gross, net = [], {uses: list[str]() for uses in USES}
        for unit in UNITS[1:]:
            both = pairs.costs(arm, target, settings.smooth, unit)
            known = [(a, b) for a, b in zip(*both, strict=True) if a and b]
            base, mine = (float(np.mean([pair[i] for pair in known])) if known else math.nan for i in (0, 1))
            gross.append(_share(base, mine))
            for uses in USES:
                share = total[unit] / uses
                net[uses].append(_share(base + share * owes_first, mine + share * owes))
        some = f" ({len(known)} of {len(both[0])} pairs)" if len(known) < len(both[0]) else ""
        rows.append([f"{arm}, saved to {name}, gross{some}", *gross])
        rows += [[f"{arm}, net, {uses} run{'s' * (uses > 1)}", *cells] for uses, cells in net.items()]
    return ("Ledger", ["", *UNITS[1:]], rows, LEDGER_NOTE)


def _share(base: float, mine: float) -> str:
    return f"{1 - mine / base:+.0%}" if base > 0 and math.isfinite(mine) else "-"


def _reads_scores(run: RunRecord) -> bool:
    """Whether the run's order or filter was made from scores; of an unknown config by the arm's name."""
    plan = (run.config.get("config") or {}).get("plan") or {"schedule": run.arm}
    return plan.get("schedule") != "vanilla" or bool(plan.get("filter"))


def _number(record: Any, name: str) -> float:
    value = record.get(name) if isinstance(record, dict) else None
    return 0.0 if value is None or mismatch(value, float) else max(float(value), 0.0)


def label_cost(runs: Sequence[RunRecord], scores: dict[str, Any]) -> str:
    """What the difficulty labels cost before the first step, in steps of these runs."""
    spent = scores.get("difficulty_labels", {}).get("rollouts", 0)
    steps = [(run.rollouts(), len(run.train)) for run in runs if len(run.train)]
    if not spent or not steps or not steps[0][0]:
        return ""
    worth = spent * steps[0][1] / steps[0][0]
    return (
        f"Not in the table: the difficulty labels took {spent:,.0f} rollouts before training, as many as "
        f"{worth:.1f} steps; they are made once for all runs, and an arm that ignores them owes nothing."
    )
