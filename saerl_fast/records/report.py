"""Tables and plots of a run or a comparison, from the files it recorded and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from saerl_fast.config import CompareConfig
from saerl_fast.errors import SaerlError, first_line, printable
from saerl_fast.fileio import mismatch, write_text
from saerl_fast.records import by_pool, compared, plots, samples, scored
from saerl_fast.records.charts import calibration_chart, map_chart
from saerl_fast.records.lock import clean
from saerl_fast.records.page import Part, Picture, markdown, page, shown, terminal
from saerl_fast.records.runs import (
    SAERL_PHASES,
    RunRecord,
    eval_modes,
    find_runs,
    load_runs,
    pilots_note,
    read_object,
)
from saerl_fast.records.stats import area_under_curve, steps_to_target

Table = samples.Table

CAPTIONS = {
    "learning_curves": "Held-out accuracy against steps and against rollouts; thin lines are single seeds.",
    "batches": "What each step trained on: its pass rate, and the share of groups that carry a gradient. "
    "Means over seeds, smoothed over nine steps.",
    "phases": "Where a step's time goes; what this project adds is red.",
    "signals": "What scoring said of the prompts: quality and difficulty where known, cluster sizes.",
    "map": "Numbers are clusters. In the page, point at a prompt to read it, and choose what colours it.",
    "calibration": "Prompts with a label; what was expected comes from fits that had not seen it. In the "
    "page, point at a prompt to read it.",
    "quality_kinds": "Held-out AUC of each kind of bad row, by the fits of the quality probe.",
}
BAND = "80 % of the labels lie within the band (in the page: between the dotted lines)."
MODE_NOTES = {
    "sample": "Accuracy is the mean reward of sampled completions of held-out prompts (avg@k).",
    "greedy": "Accuracy is the mean reward of the greedy completion of each held-out prompt.",
    "prob": "Accuracy is here the teacher-forced probability of the reference answer, averaged over the "
    "held-out prompts (train.eval.mode=prob), and not a share of generated answers that were right.",
}


def write_report(root: str | Path, echo: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Write report.md, report.html and the figures into ``root``; returns the paths.

    ``root`` is a run_dir, with runs or scores alone, or the folder of a single run in one, whose scores and
    SAE lie a level above. Raises SaerlError when ``root`` holds neither.
    """
    root, said = Path(root), list[str]()
    if pools := read_object(root / "compare.json").get("pools"):
        return by_pool.write_pools(root, pools, echo)
    only_scored = (root / "scores.json").is_file() and not find_runs(root)
    runs = [] if only_scored else [run for run in load_runs(root, said.append) if run.last]
    settings = compared.settings_of(root)
    targets = compared.find_targets(runs, settings)
    if late := compared.set_late(runs, settings):
        said.append(late)
    if len({run.arm for run in runs}) > 1 and not targets:
        said.append(compared.no_target(runs))
    if only_scored and (note := pilots_note(root)):
        said.append(f"no run of the comparison has begun, so the report is of scores alone; {note}")
    clean(root)  # a report that was killed
    for line in said:
        echo(line)
    if not runs and not only_scored:
        raise SaerlError(f"the runs in {root} recorded no step yet; let `saerl train` finish one first")
    scores = read_object(_shared(root, "scores.json")).get("metadata", {})
    sae = read_object(_shared(root, "sae/train.json")) or scores.pop("sae", {})
    paired = compared.paired_table(runs, targets, settings)
    paired = (*paired[:3], f"{paired[3]} {compared.label_cost(runs, scores)}".strip())
    results = [main_table(runs, targets, settings), paired]
    results += [compared.costs_table(runs, targets, settings), compared.budget_table(runs, settings)]
    results += [compared.ledger_table(runs, targets, settings, scores, sae), samples.merged_table(runs)]
    results = [shown(table) for table in results]
    signals = scored.signal_tables(scores, sae, sae_cost(runs, sae))
    drawn = _draw(runs, targets, root) | _draw_scores(scores, root)
    order: list[Part | str] = [samples.damage_table(said), results[0], "learning_curves", *results[1:]]
    order += [samples.arms_table(root), samples.warnings_table(runs), "batches"]
    order += [signals["probes"], "map", "calibration", "quality_kinds"]
    order += [signals["clusters"], signals["features"]]
    order += ["signals", "phases", phase_table(runs), *samples.samples_tables(runs)]
    order += [samples.settings_table(runs), samples.about_table(runs), signals["signals"], signals["sae"]]
    parts: list[Part] = []
    for part in order:
        if isinstance(part, str):
            parts += [drawn[part]] if part in drawn else []
        elif isinstance(part, Picture) or part[2]:
            parts.append(part if isinstance(part, Picture) else shown(part))
    arms = ", ".join(dict.fromkeys(run.arm for run in runs)) or "scores"
    title = printable(f"{root.name}: {arms}")
    for table in results:
        if table[2]:
            echo(terminal(table))
    return [
        write_text(root / "report.md", markdown(title, parts)),
        write_text(root / "report.html", page(title, parts)),
        *(picture.file for picture in drawn.values()),
    ]


