"""The capture benchmark: it measures on a tiny shape and refuses wrong features."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_capture as bench

CPU = torch.device("cpu")


def test_measures_every_contender_and_refuses_wrong_ones() -> None:
    problem = bench.Problem(bench.TINY[0], CPU)
    table = bench.measure(problem.contenders(), CPU, 2, base=bench.BASE, check=problem.check)
    assert set(table) == {bench.BASE, "capture", "own prefill"} and table[bench.BASE]["ratio"] == 1.0
    made = problem.captured()
    problem.check("capture", made)
    made.features.values[0] += 1
    with pytest.raises(AssertionError):
        problem.check("capture", made)
    made.completion_ids = made.completion_ids + 1
    with pytest.raises(AssertionError):
        problem.check("own prefill", made)
