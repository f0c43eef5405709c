import math

import numpy as np
import pytest

from saerl_fast.records.stats import area_under_curve, holm, paired_ratio, past, smooth, steps_to_target


def test_smooth_is_a_running_mean_over_what_there_is():
    np.testing.assert_allclose(smooth([1, 3, 5, 9], 2), [1, 3, 5, 9])
    np.testing.assert_allclose(smooth([1, 3, 5, 9], 3), [1, 3, 17 / 3, 9])
    np.testing.assert_allclose(smooth([1, 3, 5, 9, 7], 9), [1, 3, 5, 7, 7])
    assert smooth([], 3).tolist() == [] and smooth([2.0], 1).tolist() == [2.0]


def test_first_crossing_is_interpolated():
    assert steps_to_target([0, 10, 20], [0.0, 0.2, 0.6], 0.4) == pytest.approx(15.0)


def test_a_run_that_starts_above_the_target_needs_no_steps():
    assert steps_to_target([0, 10], [0.5, 0.6], 0.4) == 0.0


def test_a_run_that_never_crosses_is_censored():
    assert steps_to_target([0, 10], [0.1, 0.2], 0.4) is None


def test_smoothing_passes_over_a_lucky_spike_and_does_not_lag():
    values = [0.0, 0.5, 0.1, 0.1, 0.5, 0.5, 0.5]
    steps = list(range(0, 70, 10))
    assert 40 < steps_to_target(steps, values, 0.45, window=3) <= 50
    assert steps_to_target(steps, [0.01 * s for s in steps], 0.3, window=3) == pytest.approx(30)
    assert steps_to_target(steps, values, 0.45, window=1) < 10


def test_a_curve_is_past_a_target_once_no_evaluation_can_move_the_crossing():
    rng = np.random.default_rng(0)
    for window in (1, 2, 3, 5):
        for _ in range(50):
            steps, values = list(range(0, 200, 10)), np.cumsum(rng.normal(0.02, 0.1, 20)).tolist()
            whole = steps_to_target(steps, values, 0.2, window)
            for count in range(1, 21):
                if past(steps[:count], values[:count], 0.2, window):
                    assert steps_to_target(steps[:count], values[:count], 0.2, window) == whole
                    break
            else:
                assert whole is None or whole > steps[-1 - window // 2]


def test_area_is_the_mean_height():
    assert area_under_curve([0, 10, 30], [0.0, 1.0, 1.0]) == pytest.approx(25 / 30)


def test_paired_ratio_is_geometric_and_counts_the_censored():
    result = paired_ratio([10, 10, 10, None], [5, 20, 10, 7])
    assert result is not None
    assert result.ratio == pytest.approx(1.0)
    assert (result.pairs, result.censored, result.zero) == (3, 1, 0)
    assert result.interval[0] < 1 < result.interval[1]


def test_consistent_saving_excludes_one():
    result = paired_ratio([10, 20, 30, 40], [8, 15, 24, 33])
    assert result is not None and result.interval[1] < 1 and result.verdict() == "fewer steps"
    back = paired_ratio([8, 15, 24, 33], [10, 20, 30, 40])
    assert back is not None and back.interval[0] > 1 and back.verdict() == "more steps"
    assert result.ratio == pytest.approx(math.exp(np.mean(np.log([0.8, 0.75, 0.8, 33 / 40]))))


def test_interval_is_students():
    logs = np.array([-0.3, -0.1, 0.1, -0.2])
    result = paired_ratio([10.0] * 4, list(10 * np.exp(logs)))
    half = 3.182446 * logs.std(ddof=1) / 2  # t at 97.5%, three degrees of freedom
    assert result.interval == pytest.approx((math.exp(-0.125 - half), math.exp(-0.125 + half)))


@pytest.mark.parametrize("pairs", [3, 4, 8])
def test_false_verdicts_without_a_difference_are_rare(pairs):
    rng = np.random.default_rng(0)
    runs = np.exp(rng.normal(3.0, 0.3, size=(400, 2, pairs)))
    verdicts = [paired_ratio(list(one), list(other)).verdict() for one, other in runs]
    assert sum(verdict != "no claim" for verdict in verdicts) <= 0.08 * 400


def test_two_pairs_have_no_interval():
    result = paired_ratio([10, 20], [5, 10])
    assert result.interval is None and result.ratio == pytest.approx(0.5)
    assert result.verdict() == "no claim (too few pairs)"


def test_a_censored_pair_rules_out_a_verdict():
    saving = [10, 20, 30, 40], [8, 15, 24, 33]
    assert paired_ratio([*saving[0], 50], [*saving[1], None]).verdict() == "no claim (1 pair censored)"
    many = paired_ratio([*saving[0], None, 9], [*saving[1], 5, None])
    assert many.verdict() == "no claim (2 pairs censored)" and many.interval[1] < 1


def test_step_zero_is_reached_not_censored():
    result = paired_ratio([10, 20, 30, 0], [8, 15, 24, 33])
    assert (result.pairs, result.censored, result.zero) == (3, 0, 1)
    assert result.verdict() == "no claim (1 pair at step 0)"


def test_nothing_to_compare():
    assert paired_ratio([None], [3.0]) is None
    assert paired_ratio([0.0], [3.0]) is None
    assert paired_ratio([], []) is None


def test_p_is_students_and_agrees_with_the_interval():
    from scipy.stats import ttest_1samp

    logs = np.array([-0.3, -0.1, 0.1, -0.2])
    result = paired_ratio([10.0] * 4, list(10 * np.exp(logs)))
    assert result.p == pytest.approx(ttest_1samp(logs, 0).pvalue)
    assert (result.p < 0.05) == (result.interval[1] < 1)
    assert paired_ratio([10, 20], [5, 10]).p is None
    assert paired_ratio([10] * 3, [5] * 3).p == 0 and paired_ratio([10] * 3, [10] * 3).p == 1


def test_holm_multiplies_the_least_most_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.04, 0.09, None, 0.09])  # None counts
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] == [*holm([None])][1:]


def test_holm_takes_back_a_verdict():
    result = paired_ratio([10, 20, 30, 40], [9.6, 18, 29, 37])
    assert result.p < 0.05 and result.verdict() == "fewer steps"
    assert result.verdict(holm([result.p] * 5)[0]) == "no claim"


def test_false_verdicts_in_a_table_are_rare():
    rng = np.random.default_rng(1)
    logs = rng.normal(0.0, 0.3, size=(300, 6, 8))
    tables = [[paired_ratio([10.0] * 8, list(10 * np.exp(line))).p for line in table] for table in logs]
    plain, adjusted = ([min(f(table)) < 0.05 for table in tables] for f in (list, holm))
    assert np.mean(adjusted) <= 0.08 < 0.15 < np.mean(plain)
