"""Launching on the device of the tensors."""

from __future__ import annotations

import functools
from typing import Any, Callable, TypeVar, cast

import torch

Launcher = TypeVar("Launcher", bound=Callable[..., Any])


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
