"""A process that ends before any chosen file operation, without a process: the tests of crashes use it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saerl_fast.records.lock import NAME

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
_state: dict[str, Any] = {"root": None, "seen": 0, "last": 0}


class Crashed(BaseException):
    """The process is no more: every later file operation raises it too, so nothing is tidied up."""


def _hook(event: str, args: tuple[Any, ...]) -> None:
    root = _state["root"]
    if root is None or event not in EVENTS or not str(args[0]).startswith(root):
        return
    if NAME in str(args[0]):  # a lock goes with the process, which here lives on
        return
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
        return
    _state["seen"] += 1
    if _state["seen"] > _state["last"]:
        raise Crashed


sys.addaudithook(_hook)


def crash(root: Path, operations: int, work: Callable[[], Any]) -> bool:
    """Run ``work`` until it has changed ``root`` by so many file operations; whether it was ended then."""
    _state.update(root=str(root), seen=0, last=operations)
    try:
        work()
    except Crashed:
        return True
    finally:
        _state["root"] = None
    return False


def damages(data: bytes) -> dict[str, bytes]:
    """Four ways for a file to be damaged."""
    half = len(data) // 2
    return {
        "truncated": data[:half],
        "empty": b"",
        "flipped": data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :],
        "zeroed": data[:half] + bytes(len(data) - half),
    }
