"""The rule: the worth of a posterior, how far predictions are trusted, rollouts that fade, the guard."""

import numpy as np
import pytest
from scipy.stats import betabinom

from saerl_fast.config import AdaptiveConfig
from saerl_fast.plan.rule import CHOSEN, KAPPAS, OTHER, UNIFORM, Rule, posterior, worth


def make_rule(**settings) -> Rule:
    """A rule with one feature, the prediction's distance from 1/2, which no group moves it from."""
    rule = Rule(AdaptiveConfig(ridge=1e12, forgetting=1.0, **settings), 1, 8)
    rule.moment += 1e12
    rule.solve()
    return rule


def observe(rule, rows, predicted, rates, how=OTHER, step=0) -> None:
    z = np.float32(predicted)[:, None] - np.float32(0.5)
    rule.observe(np.array(rows), z, np.array(rates), np.full(len(rows), how), step)


@pytest.mark.parametrize("group", [2, 8, 64, 65, 500])
def test_worth_is_the_chance_of_a_mixed_group(group):
    rng = np.random.default_rng(group)
    a, b = rng.gamma(1.0, 4.0, 200), rng.gamma(1.0, 4.0, 200)
    alike = betabinom.pmf(0, group, a, b) + betabinom.pmf(group, group, a, b)
    np.testing.assert_allclose(worth(a, b, group), 1 - alike, atol=1e-9)


def test_worth_of_what_is_certain_is_nothing_and_of_nonsense_is_finite():
    mu, seen = np.array([0.0, 1.0, 0.5, 0.5]), np.array([[0, 5], [5, 0], [0, 0], [1e300, 1e300]])
    found = worth(*posterior(0.0, mu, seen), 8)
    assert (found[:2] < 1e-6).all() and np.isfinite(found).all() and (found >= 0).all()


def test_doubt_is_worth_more_than_a_certain_half_chance_of_little():
    """Nothing known beats nine failures of nine, and a prompt at 1/2 beats both."""
    value = worth(*posterior(4.0, np.array([0.2, 0.2, 0.5]), np.array([[0, 0], [0, 9], [0, 0]])), 8)
    assert value[1] < value[0] < value[2]


@pytest.mark.parametrize(("spread", "low", "high"), [(2.0, 0.5, 4.0), (200.0, 32.0, 128.0)])
def test_predictions_are_trusted_as_far_as_they_were_right(spread, low, high):
    rng, rule = np.random.default_rng(0), make_rule()
    assert rule.kappa == 8
    for step in range(60):
        predicted = rng.uniform(0.1, 0.9, 16)
        true = rng.beta(spread * predicted, spread * (1 - predicted))
        observe(rule, np.arange(16) + 16 * step, predicted, rng.binomial(8, true) / 8, step=step)
    assert low <= rule.kappa <= high
    rule.cfg.kappa = 1e6
    assert rule.kappa == 1e6


def test_evidence_is_the_log_probability_of_the_groups():
    rule, predicted = make_rule(fading=0.5), np.array([0.3, 0.6])
    rule.evidence[:], rule.counts = 2.0, np.array([[7, 2, 2.0, 4.0]])  # a step ago
    observe(rule, [7, 4], predicted, [0.25, 1.0], step=3)
    for kappa, found in zip(KAPPAS, rule.evidence, strict=True):
        a, b = kappa * predicted + [1.0, 0.0], kappa * (1 - predicted) + [2.0, 0.0]
        whole = betabinom.logpmf([2, 8], 8, a, b).sum() - np.log([28.0, 1.0]).sum()  # of one order of them
        assert found == pytest.approx(whole + 0.5 * 2.0, abs=1e-5)


def test_rollouts_of_a_prompt_are_summed_and_fade_until_they_are_forgotten():
    rule, half = make_rule(fading=0.5), [0.5] * 3
    observe(rule, [9, 2, 9], half, [0.25, 1.0, 0.5])
    observe(rule, [5], half[:1], [0.0], step=1)
    assert rule.known().tolist() == [2, 5, 9]
    found = rule.rollouts(np.array([9, 1, 2, 9, 11]), 2)
    assert found.tolist() == [[1.5, 2.5], [0, 0], [2, 0], [1.5, 2.5], [0, 0]]
    observe(rule, [2], half[:1], [0.5], step=7)  # of 8 rollouts 1/16 is left, of 16 and of the later 8 1/8
    assert rule.known().tolist() == [2, 5, 9]
    assert rule.rollouts(np.array([2]), 7).tolist() == [[4 + 8 / 2**7, 4.0]]
    observe(rule, [2], half[:1], [0.5], step=8)
    assert rule.known().tolist() == [2]


def test_the_guard_gives_up_a_choice_that_is_worse_and_comes_back():
    rule = make_rule()
    assert rule.holds()
    most, one = np.arange(18) < 15, np.arange(18) == 15
    rates = np.where(one, 0.5, 1.0)

    def holds_after(times: int, chosen: np.ndarray, uniform: np.ndarray) -> bool:
        how = np.select([chosen, uniform], [CHOSEN, UNIFORM], OTHER)
        for _ in range(times):
            observe(rule, np.arange(18), np.full(18, 0.5), rates, how)
        return rule.holds()

    assert holds_after(6, most, one)  # six uniform groups are too few to say
    assert not holds_after(6, most, one) and rule.groups[:, 1].tolist() == [0.0, rule.groups[UNIFORM, 0]]
    assert holds_after(60, one, most)
