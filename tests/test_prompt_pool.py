"""Prompt pools: columns by name and by path, what an answer may be, and every row that leaves."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from saerl_fast.config import DataConfig
from saerl_fast.prompts import reasoning_gym as reasoning_gym_pool
from saerl_fast.prompts.pool import Pool, load_prompts, load_split
from tests.prompt_files import ROWS, load, message_of, save


def test_named_columns_ids_and_template(tmp_path):
    rows = [{"q": "2 {x}", "sol": 4, "key": 7}, {"q": "3", "sol": 6, "key": 9}]
    path = save(tmp_path / "pool.jsonl", rows)
    names = {"prompt_column": "q", "answer_column": "sol", "id_column": "key"}
    pool = load(path, **names, template="Put {prompt} in \\boxed{}.")
    assert pool.column("prompt") == ["Put 2 {x} in \\boxed{}.", "Put 3 in \\boxed{}."]
    assert pool.column("prompt_id") == ["7", "9"] and pool.column("answer") == ["4", "6"]
    assert pool.column("q") == ["2 {x}", "3"]  # rewards still see the data set's own columns
    assert load(path, **(names | {"answer_column": None})).column("answer") == ["", ""]


def test_chat_messages_keep_their_roles(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    for suffix in (".jsonl", ".parquet"):
        path = save(tmp_path / f"pool{suffix}", [{"prompt": chat, "answer": "2"}])
        (prompt,) = load(path, template="{prompt} Answer:").column("prompt")
        assert prompt == [chat[0], {"role": "user", "content": "1+1? Answer:"}]


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        (None, "have no prompt"),
        ("  \n", "is empty"),
        (3, "is a int"),
        ([], "has no chat messages"),
        ([{"content": "x"}], "without a role"),
        ([{"role": "user", "content": None}], "without text content"),
        ([{"role": "assistant", "content": "x"}], "has no message but the assistant's"),
    ],
    ids=lambda x: x if isinstance(x, str) and x.strip() else "",
)
def test_a_bad_prompt_names_its_row(tmp_path, prompt, fault):
    path = save(
        tmp_path / "pool.jsonl", [{"prompt": "fine", "answer": "1"}, {"prompt": prompt, "answer": "1"}]
    )
    message = message_of(load, path)
    assert "pool.jsonl" in message and "row 1" in message and fault in message


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", ["data.train is empty"]),
        ("nowhere/pool.jsonl", ["nowhere/pool.jsonl does not exist", "data.train"]),
        ("pool.txt?", ["pool.txt?", ".parquet", "reasoning-gym:NAME"]),
        ("reasoning-gym:chain_sums", ["chain_sums", "did you mean chain_sum?"]),
        ("reasoning-gym:zzzz", ["zzzz", "with bands: ", "products"]),
        ("reasoning-gym:chain_sum@9", ["chain_sum@9", "0 to 3"]),
        ("reasoning-gym:chain_sum@x", ["chain_sum@x", "0 to 3"]),
        ("reasoning-gym:word_sorting@1", ["word_sorting", "no difficulty bands"]),
        ("reasoning-gym:rush_hour", ["rush_hour", "own answer"]),
    ],
)
def test_bad_specs_are_one_sentence(spec, words):
    if "gym" in spec:
        pytest.importorskip("reasoning_gym")
    message = message_of(load_prompts, spec, DataConfig())
    assert all(word in message for word in words), message


def test_duplicate_ids_name_both_rows(tmp_path):
    path = save(tmp_path / "pool.jsonl", [row | {"key": i % 5} for i, row in enumerate(ROWS)])
    message = message_of(load, path, id_column="key")
    assert "'0'" in message and "rows 0 and 5" in message


def test_the_held_out_split_is_seeded_and_disjoint(tmp_path):
    twice = [*ROWS, ROWS[0], ROWS[1]]  # copies must not sit on both sides
    cfg = DataConfig(train=save(tmp_path / "pool.jsonl", twice), eval_size=5)
    train, held_out = load_split(cfg, seed=1)
    assert len(held_out) == 5 and len(set(held_out.column("prompt"))) == 5
    assert not set(train.column("prompt")) & set(held_out.column("prompt"))
    assert set(train.column("prompt")) | set(held_out.column("prompt")) == {r["prompt"] for r in ROWS}
    assert load_split(cfg, seed=1)[1].column("prompt_id") == held_out.column("prompt_id")
    assert any(load_split(cfg, seed=s)[1].column("prompt_id") != held_out.column("prompt_id") for s in (2, 3))
    limited, few = load_split(replace(cfg, limit=3, eval_limit=2), seed=1)
    assert limited.column("prompt_id") == train.column("prompt_id")[:3]
    assert few.column("prompt_id") == held_out.column("prompt_id")[:2]


def test_only_rows_that_the_filter_allows_are_held_out(tmp_path):
    rows = [row | {"quality_label": None if row["n"] == 1 else row["quality_label"]} for row in ROWS]
    cfg = DataConfig(train=save(tmp_path / "pool.jsonl", rows), eval_size=7, eval_filter="quality_label")
    train, held_out = load_split(cfg)
    assert held_out.column("quality_label") == [1] * 7
    assert sorted(held_out.column("n") + train.column("n")) == list(range(1, 13))
    message = message_of(load_split, replace(cfg, eval_size=8))
    assert "eval_size=8" in message and "7 distinct" in message and "quality_label" in message
    assert "'good'" in message_of(load_split, replace(cfg, eval_filter="good"))


@pytest.mark.parametrize("rows", [1, 5], ids=["one row", "as many as asked"])
def test_a_pool_too_small_to_hold_out_is_one_sentence(tmp_path, rows):
    cfg = DataConfig(train=save(tmp_path / "pool.jsonl", ROWS[:rows]), eval_size=5)
    message = message_of(load_split, cfg)
    assert "eval_size=5" in message and f"{rows} rows" in message and "data.eval" in message


def test_training_rows_that_are_also_evaluated_are_dropped(tmp_path, caplog):
    everything = save(tmp_path / "pool.jsonl", ROWS)
    cfg = DataConfig(train=everything, eval=save(tmp_path / "eval.jsonl", ROWS[:3]))
    with caplog.at_level(logging.WARNING):
        train, held_out = load_split(cfg)
    assert train.column("n") == list(range(4, 13)) and held_out.column("n") == [1, 2, 3]
    assert "dropped 3" in caplog.text
    assert "every prompt" in message_of(load_split, replace(cfg, eval=everything))


def test_pool_refuses_uneven_and_missing_columns():
    good = {"prompt_id": ["a", "b"], "prompt": ["x", "y"], "answer": ["1", "2"]}
    pool = Pool(good)
    assert pool.select([1, 0]).column("prompt") == ["y", "x"]
    assert "'extra'" in message_of(pool.column, "extra")
    assert "differ in length" in message_of(Pool, good | {"n": [1]})
    assert "'answer'" in message_of(Pool, {"prompt_id": [], "prompt": []})


def test_row_limits(tmp_path):
    cfg = DataConfig(train=save(tmp_path / "pool.jsonl", ROWS), eval_size=2)
    train, held_out = load_split(replace(cfg, limit=1, eval_limit=1))
    assert len(train) == len(held_out) == 1


# --- reasoning-gym ---------------------------------------------------------------------------------


def test_reasoning_gym_rows_are_spread_seeded_and_disjoint():
    pytest.importorskip("reasoning_gym")
    cfg = DataConfig(train="reasoning-gym:chain_sum@0, gcd", size=103, eval_size=21)
    train, held_out = load_split(cfg, seed=5)
    assert (len(train), len(held_out)) == (103, 21)
    cells = [
        f"{task}@{level}" for task, level in zip(train.column("task"), train.column("level"), strict=True)
    ]
    assert cells[:5] == ["chain_sum@0", "gcd@0", "gcd@1", "gcd@2", "gcd@3"]
    assert [cells.count(cell) for cell in cells[:5]] == [21, 21, 21, 20, 20]
    assert not set(train.column("prompt")) & set(held_out.column("prompt"))
    assert len(set(train.column("prompt"))) == 103
    assert load_split(cfg, seed=5) == (train, held_out)
    other_train, other_eval = load_split(cfg, seed=6)
    assert other_train.column("prompt") != train.column("prompt")
    # The halves stay apart across seeds too, or a second seed would train on the first one's evaluation.
    assert not set(train.column("prompt")) & set(other_eval.column("prompt"))
    entry = json.loads(train.column("rg_entry")[0])
    assert entry["question"] == train.column("prompt")[0] and entry["answer"] == train.column("answer")[0]


def test_reasoning_gym_bands_are_those_of_the_file():
    pytest.importorskip("reasoning_gym")
    for level, band in enumerate(reasoning_gym_pool.bands()["chain_sum"]):
        pool = load_prompts(f"reasoning-gym:chain_sum@{level}", DataConfig(size=20))
        terms = [json.loads(text)["metadata"]["num_terms"] for text in pool.column("rg_entry")]
        assert band["min_terms"] <= min(terms) and max(terms) <= band["max_terms"]


def test_an_exhausted_band_is_said_and_not_repeated(caplog):
    pytest.importorskip("reasoning_gym")
    with caplog.at_level(logging.WARNING):
        pool = load_prompts("reasoning-gym:products@0", DataConfig(size=500))
    assert 50 < len(pool) < 101 and len(set(pool.column("prompt"))) == len(pool)
    assert f"products@0 has only {len(pool)} distinct train questions (500 asked)" in caplog.text


def test_a_generator_without_bands_uses_its_own_settings():
    pytest.importorskip("reasoning_gym")
    pool = load_prompts("reasoning-gym:word_sorting", DataConfig(size=3))
    assert pool.column("level") == [-1, -1, -1] and pool.column("prompt_id")[0] == "word_sorting/train/0"
