"""Tables and plots of a run or a comparison, from the files it recorded and nothing else."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from saerl_fast.config import CompareConfig
from saerl_fast.errors import SaerlError, printable
from saerl_fast.fileio import first_line, mismatch, read_table, write_text
from saerl_fast.records import plots, samples
from saerl_fast.records.lock import clean
from saerl_fast.records.runs import SAERL_PHASES, RunRecord, eval_modes, load_runs, read_object
from saerl_fast.records.stats import area_under_curve, paired_ratio, steps_to_target

Table = samples.Table

SIGNALS_NOTE = (
    "Out of fold, on rows whose labels the fit had not seen: quality.auc or quality.spearman, "
    "quality.accuracy (calibrated on the other folds), difficulty.spearman and difficulty.r2. Silhouette and "
    "purity describe the rows that were clustered, next to their values by chance."
)
BASELINES_NOTE = (
    "Out of fold, on the same folds, by the same regression. difficulty.spearman_error, of the signals, is "
    "the standard error of the difference to the best of them: less than 2.5 of it is noise."
)
CARDS_NOTE = (
    "Means over the prompts of the cluster where known. Features are those that weigh more in it than "
    "elsewhere, by their lift, each with the prompt that has most of it; all of this is in scores.json."
)
SNIPPET = 80  # characters of a prompt in a table
CAPTIONS = {
    "learning_curves": "Held-out accuracy against steps and against rollouts; thin lines are single seeds.",
    "batches": "What each step trained on: its pass rate, and the share of groups that carry a gradient. "
    "Means over seeds, smoothed over nine steps.",
    "phases": "Where a step's time goes; what this project adds is red.",
    "signals": "What scoring said of the prompts: quality and difficulty where known, cluster sizes.",
}
PLAIN = re.compile(r"[\w.,:;%+\-()\[\]±/ =>'@]*")  # what a table of figures holds: written as it is
MODE_NOTES = {
    "sample": "Accuracy is the mean reward of sampled completions of held-out prompts (avg@k).",
    "greedy": "Accuracy is the mean reward of the greedy completion of each held-out prompt.",
    "prob": "Accuracy is here the teacher-forced probability of the reference answer, averaged over the "
    "held-out prompts (train.eval.mode=prob), and not a share of generated answers that were right.",
}


def write_report(root: str | Path, echo: Callable[[str], None] = lambda line: None) -> list[Path]:
    """Write report.md, report.html and the figures into ``root``; returns the paths.

    ``root`` is a run_dir or the folder of a single run in one, whose scores and SAE lie a level above.
    Raises SaerlError when ``root`` holds no run.
    """
    root, said = Path(root), list[str]()
    runs = [run for run in load_runs(root, said.append) if run.last]
    clean(root)  # a report that was killed
    for line in said:
        echo(line)
    if not runs:
        raise SaerlError(f"the runs in {root} recorded no step yet; let `saerl train` finish one first")
    settings = _settings(root)
    targets = find_targets(runs, settings)
    scores = read_object(_shared(root, "scores.json")).get("metadata", {})
    paired = paired_table(runs, targets, settings)
    paired = (*paired[:3], f"{paired[3]} {label_cost(runs, scores)}".strip())
    results = [main_table(runs, targets, settings), paired, samples.merged_table(runs)]
    opening = [samples.damage_table(said), samples.about_table(runs), samples.settings_table(runs)]
    opening += [samples.arms_table(root), samples.warnings_table(runs)]
    sae = read_object(_shared(root, "sae/train.json")) or scores.pop("sae", {})
    closing = [
        *samples.samples_tables(runs),
        phase_table(runs),
        *signal_tables(scores, sae, sae_cost(runs, sae)),
    ]
    results = [_shown(table) for table in results]
    shown = [table for table in [*map(_shown, opening), *results, *map(_shown, closing)] if table[2]]
    figures = _draw(runs, targets, root)
    title = printable(f"{root.name}: {', '.join(dict.fromkeys(run.arm for run in runs))}")
    for table in results:
        if table[2]:
            echo(_text(table))
    return [
        write_text(root / "report.md", _markdown(title, shown, figures)),
        write_text(root / "report.html", _html(title, shown, figures)),
        *figures,
    ]


def _shown(table: Table) -> Table:
    """``table`` without characters that a terminal would obey."""
    name, header, rows, note = table
    return name, [*map(printable, header)], [[*map(printable, row)] for row in rows], printable(note)


def _shared(root: Path, name: str) -> Path:
    """A file that all runs of a run_dir share; for the folder of a single run, the one beside it."""
    own = root / name
    alone = not own.exists() and (root / "metrics.jsonl").is_file()
    return root.resolve().parent / name if alone else own


def find_targets(runs: list[RunRecord], settings: CompareConfig) -> dict[str, float]:
    """Accuracies to reach: registered values, else shares of the first arm's mean gain."""
    if settings.target_values:
        return {f"{value:.3f}": value for value in settings.target_values}
    first = [run for run in runs if run.arm == runs[0].arm and len(run.accuracy) > 1]
    if not first:
        return {}
    start = float(np.mean([run.accuracy[0] for run in first]))
    gain = float(np.mean([np.mean(run.accuracy[-settings.smooth :]) for run in first])) - start
    if not gain > 0:
        return {}
    return {f"{share:.0%} of {runs[0].arm}'s gain": start + share * gain for share in settings.targets}


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
    basis = (
        "were registered before the run" if settings.target_values else "come from the first arm's own curve"
    )
    notes = [_mode_note(runs)]
    if targets:
        window = f"{settings.smooth} evaluations"
        notes.append(f"Targets {basis}; curves are averaged over {window} around each.")
    return ("Result", header, rows, " ".join(note for note in notes if note))


