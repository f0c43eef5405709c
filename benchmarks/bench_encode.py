"""TopK encoding against the bare matrix product and against peers, as ratios taken in one process.

    pytest benchmarks/bench_encode.py --benchmark-json=benchmarks/results/cpu/encode.json

How time is taken: harness.py.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch

import saerl_kernels as sk
from benchmarks.harness import DEVICE, Contender, bench_threads, environment, grid, measure, saelens_topk


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
    Shape(64, 1024, 16, 1024),  # up to here in bfloat16 too
    Shape(768, 16384, 32, 1),
    Shape(768, 16384, 32, 8),
    Shape(64, 1024, 16, 1),
    Shape(64, 1024, 16, 8),
]
TINY = [Shape(64, 1024, 16, 33)]  # SAERL_BENCH_GRID=tiny
GPU_GRID = [  # a run that is cut short still has every width and k
    Shape(d_in, d_sae, k, batch)
    for batch in (4096, 1024, 16384, 65536)
    for d_in in (1536, 2048, 4096)
    for d_sae in (32768, 65536, 131072)
    for k in (32, 64, 100)
]
GPU_FLOAT32 = [Shape(d_in, 65536, 64, 4096) for d_in in (2048, 1536, 4096)]


class Problem:
    """One shape's inputs, in bfloat16 on a GPU and float32 on a CPU unless a dtype is given."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype | None = None) -> None:
        g = torch.Generator(device).manual_seed(0)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.shape, self.device = shape, device
        at = {"generator": g, "device": device}
        self.x = torch.randn(shape.batch, shape.d_in, **at).to(dtype)
        self.W = (torch.randn(shape.d_in, shape.d_sae, **at) / shape.d_in**0.5).to(dtype)
        self.b = (torch.randn(shape.d_sae, **at) * 0.1).to(dtype)
        self.encoder = sk.pack_encoder(self.W, self.b)
        self.weight = self.W.t().contiguous()

    @functools.cached_property
    def expected(self) -> tuple[torch.Tensor, sk.TopK]:
        """Pre-activations, from float64, of the first rows, and their top k."""
        pre = sk.reference.pre_activations(self.x[:32], self.encoder)
        return pre, sk.reference.topk(torch.where(pre > 0, pre, 0.0), self.shape.k)

    def linear(self) -> torch.Tensor:
        return torch.nn.functional.linear(self.x, self.weight, self.b)

    def linear_topk(self) -> Any:
        return self.linear().relu_().topk(self.shape.k)

    def linear_topk_fp32(self) -> Any:
        return torch.mm(self.x, self.W, out_dtype=torch.float32).add_(self.b).relu_().topk(self.shape.k)

    def contenders(self) -> dict[str, Contender]:
        """Name -> call. "linear" is the limit that every ratio is taken to."""
        found: dict[str, Contender] = {"linear": self.linear, "linear + torch.topk": self.linear_topk}
        if self.device.type == "cuda" and self.x.dtype != torch.float32:
            found["linear + torch.topk, fp32"] = self.linear_topk_fp32
        backends = ["torch", "triton"] if self.device.type == "cuda" else ["torch", "numba"]
        for name in backends:
            found[f"saerl_kernels {name}"] = lambda name=name: sk.encode_topk(  # type: ignore[misc]
                self.x, self.encoder, self.shape.k, backend=name
            )
        return found | self._peers()

    def _peers(self) -> dict[str, Contender]:
        peers: dict[str, Contender] = {}
        try:
            sae = saelens_topk(self.W, self.b, self.shape.k)
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
        """Compare the first rows with float64. Peers may round to their dtype; ours must not."""
        rows, k = min(32, self.shape.batch), self.shape.k
        pre, want = self.expected
        if not name.startswith("saerl_kernels"):
            rounding = 1e-4 if self.x.dtype == torch.float32 else 2e-2
            if name == "linear":
                found, expected = result[:rows].float(), pre
            else:  # values and indices, sorted or not, or the dense code
                values = result if isinstance(result, torch.Tensor) else result[0]
                found, expected = values[:rows].float().topk(k).values, want.values
            torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding, msg=f"{name} is wrong")
            return
        torch.testing.assert_close(result.values[:rows], want.values, rtol=1e-4, atol=1e-4)
        carried = pre.gather(1, result.indices[:rows].long()).relu()
        torch.testing.assert_close(result.values[:rows], carried, rtol=1e-4, atol=1e-4)
        assert bool((result.indices.long().sort(-1).values.diff(dim=-1) > 0).all()), "an index came twice"


GRID = grid(TINY, CPU_GRID, GPU_GRID)


@pytest.mark.parametrize("shape", GRID, ids=lambda s: "x".join(map(str, s)))
def test_encode_topk(benchmark: Any, shape: Shape) -> None:
    _bench(benchmark, Problem(shape, DEVICE))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="bfloat16 is what the other test takes on a GPU")
@pytest.mark.parametrize("shape", grid(TINY, CPU_GRID[:8], []), ids=lambda s: "x".join(map(str, s)))
def test_encode_topk_bfloat16(benchmark: Any, shape: Shape) -> None:
    """Weights and inputs of bfloat16, against the bare product of the same."""
    _bench(benchmark, Problem(shape, DEVICE, torch.bfloat16))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="float32 is what the first test takes on a CPU")
@pytest.mark.parametrize("shape", grid(TINY, [], GPU_FLOAT32), ids=lambda s: "x".join(map(str, s)))
def test_encode_topk_float32(benchmark: Any, shape: Shape) -> None:
    """float32 weights and inputs, against the bare float32 product."""
    _bench(benchmark, Problem(shape, DEVICE, torch.float32))


def _bench(benchmark: Any, problem: Problem) -> None:
    enabled = not benchmark.disabled
    with bench_threads():
        rounds = (10 if DEVICE.type == "cuda" else 9) if enabled else 2
        table = measure(problem.contenders(), DEVICE, rounds, base="linear", check=problem.check)
        benchmark.extra_info.update(
            problem.shape._asdict(), contenders=table, environment=environment(DEVICE)
        )
        benchmark.pedantic(
            sk.encode_topk, (problem.x, problem.encoder, problem.shape.k), rounds=3, warmup_rounds=1
        )
