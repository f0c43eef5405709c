"""sparse_decode and decode_csr against peers, as ratios to torch's embedding_bag taken in one process.

    pytest benchmarks/bench_decode.py --benchmark-json=benchmarks/results/cpu/decode.json

Forward only; the decoder is in 16 or 32 bits. How time is taken: harness.py. SAERL_BENCH_GRID=tiny runs one
small shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

import saerl_kernels as sk
from benchmarks.harness import DEVICE, Contender, bench_threads, environment, grid, measure

BASE = "embedding_bag"


class Shape(NamedTuple):
    d_in: int
    d_sae: int
    k: int
    batch: int
    dtype: str


TINY = [Shape(24, 128, 5, 33, "float32")]
CPU_GRID = [
    Shape(768, 16384, 32, 256, "float32"),
    Shape(768, 16384, 32, 256, "bfloat16"),
    Shape(2304, 16384, 64, 64, "float32"),
    Shape(64, 1024, 16, 1024, "float32"),
]
GPU_GRID = [
    Shape(d_in, d_sae, k, batch, dtype)
    for d_in, d_sae in ((576, 16384), (1536, 65536), (2304, 65536))
    for k in (32, 64)
    for batch in (4096, 65536)
    for dtype in ("bfloat16", "float32")
]
GRID = grid(TINY, CPU_GRID, GPU_GRID)


class Problem:
    """One shape's codes, float32 values and distinct int32 features per row, and a decoder."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        g = torch.Generator(device).manual_seed(0)
        at: dict[str, Any] = {"generator": g, "device": device}
        self.shape, self.device = shape, device
        self.dtype = getattr(torch, shape.dtype)
        self.W = torch.randn(shape.d_sae, shape.d_in, **at).to(self.dtype)
        self.values = torch.rand(shape.batch, shape.k, **at)
        # A feature from each of k equal parts of the dictionary.
        part = shape.d_sae // shape.k
        picked = torch.randint(0, part, (shape.batch, shape.k), **at)
        self.indices = (picked + torch.arange(shape.k, device=device) * part).int()
        indptr = torch.arange(shape.batch + 1, device=device) * shape.k
        self.csr = sk.CSR(indptr, self.indices.view(-1), self.values.view(-1), shape.d_sae)

    def embedding_bag(self) -> torch.Tensor:
        values = self.values.to(self.dtype)
        return F.embedding_bag(self.indices, self.W, mode="sum", per_sample_weights=values)

    def dense(self) -> torch.Tensor:
        codes = torch.zeros(self.shape.batch, self.shape.d_sae, dtype=self.dtype, device=self.device)
        return codes.scatter_(1, self.indices.long(), self.values.to(self.dtype)) @ self.W

    def contenders(self) -> dict[str, Contender]:
        found: dict[str, Contender] = {BASE: self.embedding_bag}
        size = self.shape.batch * self.shape.d_sae * self.W.itemsize
        if self.device.type == "cuda":
            fits = size < 0.6 * torch.cuda.mem_get_info()[0]
        else:  # a 16-bit product takes seconds on a CPU
            fits = self.dtype == torch.float32
        if fits:
            found["dense matmul"] = self.dense
        for name in ["torch", "triton"] if self.device.type == "cuda" else ["torch", "numba"]:
            found[f"saerl_kernels {name}"] = lambda name=name: sk.sparse_decode(  # type: ignore[misc]
                self.values, self.indices, self.W, backend=name
            )
        found["saerl_kernels decode_csr"] = lambda: sk.decode_csr(self.csr, self.W)
        try:
            from sparsify import utils

            peer = utils.triton_decode if self.device.type == "cuda" else utils.eager_decode
            found["sparsify"] = torch.no_grad()(
                lambda: peer(self.indices, self.values.to(self.dtype), self.W.mT)
            )
        except ImportError:
            pass
        return found

    def check(self, name: str, result: torch.Tensor) -> None:
        """Against float64 on the first rows; peers may round values and sums to the decoder's dtype."""
        rows = min(64, self.shape.batch)
        want = sk.reference.sparse_decode(self.values[:rows].double(), self.indices[:rows], self.W.double())
        ours = name.startswith("saerl_kernels")
        tolerance = 1e-5 if self.dtype == torch.float32 else 4e-3 if ours else 2e-2
        error = (result[:rows].double() - want).abs().max() / want.abs().max()
        assert float(error) < tolerance, f"{name} is off by {float(error):.1e}"


@pytest.mark.parametrize("shape", GRID, ids=lambda s: "x".join(map(str, s)))
def test_sparse_decode(benchmark: Any, shape: Shape) -> None:
    with bench_threads():
        problem = Problem(shape, DEVICE)
        rounds = (20 if DEVICE.type == "cuda" else 9) if not benchmark.disabled else 2
        table = measure(problem.contenders(), DEVICE, rounds, base=BASE, check=problem.check)
        benchmark.extra_info.update(
            shape._asdict(), base=BASE, contenders=table, environment=environment(DEVICE)
        )
        benchmark.pedantic(sk.decode_csr, (problem.csr, problem.W), rounds=3, warmup_rounds=1)
