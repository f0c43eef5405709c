"""Seconds per phase of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds per phase, also added to ``total``; waits for the device at a phase's end, so that phases get
    their own work."""

    def __init__(self, device: torch.device, total: dict[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._sums = [self.seconds] if total is None else [self.seconds, total]
        self._cuda = device.type == "cuda"

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if self._cuda:
                torch.cuda.synchronize()
            self.add(phase, time.perf_counter() - started)

    def add(self, phase: str, seconds: float) -> None:
        for sums in self._sums:
            sums[phase] = sums.get(phase, 0.0) + seconds
