"""Arms x seeds under one config: same model, data and evaluation; prompts and their order differ.

Every schedule but ``vanilla`` drops what the quality filter rejects, so filtering and ordering are told
apart only by an arm such as ``filtered:plan.schedule=vanilla;plan.filter=true``.
"""

from __future__ import annotations

from pathlib import Path

from saerl_fast.config import SCHEDULES, Config, apply_overrides, to_dict
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import read_json, write_json
from saerl_fast.records.report import write_report
from saerl_fast.stages.console import Echo
from saerl_fast.stages.fingerprint import RUN_SECTIONS, changes, fingerprint
from saerl_fast.stages.pipeline import train_stage
from saerl_fast.stages.preflight import check_functions, check_packages


def parse_arm(text: str) -> tuple[str, list[str]]:
    """``NAME`` (a schedule) or ``NAME:key=value;key=value`` -> the arm's name and its overrides.

    An arm named after a schedule follows it, another one the config's, unless it sets plan.schedule.
    Overrides reach ``plan`` and ``train`` only: what an arm changes must not touch data or scores.
    """
    name, _, rest = text.partition(":")
    overrides = [item.strip() for item in rest.split(";") if item.strip()]
    for item in overrides:
        if "=" not in item:
            raise SaerlError(f"arm {text!r}: write it as NAME:key=value, e.g. mine:plan.schedule={text}")
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


def compare(config: Config, echo: Echo) -> list[Path]:
    """Run every arm with every seed and write the report; finished runs are kept, broken ones resumed.

    The first seed's runs are in ``<run_dir>/<arm>``, the others' in ``<run_dir>/<arm>.seed-<seed>``.

    Raises SaerlError before anything runs when an arm or the list of seeds is wrong.
    """
    from saerl_fast.rl.rewards.dry import try_reward

    arms = [parse_arm(text) for text in config.compare.arms]
    names = [name for name, _ in arms]
    if len(set(names)) < len(names):
        raise SaerlError(f"compare.arms={','.join(names)!r} must name different arms")
    seeds = config.compare.seeds
    jobs = []
    root = Path(config.run_dir)
    for seed in seeds:
        for name, overrides in arms:
            mine = apply_overrides(config, [*overrides, f"train.seed={seed}"])
            check_packages(mine)
            check_functions(mine)
            try_reward(mine)
            folder = name if seed == seeds[0] else f"{name}.seed-{seed}"
            jobs.append((name, mine, root / folder))
    states = [_state(mine, out) for _, mine, out in jobs]  # all of them before the first one runs
    write_json(root / "compare.json", to_dict(config.compare))
    for i, ((name, mine, out), (started, finished)) in enumerate(zip(jobs, states, strict=True), 1):
        echo(f"[{i}/{len(jobs)}] {name}, seed {mine.train.seed}")
        if finished:
            echo(f"{out} is finished already; kept")
            continue
        train_stage(mine, echo, out=out, arm=name, resume=started)
    paths = write_report(root, echo=echo.result)
    for path in paths:
        echo(f"wrote {path}")
    return paths


def _state(config: Config, out: Path) -> tuple[bool, bool]:
    """Whether a run with exactly these settings has started in ``out``, and whether it has finished."""
    described = out / "run.json"
    if not described.is_file():
        return False, False
    record = read_json(described, "saerl compare")
    if record.get("fingerprint") != fingerprint(config, RUN_SECTIONS):
        why = changes(record.get("config"), config, RUN_SECTIONS)
        raise SaerlError(
            f"{out} holds a run with other settings ({why}); remove it or choose another run_dir"
        )
    return True, (out / "summary.json").is_file()
