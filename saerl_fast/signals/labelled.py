"""What scoring reads of a pool's own columns, all of it checked before anything slow begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from saerl_fast.config import Config, QualityConfig
from saerl_fast.errors import SaerlError
from saerl_fast.records.spilled import full
from saerl_fast.signals.bank import OF_ANSWER
from saerl_fast.signals.difficulty import check_rates
from saerl_fast.signals.quality import check_labels

if TYPE_CHECKING:
    from saerl_fast.prompts.pool import Pool


def label_columns(pool: Pool, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Quality labels and pass rates [n] that the pool itself holds, NaN where unknown.

    SaerlError for a column that is asked for and missing, one that holds anything but numbers in their range,
    and for features of answers where the pool has none.
    """
    quality, difficulty = config.quality.label_column, config.difficulty.label_column
    unknown = full(len(pool), np.nan)
    labels, rates = unknown, unknown
    if quality is not None and (quality in pool.columns or quality != QualityConfig.label_column):
        labels = _numbers(pool.column(quality), "quality.label_column")
        check_labels(config.quality, labels)
    if difficulty is not None:
        rates = _numbers(pool.column(difficulty), "difficulty.label_column")
        check_rates(rates)
    if config.quality.kind_column is not None:
        pool.column(config.quality.kind_column)
    asked: dict[str, Sequence[str] | None] = {
        "score.features": config.score.features,
        "difficulty.features": config.difficulty.features,
        "quality.features": config.quality.features,
        "plan.adaptive.features": config.plan.adaptive.features,
    }
    needy = [(key, kind) for key, kinds in asked.items() for kind in kinds or () if kind in OF_ANSWER]
    if needy and not any(pool.columns["answer"]):
        raise SaerlError(f"{needy[0][0]} names {needy[0][1]}, but the pool has no answers; leave it out")
    return labels, rates


def _numbers(column: Sequence[Any], setting: str) -> np.ndarray:
    """A label column as float64 [n], NaN for null."""
    numbers = full(len(column), np.nan)
    for i, value in enumerate(column):
        try:
            if isinstance(value, str) and "_" in value:  # which Python takes for one number, 0_5 for 5
                raise ValueError
            numbers[i] = np.nan if value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            raise SaerlError(
                f"{setting} names a column that holds {value!r:.80} in row {i}; use numbers or null"
            ) from None
    return numbers
