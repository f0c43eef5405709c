"""The pooling and decoding benchmarks: their measurements run, and they refuse a wrong result."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_decode, bench_pool
from benchmarks.harness import measure

CPU = torch.device("cpu")
OURS = {"saerl_kernels torch", "saerl_kernels numba"}


def test_pool():
    problem = bench_pool.Problem(bench_pool.TINY[0], CPU)
    table = measure(problem.contenders(), CPU, 2, base=bench_pool.BASE, check=problem.check)
    assert OURS | {"encode_topk + dense scatter", "encode_topk + coalesce (sum)"} <= set(table)
    assert table[bench_pool.BASE]["ratio"] == 1.0
    with pytest.raises(AssertionError):
        problem.check("SAELens encode + amax", problem.want.roll(1, 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode(dtype):
    problem = bench_decode.Problem(bench_decode.TINY[0]._replace(dtype=dtype), CPU)
    table = measure(problem.contenders(), CPU, 2, base=bench_decode.BASE, check=problem.check)
    assert OURS | {"saerl_kernels decode_csr"} <= set(table)
    assert ("dense matmul" in table) == (dtype == "float32")
    with pytest.raises(AssertionError, match="is off by"):
        problem.check("sparsify", problem.embedding_bag().roll(1, 0))