def _mode_note(runs: list[RunRecord]) -> str:
    """What "accuracy" means in these runs."""
    modes = eval_modes(runs)
    if len(modes) > 1:
        return (
            f"The runs were evaluated in different modes ({', '.join(modes)}): do not compare their figures."
        )
    return MODE_NOTES.get(modes[0], "") if modes else ""


def paired_table(runs: list[RunRecord], targets: dict[str, float], settings: CompareConfig) -> Table:
    """Steps to target relative to the first arm, paired by seed, with a t interval."""
    arms = list(dict.fromkeys(run.arm for run in runs))
    by_key = {(run.arm, run.seed): run for run in runs if run.accuracy}
    seeds = sorted({run.seed for run in runs})
    rows = []
    for arm in arms[1:]:
        pairs = [s for s in seeds if (arms[0], s) in by_key and (arm, s) in by_key]
        for name, value in targets.items():
            both = [[_steps(by_key[one, s], value, settings.smooth) for s in pairs] for one in (arms[0], arm)]
            result = paired_ratio(both[0], both[1])
            if result is None:
                why = f"{len(pairs)} of {len(pairs)} pairs left out" if pairs else "no paired seed"
                rows.append([arm, name, "-", "-", f"0 (+{len(pairs)})", f"no claim ({why})"])
                continue
            interval = "too few pairs"
            if result.interval is not None:
                low, high = result.interval
                interval = f"[{1 - high:+.0%}, {1 - low:+.0%}]"
            used = f"{result.pairs} (+{result.censored + result.zero})"
            rows.append([arm, name, f"{1 - result.ratio:+.0%}", interval, used, result.verdict])
    note = (
        "Geometric mean over paired seeds; the interval is Student's t on the logarithms of the ratios. "
        "Pairs in brackets are not in the mean: at least one run never reached the target (censored), or was "
        "there at step 0, where a ratio means nothing. Any such pair rules out a verdict, for the others are "
        "a selection. One or two pairs prove nothing: the same order run twice with other seeds differs by "
        "as much. Each line is tested at 5% by itself; the more lines, the likelier a false verdict in one."
    )
    header = [
        "arm",
        "target",
        f"steps saved against {arms[0]}",
        "95% interval",
        "pairs (+left out)",
        "verdict",
    ]
    return ("Paired comparison", header, rows, note)


