"""safetensors files that are written block by block and read where they lie, for what fills the memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saerl_fast.fileio import atomic_path, damaged

NAMES = {"F64": np.float64, "I64": np.int64, "F32": np.float32, "I32": np.int32, "U8": np.uint8}
MAPPED = 1 << 26  # bytes from which a tensor stays in its file


class Blocks(NamedTuple):
    """A tensor that is made while it is written: arrays of ``dtype`` that together have ``shape``."""

    dtype: type
    shape: tuple[int, ...]
    arrays: Iterable[np.ndarray]


class Place(NamedTuple):
    """Where a tensor lies in its file; ``at``: bytes from the file's start."""

    dtype: np.dtype
    shape: tuple[int, ...]
    at: int


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray | Blocks], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, atomically."""
    with atomic_path(path) as temporary:
        put_tensors(temporary, tensors, metadata)


def put_tensors(path: Path, tensors: Mapping[str, np.ndarray | Blocks], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in place, the widest types first so that all lie aligned."""
    names = {np.dtype(dtype): name for name, dtype in NAMES.items()}
    order = sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        dtype, shape = np.dtype(tensors[name].dtype), tensors[name].shape
        stop = at + prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name]
            for array in tensor.arrays if isinstance(tensor, Blocks) else (tensor,):
                file.write(np.ascontiguousarray(array).data)


def places(path: Path, again: str) -> tuple[dict[str, Place], dict[str, str]]:
    """Where the tensors of a safetensors file lie, and its metadata.

    Raises SaerlError, which ends in ``again``, on a file that is none.
    """
    found = {}
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = int.from_bytes(file.read(8), "little") + 8
            if start > size:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(start - 8))
        metadata = dict(header.pop("__metadata__", {}))
        for name, entry in header.items():
            dtype, shape = np.dtype(NAMES[entry["dtype"]]), tuple(entry["shape"])
            first, stop = entry["data_offsets"]
            if not (0 <= first <= stop <= size - start and stop - first == prod(shape) * dtype.itemsize):
                raise ValueError(f"{name} does not lie in it")
            found[name] = Place(dtype, shape, start + first)
    except Exception as err:  # a crafted header can stumble anywhere
        raise damaged(path, err, again) from err
    return found, metadata


def read_tensors(path: Path, again: str) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file; those from ``MAPPED`` bytes are read when they are looked at.

    All can be written to, which leaves the file as it is. Errors as in `places`.
    """
    found = {}
    for name, (dtype, shape, at) in places(path, again)[0].items():
        try:
            mapped = np.memmap(path, dtype, "c", at, shape) if prod(shape) else np.empty(shape, dtype)
        except (OSError, TypeError, ValueError) as err:
            raise damaged(path, err, again) from err
        found[name] = np.asarray(mapped) if mapped.nbytes >= MAPPED else np.array(mapped)
    return found
