"""A large pool, whose columns are packed and may lie in files, is the pool that lists would have made."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saerl_fast.config import DataConfig
from saerl_fast.errors import SaerlError
from saerl_fast.prompts import files, pool, render
from saerl_fast.prompts.pool import Pool, load_split
from saerl_fast.prompts.render import prepare
from saerl_fast.records import packed, spilled
from saerl_fast.signals.scores import Scores, score_features
from tests.prompt_files import save
from tests.test_scores import make_config, make_pool
from tests.tiny_lm import char_tokenizer

ROWS = [
    {
        "prompt": f"what is {i % 37}+{i % 5}?" if i % 7 else [{"role": "user", "content": f"say {i}"}],
        "extra": {"gold": i, "level": None if i % 3 else "hard"},
        "answer": str(i) if i % 11 else None,
        "length": i / 2 if i % 5 else float("nan"),
    }
    for i in range(90)
]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (packed, spilled, files, pool, render):
        for name, value in {"LARGE": 9, "BLOCK": 4, "FEW": 5, "SPILL": 100, "BUCKET": 7}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


def same(one: Pool, other: Pool) -> None:
    assert one.digest == other.digest and list(one.columns) == list(other.columns)
    for name, column in one.columns.items():
        assert isinstance(column, list) and column == list(other.columns[name])
        assert [type(cell) for cell in column] == [type(cell) for cell in other.columns[name]]


SETTINGS: list[dict[str, Any]] = [
    {"drop_null": True},
    {"answer_column": "extra.gold", "template": "Q: {prompt}"},
    {"answer_column": None, "limit": 20, "eval_filter": "length"},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", "folder", ".json"])
def test_loading(
    tmp_path: Path, request: pytest.FixtureRequest, suffix: str, settings: dict[str, Any]
) -> None:
    rows = [
        row | {"prompt": json.dumps(row["prompt"]) if row["prompt"][0] != "w" else row["prompt"]}
        for row in ROWS
    ]
    if suffix == "folder":
        (tmp_path / "shards").mkdir()
        for at in range(0, 90, 30):
            save(tmp_path / f"shards/{at}.jsonl", rows[at : at + 30])
        spec = str(tmp_path / "shards")
    else:
        spec = str(save(tmp_path / f"pool{suffix}", rows))
    cfg = DataConfig(train=spec, eval_size=8, **settings)
    small = load_split(cfg, 3)
    request.getfixturevalue("large")
    big = load_split(cfg, 3)
    for one, other in zip(small, big, strict=True):
        same(one, other)
    assert (
        not isinstance(big[0].columns["prompt"], list) and isinstance(big[1].columns["prompt"], list) is False
    )


def test_preparing_and_taking_rows(request: pytest.FixtureRequest) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}user: {{ m.content }}. {% endfor %}answer:"
    columns = {"prompt_id": [f"p{i}" for i in range(60)], "answer": [str(i) for i in range(60)]}
    columns["prompt"] = [f"what is {'1' * (i % 9)}+{i}?" for i in range(60)]
    cfgs = [DataConfig(max_prompt_tokens=17, chat="never"), DataConfig(max_prompt_tokens=30, prefill=" ")]
    small = [prepare(Pool(columns), tokenizer, cfg) for cfg in cfgs]
    request.getfixturevalue("large")
    for cfg, expected in zip(cfgs, small, strict=True):
        chat = cfg.chat
        found = prepare(Pool({name: packed.kept(column) for name, column in columns.items()}), tokenizer, cfg)
        assert 9 < len(found) < 60
        for name in ("texts", "ids", "answer_ids", "own"):
            one, other = getattr(expected, name), getattr(found, name)
            assert (one is None) == (other is None) == (name == "own" and chat == "never")
            if one is not None:
                assert [list(row) for row in one] == [list(row) for row in other] and not isinstance(
                    other, list
                )
        some = found.select([7, 2])
        assert some.texts == [expected.texts[7], expected.texts[2]] and list(some.ids[1]) == expected.ids[2]


def test_scores_are_the_same(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    prompts, features = make_pool()
    small = score_features(prompts, features, None, make_config())
    request.getfixturevalue("large")
    big = score_features(
        Pool({name: packed.kept(column) for name, column in prompts.columns.items()}),
        features,
        None,
        make_config(),
    )
    told = [{key: value for key, value in made.metadata.items() if key != "seconds"} for made in (small, big)]
    for card, other in zip(*(made["clusters"].pop("cards") for made in told), strict=True):
        means = {name: pytest.approx(value) for name, value in card.items() if isinstance(value, float)}
        assert other == card | means  # their sums are made in other blocks
    assert told[0] == told[1]
    big.save(tmp_path)
    loaded = Scores.load(tmp_path)
    for name, column in small.columns.items():
        kind = np.testing.assert_array_equal if isinstance(column, np.ndarray) else None
        for other in (big.columns[name], loaded.columns[name]):
            kind(column, other) if kind else (list(column) == list(other) or pytest.fail(name))
    assert isinstance(loaded.columns["prompt"], packed.Cells)


def test_a_column_of_dates_stays_and_errors_name_their_row(tmp_path: Path, large: None) -> None:
    rows = [
        {"prompt": f"p {i}", "answer": "1", "when": datetime.date(2020, 1, 1 + i % 20)} for i in range(40)
    ]
    train, _ = load_split(DataConfig(train=str(save(tmp_path / "pool.parquet", rows)), eval_size=2))
    assert isinstance(train.columns["when"], list) and train.columns["when"][0].year == 2020
    rows = [{"prompt": " " if i == 31 else f"p {i}", "answer": "1"} for i in range(40)]
    with pytest.raises(SaerlError, match="row 31: the prompt is empty"):
        load_split(DataConfig(train=str(save(tmp_path / "pool.jsonl", rows)), eval_size=2))
    texts = packed.kept("\ud800" if i == 31 else "p" for i in range(40))
    with pytest.raises(SaerlError, match="'prompt' row 31 holds half of a surrogate pair"):
        pool._check_texts({"prompt": texts}, "pool.jsonl")


def test_no_cell_is_held_as_an_object(tmp_path: Path, large: None) -> None:
    rows = [{"prompt": f"prompt {i}", "answer": "1", "note": "x"} for i in range(60)]
    train, _ = load_split(DataConfig(train=str(save(tmp_path / "pool.jsonl", rows)), eval_size=2))
    for field in dataclasses.fields(train):
        for name, column in getattr(train, field.name).items():
            assert isinstance(column, packed.Ragged), name
            assert isinstance(column.array.base, np.memmap) or column.array.nbytes <= 100, name
