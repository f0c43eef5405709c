"""`saerl export`: a pool with its scores, in the order of a plan, as Parquet with a dataset card.

    saerl export runs/demo exported --to trl      # or verl, parquet

parquet: prompts.parquet, every prompt with its scores, and plan.parquet, which prompts each step takes.
trl: train.parquet, the planned prompts in plan order. verl: the same in verl's schema. An adaptive plan has
no order beforehand: trl then gets the prompts that it may choose from, and plan.json for `plan_trainer`.

``datasets.load_dataset("exported")`` reads the folder, Ray by ``ray.data.read_parquet``; ``--push-to-hub``
shares it, see ``integrations.share``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import atomic_path, write_text
from saerl_fast.integrations.columns import add_plan
from saerl_fast.integrations.verl import write_parquet
from saerl_fast.plan import Plan, load_plan, save_plan
from saerl_fast.plan.sampler import TOLD
from saerl_fast.plan.static import StaticPlan
from saerl_fast.prompts.pool import Pool
from saerl_fast.records import manifest
from saerl_fast.records.lock import clean, lock, vacant
from saerl_fast.signals.scores import Scores
from saerl_fast.signals.table import SCORE_COLUMNS

CONSUMERS = ("parquet", "trl", "verl")
FILES = ("prompts.parquet", "plan.parquet", "train.parquet", "plan.json", "plan.safetensors", "README.md")
MEANINGS = {
    "prompt_id": "the prompt's name in the plan",
    "saerl_cluster": "cluster of its SAE features",
    "saerl_difficulty": "predicted failure rate, 1 is hard; null: unknown",
    "saerl_quality": "predicted probability of a good prompt; null: unknown",
    "saerl_pass_rate": "measured pass rate, of the prompts that were rolled out",
    "saerl_copy_of": "row that has this text before it, or -1",
    "saerl_step": "step of the plan that takes it, from 0",
}


def export(
    run_dir: str | Path, folder: str | Path, to: str, *, plan: str | Path | None = None, reward: Sequence[str]
) -> list[Path]:
    """Write what ``to`` (one of CONSUMERS) reads into the new ``folder``; the files.

    ``run_dir``: where `saerl score` wrote; ``plan``: a plan.json, by default the one there. ``reward``: of
    `write_parquet`, for verl. A folder that holds just this already, since an export was interrupted at its
    end, say, stays. Raises SaerlError without scores, without a plan (parquet needs none), on an adaptive
    plan for verl, on a plan that was made there from other scores, and on a folder that holds more than what
    a killed export has left.
    """
    import pyarrow.parquet as pq
    from datasets import Dataset

    run_dir, folder = Path(run_dir), Path(folder)
    if to not in CONSUMERS:
        raise SaerlError(
            f"--to {to} is unknown; choose one of {', '.join(CONSUMERS)} (Ray reads parquet, prime-rl takes "
            "no file: see integrations.prime_rl)"
        )
    _refuse_full(folder)
    made = manifest.check(run_dir, "scores", "saerl score")
    scores = Scores.load(run_dir)
    path = Path(plan) if plan is not None else run_dir / "plan.json"
    found = load_plan(path) if plan is not None or to != "parquet" or path.exists() else None
    if found is not None and found.asks:
        raise SaerlError(TOLD.format(found.schedule))
    if found is not None and plan is None:
        _check_origin(run_dir, made)
    table = Dataset(pq.read_table(run_dir / "scores.parquet").replace_schema_metadata())
    if manifest.check(run_dir, "scores", "saerl score") != made:
        raise SaerlError(f"the scores in {run_dir} were made again while they were read; export again")
    files_read = [run_dir / "scores.parquet"]
    if found is not None:
        files_read += [file for file in (path, path.with_suffix(".safetensors")) if file.is_file()]
    inputs = {"to": to, "reward": list(reward), "files": [manifest.digest(file) for file in files_read]}
    data = {"prompts.parquet": table}
    if to == "trl" and found is not None:
        data = {"train.parquet": add_plan(table, found)}
    elif to == "verl":
        data = {}
    elif isinstance(found, StaticPlan):
        data["plan.parquet"] = add_plan(table.select_columns(["prompt_id"]), found)
    with lock(folder):
        _refuse_full(folder)  # once more: another may have written it
        there = manifest.look(folder, "export")
        if there.entry and not there.fault:
            if there.entry.get("inputs") != inputs:
                raise SaerlError(f"{folder} holds an export of something else; name a new folder")
            return [folder / name for name in sorted(there.entry["files"])]
        try:
            manifest.begin(folder, "export")
            for name in FILES:
                (folder / name).unlink(missing_ok=True)
            for name, rows in data.items():
                with atomic_path(folder / name) as temporary:
                    rows.to_parquet(str(temporary))
            if found is not None and to == "verl":
                own = [name for name in table.column_names if name not in SCORE_COLUMNS]
                pool = Pool({name: list(table[name]) for name in own})
                write_parquet(found, pool, folder / "train.parquet", reward=reward)
            elif found is not None:
                save_plan(found, folder / "plan.json")
            names = list(data) or ["train.parquet"]
            write_text(folder / "README.md", _card(table, scores, found, to, names))
            files = [name for name in FILES if (folder / name).exists()]
            manifest.record(folder, "export", files, {"inputs": inputs})
        except BaseException:  # half of an export looks like a whole one to who reads its Parquet files
            for name in (*FILES, manifest.FILE):
                (folder / name).unlink(missing_ok=True)
            raise
    return [folder / name for name in sorted(files)]


def _refuse_full(folder: Path) -> None:
    """SaerlError when ``folder`` holds anything but what a killed export has left in it."""
    if folder.exists() and not folder.is_dir():
        raise SaerlError(f"{folder} is a file; name a new folder")
    clean(folder)
    found = manifest.look(folder, "export")
    if not vacant(folder, FILES if found.partial or (found.entry and not found.fault) else ()):
        raise SaerlError(f"{folder} exists and is not an empty folder; name a new one")


def _check_origin(run_dir: Path, scores: dict[str, Any] | None) -> None:
    """SaerlError when the manifest says that the plan in ``run_dir`` is of other scores than these."""
    files = {name: kept["sha256"] for name, kept in (scores or {}).get("files", {}).items()}
    plan = manifest.look(run_dir, "plan").entry or {}
    if any(made and made != files.get(name, made) for name, made in plan.get("inputs", {}).items()):
        raise SaerlError(
            f"{run_dir / 'plan.json'} was made from other scores than those beside it; make it again with "
            "`saerl plan`, or name it with --plan"
        )


def _card(table: Any, scores: Scores, plan: Plan | None, to: str, names: list[str]) -> str:
    """The folder's README.md: a header that `datasets` reads, and what the columns mean."""
    configs = [f"- config_name: {name.partition('.')[0]}\n  data_files: {name}" for name in names]
    configs[0] += "\n  default: true"
    lines = [
        "\n".join(["---", "configs:", *configs, "tags: [saerl-fast, reinforcement-learning]", "---"]),
        "# Prompts for reinforcement learning, scored",
        f"{len(table)} prompts, scored by saerl-fast from the features of a sparse autoencoder.",
    ]
    if plan is not None:
        size = f"{plan.total_steps} steps of {plan.batch_size} prompts, seed {plan.seed}"
        lines.append(f"Plan: schedule `{plan.schedule}`, {size}; it leaves out {len(plan.dropped)} prompts.")
        if not isinstance(plan, StaticPlan):
            lines.append("It chooses as training goes on (`plan_trainer`), so the rows are in no order.")
    if to == "verl":
        lines.append("Rows are in plan order: `data.shuffle=False`; columns as in verl's data format.")
    else:
        columns = [*table.column_names, *["saerl_step"] * isinstance(plan, StaticPlan)]
        rows = [f"| {name} | {meaning} |" for name, meaning in MEANINGS.items() if name in columns]
        lines.append("\n".join(["| column | meaning |", "|---|---|", *rows]))
    for name, figure in (("difficulty", "spearman"), ("quality", "auc")):
        value = (scores.metadata.get(name) or {}).get(figure)
        if value is not None:
            lines.append(f"Held-out {figure} of the predicted {name}: {value:.3f}.")
    lines.append("The prompts' own licence applies.")
    return "\n\n".join(lines) + "\n"
