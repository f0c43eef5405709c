"""The last whole step of a run, kept in memory so that an error loses nothing that came before it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)
DUE = "eval_due"  # in a checkpoint's counters: the evaluation of its step was not made


class Rescue:
    """``state`` gives the plan's state and the counters, ``write(step, state)`` makes a checkpoint of them.

    Weights and optimizer are not copied: they are those of the last whole step until the update begins.
    """

    def __init__(
        self, state: Callable[[], dict[str, Any]], write: Callable[[int, dict[str, Any]], None]
    ) -> None:
        self._state, self._write = state, write
        self.saved = -1  # the step of the latest checkpoint
        self._kept: tuple[int, dict[str, Any]] | None = None

    def keep(self, step: int, *, due: bool = False) -> None:
        """``step`` is whole, but for its evaluation where that is ``due``."""
        self._kept = None
        if due or step > self.saved:
            state = copy.deepcopy(self._state())
            if due:
                state["counters"][DUE] = True
            self._kept = step, state

    def drop(self) -> None:
        """An update begins."""
        self._kept = None

    def save(self, say: Callable[[str], None]) -> None:
        """After an error: write what is kept; a failure to do so is logged, as the error is what matters."""
        if self._kept is not None:
            try:
                self._write(*self._kept)
                self.saved = self._kept[0]
            except Exception as err:
                log.warning(
                    "what came before the error could not be saved: %s",
                    err if str(err) else type(err).__name__,
                )
        if self.saved >= 0:
            say(f"step {self.saved} is saved; go on with --resume when the error is mended")
