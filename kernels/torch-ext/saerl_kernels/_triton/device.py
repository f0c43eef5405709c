"""Launching on the device of the tensors, and what happens where a plan does not launch."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Callable, Dict, Set, Tuple, TypeVar, cast

import torch
import triton.language as tl
from triton.compiler.errors import CompilationError
from triton.runtime import JITFunction
from triton.runtime.errors import OutOfResources, PTXASError

Launcher = TypeVar("Launcher", bound=Callable[..., Any])
# Raised before a kernel runs. An error of the device is none of them: it stays, and nothing may hide it.
LAUNCH_ERRORS = (OutOfResources, PTXASError, CompilationError)
_refused: Set[Tuple] = set()


def interpreted() -> bool:
    """Whether Triton was imported with its interpreter on: what became of one of its own functions."""
    return not isinstance(tl.sum, JITFunction)


def on_device(launcher: Launcher) -> Launcher:
    """``launcher`` with the device of its first argument as the current one, where Triton launches.

    Without it, tensors on a second GPU would be addressed by kernels that run on the first.
    """

    @functools.wraps(launcher)
    def run(first: Any, *args: Any, **kwargs: Any) -> Any:
        if first.device.type != "cuda":
            return launcher(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return launcher(first, *args, **kwargs)

    return cast(Launcher, run)


def tried(key: Tuple, plan: Any, call: Callable[..., Any], *args: Any) -> Any:
    """``call(*args)``; None where ``plan`` does not launch, which a warning says once for a ``key``."""
    if key in _refused:
        return None
    try:
        return call(*args)
    except Exception as err:
        if not isinstance(err, LAUNCH_ERRORS) and "PassManager::run failed" not in str(err):
            raise
        _refused.add(key)
        name = f"{type(err).__name__}: {err}".partition("\n")[0][:200]
        warnings.warn(f"{plan} does not launch ({name}); a slower one runs", stacklevel=3)
        return None


def registers(most: int) -> Dict[str, int]:
    """Options of a launch that let a thread have ``most`` registers.

    Left to itself ptxas may take fewer, so that one more program fits a multiprocessor, and put 8 to 32 bytes
    of the rest on the stack. AMD's compiler has no such option.
    """
    return {} if torch.version.hip else {"maxnreg": most}


def cdiv(a: int, b: int) -> int:
    """``triton.cdiv`` without its checks, 1.4 us a call, as are those of the next."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
