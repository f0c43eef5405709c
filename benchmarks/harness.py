"""How every benchmark here takes its figures: contenders in turn, in one process, checked before timed.

Each round calls every contender once, in turn, so that a busy machine slows all of them alike; ratios are
medians over rounds. A contender whose result is wrong fails the run instead of being timed. On one CPU thread
the clock is the thread's CPU time, elsewhere wall time; on a GPU events around the call, with L2 flushed.
Rounds end early when a shape has had its seconds: SAERL_BENCH_SHAPE_SECONDS, 1.5 on a GPU, no limit on a CPU.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Contender = Callable[[], Any]
Check = Callable[[str, Any], None]
LEAST_ROUNDS = 3  # however slow a shape is


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
    memory: bool = True,
) -> dict[str, dict[str, float]]:
    """Check, warm up, then time all contenders in turn.

    Returns name -> p20_ms, p50_ms, p80_ms; ``ratio``, the median over rounds of its time to that of ``base``
    (absent where ``base`` is no contender); with ``memory`` also peak_mb (``peak_memory``).
    ``check(name, result)`` raises when a result is wrong. What does not fit the GPU's memory is left out.
    """
    flush = torch.empty(1 << 26, device=device) if device.type == "cuda" else None
    peaks: dict[str, float | None] = {}
    for name, call in contenders.items():
        try:
            result = call()  # also compiles, tunes and fills caches, which is nobody's peak
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        if check is not None:
            check(name, result)
        del result
        peaks[name] = peak_memory(call, device) if memory else None
    limit = os.environ.get("SAERL_BENCH_SHAPE_SECONDS") or ("1.5" if device.type == "cuda" else "inf")
    stop = time.monotonic() + float(limit)
    times: dict[str, list[float]] = {name: [] for name in peaks}
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.monotonic() > stop:
            break
        for name in times:
            times[name].append(timed(contenders[name], device, flush))
    table = summary(times, base)
    for name, peak in peaks.items():
        if peak is not None:
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


def grid(tiny: list, cpu: list, gpu: list) -> list:
    """The shapes to measure here: with SAERL_BENCH_GRID=tiny a smoke run's, else the device's."""
    if os.environ.get("SAERL_BENCH_GRID") == "tiny":
        return tiny
    return gpu if DEVICE.type == "cuda" else cpu


@contextmanager
def bench_threads() -> Iterator[None]:
    """On a CPU SAERL_BENCH_THREADS threads of torch's (one unless set), and after it as many as before."""
    threads = torch.get_num_threads()
    if DEVICE.type == "cpu":
        torch.set_num_threads(int(os.environ.get("SAERL_BENCH_THREADS", "1")))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def saelens_topk(W: torch.Tensor, b: torch.Tensor, k: int) -> Any:
    """SAELens' TopKSAE with the encoder W [d_in, d_sae], b [d_sae]; ImportError where it is missing."""
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    d_in, d_sae = W.shape
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=k, device=str(W.device))).to(W.device, W.dtype)
    zeros = torch.zeros(d_in, device=W.device)
    sae.load_state_dict({"W_enc": W, "b_enc": b, "W_dec": sae.W_dec, "b_dec": zeros})
    return sae


def peak_memory(call: Contender, device: torch.device) -> float | None:
    """MB (2**20 bytes) that ``call`` needs at its peak, its result included, beyond what is held before.

    On a GPU what torch allocates. On a CPU the growth of the resident set, after freed memory has gone back
    to the system (without that, glibc would serve the call from pages that already count); to 1 MB or so,
    since the kernel counts pages in batches. None where the system cannot tell (Linux with glibc can).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
        resident = process_mb("VmRSS")
        call()
        return max(0.0, process_mb("VmHWM") - resident)
    except (AttributeError, OSError, KeyError):
        return None


def process_mb(field: str) -> float:
    """MB (2**20 bytes) in /proc/self/status; ru_maxrss will not do: a child starts at its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0]) / 2**10


def environment(device: torch.device) -> dict[str, Any]:
    """What a number means nothing without."""
    root = Path(__file__).resolve().parents[1]
    commit = _said(["git", "-C", str(root), "rev-parse", "--short", "HEAD"])
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }
    for package in ("triton", "numba", "sae-lens", "eai-sparsify"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        found["driver"] = _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    else:
        found["cpu"] = _cpu_name()
        found["threads"] = torch.get_num_threads()
        found["clock"] = "thread cpu time" if torch.get_num_threads() == 1 else "wall"
        found["load"] = os.getloadavg()[0]
    return found


def _said(command: list[str]) -> str:
    """What a command prints; nothing where it is missing, since that must cost no measurement."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
