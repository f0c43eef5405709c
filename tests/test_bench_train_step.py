"""The training-step benchmark: contenders agree before they are timed, and a wrong gradient is refused."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_train_step as bench


@pytest.fixture(scope="module")
def steps() -> dict:
    found = bench.Problem(bench.TINY_GRID[0], torch.device("cpu")).contenders()
    return {name: step for name, step in found.items() if "triton" not in name}


def test_every_contender_has_equal_gradients_and_learns(steps) -> None:
    assert {"SAELens", "saerl_kernels torch", "saerl_kernels numba"} <= set(steps)
    problem = bench.Problem(bench.TINY_GRID[0], torch.device("cpu"))
    problem.check(steps)
    for name, step in steps.items():
        before = float(step.loss().detach())
        for _ in range(20):
            step()
        assert float(step.loss().detach()) < before, name
        assert all(p.grad is None for p in step.parameters)


def test_refuses_a_wrong_gradient() -> None:
    problem = bench.Problem(bench.TINY_GRID[0], torch.device("cpu"))
    steps = {"right": problem._ours("torch"), "wrong": problem._ours("torch")}
    problem.check(steps)
    steps["wrong"].scale = 1.1
    with pytest.raises(AssertionError, match="wrong: gradient of W_enc is off by 0.1"):
        problem.check(steps)


def test_grids_hold_the_promised_shapes() -> None:
    assert len(set(bench.GPU_GRID)) == 3 * 2 * 2 * 2
    assert bench.Shape(576, 16384, 32, 1024) in bench.CPU_GRID
