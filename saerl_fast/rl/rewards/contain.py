"""What a reward may change of its process, put back after each call."""

from __future__ import annotations

import builtins
import gc
import logging
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

import numpy as np
import torch


def _default_device() -> torch.device:
    try:
        return torch.get_default_device()
    except AttributeError:  # torch 2.9 cannot be asked after set_default_device(None)
        return torch.device("cpu")


def _set_default_device(device: torch.device) -> None:
    """None, not "cpu": a device that is set stays in the way of every call."""
    torch.set_default_device(None if device.type == "cpu" else device)
    try:
        torch.get_default_device()
    except AttributeError:  # others ask too, transformers among them
        del torch._GLOBAL_DEVICE_CONTEXT.device_context


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


LIMITS = [getattr(resource, f"RLIMIT_{name}") for name in ("AS", "CPU", "DATA", "FSIZE", "NOFILE", "STACK")]


def _limit(limits: list[tuple[int, int]]) -> None:
    for which, pair in zip(LIMITS, limits, strict=True):
        with suppress(OSError, ValueError):  # a hard one stays lowered
            resource.setrlimit(which, pair)


# Each is read before a call, and set again where it differs afterwards.
SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (_default_device, _set_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    (lambda: logging.root.manager.disable, logging.disable),
    (_umask, os.umask),
    (lambda: dict(os.environ), lambda before: os.environ.update(before | dict(os.environ))),  # what is gone
    (lambda: [resource.getrlimit(which) for which in LIMITS], _limit),
    (
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, []),
        lambda mask: signal.pthread_sigmask(signal.SIG_SETMASK, mask),
    ),
]
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGVTALRM", "SIGCHLD", "SIGPIPE")
    if hasattr(signal, name)
]


class Intact:
    """Puts back the builtins that the block changes, and the loaded modules that it removes.

    Leaving it needs no builtin: what is left afterwards, such as `contained`, does.
    """

    def __enter__(self) -> None:
        self._builtins, self._modules = vars(builtins).copy(), sys.modules.copy()

    def __exit__(self, *_: object) -> None:
        builtins.__dict__.update(self._builtins)
        loaded = sys.modules.copy()
        sys.modules.update(self._modules)
        sys.modules.update(loaded)


class _Open:
    """A stream that can be written to and not closed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def close(self) -> None:
        self._stream.flush()


@contextmanager
def contained() -> Iterator[None]:
    """Undo what the block changes of torch's, NumPy's and Python's settings, folder, streams and signals.

    torch's generators are put back too, since training draws from them; those of Python and NumPy go on.
    """
    before, process = [read() for read, _ in SETTINGS], os.getpid()
    here = os.open(".", os.O_RDONLY)
    main = threading.current_thread() is threading.main_thread()
    handlers = [signal.getsignal(number) for number in SIGNALS] if main else []
    timed = main and signal.getitimer(signal.ITIMER_REAL)[0] > 0
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with ExitStack() as stack:
            for replaced, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
                if stream is not None:
                    stack.enter_context(replaced(_Open(stream)))  # type: ignore[type-var]
            stack.enter_context(np.errstate())
            if main:
                stack.enter_context(warnings.catch_warnings())
            stack.enter_context(torch.random.fork_rng(devices))
            yield
    finally:
        if os.getpid() != process:  # a fork that the block left running: the program goes on once only
            os._exit(1)
        for (read, put), value in zip(SETTINGS, before, strict=True):
            if read() != value:
                put(value)
        with suppress(OSError):
            os.fchdir(here)
        os.close(here)
        if main and not timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(SIGNALS, handlers, strict=False):
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
