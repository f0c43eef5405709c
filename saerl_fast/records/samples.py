"""What a report opens and closes with: settings and versions of the runs, and texts that they wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saerl_fast.config import Config, to_dict
from saerl_fast.records.log import end_rows, read_jsonl
from saerl_fast.records.runs import RunRecord, checked, read_object

Table = tuple[str, list[str], list[list[str]], str]  # title, header, rows, note
CUT = 400  # characters of a text that are shown
SHOWN = 3  # prompts of each kind


def about_table(runs: list[RunRecord]) -> Table:
    """Versions, device and date of the runs; where they differ, each value once."""
    rows = []
    records = [run.config.get("made", {}) for run in runs]
    for key in dict.fromkeys(key for record in records for key in record):
        values = sorted({str(record[key]) for record in records if record.get(key) is not None})
        if key == "date" and len(values) > 2:
            values = [f"{values[0]} to {values[-1]}"]
        if values:
            rows.append([key, ", ".join(values)])
    resumed = [one for run in runs for one in run.config.get("resumed", [])]
    if resumed:
        rows.append(["resumed", ", ".join(str(one.get("date")) for one in resumed)])
    for key in ("saerl", "torch", "transformers", "device"):
        changed = {str(one.get(key)) for one in resumed} - {str(record.get(key)) for record in records}
        if changed:
            rows.append([f"{key} when resumed", ", ".join(sorted(changed))])
    return ("Made with", ["what", "which"], rows, "")


def settings_table(runs: list[RunRecord]) -> Table:
    """Settings that are not the default, or not the same in all runs: one column, or one for each arm."""
    arms: dict[str, dict[str, Any]] = {}
    for run in runs:
        if "config" in run.config:
            arms.setdefault(run.arm, dict(_flat(run.config["config"])))
    if not arms:
        return ("Settings", [], [], "")
    default = dict(_flat(to_dict(Config())))
    rows = []
    for key in dict.fromkeys(key for tree in arms.values() for key in tree):
        if key.startswith("compare.") or key in ("run_dir", "train.seed"):
            continue
        values = [_plain(tree.get(key)) for tree in arms.values()]
        if len(set(values)) > 1:
            rows.append([key, *values])
        elif values[0] != _plain(default.get(key)):
            rows.append([key, values[0], *[""] * (len(arms) - 1)])
    return ("Settings", ["setting", *arms] if len(arms) > 1 else ["setting", "value"], rows, SETTINGS_NOTE)


SETTINGS_NOTE = (
    "Not the default. Where arms differ, each has its own value; else the first column is for all."
)


def arms_table(root: Path) -> Table:
    """What `saerl compare` said about arms that differ in more than they name."""
    notes = read_object(root / "compare.json").get("notes", [])
    return ("Differences between the arms", ["mind"], [[str(note)] for note in notes], "")


def merged_table(runs: list[RunRecord]) -> Table:
    """What merging adapters into half-precision weights changed."""
    header = ["arm", "seed", "accuracy with adapter/", "merged and rounded", "change kept", "model/ is"]
    rows = []
    for run in runs:
        if found := run.summary.get("merged"):
            kept, dtype = f"{found['change_kept']:.0%}", f"{found['accuracy']:.4g} ({found['rounded_to']})"
            own = f"{run.summary.get('accuracy', float('nan')):.4g}"
            rows.append([run.arm, str(run.seed), own, dtype, kept, found["saved_as"]])
    note = "All figures of this report are of the model with its adapters, as adapter/ holds them."
    return ("What the figures are of", header, rows, note)


def damage_table(said: list[str]) -> Table:
    """What is missing from the records, or was not counted."""
    note = "Figures and curves below are of the rows that are left; a curve has a gap where rows are missing."
    return ("Damaged or left out", ["mind"], [[line] for line in said], note)


def warnings_table(runs: list[RunRecord]) -> Table:
    """The warnings that training gave, and for how many steps (or evaluations) each held."""
    rows = []
    for run in runs:
        for name, found in (run.summary.get("warnings") or run.alarms).items():
            rows.append(
                [run.arm, str(run.seed), name, *(str(found[key]) for key in ("first", "times", "steps"))]
            )
    note = "What the warnings mean stands in rl/health.py; steps of an accuracy are evaluations."
    return ("Warnings of training", ["arm", "seed", "warning", "first at step", "times", "steps"], rows, note)


def samples_tables(runs: list[RunRecord]) -> list[Table]:
    """Completions of the last training step, and held-out items, of the first run of each arm."""
    trained: list[list[str]] = []
    held_out: list[list[str]] = []
    for run in {run.arm: run for run in reversed(runs)}.values():
        trained[:0] = _rollouts(run)
        held_out[:0] = _items(run)
    return [
        (
            "Sample completions",
            ["arm", "step", "prompt", "answer", "completion", "reward"],
            trained,
            "The best and the worst of a prompt's completions in the last step recorded (rollouts.jsonl).",
        ),
        (
            "Held-out items",
            ["arm", "prompt", "answer", "completion", "score before", "after"],
            held_out,
            "Of the first and the last evaluation (eval_items.jsonl): the items that changed most.",
        ),
    ]


def _rollouts(run: RunRecord) -> list[list[str]]:
    path = run.folder / "rollouts.jsonl"
    last = checked(end_rows(path, last=True)[:SHOWN], path)
    found = []
    for row in last:
        rewards, texts = row.get("rewards") or [], row.get("completions") or []
        ranked = sorted(range(min(len(rewards), len(texts))), key=lambda i: rewards[i] or 0.0)
        for i in dict.fromkeys(ranked[-1:] + ranked[:1]):
            head = [run.arm, str(row["step"]), _cut(row.get("prompt")), _cut(row.get("answer"))]
            found.append([*head, _cut(texts[i]), _plain(rewards[i])])
    return found


def _items(run: RunRecord) -> list[list[str]]:
    path, asked_of = run.folder / "eval_items.jsonl", run.folder / "eval_prompts.jsonl"
    prompts = {row["prompt_id"]: row for row in _jsonl(asked_of)}
    ends = (checked(end_rows(path, last=end), path) for end in (False, True))
    first, last = ({row["prompt_id"]: row for row in rows} for rows in ends)
    change = {
        name: abs((row.get("score") or 0) - (first[name].get("score") or 0))
        for name, row in last.items()
        if name in first
    }
    found = []
    for name in sorted(change, key=lambda name: -change[name])[:SHOWN]:
        asked = prompts.get(name, {})
        text = [
            _cut(asked.get("prompt", name)),
            _cut(asked.get("answer")),
            _cut(last[name].get("completion")),
        ]
        found.append([run.arm, *text, _plain(first[name].get("score")), _plain(last[name].get("score"))])
    return found


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return checked(read_jsonl(path), path) if path.is_file() else []


def _cut(text: Any) -> str:
    if text is None:
        return "-"
    whole = text if isinstance(text, str) else str(text)
    return whole if len(whole) <= CUT else f"{whole[: CUT // 2]} ... {whole[-CUT // 2 :]}"


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
