"""The benchmark of growth: it follows a plan on a small pool, and knows what it measures."""

from __future__ import annotations

import numpy as np

from benchmarks import bench_scale as bench
from saerl_fast.plan import load_plan, save_plan


def test_a_pool_is_planned_saved_and_followed(tmp_path):
    pool, once = bench.Pool(tmp_path, bench.Shape(500, 8)), bench.Once()
    plan = once("build plan", pool.plan)
    assert np.square(plan.embedding.rows).sum(axis=1).mean() < 1.2 and len(plan.prompt_ids) == 500
    once("save", save_plan, plan, tmp_path / "plan.json")
    taken, observed = pool.follow(load_plan(tmp_path / "plan.json"), 0.0, 6)
    assert len(taken) == len(observed) == 6 and min(taken) > 0
    assert set(once.table) == {"build plan", "save"} and once.highest > 0
    assert bench.figures([1.0, 2.0, 3.0])["p50_ms"] == 2000
