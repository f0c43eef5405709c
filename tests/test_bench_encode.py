"""The encode benchmark: its measurement runs, and it refuses a wrong result."""

from __future__ import annotations

import pytest
import torch

import saerl_kernels as sk
from benchmarks import bench_encode


@pytest.fixture(scope="module")
def bench():
    return bench_encode


def test_measures_every_contender(bench):
    problem = bench.Problem(bench.Shape(16, 128, 4, 9), torch.device("cpu"))
    table = bench.measure(problem.contenders(), torch.device("cpu"), 2, base="linear", check=problem.check)
    assert {"linear", "linear + torch.topk", "saerl_kernels torch", "saerl_kernels numba"} <= set(table)
    assert table["linear"]["ratio"] == 1.0
    assert all(row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in table.values())
    assert bench.environment(torch.device("cpu"))["torch"] == torch.__version__


def test_bfloat16_is_compared_with_its_own_product(bench):
    problem = bench.Problem(bench.Shape(16, 128, 4, 9), torch.device("cpu"), torch.bfloat16)
    assert problem.linear().dtype == problem.encoder.dtype == torch.bfloat16
    table = bench.measure(problem.contenders(), torch.device("cpu"), 2, base="linear", check=problem.check)
    assert {"linear", "saerl_kernels numba"} <= set(table)


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


def test_tuning_table(bench, tmp_path, monkeypatch):
    """A measured plan is used for its own shape, at the nearest batch, and for no other."""
    import json

    from saerl_kernels._triton import tune

    plans = {n: tune.Plan("groups", T=2, BN=128, stages=n % 7)._asdict() for n in (100, 10_000)}
    rows = [{"bits": 16, "d_in": 8, "d_sae": 64, "k": 4, "n": n, "plan": plan} for n, plan in plans.items()]
    (tmp_path / "tuned.json").write_text(json.dumps({"Some GPU": rows}))
    monkeypatch.setattr(tune, "TABLE", str(tmp_path / "tuned.json"))
    tune.table.cache_clear()
    tune.tuned.cache_clear()
    try:
        assert tune.tuned("Some GPU", 16, 8, 64, 4, 300) == tune.Plan(**plans[100])
        assert tune.tuned("Some GPU", 16, 8, 64, 4, 9_000) == tune.Plan(**plans[10_000])
        assert tune.tuned("Some GPU", 32, 8, 64, 4, 300) is None
        assert tune.tuned("Other GPU", 16, 8, 64, 4, 300) is None
    finally:
        monkeypatch.undo()
        tune.table.cache_clear()
        tune.tuned.cache_clear()


def test_tuner_runs(bench):
    """The tuner times plans that agree and returns one of them."""
    from benchmarks import tune_encode
    from saerl_kernels._triton.tune import Plan, candidates

    encoder = sk.pack_encoder(torch.randn(8, 256), torch.zeros(256), permute=True)
    plans = [Plan("chunked", BM=2, BN=128, BK=128, warps=4), Plan("groups", 2, BM=16, BN=128, BK=32, warps=4)]
    plan, milliseconds = tune_encode.best_plan(torch.randn(3, 8), encoder, 4, plans, rounds=1)
    assert plan in plans and milliseconds > 0
    assert {p.algorithm for p in candidates(65536, 64, 90)} == {"chunked", "groups"}
    assert {p.algorithm for p in candidates(1024, 512, 90)} == {"chunked"}