def label_cost(runs: list[RunRecord], scores: dict[str, Any]) -> str:
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


def sae_cost(runs: list[RunRecord], sae: dict[str, Any]) -> str:
    """What training the SAE took, in steps of these runs."""
    parts = [sae.get(name) for name in ("seconds_capture", "seconds", "seconds_ce")]
    spent = sum(float(part) for part in parts if part is not None and not mismatch(part, float))
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


def signal_tables(scores: dict[str, Any], sae: dict[str, Any], cost: str) -> list[Table]:
    """Figures of every probe and the one-off costs, as scoring recorded them."""
    tables: list[Table] = []
    probes = {name: scores.get(name) or {} for name in ("difficulty", "quality")}
    baselines = {name: probe.pop("baselines", None) for name, probe in probes.items()}
    shown = [name for name in probes if baselines[name]]
    if shown:
        kinds = list(dict.fromkeys(kind for name in shown for kind in baselines[name] or ()))
        header = ["features", *(f"{name} ({_measure(probes[name])})" for name in shown)]
        rows = [["as set", *(_cell(probes[name].get(_measure(probes[name]))) for name in shown)]]
        behind = (probes["difficulty"].get("note") or "").capitalize()
        rows += [
            [f"{kind} alone", *(_cell((baselines[name] or {}).get(kind, "-")) for name in shown)]
            for kind in kinds
        ]
        tables.append(
            ("Probes against one kind of features", header, rows, f"{BASELINES_NOTE} {behind}".strip())
        )
    try:
        tables.append(cards_table(scores))
    except (AttributeError, LookupError, TypeError, ValueError) as err:
        why = f"{type(err).__name__}: {first_line(err)}"
        raise SaerlError(
            f"the cluster cards in scores.json are damaged ({why}); make them again with `saerl score`"
        ) from err
    for title, record, note in (("Signals", scores, SIGNALS_NOTE), ("SAE training", sae, cost)):
        known = [(key, value) for key, value in _flatten(record) if value is not None]
        rows = [[key, _cell(value)] for key, value in known if not isinstance(value, (list, dict))]
        tables.append((title, ["figure", "value"], rows, note))
    return tables


def cards_table(scores: dict[str, Any]) -> Table:
    """One row a cluster, the largest first: what it is made of, from the cards of its scoring."""
    rows = []
    for card in (scores.get("clusters") or {}).get("cards") or []:
        features = [
            f"{feature['feature']} (+{feature['lift']:.2f}): {feature['prompts'][0]['text'][:SNIPPET]}"
            for feature in card["features"]
        ]
        known = [card.get(name) for name in ("difficulty", "pass_rate", "quality")]
        rows.append(
            [
                str(card["cluster"]),
                str(card["size"]),
                *("-" if value is None else f"{value:.2f}" for value in known),
                "\n".join(features),
                "\n".join(prompt["text"][:SNIPPET] for prompt in card["prompts"]),
            ]
        )
    header = ["cluster", "prompts", "difficulty", "pass rate", "quality", "features (lift): first prompt"]
    return ("Clusters", [*header, "typical prompts"], rows, CARDS_NOTE if rows else "")


def _measure(probe: dict[str, Any]) -> str:
    """The figure that a probe's baselines are figures of."""
    return "auc" if probe.get("auc") is not None else "spearman"


