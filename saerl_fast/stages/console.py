"""Where the commands speak: lines on stdout, progress bars on stderr (in a notebook, as widgets)."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from saerl_fast.errors import printable
from saerl_fast.fileio import writing

# tqdm's own, with whole numbers for work that is part done
FORMAT = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


@dataclass
class Echo:
    """Called with a line of text; ``quiet`` leaves nothing but results."""

    quiet: bool = False
    bars: ClassVar[list[Any]] = []  # those on the screen

    def __call__(self, line: str) -> None:
        if not self.quiet:
            self.result(line)

    def result(self, line: str) -> None:
        """A line that is shown even when quiet."""
        line = printable(line)
        write: Callable[[str], Any] = sys.stdout.write
        if self.bars and sys.stdout.isatty():
            from tqdm import tqdm

            write = partial(tqdm.write, file=sys.stdout, end="")  # above the bars
        with writing("standard output"):
            try:
                write(line + "\n")
                sys.stdout.flush()
            except OSError as err:
                if err.errno != errno.EIO:
                    raise
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the terminal has gone

    def bar(self, label: str, unit: str = "it") -> Callable[[float, int], None]:
        """A callback ``(done, total)`` that keeps a progress bar up to date.

        Call it with 0 before the work starts: the rate and the time left are reckoned from the first call.
        """
        shown: list[Any] = []

        def update(done: float, total: int) -> None:
            if not shown:
                from tqdm.auto import tqdm

                interval = 0.2 if sys.stderr.isatty() else 10.0
                options = {"desc": label, "unit": unit, "disable": self.quiet, "mininterval": interval}
                shown.append(tqdm(total=total, initial=done, bar_format=FORMAT, **options))
                self.bars.append(shown[0])
            shown[0].update(done - shown[0].n)
            if done >= total and shown[0] in self.bars:
                self.bars.remove(shown[0])
                shown[0].close()

        return update


def close_bars() -> None:
    """Leave bars that an error has interrupted as they are; what follows has a line of its own."""
    while Echo.bars:
        Echo.bars.pop().close()


@contextmanager
def within_calls(model: Any, expected: int, tell: Callable[[float], None]) -> Iterator[None]:
    """``tell`` the share done, below 1, of ``expected`` forward passes while the block makes them."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        tell(min(calls / max(expected, 1), 0.99))

    hook = model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()
