"""Arms x seeds under one config: same model, data and evaluation; prompts and their order differ.

With ``compare.pools`` the same for each pool, which has an SAE, scores and targets of its own.

Every schedule but ``vanilla`` drops what the quality filter rejects, so filtering and ordering are told
apart only by an arm such as ``filtered:plan.schedule=vanilla;plan.filter=true``.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saerl_fast.config import Config, apply_overrides, to_dict
from saerl_fast.errors import SaerlError, Unreadable
from saerl_fast.records import manifest
from saerl_fast.records.compared import find_targets
from saerl_fast.records.lock import Held, holder, lock
from saerl_fast.records.report import write_report
from saerl_fast.records.runs import PILOT, open_run, read_object, write_comparison
from saerl_fast.records.stats import past
from saerl_fast.rl.lora import check_targets
from saerl_fast.sae.files import check_source
from saerl_fast.session import Session, load_pools
from saerl_fast.stages.arms import (
    MEASURES,
    confounded,
    differing,
    measured_apart,
    note,
    parse_arm,
    parse_pool,
)
from saerl_fast.stages.console import Echo
from saerl_fast.stages.fingerprint import changes, fingerprint
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
from saerl_fast.stages.preflight import UNRECORDED, check_functions, check_packages
from saerl_fast.stages.train import train_stage

Job = tuple[str, Config, Path]  # arm, its config, its folder


class Jobs(NamedTuple):
    """What a comparison will run, after what can be checked without the model."""

    runs: list[Job]
    pilots: list[Job]
    first: list[Config]  # of each arm, with the first seed
    notes: list[str]


def compare(config: Config, echo: Echo, *, redo: bool = False) -> list[Path]:
    """Run every arm with every seed and write the report; finished runs are kept, broken ones resumed.

    The first seed's runs are in ``<run_dir>/<arm>``, the others' in ``<run_dir>/<arm>.seed-<seed>``, where
    they stay when ``compare.seeds`` are changed; with
    ``compare.vary_sae`` the others' SAEs and scores are in ``<run_dir>/draws/seed-<seed>``; runs of
    ``compare.pilots``, which fix the targets, are in ``<run_dir>/pilot`` and count for nothing else. With
    ``compare.pools`` all that, report included, is in ``<run_dir>/<pool>``, and ``run_dir`` has the report of
    all pools. ``redo`` makes again what was made with other settings. In what an arm differs from the first
    beyond what it names is said aloud, and in the report. Several processes may run the same comparison: each
    takes the runs that nobody holds, and the last to end writes the whole report.

    Raises SaerlError before anything is trained when a pool, an arm or the list of seeds is wrong: settings,
    files, packages and functions are checked first, then, with a pool's model and scores at hand, the plan of
    every arm.
    """
    root = Path(config.run_dir)
    refuse_other_kind(config)
    if not config.compare.pools:
        return _compare(config, _jobs(config, redo), echo, redo)
    pools = [parse_pool(text) for text in config.compare.pools]
    names = [name for name, _ in pools]
    if len(set(names)) < len(names):
        raise SaerlError(f"compare.pools={','.join(names)!r} must name different pools")
    each = dict[str, Config]()
    planned = dict[str, Jobs]()
    known = dict[tuple[str, ...], str]()  # rows and settings -> the pool that has them
    for name, overrides in pools:  # settings and files of all of them before anything slow
        with _naming(name):
            given = [*overrides, f"run_dir={root / name}", "compare.pools="]
            mine = each[name] = apply_overrides(config, given)
            settings = (item for item in overrides if not item.startswith(("data.train=", "compare.")))
            rows = (pool.digest for pool in load_pools(mine))
            if (same := known.setdefault((*rows, *sorted(settings)), name)) != name:
                raise SaerlError(
                    f"it has the rows and settings of pool {same}, and would count twice; drop it"
                )
            if mine.sae.path is not None:
                check_source(mine.sae.path)
    for name, mine in each.items():
        with _naming(name):
            planned[name] = _jobs(mine, redo)
    root.mkdir(parents=True, exist_ok=True)
    with lock(root, wait=echo.result):
        write_comparison(root, to_dict(config.compare) | {"pools": names})
    for name, overrides in pools:
        echo.result(f"pool {name}")
        with _naming(name, [*overrides, f"run_dir={root / name}"]):
            _compare(each[name], planned[name], echo, redo)
    with lock(root, wait=echo.result):  # other processes may hold all runs, and have begun none
        paths = write_report(root, echo=echo.result) if any(root.rglob("metrics.jsonl")) else []
    for path in paths:
        echo(f"wrote {path}")
    return paths


def refuse_other_kind(config: Config) -> None:
    """SaerlError where run_dir has a comparison with pools and ``config`` none, or the other way round."""
    before = _object(Path(config.run_dir) / "compare.json")
    if before and bool(before.get("pools")) != bool(config.compare.pools):
        raise SaerlError(
            f"{config.run_dir} holds a comparison with{'' if before.get('pools') else 'out'} compare.pools; "
            "choose another run_dir"
        )


def _object(path: Path) -> dict[str, Any]:
    """The object in ``path``, {} where it is damaged."""
    try:
        return read_object(path)
    except Unreadable:
        raise
    except SaerlError:
        return {}


@contextmanager
def _naming(pool: str, settings: Sequence[str] = ()) -> Iterator[None]:
    """Errors begin with the pool's name; one that names `saerl score` says where, and with which settings."""
    try:
        yield
    except SaerlError as err:
        if type(err) not in (SaerlError, Unreadable):
            raise
        said = str(err)
        if settings and "`saerl score`" in said:
            said += f" (of this pool, with the settings of the comparison and {' '.join(settings)})"
        raise type(err)(f"pool {pool}: {said}") from err


