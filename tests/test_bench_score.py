"""The benchmark of scoring runs the batches of the pass, and refuses features that differ."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_score as bench
from saerl_fast.sae.capture import iter_hidden_ids


def test_measures_every_contender_and_refuses_wrong_ones() -> None:
    problem = bench.Problem(bench.TINY[0], bench.DEMO)
    contenders = problem.contenders()
    table = bench.measure(contenders, torch.device("cpu"), 2, base=bench.BASE, check=problem.check)
    assert set(table) == {bench.BASE, "in order", "sae", "default"} and table[bench.BASE]["ratio"] == 1.0
    made = contenders["default"]()
    assert set(made) == {"sae", "sae_mean", "hidden"}
    made["sae"].values[0] += 1
    with pytest.raises(AssertionError):
        problem.check("default", made)


def test_the_bare_pass_has_the_same_batches() -> None:
    problem = bench.Problem(bench.TINY[0]._replace(prompts=30), bench.DEMO)
    problem.most = 30
    longest, in_order = problem.batches()
    seen = iter_hidden_ids(problem.model, problem.prompts, problem.layer, problem.most)
    assert [len(rows) for rows, _, _ in seen] == list(map(len, longest)) and len(longest) > 3
    assert sum(map(len, in_order)) == 30 and max(map(len, in_order)) == len(longest[0])
