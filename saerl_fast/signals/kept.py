"""Files of what a forward pass left of every prompt: CSR features, and arrays that are mapped
into memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import damaged
from saerl_fast.signals import features
from saerl_fast.signals.features import open_features, save_features
from saerl_fast.signals.stored import AGAIN, Stored

Parts = Mapping[str, Any]  # name -> CSR, Stored or float32 [n, columns]
ENDS = (".safetensors", ".npy")


def suffix(rows: Any) -> str:
    """How the name of a file of ``rows`` ends."""
    return ENDS[isinstance(rows, np.ndarray)]


def save_part(path: Path, rows: Any, ids: Sequence[str]) -> None:
    """Write CSR or an array [len(ids), columns]; equal rows make equal files."""
    if not isinstance(rows, np.ndarray):
        save_features(path, rows, ids)
        return
    if len(rows) != len(ids):
        raise SaerlError(f"{len(rows)} feature rows cannot belong to {len(ids)} prompts")
    with open(path, "wb") as file:  # np.save would add an ending to the name
        np.lib.format.write_array(file, np.ascontiguousarray(rows), allow_pickle=False)


def load_part(path: Path, ids: Sequence[str]) -> Any:
    """What `save_part` wrote: `Stored`, or an array memory-mapped; SaerlError for a damaged file."""
    if path.suffix != ".npy":
        return open_features(path, ids)
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as err:
        raise damaged(path, err, AGAIN) from err
    if rows.ndim != 2 or rows.dtype != np.float32 or len(rows) != len(ids):
        shown = f"{rows.dtype} {list(rows.shape)}"
        raise SaerlError(f"{path} holds {shown}, not a float32 row for each of {len(ids)} prompts; {AGAIN}")
    return rows


def in_memory(rows: Any) -> Any:
    """CSR that lies in files, unless it has more than ``SAMPLE`` rows, in memory; anything else as it is."""
    if isinstance(rows, Stored) and rows.n_rows <= features.SAMPLE:
        return rows.rows(0, rows.n_rows)
    return rows


def join_arrays(path: Path, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The rows of all parts, in a file that is mapped into memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (sum(map(len, parts)), parts[0].shape[1])
    whole = np.lib.format.open_memmap(path, "w+", parts[0].dtype, shape)
    at = 0
    for part in parts:
        whole[at : at + len(part)] = part
        at += len(part)
    whole.flush()
    return np.load(path, mmap_mode="r")