def _jobs(config: Config, redo: bool) -> Jobs:
    """What to run, in the order of it; SaerlError for an arm, seeds or a folder that cannot be."""
    from saerl_fast.rl.rewards.dry import try_reward

    arms = [parse_arm(text) for text in config.compare.arms]
    names = [name for name, _ in arms]
    if len(set(names)) < len(names):
        raise SaerlError(f"compare.arms={','.join(names)!r} must name different arms")
    seeds = config.compare.seeds
    runs = []
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
            runs.append((name, mine, _folder(root, name, seed, first=seed == seeds[0])))
    pilots: list[Job] = []
    if both := sorted({*seeds} & {*config.compare.pilots}):
        raise SaerlError(f"compare.pilots and compare.seeds both have {both[0]}; targets need other seeds")
    for key in ("pilots", "target_values"):
        if getattr(config.compare, key) and not config.train.eval.every:
            raise SaerlError(f"compare.{key} are measured by evaluations on the way; set train.eval.every")
    if config.compare.pilots and not config.compare.target_values:
        name, overrides = arms[0]
        for seed in config.compare.pilots:
            mine = apply_overrides(config, [*overrides, f"train.seed={seed}"])
            pilots.append((f"{name}-pilot", mine, root / PILOT / f"{name}.seed-{seed}"))
    for _, mine, out in (*pilots, *runs):  # all of them before the first one runs
        _state(mine, out, redo)
    first = [mine for _, mine, _ in runs[: len(arms)]]
    notes = ["compare.target_values are given, so compare.pilots are not run"] * bool(
        config.compare.pilots and config.compare.target_values
    )
    for (name, overrides), mine in zip(arms, first, strict=True):
        apart = measured_apart(first[0], mine)
        if judged := {key: apart[key] for key in MEASURES if key in apart}:
            raise SaerlError(
                f"arm {name} would be evaluated by {differing(judged, names[0])}, so accuracies would not be "
                "of one measure; set train.eval.mode=prob, or give each reward a run_dir of its own"
            )
        if apart:
            notes.append(f"{name} is evaluated with {differing(apart, names[0])}, as it is trained.")
        if more := confounded(first[0], mine, overrides):
            notes.append(note(names[0], name, more))
    return Jobs(runs, pilots, first, notes)


def _folder(root: Path, name: str, seed: int, *, first: bool) -> Path:
    """Where an arm's run with ``seed`` is: the folder without a seed in its name has the first seed's, of the
    seeds as they were when it was begun."""
    held = _object(root / name / "run.json").get("seed")
    return root / name if held == seed or (held is None and first) else root / f"{name}.seed-{seed}"


