"""TopK encoding against the bare matrix product and against peers, as ratios taken in one process.

    pytest benchmarks/bench_encode.py --benchmark-json=benchmarks/results/cpu/encode.json

Each round times every contender once, in turn, so that a busy machine slows all of them; ratios are medians
over rounds. A contender whose result is wrong fails the run instead of being timed. On one CPU thread the
clock is the thread's CPU time, elsewhere wall time; on a GPU events around the call, with L2 flushed.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import saerl_kernels as sk


class Shape(NamedTuple):
    d_in: int
    d_sae: int
    k: int
    batch: int


CPU_GRID = [
    Shape(768, 16384, 32, 512),  # the shape the target is set for
    Shape(768, 16384, 32, 64),
    Shape(768, 16384, 32, 2048),
    Shape(768, 16384, 128, 512),
    Shape(2048, 16384, 64, 256),
    Shape(576, 32768, 32, 256),
    Shape(256, 4096, 32, 1024),
    Shape(64, 1024, 16, 1024),
]
GPU_GRID = [
    Shape(d_in, d_sae, k, batch)
    for d_in in (1536, 2048, 4096)
    for d_sae in (32768, 65536, 131072)
    for k in (32, 64, 100)
    for batch in (1024, 4096, 16384, 65536)
]
Contender = Callable[[], Any]


class Problem:
    """One shape's inputs, in bfloat16 on a GPU and float32 on a CPU."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        g = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.shape, self.device = shape, device
        at = {"generator": g, "device": device}
        self.x = torch.randn(shape.batch, shape.d_in, **at).to(dtype)
        self.W = (torch.randn(shape.d_in, shape.d_sae, **at) / shape.d_in**0.5).to(dtype)
        self.b = (torch.randn(shape.d_sae, **at) * 0.1).to(dtype)
        self.encoder = sk.pack_encoder(self.W, self.b)
        self.weight = self.W.t().contiguous()

    def linear(self) -> torch.Tensor:
        return torch.nn.functional.linear(self.x, self.weight, self.b)

    def linear_topk(self) -> Any:
        return self.linear().relu_().topk(self.shape.k)

    def linear_topk_fp32(self) -> Any:
        return torch.mm(self.x, self.W, out_dtype=torch.float32).add_(self.b).relu_().topk(self.shape.k)

    def contenders(self) -> dict[str, Contender]:
        """Name -> call. "linear" is the limit that every ratio is taken to."""
        found: dict[str, Contender] = {"linear": self.linear, "linear + torch.topk": self.linear_topk}
        if self.device.type == "cuda":
            found["linear + torch.topk, fp32"] = self.linear_topk_fp32
        backends = ["torch", "triton"] if self.device.type == "cuda" else ["torch", "numba"]
        for name in backends:
            found[f"saerl_kernels {name}"] = lambda name=name: sk.encode_topk(  # type: ignore[misc]
                self.x, self.encoder, self.shape.k, backend=name
            )
        found.update(self._peers())
        # One dense matrix of pre-activations in float32, twice over, must fit beside the rest.
        if self.device.type == "cuda":
            dense = 8 * self.shape.batch * self.shape.d_sae
            if dense > 0.6 * torch.cuda.mem_get_info()[0]:
                found = {n: f for n, f in found.items() if n.startswith("saerl_kernels triton")}
        return found

    def _peers(self) -> dict[str, Contender]:
        peers: dict[str, Contender] = {}
        try:
            from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

            config = TopKSAEConfig(
                d_in=self.shape.d_in, d_sae=self.shape.d_sae, k=self.shape.k, device=str(self.device)
            )
            sae = TopKSAE(config).to(self.device, self.x.dtype)
            zeros = torch.zeros(self.shape.d_in, device=self.device)
            sae.load_state_dict({"W_enc": self.W, "b_enc": self.b, "W_dec": sae.W_dec, "b_dec": zeros})
            peers["SAELens TopKSAE.encode"] = torch.no_grad()(lambda: sae.encode(self.x))
        except ImportError:
            pass
        try:
            from sparsify.fused_encoder import fused_encoder

            call = torch.no_grad()(lambda: fused_encoder(self.x, self.weight, self.b, self.shape.k, "topk"))
            peers["sparsify fused_encoder"] = call
        except ImportError:
            pass
        return peers

    def check(self, name: str, result: Any) -> None:
        """Compare with float64 on the first rows; 16-bit peers round, so only our own must be exact."""
        if not name.startswith("saerl_kernels"):
            return
        rows = min(32, self.shape.batch)
        want = sk.reference.encode_topk(self.x[:rows], self.encoder, self.shape.k)
        torch.testing.assert_close(result.values[:rows], want.values, rtol=1e-4, atol=1e-4)
        pre = sk.reference.pre_activations(self.x[:rows], self.encoder)
        carried = pre.gather(1, result.indices[:rows].long()).relu()
        torch.testing.assert_close(result.values[:rows], carried, rtol=1e-4, atol=1e-4)
        assert bool((result.indices.long().sort(-1).values.diff(dim=-1) > 0).all()), "an index came twice"


def timed(call: Contender, device: torch.device, flush: torch.Tensor | None) -> float:
    """Seconds of one call."""
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


def measure(problem: Problem, rounds: int) -> dict[str, dict[str, float]]:
    """Check, warm up, then time all contenders in turn: name -> milliseconds, ratio to linear, memory."""
    contenders = problem.contenders()
    flush = torch.empty(1 << 26, device=problem.device) if problem.device.type == "cuda" else None
    memory = {}
    for name, call in contenders.items():
        if flush is not None:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        problem.check(name, call())
        if flush is not None:
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            times[name].append(timed(call, problem.device, flush))
    base = times.get("linear")
    table = {}
    for name, seconds in times.items():
        p20, p50, p80 = (statistics.quantiles(seconds, n=10, method="inclusive")[i] for i in (1, 4, 7))
        table[name] = {"p20_ms": p20 * 1e3, "p50_ms": p50 * 1e3, "p80_ms": p80 * 1e3}
        if base is not None:
            table[name]["ratio"] = statistics.median(a / b for a, b in zip(seconds, base, strict=True))
        if name in memory:
            table[name]["peak_mb"] = memory[name]
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


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "shape", GPU_GRID if DEVICE.type == "cuda" else CPU_GRID, ids=lambda s: "x".join(map(str, s))
)
def test_encode_topk(benchmark: Any, shape: Shape) -> None:
    problem = Problem(shape, DEVICE)
    enabled = not benchmark.disabled
    threads = torch.get_num_threads()
    if DEVICE.type == "cpu":
        torch.set_num_threads(int(os.environ.get("SAERL_BENCH_THREADS", "1")))
    try:
        table = measure(problem, rounds=(10 if DEVICE.type == "cuda" else 9) if enabled else 2)
        benchmark.extra_info.update(shape._asdict(), contenders=table, environment=environment(DEVICE))
        benchmark.pedantic(sk.encode_topk, (problem.x, problem.encoder, shape.k), rounds=3, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)
