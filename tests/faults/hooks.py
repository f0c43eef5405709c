"""What is done to a command from the inside at its n-th operation on files: it dies, its disk fails, it is
sent signals."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
MAKING = {"open", "os.rename", "os.mkdir", "os.link", "os.symlink"}  # what a full disk refuses
CHANGING = MAKING | {"os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def each_operation(
    run_dir: Path, call: Callable[[int], None], among: set[str] = CHANGING, *, reading: bool = False
) -> Callable[[], None]:
    """Before every write, renaming or deletion in run_dir (or every opening to read), ``call`` with its
    number, from 1."""

    def install() -> None:
        seen, inside = [0], str(run_dir)

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event in among and _concerns(event, args, inside, reading):
                seen[0] += 1
                call(seen[0])

        sys.addaudithook(hook)

    return install


def _concerns(event: str, args: tuple[Any, ...], inside: str, reading: bool) -> bool:
    if not isinstance(args[0], (str, bytes, os.PathLike)) or not os.fsdecode(args[0]).startswith(inside):
        return False
    if event != "open":
        return True
    _, mode, flags = args
    if (flags or 0) & getattr(os, "O_DIRECTORY", 0):
        return False
    return reading != (bool((flags or 0) & WRITING) or any(letter in (mode or "") for letter in "wax+"))


def counted(run_dir: Path, to: Path) -> Callable[[], None]:
    """Leave a byte in ``to`` for every operation: M for one of MAKING, else another."""
    handle = os.open(to, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    made = each_operation(run_dir, lambda number: os.write(handle, b"M") and None, MAKING)
    others = each_operation(run_dir, lambda number: os.write(handle, b".") and None, CHANGING - MAKING)

    def install() -> None:
        made()
        others()

    return install


def killed_at(run_dir: Path, number: int) -> Callable[[], None]:
    """SIGKILL before the operation of this number."""
    return each_operation(run_dir, lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == number else None)


def full_at(run_dir: Path, number: int) -> Callable[[], None]:
    """No space left on the device at the operation of this number and all after it."""
    return each_operation(run_dir, lambda n: _refuse(errno.ENOSPC) if n >= number else None, MAKING)


def refused_at(run_dir: Path, number: int, code: int, *, once: bool) -> Callable[[], None]:
    """The error ``code`` at the operation of this number and, unless ``once``, at all after it."""
    return each_operation(
        run_dir, lambda n: _refuse(code) if n == number or (n > number and not once) else None
    )


def unreadable_at(run_dir: Path, number: int) -> Callable[[], None]:
    """Too many open files when this file is opened to be read, and no more after it."""
    reads = {"open"}
    return each_operation(
        run_dir, lambda n: _refuse(errno.EMFILE) if n == number else None, reads, reading=True
    )


def at_each_sync(call: Callable[[int], None]) -> Callable[[], None]:
    """Before the disk is asked to have written a file, ``call`` with the number of such requests, from 1."""

    def install() -> None:
        sync, seen = os.fsync, [0]

        def counting(handle: int) -> None:
            seen[0] += 1
            call(seen[0])
            sync(handle)

        os.fsync = counting  # type: ignore[assignment]

    return install


def unsynced_at(number: int, code: int) -> Callable[[], None]:
    """The error ``code`` where the disk is asked for the time of this number."""
    return at_each_sync(lambda n: _refuse(code) if n == number else None)


def signalled_at(run_dir: Path, sent: dict[int, list[int]]) -> Callable[[], None]:
    """The signals of each number before the operation of that number."""
    return each_operation(run_dir, lambda n: [os.kill(os.getpid(), one) for one in sent.get(n, [])] and None)


def _refuse(code: int) -> None:
    raise OSError(code, os.strerror(code))


def no_file_above(size: int) -> Callable[[], None]:
    """No file may grow beyond ``size`` bytes: what a full disk is to libraries that write by themselves."""

    def install() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return install
