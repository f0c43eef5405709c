"""Which implementation runs: per call, by a context manager, by the environment, or automatically."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
from typing import Any, Iterator, Optional

import torch

BACKENDS = ("auto", "triton", "torch", "numba", "reference")
ENVIRONMENT = "SAERL_KERNELS_BACKEND"

_override: contextvars.ContextVar = contextvars.ContextVar("saerl_kernels_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block whose ``backend`` is "auto" on ``name``."""
    _check(name, "use_backend")
    token = _override.set(None if name == "auto" else name)
    try:
        yield
    finally:
        _override.reset(token)


@functools.lru_cache(maxsize=None)
def has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


@functools.lru_cache(maxsize=None)
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Is Triton's interpreter on? Then its kernels take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def resolve(backend: str, device: torch.device) -> str:
    """The backend to run: "triton", "torch", "numba" or "reference".

    An explicit ``backend`` wins over ``use_backend``, that over the environment variable
    SAERL_KERNELS_BACKEND, and that over the automatic choice: Triton on CUDA, numba on the CPU when it is
    installed, torch otherwise. Raises ValueError for a backend that cannot run on ``device``.
    """
    _check(backend, "backend")
    name: Optional[str] = backend
    if name == "auto":
        name = _override.get()
    if name is None or name == "auto":
        name = os.environ.get(ENVIRONMENT) or "auto"
        _check(name, ENVIRONMENT)
    if name == "auto":
        if device.type == "cuda":
            return "triton" if has_triton() else "torch"
        return "numba" if device.type == "cpu" and has_numba() else "torch"
    if name == "triton":
        if not has_triton():
            raise ValueError("backend 'triton' is not installed; install triton or use backend='auto'")
        if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
            raise ValueError(
                f"backend 'triton' cannot run on {device}; use a CUDA tensor, or TRITON_INTERPRET=1 to debug"
            )
    if name == "numba":
        if not has_numba():
            raise ValueError("backend 'numba' is not installed; install numba or use backend='auto'")
        if device.type != "cpu":
            raise ValueError(f"backend 'numba' cannot run on {device}; use backend='auto'")
    assert name is not None
    return name


def _check(name: str, where: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{where}={name!r} is unknown; choose one of {', '.join(BACKENDS)}")


@functools.lru_cache(maxsize=None)
def implementation(name: str) -> Any:
    """The module that implements backend ``name``, imported at first use."""
    if name == "torch":
        from . import _torch

        return _torch
    return importlib.import_module(f"._{name}", __package__)
