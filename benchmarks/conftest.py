"""How run_all bounds a benchmark file: a time after which shapes are skipped, and a grid of one shape."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

STARTED = time.monotonic()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("SAERL_BENCH_GRID") == "tiny":
        first = {item.path: item for item in reversed(items)}
        mine = Path(__file__).parent
        items[:] = [item for item in items if mine not in item.path.parents or first[item.path] is item]


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = os.environ.get("SAERL_BENCH_SECONDS")
    if limit and time.monotonic() - STARTED > float(limit):
        pytest.skip(f"the {float(limit):.0f} seconds of this benchmark are over")
