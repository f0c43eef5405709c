"""The report of a comparison on several pools: a line for each pool, arm and target, and the law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import write_text
from saerl_fast.records import plots
from saerl_fast.records.compared import (
    PAIRED,
    PAIRED_NOTE,
    Line,
    ended_early,
    find_targets,
    no_target,
    paired_cells,
    paired_lines,
    set_late,
    settings_of,
    verdicts,
)
from saerl_fast.records.lock import clean
from saerl_fast.records.page import Part, Picture, markdown, page, shown, terminal
from saerl_fast.records.runs import RunRecord, find_runs, load_runs, pilots_note
from saerl_fast.records.samples import Table
from saerl_fast.records.stats import area_under_curve

LAW = (
    "Steps saved, with 95 % intervals, against the share of the first arm's groups that carry a gradient: "
    "a point a pool, arm and target."
)


def write_pools(root: Path, pools: Sequence[str], echo: Callable[[str], None]) -> list[Path]:
    """Write report.md, report.html and law.png into ``root`` from the runs in its folders ``pools``.

    Holm's correction is over the lines of all pools. Raises SaerlError when no pool has a run.
    """
    lines: list[tuple[str, Line]] = []
    rows, open_, said = list[list[str]](), list[list[str]](), list[str]()
    every = list[RunRecord]()
    share: dict[tuple[str, str], float] = {}
    for pool in pools:
        there = (root / pool).is_dir() and find_runs(root / pool)
        runs = [run for run in load_runs(root / pool, said.append) if run.last] if there else []
        if not runs:
            note = pilots_note(root / pool)
            said.append(f"pool {pool} has no run yet" + (f"; {note}" if note else ""))
            continue
        every += runs
        settings = settings_of(root / pool)
        targets = find_targets(runs, settings)
        arms = {arm: [run for run in runs if run.arm == arm] for arm in dict.fromkeys(r.arm for r in runs)}
        base = next(iter(arms))
        share |= {(pool, arm): _used(mine) for arm, mine in arms.items()}
        rows += [_accuracy(pool, arm, mine) for arm, mine in arms.items()]
        found = paired_lines(runs, targets, settings)
        lines += [(pool, line) for line in found]
        if late := set_late(runs, settings):
            said.append(f"pool {pool}: {late}")
        if not targets:
            said.append(f"pool {pool}: {no_target(runs)}")
            open_ += [
                [pool, arm, *["-"] * (2 + len(PAIRED[:-1])), "no target"] for arm in arms if arm != base
            ]
        for name in dict.fromkeys(line.target for line in found if line.result is None and line.out[0]):
            said.append(
                f"pool {pool}: no seed has both {base} and another arm reach {name}; choose targets that "
                f"{base} reaches in train.steps, with compare.target_values in the pool's own settings"
            )
    if not rows:
        raise SaerlError(f"the pools of {root} have no run yet; let `saerl compare` finish one first")
    bare = [line for _, line in lines]
    body = [[pool, *cells] for (pool, _), cells in zip(lines, paired_cells(bare), strict=True)] + open_
    base = rows[0][1]
    for row in body:
        row += [_percent(share[row[0], arm]) for arm in (base, row[1]) if (row[0], arm) in share]
    header = ["pool", "arm", "target", f"steps saved against {base}", *PAIRED]
    header += [f"groups with a gradient, {base}", "the arm"]
    verdict = sentence(lines)
    result: Table = ("Result by pool", header, body, f"{verdict} {PAIRED_NOTE}".strip())
    named = ["pool", "arm", "seeds", "accuracy before", "after", "mean over run", "groups with a gradient"]
    note = "Each pool has a report of its own, in its folder, with costs, budgets, curves and signals."
    note = f"{ended_early(every)} {note}".strip()
    tables: list[Table] = [
        ("Damaged or left out", ["mind"], [[line] for line in said], ""),
        result,
        ("Accuracy by pool", named, rows, note),
    ]
    parts: list[Part] = [shown(table) for table in tables if table[2]]
    if drawn := _law(lines, share, root / "law.png"):
        parts.insert(len(parts) - 1, drawn)
    clean(root)
    for line in said:
        echo(line)
    for part in parts:
        if not isinstance(part, Picture) and part[0] != tables[0][0]:
            echo(terminal(part))
    if verdict:
        echo(f"\n{verdict}")
    title = f"{root.name}: {', '.join(pools)}"
    return [
        write_text(root / "report.md", markdown(title, parts)),
        write_text(root / "report.html", page(title, parts)),
        *([drawn.file] if drawn else []),
    ]


def sentence(lines: Sequence[tuple[str, Line]]) -> str:
    """What holds at 5 % when corrected for all lines, in a sentence an arm."""
    found: dict[tuple[str, str], dict[str, dict[str, list[str]]]] = {}
    for (pool, line), (_, said) in zip(lines, verdicts([line for _, line in lines]), strict=True):
        kind = said.partition(" (")[0]
        by = "" if kind == "no claim" or line.result is None else f" by {abs(1 - line.result.ratio):.0%}"
        kinds = found.setdefault((line.arm, line.base), {"fewer steps": {}, "more steps": {}, "no claim": {}})
        kinds[kind].setdefault(pool, []).append(f"{line.target}{by}")
    told = []
    for (arm, base), kinds in found.items():
        parts = []
        for kind, pools in kinds.items():
            at = ", ".join(f"{pool} ({', '.join(targets)})" for pool, targets in pools.items())
            parts += [f"{kind} on {at}"] if pools else []
        told.append(f"{arm} against {base}: {'; '.join(parts)}.")
    return " ".join(told)


def _used(runs: Sequence[RunRecord]) -> float:
    """The mean share of groups with a gradient; unknown where no step recorded it."""
    known = [run.train["used"][np.isfinite(run.train["used"])] for run in runs]
    means = [column.mean() for column in known if len(column)]
    return float(np.mean(means)) if means else float("nan")


def _percent(value: float) -> str:
    return f"{value:.0%}" if np.isfinite(value) else "-"


def _accuracy(pool: str, arm: str, runs: Sequence[RunRecord]) -> list[str]:
    known = [run for run in runs if run.accuracy]
    columns = [
        [run.accuracy[0] for run in known if run.eval_steps[0] == 0],
        [run.accuracy[-1] for run in known],
        [area_under_curve(run.eval_steps, run.accuracy) for run in known],
    ]
    cells = [f"{np.mean(column):.3f}" if column else "-" for column in columns]
    return [pool, arm, str(len(runs)), *cells, _percent(_used(runs))]


def _law(
    lines: Sequence[tuple[str, Line]], share: dict[tuple[str, str], float], path: Path
) -> Picture | None:
    """The figure; None without matplotlib or a saving with an interval."""
    points: dict[str, list[plots.Saving]] = {}
    for pool, line in lines:
        if line.result is not None and line.result.interval is not None:
            low, high = line.result.interval
            saving = plots.Saving(share[pool, line.base], 1 - line.result.ratio, 1 - high, 1 - low)
            points.setdefault(line.arm, []).append(saving)
    try:
        plots.load()
    except ImportError:
        return None
    base = lines[0][1].base if lines else ""
    return (
        Picture(plots.law(points, base, path), LAW, "Steps saved and groups with a gradient")
        if points
        else None
    )
