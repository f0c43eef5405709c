"""What is set up and checked before any work: the process, its packages, the folder it would write."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saerl_fast.config import Config
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import check_writable, remove
from saerl_fast.plan.build import NO_COLUMN
from saerl_fast.prompts import layouts
from saerl_fast.records.lock import NAME, vacant
from saerl_fast.session import load_pools
from saerl_fast.signals.labelled import label_columns
from saerl_fast.signals.quality import why_not
from saerl_fast.stages.fingerprint import changes
from saerl_fast.stages.made import finished, other_inputs, run_entry, run_sections

if TYPE_CHECKING:
    from saerl_fast.sae.model import SAE

UNRECORDED = "its manifest.json does not record it, as in a folder of an earlier version"


def set_up(config: Config, *, new_sae: bool = False) -> None:
    """CPU threads, a quiet transformers, and what must exist before any work: engines, a folder to write to
    and, unless the command trains a ``new_sae``, the SAE that the config names.
    """
    from saerl_fast.sae.files import check_source

    check_scoring(config)
    for source in (None if new_sae else config.sae.path, config.sae.init):
        if source is not None:
            check_source(source)
    check_writable(config.run_dir)
    try:
        from transformers.utils import logging
    except ImportError:
        raise SaerlError(
            'transformers is not installed; run `pip install -e ".[all]"` in the clone of saerl-fast'
        ) from None
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft's, not the user's
    if config.threads is not None:
        import torch

        torch.set_num_threads(config.threads)


def check_packages(config: Config) -> None:
    """SaerlError for a setting of training whose package is missing, before anything takes long."""
    config.recheck()
    needs: dict[str, str] = {name: f"train.trackers={name}" for name in config.train.trackers}
    if config.train.lora.rank:
        needs["peft"] = f"train.lora.rank={config.train.lora.rank}"
    if config.train.rollout.engine == "vllm":
        needs["vllm"] = "train.rollout.engine=vllm"
    for package, setting in needs.items():
        missing = sys.modules[package] is None if package in sys.modules else not find_spec(package)
        if missing:
            raise SaerlError(f"{setting} needs {package}; run `pip install {package}`, or leave it out")
    if "wandb" in config.train.trackers and os.environ.get("WANDB_MODE", "online") == "online":
        import wandb

        asks = "prompt" in inspect.signature(getattr(wandb, "login", print)).parameters  # older ones may ask
        try:
            known = not asks or wandb.login(prompt=False, verify=False)
        except Exception:  # a key of another form
            known = False
        if not known:
            raise SaerlError(
                "train.trackers=wandb has no key that it takes; run `wandb login`, or set WANDB_MODE=offline"
            )


def check_scoring(config: Config) -> None:
    """SaerlError for a setting of scoring that cannot be followed here, before anything takes long."""
    from saerl_fast.signals.clusters import check_backend
    from saerl_kernels.dispatch import check_name

    check_backend(config.diversity.backend)
    try:
        check_name(config.score.backend, "score.backend")
    except ValueError as err:
        raise SaerlError(str(err)) from None


def check_functions(config: Config, *, planned: bool = False) -> None:
    """SaerlError for a loss, a reward or, unless the plan is a file (``planned``), a schedule that cannot be.

    A schedule cannot be followed where it needs pass rates that nobody is asked to find out.
    """
    from saerl_fast.plan.static import get_schedule
    from saerl_fast.rl.engine import get_engine
    from saerl_fast.rl.loss import get_loss
    from saerl_fast.rl.rewards import check_answers, get_reward

    get_loss(config.train.loss.kind)
    if config.train.rollout.engine != "transformers":
        get_engine(config.train.rollout.engine)
    get_reward(config.train.reward, config.train.reward_weights)
    if planned:
        return
    static = get_schedule(config.plan.schedule)
    asked = config.difficulty.label_column is not None or config.difficulty.n_labels > 0
    wanted = {"difficulty", "pass_rate"} & set(static.needs) if static else set()
    if not asked and (wanted or (static and static.keep)):
        raise SaerlError(
            f"plan.schedule={config.plan.schedule} needs pass rates of some prompts, and "
            "difficulty.n_labels=0 finds out none; raise it, or name known ones in difficulty.label_column"
        )
    if config.plan.filter and config.quality.head == "none":
        raise SaerlError("plan.filter=true needs quality scores, and quality.head=none makes none; unset one")
    if config.plan.filter and (why := unfiltered(config)):
        raise SaerlError(
            f"plan.filter=true needs quality scores, but {why}; name a column with labels in "
            "quality.label_column, or set plan.filter=false"
        )
    if config.plan.schedule == "oracle":
        check_answers(load_pools(config)[0].column("answer"), "plan.schedule=oracle")
    for name in config.plan.adaptive.columns:
        columns = load_pools(config)[0].columns
        if not name.startswith("saerl_") and layouts.column(columns, name) is None:  # which scoring adds
            raise SaerlError(NO_COLUMN.format(name, layouts.not_found(columns, name)))


def unfiltered(config: Config) -> str | None:
    """Why no quality can be scored from the labels of the pool, or None."""
    labels = label_columns(load_pools(config)[0], config)[0]
    return why_not(config.quality, labels[np.isfinite(labels)])


def open_sae(source: str) -> SAE:
    """The SAE that ``source`` names, from the hub where it is no path."""
    from saerl_fast.hub import hub_access, is_local
    from saerl_fast.sae.files import load_sae

    with hub_access(not is_local(source)):
        return load_sae(source)


def check_sae(config: Config, path: str) -> None:
    """SaerlError for an SAE that cannot be read, or is of another width than the model names."""
    from saerl_fast.models.load import named_width

    width, found = named_width(config.model), open_sae(path).d_in
    if width not in (None, found):
        raise SaerlError(
            f"the SAE {path} reads activations of width {found} but the hidden size of model "
            f"{config.model.path} is {width}; use an SAE trained on this model"
        )


def check_target(
    out: Path, described: dict[str, Any], config: Config, *, resume: bool, overwrite: bool
) -> None:
    """SaerlError before anything in ``out`` is touched that must not be."""
    if resume and overwrite:
        raise SaerlError("--resume goes on with a run and --overwrite replaces it; choose one")
    if vacant(out):
        return
    if not (out / "run.json").is_file():
        raise SaerlError(f"{out} holds files that are no run of saerl; remove it, or choose another run_dir")
    if overwrite:
        return
    if not resume:
        raise SaerlError(
            f"{out} holds a run already; add --resume to go on, --redo to make it again where settings have "
            "changed, or --overwrite to replace it"
        )
    before, fault = run_entry(out), finished(out)[1]
    if before is None or fault:
        raise SaerlError(f"{out} cannot go on: {fault or UNRECORDED}; add --overwrite to make the run again")
    if not _resumable(before, described):
        raise SaerlError(
            f"{out} was started with other settings ({_why(before, described, config)}); resume with the "
            "same ones (train.steps may grow), add --redo instead to replace it, or choose another run_dir"
        )
    steps, planned = described["config"]["train"]["steps"], before["config"]["train"]["steps"]
    if steps < planned:
        raise SaerlError(f"train.steps={steps} is less than the {planned} this run was started with")


def redo_target(out: Path, described: dict[str, Any], config: Config, say: Callable[[str], None]) -> str:
    """What ``--redo`` does about the run in ``out``: fresh, kept, resume or overwrite; said aloud."""
    if not (out / "run.json").is_file():
        return "fresh"
    before, (ended, fault) = run_entry(out), finished(out)
    if before is None or fault:
        say(f"--redo: {out} is made again ({fault or UNRECORDED})")
        return "overwrite"
    if _resumable(before, described):
        steps = described["config"]["train"]["steps"], before["config"]["train"]["steps"]
        if steps[0] == steps[1] and ended:
            say(f"--redo: {out} is kept, for nothing that it depends on has changed")
            return "kept"
        if steps[0] >= steps[1]:
            say(f"--redo: {out} goes on from where it stopped")
            return "resume"
    why = _why(before, described, config)
    if _resumable(before, described):
        why = f"train.steps was {before['config']['train']['steps']}"
    say(f"--redo: {out} is made again ({why})")
    return "overwrite"


def _resumable(before: dict[str, Any], described: dict[str, Any]) -> bool:
    same = all(before.get(key) == described[key] for key in ("resumable", "plan"))
    return same and not other_inputs(before, described["inputs"])


def clear(out: Path) -> None:
    """Remove the run in ``out``: first what a resumed one would read, last of all run.json, which says that a
    run is there. The folder stays, for it may be a link to another disk, and so does its lock."""
    order = {"summary.json": 0, "checkpoints": 1, "run.json": 3}
    for path in sorted(out.iterdir(), key=lambda path: order.get(path.name, 2)):
        if path.name != NAME:
            remove(path)


def _why(before: dict[str, Any], described: dict[str, Any], config: Config) -> str:
    if before.get("plan") != described["plan"]:
        return "another --plan"
    if before.get("resumable") == described["resumable"]:
        return "by name the same, but other scores"
    sections = run_sections(config, planned=described["plan"] is not None)
    return changes(before.get("config"), config, sections, ("steps",))
