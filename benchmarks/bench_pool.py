"""encode_pool against encoding and then reducing, as ratios taken in one process.

    pytest benchmarks/bench_pool.py --benchmark-json=benchmarks/results/cpu/pool.json

Sequences of uneven length, reduce "max", which every peer can do. The base is torch alone, a sequence at a
time: linear, torch.topk, scatter, amax. How time is taken: harness.py. SAERL_BENCH_GRID=tiny runs one small
shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

import saerl_kernels as sk
from benchmarks.harness import DEVICE, Contender, bench_threads, environment, grid, measure, saelens_topk

BASE = "linear + torch.topk + scatter + amax"


class Shape(NamedTuple):
    d_in: int
    d_sae: int
    k: int
    tokens: int
    sequences: int


TINY = [Shape(32, 256, 8, 96, 5)]
CPU_GRID = [
    Shape(576, 8192, 32, 1024, 16),
    Shape(768, 16384, 32, 512, 4),
    Shape(256, 16384, 64, 1024, 8),
]
GPU_GRID = [
    Shape(d_in, d_sae, k, tokens, tokens // length)
    for d_in, d_sae in ((576, 16384), (1536, 65536), (2304, 65536))
    for k in (32, 64)
    for tokens, length in ((16384, 128), (65536, 512), (65536, 65536))
]
GRID = grid(TINY, CPU_GRID, GPU_GRID)


class Problem:
    """One shape's inputs, in bfloat16 on a GPU and float32 on a CPU."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        g = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.shape, self.device = shape, device
        at: dict[str, Any] = {"generator": g, "device": device}
        self.x = torch.randn(shape.tokens, shape.d_in, **at).to(dtype)
        self.W = (torch.randn(shape.d_in, shape.d_sae, **at) / shape.d_in**0.5).to(dtype)
        self.b = (torch.randn(shape.d_sae, **at) * 0.1).to(dtype)
        self.encoder = sk.pack_encoder(self.W, self.b)
        self.weight = self.W.t().contiguous()
        cuts = torch.randperm(shape.tokens - 1, generator=torch.Generator().manual_seed(0))
        inner = cuts[: shape.sequences - 1].sort().values + 1
        self.offsets = torch.cat([torch.tensor([0]), inner, torch.tensor([shape.tokens])])
        self.pairs = list(zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True))
        owner = torch.repeat_interleave(torch.arange(shape.sequences), self.offsets.diff())
        self.owner = owner.to(device)
        self.want = sk.encode_pool(self.x, self.offsets, self.encoder, shape.k, backend="torch").to_dense()

    def pool(self, backend: str) -> sk.CSR:
        return sk.encode_pool(self.x, self.offsets, self.encoder, self.shape.k, backend=backend)

    def linear_topk(self) -> torch.Tensor:
        rows = []
        for start, stop in self.pairs:
            pre = torch.nn.functional.linear(self.x[start:stop], self.weight, self.b).relu_()
            values, indices = pre.topk(self.shape.k)
            rows.append(torch.zeros_like(pre).scatter_(1, indices, values).amax(0))
        return torch.stack(rows)

    def encode_then_dense(self) -> torch.Tensor:
        """Our encoder, then a dense [sequences, d_sae] table."""
        values, indices = sk.encode_topk(self.x, self.encoder, self.shape.k)
        dense = torch.zeros(self.shape.sequences, self.shape.d_sae, device=self.device)
        at = self.owner.unsqueeze(1) * self.shape.d_sae + indices
        return dense.view(-1).scatter_reduce_(0, at.view(-1), values.view(-1), "amax").view_as(dense)

    def encode_then_coalesce(self) -> torch.Tensor:
        """Our encoder, then torch's sparse tensors. coalesce can only add: another result, unchecked."""
        values, indices = sk.encode_topk(self.x, self.encoder, self.shape.k)
        at = torch.stack([self.owner.repeat_interleave(self.shape.k), indices.view(-1).long()])
        size = (self.shape.sequences, self.shape.d_sae)
        return torch.sparse_coo_tensor(at, values.view(-1), size, check_invariants=False).coalesce()

    def contenders(self) -> dict[str, Contender]:
        found: dict[str, Contender] = {
            BASE: self.linear_topk,
            "encode_topk + dense scatter": self.encode_then_dense,
            "encode_topk + coalesce (sum)": self.encode_then_coalesce,
        }
        for name in ["torch", "triton"] if self.device.type == "cuda" else ["torch", "numba"]:
            found[f"saerl_kernels {name}"] = lambda name=name: self.pool(name)  # type: ignore[misc]
        try:
            sae = saelens_topk(self.W, self.b, self.shape.k)
            found["SAELens encode + amax"] = torch.no_grad()(
                lambda: torch.stack([sae.encode(self.x[start:stop]).amax(0) for start, stop in self.pairs])
            )
        except ImportError:
            pass
        # The peers hold the longest sequence's pre-activations, and more than one copy of them.
        if self.device.type == "cuda":
            dense = 12 * int(self.offsets.diff().max()) * self.shape.d_sae
            if dense > 0.6 * torch.cuda.mem_get_info()[0]:
                found = {name: call for name, call in found.items() if "saerl_kernels" in name}
        return found

    def check(self, name: str, result: Any) -> None:
        """Ours and what is built on our encoder must agree; peers in 16 bits round before they rank."""
        if "(sum)" in name:
            return
        dense = result.to_dense() if isinstance(result, sk.CSR) else result.float()
        if self.device.type == "cuda" and not name.startswith(("saerl_kernels", "encode_topk")):
            assert (dense - self.want).abs().mean() < 0.01 * self.want.mean(), name
            return
        # Features whose activations differ by rounding may swap at the k-th place: few, and of that size.
        wrong = (dense - self.want).abs() > 1e-3
        assert int(wrong.sum()) <= self.shape.tokens // 256, name


@pytest.mark.parametrize("shape", GRID, ids=lambda s: "x".join(map(str, s)))
def test_encode_pool(benchmark: Any, shape: Shape) -> None:
    with bench_threads():
        problem = Problem(shape, DEVICE)
        rounds = (10 if DEVICE.type == "cuda" else 7) if not benchmark.disabled else 2
        table = measure(problem.contenders(), DEVICE, rounds, base=BASE, check=problem.check)
        benchmark.extra_info.update(
            shape._asdict(), base=BASE, contenders=table, environment=environment(DEVICE)
        )
        benchmark.pedantic(problem.pool, ("auto",), rounds=3, warmup_rounds=1)