def _shared(root: Path, name: str) -> Path:
    """A file that all runs of a run_dir share; for the folder of a single run, the one beside it."""
    own = root / name
    alone = not own.exists() and (root / "metrics.jsonl").is_file()
    return root.resolve().parent / name if alone else own


def main_table(runs: list[RunRecord], targets: dict[str, float], settings: CompareConfig) -> Table:
    """One row an arm: accuracy, steps to each target, rollouts, seconds and overhead."""
    measure = "P(reference answer)" if eval_modes(runs) == ["prob"] else "accuracy"
    header = ["arm", "seeds", f"{measure} before", "after", "mean over run"]
    header += [f"steps to {value:.3f} ({name})" for name, value in targets.items()]
    header += ["groups with a gradient", "rollouts", "seconds/step", "SAE + plan overhead"]
    rows = []
    for arm in dict.fromkeys(run.arm for run in runs):
        mine = [run for run in runs if run.arm == arm]
        known = [run for run in mine if run.accuracy]
        holed = sum(bool(run.holes()) for run in mine)
        row = [arm, str(len(mine)) + (f" ({holed} with lost rows)" if holed else "")]
        row.append(_mean([run.accuracy[0] for run in known if run.eval_steps[0] == 0]))
        row.append(_mean([run.accuracy[-1] for run in known]))
        row += [_mean([area_under_curve(run.eval_steps, run.accuracy) for run in known])]
        for value in targets.values():
            reached = [steps_to_target(r.eval_steps, r.accuracy, value, settings.smooth) for r in known]
            found = [step for step in reached if step is not None]
            text = _mean(found, 1) if found else "not reached"
            row.append(
                text + (f" ({len(found)} of {len(known)} runs)" if 0 < len(found) < len(known) else "")
            )
        used = [np.nanmean(run.train["used"]) for run in mine if np.isfinite(run.train["used"]).any()]
        row.append(f"{np.mean(used):.0%}" if used else "-")
        row.append(_mean([run.rollouts() for run in mine], 0))
        row.append(_mean([_step_seconds(run) for run in mine if len(run.train)], 2))
        overheads = [share for share in (run.overhead() for run in mine) if share is not None]
        row.append(f"{np.mean(overheads):.1%}" if overheads else "-")
        rows.append(row)
    basis = "come from the first arm's own curve"
    if settings.target_values:
        late = compared.set_late(runs, settings)
        basis = "were given after the start of some runs" if late else "were registered before the run"
    if settings.target_values and settings.pilots:
        basis = f"come from {len(settings.pilots)} runs of the first arm with other seeds (compare.pilots)"
    notes = [_mode_note(runs)]
    if targets:
        width = (settings.smooth - 1) // 2 * 2 + 1  # see `smooth`
        window = f"averaged over {width} evaluations around each" if width > 1 else "not averaged"
        notes.append(f"Targets {basis}; curves are {window}.")
    if early := compared.ended_early(runs):
        notes.append(early)
    return ("Result", header, rows, " ".join(note for note in notes if note))


def _mode_note(runs: list[RunRecord]) -> str:
    """What "accuracy" means in these runs."""
    modes = eval_modes(runs)
    if len(modes) > 1:
        return (
            f"The runs were evaluated in different modes ({', '.join(modes)}): do not compare their figures."
        )
    return MODE_NOTES.get(modes[0], "") if modes else ""


