"""Arms x seeds under one config: same model, data and evaluation; prompts and their order differ.

Every schedule but ``vanilla`` drops what the quality filter rejects, so filtering and ordering are told
apart only by an arm such as ``filtered:plan.schedule=vanilla;plan.filter=true``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from saerl_fast.config import SCHEDULES, Config, apply_overrides, to_dict
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import read_json, write_json
from saerl_fast.plan.static import get_schedule
from saerl_fast.records.lock import Held, holder, lock
from saerl_fast.records.report import write_report
from saerl_fast.records.runs import open_run
from saerl_fast.records.stats import past
from saerl_fast.rl.lora import check_targets
from saerl_fast.session import Session
from saerl_fast.stages.console import Echo
from saerl_fast.stages.fingerprint import changes, fingerprint, flat
from saerl_fast.stages.made import (
    finished,
    needs_scores,
    other_inputs,
    refuse_other,
    run_entry,
    run_sections,
    score_hashes,
    set_aside,
)
from saerl_fast.stages.pipeline import find_scores, make_plan, open_session
from saerl_fast.stages.preflight import UNRECORDED, check_functions, check_packages, unfiltered
from saerl_fast.stages.train import train_stage


def parse_arm(text: str) -> tuple[str, list[str]]:
    """``NAME`` (a schedule) or ``NAME:key=value;key=value`` -> the arm's name and its overrides.

    An arm named after a schedule follows it, another one the config's, unless it sets plan.schedule.
    Overrides reach ``plan`` and ``train`` only: what an arm changes must not touch data or scores.
    """
    name, _, rest = text.partition(":")
    overrides = [item.strip() for item in rest.split(";") if item.strip()]
    for item in overrides:
        if "=" not in item:
            example = f"plan.schedule={text}" if "=" not in text else "plan.filter=true;train.lr=1e-4"
            raise SaerlError(
                f"arm {text!r}: {item!r} lacks a value; write it as NAME:key=value, e.g. mine:{example}"
            )
        if not item.startswith(("plan.", "train.")):
            raise SaerlError(f"arm {text!r} sets {item!r}; an arm may set plan.* and train.* only")
    named = name in SCHEDULES or not overrides
    if named and not any(item.startswith("plan.schedule=") for item in overrides):
        overrides.insert(0, f"plan.schedule={name}")
    if not name.replace("-", "_").isidentifier() or name == "sae":
        raise SaerlError(
            f"arm name {name!r} must be letters, digits, '-' or '_', and not 'sae'; it becomes a folder"
        )
    return name, overrides


def compare(config: Config, echo: Echo, *, redo: bool = False) -> list[Path]:
    """Run every arm with every seed and write the report; finished runs are kept, broken ones resumed.

    The first seed's runs are in ``<run_dir>/<arm>``, the others' in ``<run_dir>/<arm>.seed-<seed>``; with
    ``compare.vary_sae`` the others' SAEs and scores are in ``<run_dir>/draws/seed-<seed>``. ``redo`` makes
    again what was made with other settings. In what an arm differs from the first beyond what it names is
    said aloud, and in the report. Several processes may run the same comparison: each takes the runs that
    nobody holds, and the last to end writes the whole report.

    Raises SaerlError before anything is trained when an arm or the list of seeds is wrong: settings, packages
    and functions are checked first, then, with the model and the scores at hand, the plan of every arm.
    """
    from saerl_fast.rl.rewards.dry import try_reward

    arms = [parse_arm(text) for text in config.compare.arms]
    names = [name for name, _ in arms]
    if len(set(names)) < len(names):
        raise SaerlError(f"compare.arms={','.join(names)!r} must name different arms")
    seeds = config.compare.seeds
    jobs = []
    root = Path(config.run_dir)
    for draw, seed in enumerate(seeds):
        given = [f"train.seed={seed}"]
        if draw and config.compare.vary_sae:
            given += [f"sae.seed={config.sae.seed + draw}", f"run_dir={root / 'draws' / f'seed-{seed}'}"]
        for name, overrides in arms:
            mine = apply_overrides(config, [*overrides, *given])
            if seed == seeds[0]:
                check_packages(mine)
                check_functions(mine)
                try_reward(mine)
            folder = name if seed == seeds[0] else f"{name}.seed-{seed}"
            jobs.append((name, mine, root / folder))
    for _, mine, out in jobs:  # all of them before the first one runs
        _state(mine, out, redo)
    first = [mine for _, mine, _ in jobs[: len(arms)]]
    notes = []
    for (name, overrides), mine in zip(arms, first, strict=True):
        if more := confounded(first[0], mine, overrides):
            notes.append(_note(names[0], name, more))
    for note in notes:
        echo.result(note)
    with lock(root, wait=echo.result):
        record = to_dict(config.compare) | {"notes": notes}
        refuse_beside(root, record)
        undone = {name for name, mine, out in jobs if not _state(mine, out, redo)[1] or _short(mine, out)}
        unfinished = [mine for name, mine, _ in jobs[: len(arms)] if name in undone]
        if redo and any(map(needs_scores, unfinished)):
            set_aside(config, echo)
        session = _check_plans(unfinished, echo) if unfinished else None
        write_json(root / "compare.json", record)
    bar = echo.bar("runs", "run")
    bar(0, len(jobs))
    done, todo, held = 0, list(enumerate(jobs, 1)), dict[int, str]()
    while todo:
        held.clear()
        for i, (name, mine, out) in todo:
            echo(f"[{i}/{len(jobs)}] {name}, seed {mine.train.seed}")
            try:
                with lock(out):
                    started, ended = _state(mine, out, redo)
                    if ended and not _short(mine, out):
                        echo(f"{out} is finished already; kept")
                    else:
                        enough = partial(_enough, mine) if mine.compare.until else None
                        how: dict[str, Any] = {
                            "resume": started,
                            "redo": redo and not ended,
                            "enough": enough,
                        }
                        train_stage(mine, echo, out=out, arm=name, session=session, **how)
                        session = None  # it has been trained
            except Held as err:
                if err.folder != out:
                    raise
                held[i] = f"{out} is written by {err.who}"
            done += i not in held
            bar(done, len(jobs))
        left = [job for job in todo if job[0] in held]
        todo = left if len(left) < len(todo) else []  # once more, for others may have ended or been killed
    with lock(root, wait=echo.result):  # the last to come reads what all have written
        begun = not held or any(root.rglob("metrics.jsonl"))
        paths = write_report(root, echo=echo.result) if begun else []
    for path in paths:
        echo(f"wrote {path}")
    for line in held.values():
        echo.result(f"{line}; it writes the report of all runs when it ends")
    return paths


def _enough(config: Config, curve: Sequence[tuple[int, float]]) -> bool:
    """Whether a run with these steps and accuracies is past all targets."""
    if not curve or not curve[-1][0]:  # a run takes one step at least
        return False
    settings, (steps, values) = config.compare, zip(*curve, strict=True)
    return all(past(steps, values, target, settings.smooth) for target in settings.target_values or ())


def _short(config: Config, out: Path) -> bool:
    """Whether the finished run in ``out`` was ended early, by targets that no longer say so."""
    run = open_run(out)
    if run.summary.get("steps", config.train.steps) >= config.train.steps:
        return False
    run.read(whole=True)
    return not (
        config.compare.until and _enough(config, list(zip(run.eval_steps, run.accuracy, strict=True)))
    )


def refuse_beside(root: Path, record: dict[str, Any]) -> None:
    """SaerlError when another comparison than ``record`` is being made in ``root``."""
    file = root / "compare.json"
    if file.is_file() and read_json(file, "saerl compare") != json.loads(json.dumps(record)):
        for out in sorted(path for path in root.iterdir() if path.is_dir()):
            if who := holder(out):
                raise Held(out, f"{who}, of another comparison")


def confounded(base: Config, arm: Config, overrides: list[str]) -> dict[str, tuple[Any, Any]]:
    """Settings of plan and train in which ``arm`` differs from ``base``, not named by ``overrides``.

    Key -> (value in ``base``, value in ``arm``). The quality filter is compared as it takes effect: where the
    pool has labels for it, every schedule but vanilla filters unless plan.filter says otherwise.
    """
    named = {item.partition("=")[0] for item in overrides}
    one, two = (dict(flat(to_dict(cfg))) | {"plan.filter": _filters(cfg)} for cfg in (base, arm))
    about = [key for key in one if key.startswith(("plan.", "train.")) and key not in named]
    return {key: (one[key], two[key]) for key in about if one[key] != two[key]}


def _filters(config: Config) -> bool:
    if unfiltered(config):
        return False
    static = get_schedule(config.plan.schedule)
    return config.plan.filter if config.plan.filter is not None else static is None or static.filtered


def _note(base: str, name: str, more: dict[str, tuple[Any, Any]]) -> str:
    shown = ", ".join(f"{key} ({_plain(two)}, {base}: {_plain(one)})" for key, (one, two) in more.items())
    equal = ";".join(f"{key}={_plain(one)}" for key, (one, _) in more.items())
    return (
        f"{name} differs from {base} in more than it names: {shown}. What is found may be due to either; "
        f"an arm with {equal} differs in the rest alone."
    )


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _check_plans(arms: list[Config], echo: Echo) -> Session:
    """Lay out the plan of every arm, so that none fails after another's training; the session used."""
    scored = [mine for mine in arms if needs_scores(mine)]
    if scored:
        refuse_other(scored[0])
    session = open_session(scored[0], echo) if scored else Session.open(arms[0], echo)
    if scored:
        find_scores(scored[0], echo, session)
    for mine in arms:
        check_targets(session.model, mine.train.lora)
        make_plan(mine, Echo(quiet=True), session)
    return session


def _state(config: Config, out: Path, redo: bool) -> tuple[bool, bool]:
    """Whether a run with exactly these settings has started in ``out``, and whether it has finished."""
    if not (out / "run.json").is_file():
        return False, False
    record, (ended, fault) = run_entry(out), finished(out)
    if record is None:
        why = f"that cannot be kept: {UNRECORDED}"
    elif fault:
        why = f"that cannot be kept: {fault}"
    elif record.get("fingerprint") != fingerprint(config, run_sections(config)):
        why = f"with other settings ({changes(record.get('config'), config, run_sections(config))})"
    elif other_inputs(record, score_hashes(config)):
        why = "made from other scores than those in run_dir"
    else:
        return True, ended
    if redo:
        return False, False
    raise SaerlError(
        f"{out} holds a run {why}; add --redo to replace it, remove it, or choose another run_dir"
    )
