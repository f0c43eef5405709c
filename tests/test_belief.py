"""The belief about a pass rate: its worth, how far predictions are trusted, the guard, the quota."""

import numpy as np
import pytest
from scipy.stats import betabinom

from saerl_fast.plan import belief
from saerl_fast.plan.belief import KAPPAS, Guard, Prior, Trust, best, capped, worth


@pytest.mark.parametrize("group", [2, 8, 64, 65, 500])
def test_worth_is_the_chance_of_a_mixed_group(group):
    rng = np.random.default_rng(group)
    a, b = rng.gamma(1.0, 4.0, 200), rng.gamma(1.0, 4.0, 200)
    alike = betabinom.pmf(0, group, a, b) + betabinom.pmf(group, group, a, b)
    np.testing.assert_allclose(worth(a, b, group), 1 - alike, atol=1e-9)


def test_worth_of_what_is_certain_is_nothing_and_of_nonsense_is_finite():
    a = np.array([0.0, 5.0, 0.0, 1e300])
    found = worth(a, np.array([5.0, 0.0, 0.0, 1e300]), 8)
    assert (found[:2] < 1e-6).all() and np.isfinite(found).all() and (found >= 0).all()


@pytest.mark.parametrize("kappa", [0.5, 8.0, 1e6])
def test_the_prior_is_interpolated_and_falls(kappa):
    prior, distance = Prior(kappa, 8), np.linspace(0, 0.5, 5001)
    exact = worth(kappa * (0.5 + distance), kappa * (0.5 - distance), 8)
    found = prior(distance)
    np.testing.assert_allclose(found, exact, atol=2e-3 if kappa < 1 else 1e-4)
    assert (np.diff(found) <= 0).all() and prior(np.array([0.5]))[0] == pytest.approx(0, abs=1e-6)


def test_doubt_is_worth_more_than_a_certain_half_chance_of_little():
    """Nothing known beats nine failures of nine, and a prompt at 1/2 beats both."""
    value = Prior(4.0, 8).updated(np.array([0.2, 0.2, 0.5]), np.array([0, 0, 0]), np.array([0, 9, 0]))
    assert value[1] < value[0] < value[2]


@pytest.mark.parametrize(("spread", "low", "high"), [(2.0, 0.5, 4.0), (200.0, 32.0, 128.0)])
def test_predictions_are_trusted_as_far_as_they_were_right(spread, low, high):
    rng, trust = np.random.default_rng(0), Trust()
    assert trust.kappa() == belief.USUAL
    for _ in range(60):
        predicted = rng.uniform(0.1, 0.9, 16)
        true = rng.beta(spread * predicted, spread * (1 - predicted))
        trust.observe(predicted, np.zeros((16, 2)), rng.binomial(8, true) / 8, 8, 0.97)
    assert low <= trust.kappa() <= high


def test_evidence_is_the_log_probability_of_the_groups():
    trust, predicted, counts = Trust(), np.array([0.3, 0.6]), np.array([[1.0, 2.0], [0.0, 0.0]])
    trust.observe(predicted, counts, np.array([0.25, 1.0]), 8, 0.5)
    for kappa, found in zip(KAPPAS, trust.evidence, strict=True):
        a, b = kappa * predicted + counts[:, 0], kappa * (1 - predicted) + counts[:, 1]
        whole = betabinom.logpmf([2, 8], 8, a, b).sum() - np.log([28.0, 1.0]).sum()  # of one order of them
        assert found == pytest.approx(whole)


def test_the_guard_gives_up_a_choice_that_is_worse_and_comes_back():
    guard = Guard()
    assert guard.holds() and np.isnan(guard.shares()).all()
    uniform = np.arange(16) >= 15
    for _ in range(6):
        guard.observe(uniform, np.where(uniform, 0.5, 1.0), 0.97)
    assert guard.holds()  # six uniform groups are too few to say
    for _ in range(6):
        guard.observe(uniform, np.where(uniform, 0.5, 1.0), 0.97)
    assert not guard.holds() and guard.shares().tolist() == [0.0, 1.0]
    for _ in range(60):
        guard.observe(~uniform, np.where(uniform, 0.5, 1.0), 0.97)
    assert guard.holds()


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
    found = best(utility, groups, most, min(size, len(order)))
    assert found.tolist() == (taken + rest)[: min(size, len(order))]
    plain = best(utility, None, most, min(size, len(order)))
    assert plain.tolist() == order[: min(size, len(order))]
    assert capped(np.array(order), groups, most).sum() == len(taken)