def _flatten(record: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in record.items():
        if key in ("config", "fingerprint", "format", "version"):
            continue
        if isinstance(value, dict):
            flat += _flatten(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat


def _draw(runs: list[RunRecord], targets: dict[str, float], root: Path) -> list[Path]:
    try:
        plots.load()
    except ImportError:
        return []
    figures = []
    if any(run.accuracy for run in runs):
        figures.append(plots.learning_curves(runs, targets, root / "learning_curves.png"))
    if any(len(run.train) for run in runs):
        figures.append(plots.batches(runs, root / "batches.png"))
        figures.append(plots.phases(runs, root / "phases.png"))
    scores = _shared(root, "scores.parquet")
    if scores.is_file():
        again = "make it again with `saerl score`"
        try:
            figures.append(plots.signals(read_table(scores, again), root / "signals.png"))
        except SaerlError:
            raise
        except (LookupError, TypeError, ValueError, OverflowError) as err:
            raise SaerlError(f"{scores} is damaged ({first_line(err)}); {again}") from err
    return figures


def _settings(root: Path) -> CompareConfig:
    recorded = read_object(root / "compare.json")
    known = {key: recorded[key] for key in CompareConfig.__dataclass_fields__ if key in recorded}
    return CompareConfig(**known)


def _steps(run: RunRecord, target: float, window: int) -> float | None:
    return steps_to_target(run.eval_steps, run.accuracy, target, window)


def _step_seconds(run: RunRecord) -> float:
    return sum(s for name, s in run.phase_seconds().items() if name != "eval") / len(run.train)


def _mean(values: list[Any], digits: int = 3) -> str:
    if not values:
        return "-"
    text = f"{np.mean(values):,.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):,.{digits}f}"


def _phase_order(name: str) -> tuple[bool, str]:
    return (name in SAERL_PHASES, name)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(title: str, tables: list[Table], figures: list[Path]) -> str:
    parts = [f"# {_markdown_cell(title)}", ""]
    for name, header, rows, note in tables:
        lines = ["| " + " | ".join(map(_markdown_cell, row)) + " |" for row in [header, *rows]]
        parts += [f"## {name}", "", lines[0], "|" + "---|" * len(header), *lines[1:]]
        parts += ["", _markdown_cell(note), ""] if note else [""]
    parts += ["## Figures\n"] if figures else []
    parts += [f"![{figure.stem}]({figure.name})\n\n*{CAPTIONS[figure.stem]}*\n" for figure in figures]
    return "\n".join(parts) + "\n"


def _markdown_cell(text: str) -> str:
    """``text`` as one line that a table may hold: no markup, no HTML, no column ends."""
    lines = html.escape(text, quote=False).replace("\\", "\\\\").splitlines() or [""]
    if PLAIN.fullmatch(text) and "](" not in text:  # no link
        return text
    return re.sub(r"([|`*_\[\]$])", r"\\\1", "<br>".join(lines))


def _text(table: Table) -> str:
    """The table for a terminal: one block an arm would be too long, so columns are padded."""
    name, header, rows, _ = table
    header, *rows = [[" ".join(cell.splitlines()) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(["", name, *lines])


def _html(title: str, tables: list[Table], figures: list[Path]) -> str:
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;margin:.5rem 0;font-size:14px}th{background:#f7fafc}"
        "td,th{padding:.3rem .7rem;text-align:left;border-bottom:1px solid #e2e8f0}"
        "img{max-width:100%}figure{margin:1rem 0}p,figcaption{color:#4a5568}.scroll{overflow-x:auto}"
        "td{white-space:pre-wrap;vertical-align:top;overflow-wrap:anywhere;min-width:3rem}"
    )
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"]
    parts += [f"<style>{style}</style><h1>{html.escape(title)}</h1>"]
    encoded = [base64.b64encode(figure.read_bytes()).decode() for figure in figures]
    pictures = [
        f'<figure><img alt="{figure.stem}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(CAPTIONS[figure.stem])}</figcaption></figure>"
        for figure, data in zip(figures, encoded, strict=True)
    ]
    for name, header, rows, note in tables:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        parts.append(
            f"<h2>{html.escape(name)}</h2><div class=scroll><table><tr>{head}</tr>{body}</table></div>"
        )
        parts.append(f"<p>{html.escape(note)}</p>" if note else "")
        if name == "Result":
            parts += pictures[:1]
    parts += ["<h2>Figures</h2>"] if pictures[1:] else []
    return "\n".join(parts + pictures[1:]) + "</html>\n"
