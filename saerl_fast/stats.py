"""Steps to a target, area under the curve and paired comparisons between arms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Running mean over the last ``window`` evaluations; the first ones average what there is."""
    array = np.asarray(values, dtype=np.float64)
    total = np.concatenate([[0.0], np.cumsum(array)])
    ends = np.arange(1, len(array) + 1)
    starts = np.maximum(ends - max(window, 1), 0)
    return (total[ends] - total[starts]) / (ends - starts)


def steps_to_target(
    steps: Sequence[int], values: Sequence[float], target: float, window: int = 1
) -> float | None:
    """The first step, linearly interpolated, at which the smoothed curve reaches ``target``.

    None when it never does: the run is censored, and callers must count it rather than drop it.
    """
    curve = smooth(values, window)
    for i, value in enumerate(curve):
        if value >= target:
            if i == 0:
                return float(steps[0])
            share = (target - curve[i - 1]) / (value - curve[i - 1])
            return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
    return None


def area_under_curve(steps: Sequence[int], values: Sequence[float]) -> float:
    """Mean height of the evaluation curve over its steps (trapezoids); comparable between equal runs."""
    if len(steps) < 2 or steps[-1] == steps[0]:
        return float(values[-1]) if len(values) else math.nan
    heights = np.asarray(values, dtype=np.float64)
    widths = np.diff(np.asarray(steps, dtype=np.float64))
    return float(((heights[1:] + heights[:-1]) / 2 * widths).sum() / widths.sum())


@dataclass
class PairedRatio:
    """Geometric mean of arm / baseline over paired seeds, with a bootstrap interval over seeds."""

    ratio: float
    low: float
    high: float
    pairs: int
    censored: int  # pairs left out because one of the two runs never reached the target


def paired_ratio(
    baseline: Sequence[float | None], arm: Sequence[float | None], rounds: int = 2000, seed: int = 0
) -> PairedRatio | None:
    """Compare steps to target seed by seed; None when no pair has both runs at the target.

    The interval resamples seeds with replacement. With fewer than three pairs it says next to nothing,
    and callers should say so.
    """
    both = [(b, a) for b, a in zip(baseline, arm, strict=True) if b and a]
    censored = len(baseline) - len(both)
    if not both:
        return None
    logs = np.array([math.log(a / b) for b, a in both])
    rng = np.random.default_rng(seed)
    means = logs[rng.integers(0, len(logs), size=(rounds, len(logs)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return PairedRatio(math.exp(logs.mean()), math.exp(low), math.exp(high), len(both), censored)
