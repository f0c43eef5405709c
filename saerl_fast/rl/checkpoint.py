"""Checkpoints that are whole or not there: written aside, checksummed, renamed, verified when read.

``checkpoints/step-000020/`` holds model.safetensors, optimizer.safetensors, extra.safetensors (tensors of
the plan and the random generators), state.json (everything else) and manifest.json with every file's
SHA-256. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import atomic_path

log = logging.getLogger(__name__)
FORMAT = 1
FOLDER = "checkpoints"


@dataclass
class Checkpoint:
    """A verified checkpoint, read into memory (CPU tensors)."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    plan: dict[str, Any]
    rng: dict[str, Any]
    counters: dict[str, Any]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: the trainable parameters of a partly frozen model (adapters, say), else the
    model's whole state; without second names of shared (tied) tensors."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    partly = 0 < len(trained) < sum(1 for _ in model.parameters())
    found: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in model.state_dict().items():
        if partly and name not in trained:
            continue
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.device)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        found[name] = tensor
    return found


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's weights into the model, in place, so that ties and the optimizer stay attached."""
    own = model_tensors(model)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())[0]
        raise SaerlError(f"the checkpoint is of another model ({odd!r} is in only one of them)")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                shapes = f"{list(tensors[name].shape)} in the checkpoint, {list(tensor.shape)} in the model"
                raise SaerlError(f"the checkpoint is of another model ({name!r} is {shapes})")
            tensor.copy_(tensors[name])


def save_checkpoint(
    out_dir: str | Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: Mapping[str, Tensor],
    plan: Mapping[str, Any],
    counters: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write ``step-NNNNNN``; delete all but the ``keep`` latest, and later ones that a fallback left behind.

    ``plan`` and ``counters``: flat or nested values that JSON knows; ``plan`` may hold tensors and arrays.
    """
    root = Path(out_dir) / FOLDER
    final = root / f"step-{step:06d}"
    temporary = root / f"{final.name}.tmp"
    tensors: dict[str, Tensor] = {}
    state = {
        "step": step,
        "plan": _strip(dict(plan), "plan", tensors),
        "rng": _strip(_rng_state(), "rng", tensors),
        "counters": dict(counters),
    }
    try:
        if root.is_dir():
            for leftover in root.glob("*.tmp"):
                shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        _write_tensors(temporary / "model.safetensors", model_tensors(model))
        _write_tensors(temporary / "optimizer.safetensors", optimizer)
        _write_tensors(temporary / "extra.safetensors", tensors)
        (temporary / "state.json").write_text(json.dumps(state))
        files = {file.name: _digest(file) for file in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "step": step, "files": files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for file in (*temporary.iterdir(), temporary):
            _sync(file)
        if final.exists():  # the same step again, after a fallback to an earlier one
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync(root)
        folders = _folders(root)
        at = folders.index(final)
        for stale in folders[:at] + folders[at + keep :]:
            shutil.rmtree(stale)
    except OSError as err:
        raise SaerlError(f"cannot write checkpoint {final}: {err.strerror or err}; free some space") from err
    return final


def set_aside(out_dir: str | Path) -> None:
    """Move the checkpoints of an earlier run to ``checkpoints.previous``, out of a fresh run's way."""
    root = Path(out_dir) / FOLDER
    if root.is_dir():
        previous = root.with_name(f"{FOLDER}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(root, previous)


def load_latest(out_dir: str | Path) -> Checkpoint | None:
    """The latest checkpoint that is intact; None when there is none at all.

    A damaged one is reported in the log and the one before it used. Raises SaerlError when all are damaged.
    """
    folders = _folders(Path(out_dir) / FOLDER)
    for folder in folders:
        try:
            return _load(folder)
        except (OSError, ValueError, KeyError, TypeError) as err:
            log.warning("checkpoint %s is damaged (%s); trying the one before it", folder, err)
    if folders:
        raise SaerlError(f"every checkpoint in {out_dir} is damaged; start the run again without --resume")
    return None


def save_reference(out_dir: str | Path, model: nn.Module) -> Path:
    """Write the frozen reference policy's weights, once per run."""
    target = Path(out_dir) / "reference.safetensors"
    with atomic_path(target) as temporary:
        _write_tensors(temporary, model_tensors(model))
    return target


def load_reference(out_dir: str | Path, model: nn.Module) -> None:
    """Load what :func:`save_reference` wrote. Raises SaerlError when it is missing or damaged."""
    from safetensors.torch import load_file

    path = Path(out_dir) / "reference.safetensors"
    try:
        tensors = load_file(path)
    except Exception as err:  # FileNotFoundError, or safetensors' own error
        raise SaerlError(f"the reference policy {path} cannot be read ({err}); start the run again") from None
    load_model_tensors(model, tensors)


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set the process's random generators to a checkpoint's."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state.get("cuda") is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _rng_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, torch.tensor(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _load(folder: Path) -> Checkpoint:
    from safetensors.torch import load_file

    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
    for name, digest in manifest["files"].items():
        if _digest(folder / name) != digest:
            raise ValueError(f"{name} does not match its checksum")
    state = json.loads((folder / "state.json").read_text())
    extra = load_file(folder / "extra.safetensors")
    return Checkpoint(
        path=folder,
        step=int(state["step"]),
        model=load_file(folder / "model.safetensors"),
        optimizer=load_file(folder / "optimizer.safetensors"),
        plan=_fill(state["plan"], extra),
        rng=_fill(state["rng"], extra),
        counters=state["counters"],
    )


def _folders(root: Path) -> list[Path]:
    """Complete checkpoint folders, latest first."""
    return sorted((p for p in root.glob("step-*") if p.suffix != ".tmp" and p.is_dir()), reverse=True)


def _strip(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` with its tensors and arrays moved to ``tensors`` and named in their place."""
    if isinstance(value, (Tensor, np.ndarray)):
        tensors[name] = torch.as_tensor(value)
        return {"__tensor__": name, "numpy": isinstance(value, np.ndarray)}
    if isinstance(value, Mapping):
        return {str(key): _strip(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strip(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    return value.item() if isinstance(value, np.generic) else value


def _fill(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "__tensor__" in value:
            tensor = tensors[value["__tensor__"]]
            return tensor.numpy() if value["numpy"] else tensor
        return {key: _fill(item, tensors) for key, item in value.items()}
    return [_fill(item, tensors) for item in value] if isinstance(value, list) else value


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    # a copy of each: safetensors refuses views that share memory
    save_file({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}, path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
