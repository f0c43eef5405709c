"""Which implementation runs: per call, by a context manager, by the environment, or automatically.

A backend is any object with ops as attributes; README.md has the contract of each. What it lacks, torch runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
import warnings
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Tuple

import torch

BACKENDS = ("auto", "triton", "torch", "numba", "reference")
OPS = (
    "decode_csr",
    "encode_threshold",
    "encode_topk",
    "pool_codes",
    "sparse_decode",
    "topk",
    "value_grads",
    "weight_grads",
)
STEPS = ("assign", "row_similarity", "table_of", "transpose", "update")  # of k-means
NO_DATA = (
    "what this op returns depends on the data, and a meta tensor has none; give it tensors of a real device"
)
ENVIRONMENT = "SAERL_KERNELS_BACKEND"
SCREEN = "SAERL_KERNELS_SCREEN"


class _Registered(NamedTuple):
    own: Any  # the object with the ops, or the name of a module
    available: Callable[[torch.device], bool]


_registered: Dict[str, _Registered] = {}

_override: contextvars.ContextVar = contextvars.ContextVar("saerl_kernels_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block whose ``backend`` is "auto" on ``name``."""
    check_name(name, "use_backend")
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


@functools.lru_cache(maxsize=None)
def interpreting() -> bool:
    """Is Triton's interpreter on? Then its kernels take CPU tensors.

    Triton reads TRITON_INTERPRET, in spellings of its own, when it is imported, and what the variable says
    later changes no kernel.
    """
    if not has_triton():
        return False
    from ._triton.device import interpreted

    return interpreted()


def screening() -> bool:
    """May TopK encoders be screened in bfloat16? Unless the environment has SAERL_KERNELS_SCREEN=0."""
    return os.environ.get(SCREEN) != "0"


def resolve(backend: str, device: torch.device) -> str:
    """The backend to run: "triton", "torch", "numba", "reference" or the name of a registered one.

    An explicit ``backend`` wins over ``use_backend``, that over the environment variable
    SAERL_KERNELS_BACKEND, and that over the automatic choice: Triton on CUDA, numba on the CPU when it is
    installed, torch otherwise. Raises ValueError for a backend that cannot run on ``device``, and
    for the meta device, of which only ops whose shapes do not depend on the data take tensors.
    """
    check_name(backend, "backend")
    if device.type == "meta":
        raise ValueError(NO_DATA)
    name: Optional[str] = backend
    if name == "auto":
        name = _override.get()
    if name is None or name == "auto":
        name = os.environ.get(ENVIRONMENT) or "auto"
        check_name(name, ENVIRONMENT)
    if name == "auto":
        if device.type == "cuda":
            return "triton" if has_triton() else "torch"
        return "numba" if device.type == "cpu" and has_numba() else "torch"
    assert name is not None
    if name in _registered and not _registered[name].available(device):
        raise ValueError(f"backend {name!r} cannot run on {device}; use backend='auto'")
    if name == "triton":
        if not has_triton():
            raise ValueError("backend 'triton' is not installed; install triton or use backend='auto'")
        if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
            raise ValueError(
                f"backend 'triton' cannot run on {device}; use a CUDA tensor, or start with "
                "TRITON_INTERPRET=1 to debug"
            )
    if name == "numba":
        if not has_numba():
            raise ValueError("backend 'numba' is not installed; install numba or use backend='auto'")
        if device.type != "cpu":
            raise ValueError(f"backend 'numba' cannot run on {device}; use backend='auto'")
    return name


def check_name(name: str, where: str = "backend") -> None:
    """ValueError that starts with ``where`` when no backend has this name."""
    names = (*BACKENDS, *_registered)
    if name not in names:
        raise ValueError(f"{where}={name!r} is unknown; choose one of {', '.join(names)}")


def register_backend(name: str, own: Any, available: Optional[Callable[[torch.device], bool]] = None) -> None:
    """Make ``backend=name`` run the ops of ``own``, on every op's call and in ``use_backend``.

    Args:
        name: an identifier that is no built-in backend's. A name that was registered before is replaced.
        own: an object with one or more of ``OPS`` as attributes (a module, a namespace, a class of static
            methods), or the absolute name of such a module, which is then imported at first use. Its
            attribute ``kmeans``, where it has one, offers ``STEPS`` in the same way. Torch runs what is
            missing, and a warning says so once for each op. README.md says what each op gets and returns.
        available: whether the backend can run on a device; None: on every one.

    It is never the automatic choice. Raises ValueError for a name that is taken, or an object without ops.
    """
    if not name.isidentifier() or name in BACKENDS:
        raise ValueError(f"a backend cannot be called {name!r}; choose another identifier")
    if not isinstance(own, str):
        _check_ops(name, own)
    _registered[name] = _Registered(own, available or (lambda device: True))
    implementation.cache_clear()
    kmeans_steps.cache_clear()


def _check_ops(name: str, own: Any) -> None:
    if not any(hasattr(own, op) for op in (*OPS, "kmeans")):
        raise ValueError(f"backend {name!r} offers no op; give it one of {', '.join((*OPS, 'kmeans'))}")


class Fallback:
    """The functions of a backend, and torch's where it lacks one, which a warning says once for each."""

    def __init__(self, name: str, own: Any, torchs: Any) -> None:
        self._parts = name, own, torchs

    def __getattr__(self, op: str) -> Any:
        name, own, torchs = self._parts
        found = getattr(own, op, None)
        if found is None:
            found = getattr(torchs, op)
            warnings.warn(f"backend {name!r} has no {op}: torch runs it", stacklevel=3)
        setattr(self, op, found)
        return found


def _complete(name: str, own: Any, names: Tuple[str, ...], torchs: Any) -> Any:
    return own if all(hasattr(own, op) for op in names) else Fallback(name, own, torchs)


@functools.lru_cache(maxsize=None)
def _own(name: str) -> Any:
    return importlib.import_module(f"._{name}", __package__)


@functools.lru_cache(maxsize=None)
def implementation(name: str) -> Any:
    """An object with the ``OPS`` of backend ``name``; a module is imported at first use."""
    torchs = _own("torch")
    own = _registered[name].own if name in _registered else _own(name)
    if isinstance(own, str):
        own = importlib.import_module(own)
        _check_ops(name, own)
    return _complete(name, own, OPS, torchs)


@functools.lru_cache(maxsize=None)
def kmeans_steps(name: str) -> Any:
    """An object with the ``STEPS`` of backend ``name``, and ``reassign`` where it has that."""
    torchs = _own("torch_kmeans")
    if name in _registered:
        own = getattr(implementation(name), "kmeans", None)
    else:
        own = torchs if name == "torch" else importlib.import_module(f"._{name}.kmeans", __package__)
    return _complete(name, own, STEPS, torchs)
