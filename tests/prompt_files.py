"""What the tests of prompt pools share: rows, files of every format, and the message of a refusal."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from saerl_fast.config import DataConfig
from saerl_fast.errors import SaerlError
from saerl_fast.prompts.pool import Pool, load_prompts

ROWS = [
    {"prompt": f"What is {i} + {i}? {{braces}}", "answer": str(2 * i), "quality_label": i % 3 and 1, "n": i}
    for i in range(1, 13)
]


def save(path: Path, rows: list[dict[str, Any]]) -> str:
    """``rows`` in the format that the suffix names."""
    opened = gzip.open if path.suffix == ".gz" else open
    kind = path.name.removesuffix(".gz")[path.name.index(".") :]
    if kind == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
        return str(path)
    with opened(path, "wt", newline="") as handle:
        if kind == ".jsonl":
            handle.write("\n".join(json.dumps(row) for row in rows) + "\n")
        elif kind == ".json":
            handle.write(json.dumps(rows))
        else:
            writer = csv.DictWriter(handle, rows[0], delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def load(path: Path | str, **settings: Any) -> Pool:
    return load_prompts(str(path), DataConfig(**settings))


def message_of(call: Any, *args: Any, **kwargs: Any) -> str:
    """The one sentence of the SaerlError that the call raises."""
    with pytest.raises(SaerlError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