def sae_cost(runs: list[RunRecord], sae: dict[str, Any]) -> str:
    """What training the SAE took, in steps of these runs."""
    spent = compared.sae_seconds(sae)
    step = float(np.mean([_step_seconds(run) for run in runs if len(run.train)] or [0.0]))
    if spent <= 0 or not step > 0:
        return ""
    return f"The SAE took {spent:,.0f} s, once for all runs: as long as {spent / step:.1f} of their steps."


def phase_table(runs: list[RunRecord]) -> Table:
    """Mean seconds of a step by phase."""
    arms = list(dict.fromkeys(run.arm for run in runs))
    per_arm: dict[str, dict[str, float]] = {}
    for arm in arms:
        mine = [run for run in runs if run.arm == arm]
        steps = max(sum(len(run.train) for run in mine), 1)
        found = {name for run in mine for name in run.phase_seconds()}
        per_arm[arm] = {n: sum(run.phase_seconds().get(n, 0.0) for run in mine) / steps for n in found}
    names = list(dict.fromkeys(name for arm in arms for name in sorted(per_arm[arm], key=_phase_order)))
    rows = [[arm, *(f"{1000 * per_arm[arm].get(name, 0.0):.1f}" for name in names)] for arm in arms]
    note = "Overhead above is (capture + encode + plan) over everything else but evaluation."
    return ("Milliseconds per step, by phase", ["arm", *names], rows if names else [], note)


def _draw(runs: list[RunRecord], targets: dict[str, float], root: Path) -> dict[str, Picture]:
    """The figures of the runs, by name; none without matplotlib."""
    try:
        plots.load()
    except ImportError:
        return {}
    drawn = []
    if any(run.accuracy for run in runs):
        drawn.append(plots.learning_curves(runs, targets, root / "learning_curves.png"))
    if any(len(run.train) for run in runs):
        drawn.append(plots.batches(runs, root / "batches.png"))
        drawn.append(plots.phases(runs, root / "phases.png"))
    return {file.stem: Picture(file, CAPTIONS[file.stem]) for file in drawn}


def _draw_scores(scores: dict[str, Any], root: Path) -> dict[str, Picture]:
    """The figures of the scores, by name; none without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return {}
    found: dict[str, Picture] = {}

    def add(file: Path, title: str, note: str = "", chart: dict[str, Any] | None = None) -> None:
        found[file.stem] = Picture(file, f"{note} {CAPTIONS[file.stem]}".strip(), title, chart)

    if kinds := scored.by_kind(scores):
        add(plots.kinds(kinds, root / "quality_kinds.png"), "Quality by kind")
    file = _shared(root, "scores.parquet")
    if not file.is_file():
        return found
    columns = scored.read_columns(file)
    try:
        add(plots.signals(columns, root / "signals.png"), "Scores")
        said, seen, rows = scored.calibrated(columns)
        ids = [printable(str(columns["prompt_id"][i])) for i in rows]
    except SaerlError:  # the disk, say
        raise
    except (LookupError, TypeError, ValueError, OverflowError) as err:
        raise SaerlError(f"{file} is damaged ({first_line(err)}); make it again with `saerl score`") from err
    points = scored.read_map(scores, columns)
    if len(said):
        interval = (scores.get("difficulty") or {}).get("interval")
        width = None if mismatch(interval, float) else interval
        texts = {} if points is None else dict(zip(points.rows, points.texts, strict=True))
        names = [texts.get(i, name) for i, name in zip(rows, ids, strict=True)]
        drawn = plots.calibration(said, seen, width, root / "calibration.png")
        chart = calibration_chart(said, seen, names, width)
        add(drawn, "Difficulty against what was observed", "" if width is None else BAND, chart)
    if points is not None:
        add(plots.prompt_map(points, root / "map.png"), "Map of the prompts", points.note, map_chart(points))
    return found


def _step_seconds(run: RunRecord) -> float:
    return sum(s for name, s in run.phase_seconds().items() if name != "eval") / len(run.train)


def _mean(values: list[Any], digits: int = 3) -> str:
    if not values:
        return "-"
    text = f"{np.mean(values):,.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):,.{digits}f}"


def _phase_order(name: str) -> tuple[bool, str]:
    return (name in SAERL_PHASES, name)
