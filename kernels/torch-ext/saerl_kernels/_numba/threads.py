"""Jitted loops over rows, split over torch's threads."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Optional, Tuple

import torch

_pool: Optional[Tuple[int, int, ThreadPoolExecutor]] = None


def run(function: Callable, rows: int, *args: Any, least: int = 32) -> None:
    """``function(*args, start, stop)`` over ``rows``, split over torch's threads, ``least`` rows to each."""
    global _pool
    threads = min(torch.get_num_threads(), rows // least)
    if threads <= 1:
        function(*args, 0, rows)
        return
    key = (os.getpid(), torch.get_num_threads())  # threads do not survive a fork
    if _pool is None or _pool[:2] != key:
        _pool = (*key, ThreadPoolExecutor(key[1], thread_name_prefix="saerl_kernels"))
    edges = [rows * i // threads for i in range(threads + 1)]
    jobs = [_pool[2].submit(function, *args, a, b) for a, b in zip(edges, edges[1:])]
    for job in jobs:
        job.result()
