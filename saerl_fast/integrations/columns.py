"""Pools and scores as Hugging Face datasets, for any trainer that reads one."""

from __future__ import annotations

from typing import Any

import numpy as np

from saerl_fast.errors import SaerlError
from saerl_fast.plan import Plan
from saerl_fast.plan.sampler import dataset_rows
from saerl_fast.plan.static import StaticPlan
from saerl_fast.prompts.pool import Pool
from saerl_fast.signals.scores import SCORE_COLUMNS, Scores


def to_dataset(pool: Pool) -> Any:
    """A ``datasets.Dataset`` with the pool's columns, rows in pool order."""
    return _datasets().Dataset.from_dict({name: list(column) for name, column in pool.columns.items()})


def add_scores(dataset: Any, scores: Scores, id_column: str = "prompt_id") -> Any:
    """``dataset`` with the score columns saerl_cluster int32, saerl_difficulty and saerl_quality float32.

    Rows are matched by ``id_column``; an unknown float is null. Raises SaerlError when the column or
    one of the dataset's ids is missing from the scores.
    """
    datasets = _datasets()
    if id_column not in dataset.column_names:
        raise SaerlError(f"the dataset has no column {id_column!r}; it has {', '.join(dataset.column_names)}")
    row = {name: i for i, name in enumerate(scores.prompt_ids)}
    ids = [str(name) for name in dataset[id_column]]
    missing = [name for name in ids if name not in row]
    if missing:
        raise SaerlError(
            f"{len(missing)} dataset rows have no scores, first {missing[0]!r}; score them first"
        )
    order = [row[name] for name in ids]
    for name, dtype in SCORE_COLUMNS.items():
        if name not in scores.columns:
            continue
        values = np.asarray(scores.columns[name], dtype=dtype)[order]
        cells = [None if value != value else value.item() for value in values]
        if name in dataset.column_names:
            dataset = dataset.remove_columns(name)
        dataset = dataset.add_column(name, cells, feature=datasets.Value(np.dtype(dtype).name))
    return dataset


def add_plan(dataset: Any, plan: Plan, id_column: str = "prompt_id") -> Any:
    """The rows that ``plan`` takes, in its order, with the column saerl_step int32 (from 0).

    ``plan`` is walked through from where it stands. An adaptive one has no order beforehand: its result are
    the rows that it may choose from, without that column. SaerlError for a prompt that ``dataset`` lacks.
    """
    row = dataset_rows(plan, [str(name) for name in dataset[id_column]])
    if not isinstance(plan, StaticPlan):
        return dataset.select([row[name] for name in plan.prompt_ids])
    batches = [plan.next_batch() for _ in range(plan.total_steps)]
    ordered = dataset.select([row[name] for batch in batches for name in batch])
    steps = [step for step, batch in enumerate(batches) for _ in batch]
    return ordered.add_column("saerl_step", steps, feature=_datasets().Value("int32"))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise SaerlError("this needs the datasets package; pip install datasets") from None
    return datasets
