"""The last stage: one GRPO run under a plan, from the checks before anything is loaded to its report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_fast.config import Config
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import read_json
from saerl_fast.plugins import call
from saerl_fast.records import manifest
from saerl_fast.records.lock import clean, lock
from saerl_fast.session import Session
from saerl_fast.stages.about import about, runs_of
from saerl_fast.stages.console import Echo
from saerl_fast.stages.fingerprint import fingerprint, made_from, training_seed
from saerl_fast.stages.made import needs_scores, refuse_other, run_sections, score_hashes, set_aside
from saerl_fast.stages.pipeline import find_sae, make_plan, open_session, record_plan
from saerl_fast.stages.preflight import (
    check_functions,
    check_packages,
    check_target,
    clear,
    redo_target,
)

if TYPE_CHECKING:
    from saerl_fast.plan import Plan
    from saerl_fast.rl.engine import Engine


def folder_name(schedule: str) -> str:
    """What a run under this schedule is called, a folder's name; pkg.mod:fn becomes pkg-mod-fn."""
    name = re.sub(r"\W+", "-", schedule).strip("-")
    if not name or name == "sae" or len(name.encode()) > 200:
        raise SaerlError(
            f"a run cannot be called {name!r:.60}, after its schedule; name the schedule otherwise"
        )
    return name


def train_stage(
    config: Config,
    echo: Echo,
    *,
    plan_file: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    redo: bool = False,
    out: Path | None = None,
    arm: str | None = None,
    with_report: bool = False,
    session: Session | None = None,
    enough: Callable[[Sequence[tuple[int, float]]], bool] | None = None,
) -> dict[str, Any]:
    """One GRPO run into ``<run_dir>/<schedule>`` (see `folder_name`); returns its summary.

    ``redo`` makes again what was made with other settings, and only that. ``session``: of the model as it is
    loaded; it is trained in place. ``enough``: see `saerl_fast.rl.trainer.train`. Holds the folder of the run
    (see `lock`), and the run folder only while an SAE or scores are made.
    """
    from saerl_fast.plan import load_plan
    from saerl_fast.rl import distributed

    given = load_plan(plan_file) if plan_file else None
    arm = arm or folder_name(given.schedule if given else config.plan.schedule)
    out = out or Path(config.run_dir) / arm
    with ExitStack() as stack:
        distributed.on_first(lambda: clean(Path(config.run_dir)))
        distributed.on_first(lambda: stack.enter_context(lock(out)))
        return _train(
            config,
            echo,
            given,
            plan_file=plan_file,
            resume=resume,
            overwrite=overwrite,
            redo=redo,
            out=out,
            arm=arm,
            with_report=with_report,
            session=session,
            enough=enough,
        )


