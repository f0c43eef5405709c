"""The encode benchmark: its measurement runs, and it refuses a wrong result."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import saerl_kernels as sk


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_encode.py"
    spec = importlib.util.spec_from_file_location("bench_encode", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measures_every_contender(bench):
    problem = bench.Problem(bench.Shape(16, 128, 4, 9), torch.device("cpu"))
    table = bench.measure(problem, rounds=2)
    assert {"linear", "linear + torch.topk", "saerl_kernels torch", "saerl_kernels numba"} <= set(table)
    assert table["linear"]["ratio"] == 1.0
    assert all(row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in table.values())
    assert bench.environment(torch.device("cpu"))["torch"] == torch.__version__


def test_refuses_wrong_results(bench):
    problem = bench.Problem(bench.Shape(16, 128, 4, 9), torch.device("cpu"))
    kept = sk.encode_topk(problem.x, problem.encoder, 4)
    problem.check("saerl_kernels numba", kept)
    wrong = kept.indices.clone()
    wrong[3] = wrong[3].roll(1)
    with pytest.raises(AssertionError):
        problem.check("saerl_kernels numba", sk.TopK(kept.values, wrong))


def test_grids_hold_the_promised_shapes(bench):
    assert len(set(bench.GPU_GRID)) == 3 * 3 * 3 * 4
    assert bench.Shape(768, 16384, 32, 512) in bench.CPU_GRID
