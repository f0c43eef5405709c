"""Checkpoints that are whole or not there: one file each, written aside, renamed, verified when read.

``checkpoints/step-000020-0123456789abcdef.safetensors``: the step, and the start of the file's SHA-256. The
tensors are called ``model.*``, ``optimizer.*``, ``reference.*`` and ``plan.*``; everything else is JSON in
the file's metadata. Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saerl_fast.errors import SaerlError, Unreadable, no_memory
from saerl_fast.fileio import damaged, remove, use_umask, writing, written
from saerl_fast.records.manifest import digest, read

log = logging.getLogger(__name__)
FORMAT = "2"
FOLDER = "checkpoints"
_NAME = re.compile(r"step-\d+-[0-9a-f]{16}\.safetensors")  # nothing else in the folder is one
PARTS = ("model", "optimizer", "reference")


@dataclass
class Checkpoint:
    """A verified checkpoint, read into memory (CPU tensors)."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    reference: dict[str, Tensor]  # empty without a reference policy
    plan: dict[str, Any]
    counters: dict[str, Any]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: the trainable parameters of a partly frozen model (adapters, say), else the
    model's whole state; without second names of shared (tied) tensors."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    partly = 0 < len(trained) < sum(1 for _ in model.parameters())
    found: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if not partly or name in trained:
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)
            found.setdefault(place if tensor.numel() else name, (name, tensor))
    return dict(found.values())


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's weights into the model, in place, so that ties and the optimizer stay attached."""
    own = model_tensors(model)
    for name in sorted(own.keys() | tensors.keys()):
        shapes = [list(found[name].shape) if name in found else None for found in (tensors, own)]
        if shapes[0] != shapes[1]:
            raise SaerlError(
                f"the checkpoint is of another model ({name!r} is {shapes[0]} there, {shapes[1]} in this one)"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def save_checkpoint(
    out_dir: str | Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: Mapping[str, Tensor],
    plan: Mapping[str, Any],
    counters: Mapping[str, Any],
    reference: nn.Module | None = None,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of ``step``; delete all but the ``keep`` latest, and any of the same or a later
    step that a fallback to an earlier one left behind.

    ``plan`` and ``counters``: flat values that JSON knows; ``plan`` may also hold tensors and arrays.
    """
    root = Path(out_dir) / FOLDER
    frozen = {} if reference is None else model_tensors(reference)
    parts = zip(PARTS, (model_tensors(model), optimizer, frozen), strict=True)
    tensors = {f"{part}.{name}": tensor for part, named in parts for name, tensor in named.items()}
    arrays = {name: value for name, value in plan.items() if isinstance(value, (Tensor, np.ndarray))}
    tensors |= {f"plan.{name}": torch.as_tensor(value) for name, value in arrays.items()}
    numpy = [name for name, value in arrays.items() if isinstance(value, np.ndarray)]
    values = {name: value for name, value in plan.items() if name not in arrays}
    state = {"step": step, "plan": values, "numpy": numpy, "counters": dict(counters)}
    state["run"] = _run(out_dir)
    temporary = root / f"step-{step:06d}.tmp"
    with writing(f"a checkpoint to {root}"):
        try:
            root.mkdir(parents=True, exist_ok=True)
            for leftover in root.glob("*.tmp"):
                leftover.unlink()
            _write(temporary, tensors, {"format": FORMAT, "state": json.dumps(state, default=float)})
            final = root / f"{temporary.stem}-{digest(temporary)[:16]}.safetensors"
            use_umask(temporary)
            _sync(temporary)
            os.replace(temporary, final)
            _sync(root)
            files = _files(root)
            older = [file for file in files if _step(file) < step]
            for file in set(files) - {final, *older[: keep - 1]}:
                file.unlink()
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    written[final] = None
    return final


def set_aside(out_dir: str | Path) -> None:
    """Move the checkpoints of an earlier run to ``checkpoints.previous``, out of a fresh run's way.

    Where ``checkpoints`` is a link to another disk, it stays and so does the disk that they are on.
    """
    root = Path(os.path.realpath(Path(out_dir) / FOLDER))
    if root.is_dir():
        previous = root.with_name(f"{root.name}.previous")
        with writing(previous):
            remove(previous)
            os.replace(root, previous)
            root.mkdir()


def load_latest(out_dir: str | Path) -> Checkpoint | None:
    """The latest checkpoint that is intact; None when there is none at all.

    A damaged one is reported in the log and the one before it used. Raises SaerlError when all are damaged.
    """
    files, run = _files(Path(out_dir) / FOLDER), _run(out_dir)
    unread: list[SaerlError] = []
    for file in files:
        try:
            return _load(file, run)
        except Exception as err:  # whatever a crafted file raises; safetensors has a type of its own
            if no_memory(err):
                raise
            fault = damaged(file, err, "trying the checkpoint before it")
            unread += [fault] * isinstance(fault, Unreadable)
            log.warning("%s", fault)
    if unread:  # no reason to make the run again
        raise unread[0]
    if files:
        raise SaerlError(f"every checkpoint in {out_dir} is damaged; add --overwrite to make the run again")
    return None


def _run(out_dir: str | Path) -> list[Any] | None:
    """What the run in ``out_dir`` was made from, as its manifest has it."""
    entries = (read(out_dir) or {}).get("run")
    return [entries[0].get("resumable"), entries[0].get("plan")] if entries else None


def _load(file: Path, run: list[Any] | None) -> Checkpoint:
    from safetensors import safe_open

    if digest(file)[:16] != file.stem.rpartition("-")[2]:
        raise ValueError("the content does not match the checksum in its name")
    with safe_open(file, "pt") as opened:
        about = opened.metadata() or {}
        if about.get("format") != FORMAT:
            raise ValueError(f"format {about.get('format')}, this version reads {FORMAT}")
        state = json.loads(about["state"])
        if None not in (run, state.get("run")) and run != state["run"]:
            raise ValueError("it is of a run with other settings")
        parts: dict[str, dict[str, Any]] = {part: {} for part in (*PARTS, "plan")}
        for key in opened.keys():  # noqa: SIM118  # no mapping
            part, _, name = key.partition(".")
            parts[part][name] = tensor = opened.get_tensor(key)
            if part in PARTS and not tensor.isfinite().all():
                raise ValueError(f"{key} holds NaN or infinite values")
    plan = state["plan"] | parts.pop("plan")
    plan |= {name: plan[name].numpy() for name in state["numpy"]}
    return Checkpoint(file, state["step"], plan=plan, counters=state["counters"], **parts)


def _files(root: Path) -> list[Path]:
    """Complete checkpoints, latest first."""
    found = root.iterdir() if root.is_dir() else ()  # glob() passes over a folder that cannot be read
    return sorted((file for file in found if _NAME.fullmatch(file.name)), key=_step, reverse=True)


def _step(file: Path) -> int:
    return int(file.name.split("-")[1])


def _write(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str]) -> None:
    from safetensors.torch import save_file

    # a copy of each: safetensors refuses views that share memory
    save_file(
        {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}, path, about
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
