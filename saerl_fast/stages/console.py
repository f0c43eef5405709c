"""Where the commands speak: lines on stdout, progress bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Echo:
    """Called with a line of text; ``quiet`` leaves nothing but results."""

    quiet: bool = False

    def __call__(self, line: str) -> None:
        if not self.quiet:
            self.result(line)

    def result(self, line: str) -> None:
        """A line that is shown even when quiet."""
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def bar(self, label: str) -> Callable[[int, int], None]:
        """A callback ``(done, total)`` that keeps a progress bar up to date."""
        from tqdm import tqdm

        shown: list[Any] = []

        def update(done: int, total: int) -> None:
            if not shown:
                interval = 0.2 if sys.stderr.isatty() else 10.0
                shown.append(tqdm(total=total, desc=label, disable=self.quiet, mininterval=interval))
            shown[0].update(done - shown[0].n)
            if done >= total:
                shown[0].close()

        return update
