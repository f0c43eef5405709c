"""Whole trainings: every trainer gets the same split, and its SAE is measured by one function."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_sae as bench
from benchmarks import report


@pytest.mark.parametrize("shape", bench.TINY_GRID, ids=lambda s: s.activation)
def test_trainers_learn_on_equal_tokens(shape: bench.Shape) -> None:
    pytest.importorskip("sae_lens")
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0)).relu()
    shape = shape._replace(steps=20, d_sae=32)
    one, two = bench.Problem(shape, 1, x), bench.Problem(shape, 1, x)
    assert torch.equal(one.tokens.test, two.tokens.test) and len(one.tokens.test) == 60
    assert not torch.equal(one.tokens.test, bench.Problem(shape, 2, x).tokens.test)
    table = bench.compare(shape, 2, x)
    assert {"SAELens", "saerl_fast"} <= set(table)
    for name, figures in table.items():
        assert 0 < figures["FVU"] < 1.5 and 0 <= figures["FVU sd"] < 0.2, name
        assert 0 <= figures["dead"] <= 1 and figures["p50_ms"] > 0, name


def test_each_trainer_has_the_rate_that_is_best_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.Problem, "contenders", lambda self: {"saerl_fast": self._ours})
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0)).relu()
    shape = bench.TINY_GRID[0]._replace(steps=20, d_sae=32)
    rates = bench.own_rates(shape, x, (1e-6, 3e-3))
    assert rates == {"saerl_fast": 3e-3}  # the other learns nothing
    least, best = (bench.compare(shape, 2, x, {"saerl_fast": rate})["saerl_fast"] for rate in (1e-6, 3e-3))
    assert best["FVU"] < 0.9 * least["FVU"]


def test_figures_with_a_deviation_have_a_table() -> None:
    row = report.Row(
        {"k": 4}, {"ours": {"p50_ms": 1.0, "FVU": 0.25, "FVU sd": 0.5}, "other": {"p50_ms": 2.0}}
    )
    table = report.Table("cpu", "sae", "test_sae", "", None, [], [row])
    assert report.figure_table(table)[2:] == ["| 4 | ours | 0.2500 ± 0.5000 |", "| 4 | other |  |"]
    plain = report.Row({}, {"ours": {"p50_ms": 1.0, "inertia": 2.0}})
    assert report.figure_table(table._replace(rows=[plain])) == []
