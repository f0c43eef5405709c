"""Prompts chosen for labels: distinct, the same again, and such that they stand for the others."""

from __future__ import annotations

import numpy as np
import torch

from saerl_fast.signals import choose
from saerl_fast.signals.bank import Bank
from saerl_fast.signals.choose import spread, spread_rows
from saerl_fast.signals.ridge import NOISE, SIGNAL, Block
from saerl_kernels import CSR


def test_every_group_is_heard_before_any_is_heard_twice() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(8), 25)
    X = 10 * np.eye(8)[group] + 0.1 * rng.normal(size=(200, 8))
    chosen = spread({"x": Block(X)}, np.arange(200), 12)
    assert len(set(chosen.tolist())) == 12 and len(set(group[chosen[:8]].tolist())) == 8
    assert len(spread({"x": Block(X)}, np.arange(5), 12)) == 5


def test_the_first_one_reduces_the_variance_of_all_most() -> None:
    X = np.random.default_rng(1).normal(size=(30, 4))
    K, noise = Block(X).kernel(np.arange(30)), NOISE / SIGNAL
    left = [np.trace(K - np.outer(K[:, i], K[:, i]) / (K[i, i] + noise)) for i in range(30)]
    assert spread({"x": Block(X)}, np.arange(30), 1)[0] == int(np.argmin(left))


def test_a_large_pool_is_sampled(monkeypatch) -> None:
    monkeypatch.setattr(choose, "CANDIDATES", 20)
    dense = torch.rand(50, 9, generator=torch.manual_seed(0)).clamp_min(0.5) - 0.5
    bank = Bank(CSR.from_dense(dense), [f"prompt {i}" for i in range(50)])
    rows = spread_rows(bank, 6, ["sae", "tfidf"], seed=3)
    assert len(set(rows.tolist())) == 6 and set(rows) <= set(
        np.random.default_rng([3, 1]).permutation(50)[:20]
    )
    np.testing.assert_array_equal(rows, spread_rows(bank, 6, ["sae", "tfidf"], seed=3))
    assert len(spread_rows(bank, 99, None, seed=3)) == 50
