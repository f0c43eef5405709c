"""With what a run was made, for its record: versions, device, date, commit. No part of its fingerprint."""

from __future__ import annotations

import platform
import secrets
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from saerl_fast import __version__
from saerl_fast.fileio import read_json
from saerl_fast.records.runs import RUN

PACKAGES = ("torch", "triton", "transformers", "datasets", "peft", "vllm", "numpy")


def about(device: Any) -> dict[str, Any]:
    """Date, device and versions of this process; the git commit of the working folder, ``+`` when edited."""
    import torch

    packages: dict[str, str] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    packages["torch"] = str(torch.__version__)  # with the build, as +cu126
    device = torch.device(device)
    shown = str(device)
    if device.type == "cuda":
        shown += f" ({torch.cuda.get_device_name(device)})"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": shown,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "saerl": __version__,
        "python": platform.python_version(),
        **packages,
        "git": _commit(),
    }


def runs_of(out: Path, made: dict[str, Any], target_values: list[float] | None) -> dict[str, Any]:
    """For run.json in ``out``: ``made`` by the process that began, and ``resumed`` by those that went on; the
    run's ``id``, which a copy of it has too; the ``target_values`` of the comparison when it began."""
    before = read_json(out / "run.json", "saerl train", RUN) if (out / "run.json").is_file() else {}
    if "made" not in before:
        return {"id": secrets.token_hex(8), "made": made, "target_values": target_values}
    kept = {key: before[key] for key in ("id", "made", "target_values") if key in before}
    return {**kept, "resumed": [*before.get("resumed", []), made]}


def _commit() -> str | None:
    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
