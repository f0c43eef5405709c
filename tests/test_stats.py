import math

import numpy as np
import pytest

from saerl_fast.stats import area_under_curve, paired_ratio, smooth, steps_to_target


def test_smooth_is_a_running_mean_over_what_there_is():
    np.testing.assert_allclose(smooth([1, 3, 5, 9], 2), [1, 2, 4, 7])


def test_first_crossing_is_interpolated():
    assert steps_to_target([0, 10, 20], [0.0, 0.2, 0.6], 0.4) == pytest.approx(15.0)


def test_a_run_that_starts_above_the_target_needs_no_steps():
    assert steps_to_target([0, 10], [0.5, 0.6], 0.4) == 0.0


def test_a_run_that_never_crosses_is_censored():
    assert steps_to_target([0, 10], [0.1, 0.2], 0.4) is None


def test_smoothing_delays_a_lucky_spike():
    values = [0.0, 0.5, 0.1, 0.1, 0.5, 0.5, 0.5]
    steps = list(range(0, 70, 10))
    assert steps_to_target(steps, values, 0.45, window=3) > 40
    assert steps_to_target(steps, values, 0.45, window=1) < 10


def test_area_is_the_mean_height():
    assert area_under_curve([0, 10, 30], [0.0, 1.0, 1.0]) == pytest.approx(25 / 30)


def test_paired_ratio_is_geometric_and_counts_the_censored():
    result = paired_ratio([10, 10, 10, None], [5, 20, 10, 7])
    assert result is not None
    assert result.ratio == pytest.approx(1.0)
    assert (result.pairs, result.censored) == (3, 1)
    assert result.low < 1 < result.high


def test_consistent_saving_excludes_one():
    result = paired_ratio([10, 20, 30, 40], [8, 15, 24, 33])
    assert result is not None and result.high < 1
    assert result.ratio == pytest.approx(math.exp(np.mean(np.log([0.8, 0.75, 0.8, 33 / 40]))))


def test_nothing_to_compare():
    assert paired_ratio([None], [3.0]) is None