def _train(
    config: Config,
    echo: Echo,
    given: Plan | None,
    *,
    plan_file: str | None,
    resume: bool,
    overwrite: bool,
    redo: bool,
    out: Path,
    arm: str,
    with_report: bool,
    session: Session | None,
    enough: Callable[[Sequence[tuple[int, float]]], bool] | None,
) -> dict[str, Any]:
    from saerl_fast.records.report import write_report
    from saerl_fast.rl import distributed
    from saerl_fast.rl.generate import prove
    from saerl_fast.rl.logprobs import check_gradient
    from saerl_fast.rl.lora import check_targets
    from saerl_fast.rl.rewards import get_reward
    from saerl_fast.rl.rewards.dry import check_think, try_reward
    from saerl_fast.rl.trainer import train
    from saerl_fast.sae.capture import FeatureCapture

    sections = run_sections(config, planned=given is not None)
    described = made_from(config, sections) | {
        "resumable": fingerprint(config, sections, without=("steps",)),
        "plan": manifest.digest(plan_file) if plan_file else None,
    }
    described["inputs"] |= {} if plan_file else score_hashes(config)
    if distributed.size() > 1 and ":" in config.model.device:
        raise SaerlError(f"model.device={config.model.device} is one device for all processes; set auto")
    check_packages(config)
    check_functions(config, planned=given is not None)
    reward = get_reward(config.train.reward, config.train.reward_weights)
    try_reward(config)
    if redo:
        state = distributed.gather(lambda: redo_target(out, described, config, echo))[0]
        if state == "kept":
            return dict(read_json(out / "summary.json", "saerl train"))
        resume, overwrite = state == "resume", state == "overwrite"
    distributed.on_first(lambda: check_target(out, described, config, resume=resume, overwrite=overwrite))
    if given is None and needs_scores(config):
        if redo and distributed.size() == 1:
            with lock(config.run_dir):
                set_aside(config, echo)
        refuse_other(config)
    if session is None:
        scored = given is None and needs_scores(config)
        session = open_session(config, echo) if scored else Session.open(config, echo)
    if config.train.rollout.engine == "transformers":
        prove(session.model, session.tokenizer)
    check_gradient(session.model)
    check_targets(session.model, config.train.lora)
    check_think(config.train.reward, session.tokenizer)
    plan = given or make_plan(config, echo, session)
    if plan.batch_size != config.train.rollout.prompts_per_step or plan.total_steps < config.train.steps:
        raise SaerlError(
            f"{plan_file} is a plan of {plan.total_steps} batches of {plan.batch_size} prompts; set "
            "train.steps and train.rollout.prompts_per_step to match"
        )
    capture = None
    if config.train.capture and plan.wants_features:
        sae = find_sae(config, echo, session)
        capture = FeatureCapture(
            session.model, sae, config.score.reduce, config.score.backend, layer=config.sae.layer
        )
        capture.warm_up()
        if given is None:
            refuse_other(config)  # an SAE that was made just now may differ from the one behind the scores
    if given is None:
        described["inputs"] |= score_hashes(config)  # of scores that were made just now, too
    if resume:
        distributed.on_first(lambda: check_target(out, described, config, resume=True, overwrite=False))
    engine = None if config.train.rollout.engine == "transformers" else _engine(config, echo, session)
    machine, targets = about(session.model.device), config.compare.target_values

    def prepare() -> None:
        if overwrite:
            clear(out)
        if (fault := manifest.look(out, "run").fault) and (out / "run.json").exists():
            echo(f"{fault}; it is written anew")
            (out / "run.json").unlink()
        kept = {key: described[key] for key in ("fingerprint", "resumable", "plan", "config")}
        text = {"arm": arm, "seed": training_seed(config), **kept, **runs_of(out, machine, targets)}
        with manifest.publish(out, "run", described) as new:
            new("run.json").write_text(json.dumps(text, indent=1) + "\n")
        record_plan(plan, out, {"fingerprint": described["fingerprint"]})

    distributed.on_first(prepare)
    echo(f"training into {out}")
    summary = train(
        session,
        plan,
        reward,
        config.train,
        out,
        capture=capture,
        engine=engine,
        resume=resume,
        seed=training_seed(config),
        echo=echo,
        progress=echo.bar("training", "step"),
        enough=enough,
    )
    echo(f"wrote {out}")
    if with_report and distributed.rank() == 0:
        for path in write_report(out, echo=echo.result):
            echo(f"wrote {path}")
    return summary


def _engine(config: Config, echo: Echo, session: Session) -> Engine:
    from saerl_fast.rl.engine import Engine, get_engine

    name = config.train.rollout.engine
    make = get_engine(name)
    made = call(f"train.rollout.engine={name}", lambda: make(session.model, config.train.rollout))
    if not isinstance(made, Engine):
        raise SaerlError(
            f"train.rollout.engine={name} is no Engine; derive it from saerl_fast.rl.engine.Engine"
        )
    if config.train.capture and not made.observes:
        echo(f"the prefill of {made.name} is not observed: features take a forward pass of their own")
    return made
