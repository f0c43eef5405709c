"""The choice by worth: what it is of prompts without rollouts, and the quota."""

import numpy as np
import pytest

from saerl_fast.plan.choice import Prior, Quota, best, capped
from saerl_fast.plan.rule import posterior, worth


@pytest.mark.parametrize("kappa", [0.5, 8.0, 1e6])
def test_the_prior_is_interpolated_and_falls(kappa):
    prior, distance = Prior(kappa, 8), np.linspace(0, 0.5, 5001)
    exact = worth(*posterior(kappa, 0.5 + distance, np.zeros(2)), 8)
    found = prior(distance)
    np.testing.assert_allclose(found, exact, atol=2e-3 if kappa < 1 else 1e-4)
    assert (np.diff(found) <= 0).all() and prior(np.array([0.5]))[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_the_best_keep_to_their_quota_while_there_are_others(seed):
    rng = np.random.default_rng(seed)
    n, size, most = int(rng.integers(20, 400)), int(rng.integers(1, 17)), int(rng.integers(1, 4))
    groups = rng.choice(np.array([-5, 0, 3, 900]), n)
    utility = rng.choice([rng.random(n), np.round(rng.random(n), 1)])
    utility[rng.choice(n, n // 4, replace=False)] = -np.inf
    order = [row for row in np.lexsort((np.arange(n), -utility)) if utility[row] > -np.inf]
    taken, rest = [], []
    for row in order:
        few = sum(groups[row] == groups[other] for other in taken) < most
        (taken if few else rest).append(row)
    found = best(utility, Quota(groups, most), min(size, len(order)))
    assert found.tolist() == (taken + rest)[: min(size, len(order))]
    plain = best(utility, None, min(size, len(order)))
    assert plain.tolist() == order[: min(size, len(order))]
    assert capped(np.array(order), Quota(groups, most)).sum() == len(taken)