def _compare(config: Config, planned: Jobs, echo: Echo, redo: bool) -> list[Path]:
    """The runs of one pool that are missing, and the report of all."""
    jobs, pilots, first, notes = planned
    root = Path(config.run_dir)
    for line in notes:
        echo.result(line)
    with lock(root, wait=echo.result):
        record = to_dict(config.compare) | {"notes": notes}
        record["pilots"] = config.compare.pilots if pilots else []
        refuse_beside(root, record)
        ended = {out: _state(mine, out, redo)[1] for _, mine, out in (*pilots, *jobs)}
        missing = [pilot for pilot in pilots if not ended[pilot[2]]]
        if pilots and not missing:
            record["target_values"] = _targets(pilots, config)
        known = record["target_values"]
        due = {jobs[0][0] for _ in missing}
        due |= {name for name, mine, out in jobs if not ended[out] or _short(mine, out, known)}
        arms = [mine for (name, _, _), mine in zip(jobs, first, strict=False) if name in due]
        if redo and any(map(needs_scores, arms)):
            set_aside(config, echo)
        session = _check_plans(arms, echo) if arms else None
        write_comparison(root, record)
    for name, mine, out in missing:
        echo(f"{name}, seed {mine.train.seed}")
        with lock(out, wait=echo.result):
            session = _run(name, mine, out, None, echo, redo, session)
    if missing:
        known = record["target_values"] = _targets(pilots, config)
        with lock(root, wait=echo.result):
            refuse_beside(root, record)
            write_comparison(root, record)
    if pilots:
        shown = ", ".join(f"{value:g}" for value in known)
        echo.result(
            f"targets by the gain of {jobs[0][0]} in {len(pilots)} pilot{'s' * (len(pilots) > 1)}: {shown}"
        )
    bar = echo.bar("runs", "run")
    bar(0, len(jobs))
    done, todo, held = 0, list(enumerate(jobs, 1)), dict[int, str]()
    while todo:
        held.clear()
        for i, (name, mine, out) in todo:
            echo(f"[{i}/{len(jobs)}] {name}, seed {mine.train.seed}")
            try:
                with lock(out):
                    session = _run(name, mine, out, known, echo, redo, session)
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


def _run(
    name: str,
    config: Config,
    out: Path,
    targets: list[float] | None,
    echo: Echo,
    redo: bool,
    session: Session | None,
) -> Session | None:
    """The run in ``out``, which this process holds, unless it is finished; the session if still unused."""
    started, ended = _state(config, out, redo)
    if ended and not _short(config, out, targets):
        echo(f"{out} is finished already; kept")
        return session
    enough = partial(_enough, config, targets) if config.compare.until and targets else None
    how: dict[str, Any] = {"resume": started, "redo": redo and not ended, "enough": enough}
    train_stage(config, echo, out=out, arm=name, session=session, **how)
    return None  # it has been trained


def _targets(pilots: list[Job], config: Config) -> list[float]:
    """Accuracies at the shares ``compare.targets`` of what the pilots gained, to three decimals or as many as
    a hundredth of the least distance between them takes. SaerlError where they gained nothing, or where rows
    of one are lost."""
    runs = [open_run(out) for _, _, out in pilots]
    for run in runs:
        run.read(whole=True)
        if lost := run.holes():
            raise SaerlError(f"{run.folder}: {lost[0]}; remove that folder, and the pilot is run again")
    found = find_targets(runs, config.compare)
    if not found:
        raise SaerlError(
            "the pilots gain nothing, so there is no target; raise train.steps, or give compare.target_values"
        )
    start = float(np.mean([run.accuracy[0] for run in runs]))
    ascending = sorted([start, *found.values()])
    least = min(b - a for a, b in itertools.pairwise(ascending))
    digits = max(3, math.ceil(2 - math.log10(max(least, 1e-12))))
    return [round(value, digits) for value in found.values()]


def _enough(config: Config, targets: Sequence[float], curve: Sequence[tuple[int, float]]) -> bool:
    """Whether a run with these steps and accuracies is past all targets."""
    if not curve or not curve[-1][0]:  # a run takes one step at least
        return False
    steps, values = zip(*curve, strict=True)
    return all(past(steps, values, target, config.compare.smooth) for target in targets)


def _short(config: Config, out: Path, targets: Sequence[float] | None) -> bool:
    """Whether the finished run in ``out`` was ended early, by targets that no longer say so."""
    run = open_run(out)
    if run.summary.get("steps", config.train.steps) >= config.train.steps:
        return False
    curve = run.summary.get("curve")
    if curve is None:  # as version 0.1.0 wrote it
        run.read(whole=True)
        curve = list(zip(run.eval_steps, run.accuracy, strict=True))
    return not (config.compare.until and targets and _enough(config, targets, curve))


def refuse_beside(root: Path, record: dict[str, Any]) -> None:
    """SaerlError when another comparison than ``record`` is being made in ``root``."""
    kept = _object(root / "compare.json")  # a damaged one is written anew
    if kept and record.get("pilots"):  # by which they are found
        kept["target_values"] = record["target_values"]
    if (root / "compare.json").is_file() and kept != json.loads(json.dumps(record)):
        for out in sorted(path for path in (*root.iterdir(), *root.glob(f"{PILOT}/*")) if path.is_dir()):
            if who := holder(out):
                raise Held(out, f"{who}, of another comparison")


def _check_plans(arms: list[Config], echo: Echo) -> Session:
    """Lay out the plans of the arms to run: none fails after another's training. The session used."""
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
        return True, ended and not manifest.look(out, "run").fault  # a run that goes on writes run.json anew
    if redo:
        return False, False
    raise SaerlError(
        f"{out} holds a run {why}; add --redo to replace it, remove it, or choose another run_dir"
    )
