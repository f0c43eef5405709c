"""What is set up and checked before any work: the process, its packages, the folder it would write."""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from saerl_fast.config import Config
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import check_writable, read_json
from saerl_fast.stages.fingerprint import RUN_SECTIONS, changes


def set_up(config: Config) -> None:
    """CPU threads, a quiet transformers, engines that exist and a folder to write to, before any work."""
    check_scoring(config)
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
    needs: dict[str, str] = {name: f"train.trackers={name}" for name in config.train.trackers}
    if config.train.lora.rank:
        needs["peft"] = f"train.lora.rank={config.train.lora.rank}"
    if config.train.rollout.engine == "vllm":
        needs["vllm"] = "train.rollout.engine=vllm"
    for package, setting in needs.items():
        missing = sys.modules[package] is None if package in sys.modules else not find_spec(package)
        if missing:
            raise SaerlError(f"{setting} needs {package}; run `pip install {package}`, or leave it out")


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
    """SaerlError for a loss or, unless the plan is a file (``planned``), a schedule that cannot be loaded."""
    from saerl_fast.plan.static import get_schedule
    from saerl_fast.rl.loss import get_loss

    get_loss(config.train.loss.kind)
    if not planned:
        get_schedule(config.plan.schedule)


def check_target(
    out: Path, described: dict[str, Any], config: Config, *, resume: bool, overwrite: bool
) -> None:
    """SaerlError before anything in ``out`` is touched that must not be."""
    if resume and overwrite:
        raise SaerlError("--resume goes on with a run and --overwrite replaces it; choose one")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / "run.json").is_file():
        raise SaerlError(f"{out} holds files that are no run of saerl; choose another run_dir")
    if overwrite:
        return
    if not resume:
        raise SaerlError(f"{out} holds a run already; add --resume to go on, or --overwrite to replace it")
    before = read_json(out / "run.json", "saerl train")
    if any(before.get(key) != described[key] for key in ("resumable", "plan")):
        raise SaerlError(
            f"{out} was started with other settings ({_why(before, described, config)}); resume with the "
            "same ones (train.steps may grow), or choose another run_dir"
        )
    steps, planned = described["config"]["train"]["steps"], before["config"]["train"]["steps"]
    if steps < planned:
        raise SaerlError(f"train.steps={steps} is less than the {planned} this run was started with")


def _why(before: dict[str, Any], described: dict[str, Any], config: Config) -> str:
    if before.get("plan") != described["plan"]:
        return "another --plan"
    return changes(before.get("config"), config, RUN_SECTIONS, ("steps",))
