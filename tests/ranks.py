"""The same command once for every process of a group, as torchrun starts it."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_ranks(command: Sequence[str], count: int, timeout: float) -> None:
    """Run ``command`` in ``count`` processes on one thread each; all must end with 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels/torch-ext'}", "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=env | {"RANK": str(i)}, stderr=subprocess.PIPE, text=True)
        for i in range(count)
    ]
    try:
        ends = [rank.communicate(timeout=timeout)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * count, ends
