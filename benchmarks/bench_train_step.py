"""A full SAE training step (encode, decode, loss, backward, Adam) against SAELens and eai-sparsify.

    pytest benchmarks/bench_train_step.py --benchmark-json=benchmarks/results/cpu/train_step.json

Every contender starts from equal weights and must give equal gradients before it is timed. Peers keep their
own defaults (SAELens ranks activations times decoder norms, which are 1 here; sparsify runs in bfloat16
autocast on a GPU), each with its own reconstruction loss and without an auxiliary one; all use the same
fused Adam and hold no gradients between steps. On a GPU ours multiplies in bfloat16 with float32 weights, so
SAELens is also run under bfloat16 autocast.

Peak memory is what a step takes beyond weights and optimizer state, its gradients included: on a GPU from the
allocator, on a CPU the growth of the resident set. How time and memory are taken: harness.py.
SAERL_BENCH_GRID=tiny runs one small shape.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import saerl_kernels as sk
from benchmarks.harness import DEVICE, bench_threads, environment, grid, measure


class Shape(NamedTuple):
    d_in: int
    d_sae: int
    k: int
    batch: int


CPU_GRID = [Shape(576, 16384, 32, 1024), Shape(576, 16384, 32, 512), Shape(256, 4096, 32, 1024)]
GPU_GRID = [
    Shape(d_in, d_sae, k, batch)
    for d_in in (576, 1536, 2304)
    for d_sae in (16384, 65536)
    for k in (32, 64)
    for batch in (4096, 8192)
]
TINY_GRID = [Shape(16, 128, 4, 32)]
GRID = grid(TINY_GRID, CPU_GRID, GPU_GRID)


class Step:
    """One contender: its parameters as W_enc [d_sae, d_in], b_enc, W_dec [d_sae, d_in], b_dec."""

    def __init__(
        self, parameters: list[nn.Parameter], loss: Callable[[], Tensor], transposed: bool, scale: float
    ) -> None:
        self.parameters, self.loss, self.transposed, self.scale = parameters, loss, transposed, scale
        self.optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> list[Tensor]:
        """Of the summed squared error per token, in the common layout."""
        found = [g * self.scale for g in torch.autograd.grad(self.loss(), self.parameters)]
        return [found[0].t() if self.transposed else found[0], *found[1:]]


class Problem:
    """One shape's activations and weights: unit decoder rows, encoder tied to them."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        g = torch.Generator(device).manual_seed(0)
        at = {"generator": g, "device": device}
        self.shape, self.device = shape, device
        self.x = torch.randn(shape.batch, shape.d_in, **at)
        W = torch.randn(shape.d_sae, shape.d_in, **at)
        W /= W.norm(dim=1, keepdim=True)
        b_enc, b_dec = (torch.randn(n, **at) * 0.01 for n in (shape.d_sae, shape.d_in))
        self.weights = [W, b_enc, W, b_dec]

    def contenders(self) -> dict[str, Step]:
        gpu = self.device.type == "cuda"
        found = {}
        for make in (self._saelens, self._sparsify):
            with contextlib.suppress(ImportError):
                found.update(make())
        for name in ["torch", "triton"] if gpu else ["torch", "numba"]:
            found[f"saerl_kernels {name}"] = self._ours(name)
        return found

    def _ours(self, backend: str) -> Step:
        W_enc, b_enc, W_dec, b_dec = parameters = [nn.Parameter(w.clone()) for w in self.weights]
        dtype = torch.bfloat16 if self.device.type == "cuda" else None

        def loss() -> Tensor:
            kept = sk.encode_topk_train(
                self.x, W_enc.t(), b_enc, self.shape.k, b_dec=b_dec, dtype=dtype, backend=backend
            )
            recon = sk.sparse_decode(*kept, W_dec, b_dec, backend=backend)
            return (recon - self.x).square().sum(-1).mean()

        return Step(parameters, loss, False, 1.0)

    def _saelens(self) -> dict[str, Step]:
        from sae_lens.saes.sae import TrainStepInput
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        d_in, d_sae, k, _ = self.shape
        given = TrainStepInput(self.x, {}, None, 0, False)

        def make(autocast: bool) -> Step:
            sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, device=str(self.device)))
            W, b_enc, W_dec, b_dec = self.weights
            sae.load_state_dict({"W_enc": W.t(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec})

            def loss() -> Tensor:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
                    return sae.training_forward_pass(given).loss

            return Step([sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec], loss, True, 1.0)

        found = {"SAELens": make(False)}
        if self.device.type == "cuda":
            found["SAELens, bfloat16 autocast"] = make(True)
        return found

    def _sparsify(self) -> dict[str, Step]:
        if self.device.type == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read at import; its kernels need a GPU
        from sparsify import SparseCoder, SparseCoderConfig

        config = SparseCoderConfig(num_latents=self.shape.d_sae, k=self.shape.k)
        coder = SparseCoder(self.shape.d_in, config, device=self.device)
        assert coder.W_dec is not None
        parameters = [coder.encoder.weight, coder.encoder.bias, coder.W_dec, coder.b_dec]
        with torch.no_grad():
            for parameter, weight in zip(parameters, self.weights, strict=True):
                parameter.copy_(weight)
        variance = float((self.x - self.x.mean(0)).square().sum())
        step = Step(parameters, lambda: coder(self.x).fvu, False, variance / self.shape.batch)
        return {"sparsify": step}

    def check(self, steps: dict[str, Step]) -> None:
        """Gradients agree with the first contender's; with 16-bit products some rows select others."""
        limit = 0.2 if self.device.type == "cuda" else 1e-2
        names = list(steps)
        wanted = steps[names[0]].gradients()
        for name in names[1:]:
            found = steps[name].gradients()
            for what, a, b in zip(("W_enc", "b_enc", "W_dec", "b_dec"), found, wanted, strict=True):
                error = float((a - b).norm() / b.norm())
                assert error < limit, f"{name}: gradient of {what} is off by {error:.2g}"


@pytest.mark.parametrize("shape", GRID, ids=lambda s: "x".join(map(str, s)))
def test_train_step(benchmark: Any, shape: Shape) -> None:
    problem = Problem(shape, DEVICE)
    rounds = (10 if DEVICE.type == "cuda" else 5) if benchmark.enabled else 2
    with bench_threads():
        steps = problem.contenders()
        problem.check(steps)
        table = measure(steps, DEVICE, rounds, base="SAELens")
        benchmark.extra_info.update(
            shape._asdict(), base="SAELens", contenders=table, environment=environment(DEVICE)
        )
        best = steps["saerl_kernels triton" if DEVICE.type == "cuda" else "saerl_kernels numba"]
        benchmark.pedantic(best, rounds=2)
