"""Scores as columns of a Hugging Face dataset, for a trainer or a curriculum of your own.

    saerl score --config examples/demo.yaml && python examples/datasets_columns.py runs/demo

Drops the prompts of low predicted quality, sorts the rest from easy to hard, writes Parquet.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from saerl_fast import Scores, add_scores, load_config, load_split, to_dataset


def main(run_dir: str) -> Any:
    """The dataset; also in ``run_dir``/easy_to_hard.parquet."""
    config = load_config("examples/demo.yaml")
    pool, _ = load_split(config.data, config.seed)
    scores = Scores.load(run_dir)
    dataset = add_scores(to_dataset(pool), scores)
    if scores.column("saerl_quality") is not None:
        dataset = dataset.filter(lambda row: (row["saerl_quality"] or 0.0) >= config.quality.threshold)
    if scores.column("saerl_difficulty") is not None:
        dataset = dataset.sort("saerl_difficulty")
    dataset.to_parquet(str(Path(run_dir) / "easy_to_hard.parquet"))
    return dataset


if __name__ == "__main__":
    rows = main(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    print(rows)
    for row in rows.select(range(min(5, len(rows)))):
        print(row["saerl_difficulty"], row["saerl_cluster"], row["prompt"].splitlines()[0][:60])
