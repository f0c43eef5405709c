"""How every benchmark here takes its figures: contenders in turn, in one process, checked before timed.

Each round calls every contender once, in turn, so that a busy machine slows all of them alike; ratios are
medians over rounds. A contender whose result is wrong fails the run instead of being timed. On one CPU thread
the clock is the thread's CPU time, elsewhere wall time; on a GPU events around the call, with L2 flushed.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Contender = Callable[[], Any]
Check = Callable[[str, Any], None]


def timed(call: Contender, device: torch.device, flush: torch.Tensor | None) -> float:
    """Seconds of one call; ``flush`` is a tensor larger than the GPU's L2, None on a CPU."""
    if device.type != "cuda":
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        call()
        return clock() - start
    assert flush is not None
    flush.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def measure(
    contenders: Mapping[str, Contender],
    device: torch.device,
    rounds: int,
    *,
    base: str,
    check: Check | None = None,
) -> dict[str, dict[str, float]]:
    """Check, warm up, then time all contenders in turn.

    Returns name -> p20_ms, p50_ms, p80_ms; ``ratio``, the median over rounds of its time to that of ``base``
    (absent where ``base`` is no contender); on a GPU ``peak_mb``, what the call allocated beyond what was
    held before. ``check(name, result)`` raises when a result is wrong.
    """
    flush = torch.empty(1 << 26, device=device) if device.type == "cuda" else None
    memory = {}
    for name, call in contenders.items():
        if flush is not None:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        result = call()
        if check is not None:
            check(name, result)
        del result
        if flush is not None:
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(timed(call, device, flush))
    table = summary(times, base)
    for name, peak in memory.items():
        table[name]["peak_mb"] = peak
    return table


def summary(times: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, float]]:
    """Name -> p20_ms, p50_ms, p80_ms and ratio to ``base`` of the seconds in each round."""
    reference = times.get(base)
    table = {}
    for name, seconds in times.items():
        p20, p50, p80 = (statistics.quantiles(seconds, n=10, method="inclusive")[i] for i in (1, 4, 7))
        table[name] = {"p20_ms": p20 * 1e3, "p50_ms": p50 * 1e3, "p80_ms": p80 * 1e3}
        if reference is not None:
            table[name]["ratio"] = statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
    return table


def environment(device: torch.device) -> dict[str, Any]:
    """What a number means nothing without."""
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
    ).stdout.strip()
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }
    for module in ("triton", "numba", "sae_lens"):
        try:
            found[module] = __import__(module).__version__
        except (ImportError, AttributeError):
            found[module] = None
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    else:
        found["cpu"] = _cpu_name()
        found["threads"] = torch.get_num_threads()
        found["clock"] = "thread cpu time" if torch.get_num_threads() == 1 else "wall"
        found["load"] = os.getloadavg()[0]
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
