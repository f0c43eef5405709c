"""Where prompts and answers stand: nested names, verl's and TRL's layouts, and what an answer may be."""

from __future__ import annotations

import datetime
import decimal
import logging

import numpy as np
import pytest

from saerl_fast.config import DataConfig
from saerl_fast.prompts import layouts
from saerl_fast.prompts.pool import load_prompts, load_split
from tests.prompt_files import load, message_of, save

USER = {"role": "user", "content": "1+1?"}
VERL = {
    "data_source": "gsm8k",
    "prompt": [USER],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 7, "split": "train", "answer": "1+1=2"},
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json.gz"])
def test_verl_rows_are_read_as_they_are(tmp_path, caplog, suffix):
    path = save(tmp_path / f"pool{suffix}", [VERL])
    with caplog.at_level(logging.INFO):
        pool = load(path)
    assert pool.column("answer") == ["2"] and pool.column("prompt") == [[USER]]
    assert "answers are read from reward_model.ground_truth (verl's layout)" in caplog.text
    assert pool.column("extra_info.index") == [7] and pool.column("data_source") == ["gsm8k"]
    named = load(path, answer_column="extra_info.answer", id_column="extra_info.index")
    assert named.column("answer") == ["1+1=2"] and named.column("prompt_id") == ["7"]


def test_nested_names_of_prompts_lists_and_flat_columns(tmp_path):
    rows = [{"q": {"text": "a"}, "answers": {"text": ["Paris"], "start": [0]}, "x.y": 3, "x": {"y": 4}}]
    path = save(tmp_path / "pool.jsonl", rows)
    pool = load(path, prompt_column="q.text", answer_column="answers.text")
    assert pool.column("prompt") == ["a"] and pool.column("answer") == ["Paris"]
    assert load(path, prompt_column="q.text", answer_column="answers.text.0").column("answer") == ["Paris"]
    assert load(path, prompt_column="q.text", answer_column="x.y").column("answer") == ["3"]


def test_a_wrong_name_says_what_there_is(tmp_path):
    path = save(tmp_path / "pool.jsonl", [VERL])
    message = message_of(load, path, answer_column="ground_truth")
    assert "no column 'ground_truth' (data.answer_column, or null where there are no answers)" in message
    assert "did you mean reward_model.ground_truth?" in message
    assert "did you mean reward_model.ground_truth?" in message_of(
        load, path, answer_column="reward_model.ground_thruth"
    )
    assert "did you mean prompt?" in message_of(load, path, prompt_column="prompts")
    path = save(tmp_path / "other.jsonl", [{"question": "1 + 1", "solution": "2"}])
    assert "did you mean question?" in message_of(load, path)
    assert "did you mean solution?" in message_of(load, path, prompt_column="question")
    assert "did you mean extra_info.index?" in message_of(load(tmp_path / "pool.jsonl").column, "index")


def test_conversations_end_in_their_answers(tmp_path, caplog):
    system, said = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "2"}
    path = save(tmp_path / "pool.jsonl", [{"messages": [system, USER, said]}, {"messages": [USER, said]}])
    with caplog.at_level(logging.INFO):
        pool = load(path)
    assert pool.column("prompt") == [[system, USER], [USER]] and pool.column("answer") == ["2", "2"]
    assert "up to its last assistant message" in caplog.text
    assert "the last assistant messages are the answers" in caplog.text
    path = save(tmp_path / "own.jsonl", [{"messages": [USER, said], "answer": "two"}])
    assert load(path).column("answer") == ["two"] and load(path).column("prompt") == [[USER]]
    path = save(tmp_path / "asked.jsonl", [{"messages": [USER], "answer": "two"}])
    assert load(path).column("prompt") == [[USER]]
    path = save(tmp_path / "mixed.jsonl", [{"messages": [USER, said]}, {"messages": [USER]}])
    assert "1 of 2 rows have no answer" in message_of(load, path)
    parts = {"role": "assistant", "content": [{"type": "text", "text": "2"}]}
    path = save(tmp_path / "parts.jsonl", [{"messages": [USER, parts]}])
    assert load(path).column("answer") == ["2"]


def test_prompt_completion_rows(tmp_path, caplog):
    rows = [{"prompt": [USER], "completion": [{"role": "assistant", "content": "2"}]}]
    with caplog.at_level(logging.INFO):
        assert load(save(tmp_path / "chat.jsonl", rows)).column("answer") == ["2"]
    assert "answers are read from `completion`" in caplog.text
    text = save(tmp_path / "text.jsonl", [{"prompt": "1+1=", "completion": " 2"}])
    assert load(text).column("answer") == [" 2"]
    turns = save(tmp_path / "turns.jsonl", [rows[0] | {"completion": [USER, USER]}])
    assert "row 0: the answer is a list of 2 objects" in message_of(load, turns)


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("x", "x"),
        (3, "3"),
        (2.5, "2.5"),
        (True, "True"),
        (["3"], "3"),
        ([4], "4"),
        ((5.5,), "5.5"),
        (np.array(["6"]), "6"),
        (np.array(7), "7"),
        (np.float64(8.5), "8.5"),
        (np.int64(9), "9"),
        (decimal.Decimal("1.50"), "1.50"),
        (datetime.date(2020, 1, 2), "2020-01-02"),
        (None, None),
        (float("nan"), None),
        (np.float32("nan"), None),
        ([None], None),
        (decimal.Decimal("NaN"), None),
    ],
    ids=repr,
)
def test_what_counts_as_an_answer(cell, text):
    assert layouts.text_of(cell, "answer") == (text, None)


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (["1", "2"], ["is a list of 2 values", "data.answer_column=null"]),
        ([["1"]], ["is a list of 1 values"]),
        ([], ["is an empty list"]),
        (np.array([1, 2]), ["is a list of 2 values"]),
        ([{"a": 1}], ["is a list of 1 objects"]),
        ({"style": "rule", "ground_truth": "5"}, ["style, ground_truth", "gold.ground_truth"]),
        ({"a": {"b": 1}}, ["an object with a", "give it as text"]),
        (b"5", ["of type bytes"]),
        (object(), ["of type object"]),
    ],
    ids=lambda value: None if isinstance(value, list) else repr(value)[:20],
)
def test_what_is_no_answer_says_what_to_do(cell, words):
    text, fault = layouts.text_of(cell, "gold")
    assert text is None and fault is not None
    assert all(word in fault for word in words), fault


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_list_and_object_answers_of_files(tmp_path, suffix):
    rows = [{"prompt": "a", "answer": ["3"]}, {"prompt": "b", "answer": ["4"]}]
    assert load(save(tmp_path / f"a{suffix}", rows)).column("answer") == ["3", "4"]
    rows[1]["answer"] = ["4", "5"]
    message = message_of(load, save(tmp_path / f"a{suffix}", rows))
    assert "row 1: the answer is a list of 2 values" in message
    path = save(tmp_path / f"b{suffix}", [VERL])
    message = message_of(load, path, answer_column="reward_model")
    assert "row 0: the answer is an object" in message and "reward_model.ground_truth" in message
    assert "row 0: the id is an object" in message_of(load, path, id_column="extra_info")


NULLS = [
    {"prompt": "a", "answer": 1.0},
    {"prompt": "b", "answer": float("nan")},
    {"prompt": None, "answer": 3.0},
    {"prompt": "d", "answer": None},
    {"prompt": "e", "answer": 5.0},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_missing_cells_are_refused_or_dropped_and_counted(tmp_path, caplog, suffix):
    path = save(tmp_path / f"pool{suffix}", NULLS)
    message = message_of(load, path)
    assert "1 of 5 rows have no prompt" in message and "the first is row 2" in message
    message = message_of(load, save(tmp_path / f"b{suffix}", [NULLS[0], NULLS[1], NULLS[3]]))
    assert "2 of 3 rows have no answer" in message and "the first is row 1" in message
    assert "data.drop_null=true" in message
    with caplog.at_level(logging.WARNING):
        pool = load(path, drop_null=True)
    # The rest keep their numbers as ids, and whole numbers are not the text 1.0.
    assert pool.column("prompt_id") == ["0", "4"] and pool.column("answer") == ["1", "5"]
    assert "2 of 5 rows have no answer" in caplog.text and "1 of 5 rows have no prompt" in caplog.text
    only = save(tmp_path / f"c{suffix}", [NULLS[1]])
    assert "leaves none of 1 rows" in message_of(load, only, drop_null=True)


def test_missing_cells_of_csv_and_ids(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer,key\na,1,x\nb,,y\nc,3,\n")
    assert "1 of 3 rows have no answer" in message_of(load, tmp_path / "a.csv")
    pool = load(tmp_path / "a.csv", id_column="key", drop_null=True)
    assert pool.column("prompt_id") == ["x"]
    path = save(tmp_path / "a.jsonl", [{"prompt": "a", "k": 1}, {"prompt": "b", "k": None}])
    assert "1 of 2 rows have no id" in message_of(load, path, answer_column=None, id_column="k")


def test_every_row_that_leaves_is_counted(tmp_path, caplog):
    rows = [{"prompt": f"p{i % 20}", "answer": str(i)} for i in range(25)]  # five prompts come twice
    path = save(tmp_path / "pool.jsonl", rows)
    cfg = DataConfig(train=path, eval_size=8, limit=3, eval_limit=2)
    with caplog.at_level(logging.INFO):
        train, held_out = load_split(cfg, seed=0)
    evaluated = set(load_split(DataConfig(train=path, eval_size=8), seed=0)[1].column("prompt"))
    copies = sum(row["prompt"] in evaluated for row in rows) - 8
    assert copies > 0 and (len(train), len(held_out)) == (3, 2)
    assert "held out 8 of 25 rows for evaluation" in caplog.text
    assert f"dropped {copies} training rows that the evaluation set also holds" in caplog.text
    assert f"data.limit=3 leaves out {14 - copies} of {17 - copies} training rows" in caplog.text
    assert "data.eval_limit=2 leaves out 6 of 8 evaluation rows" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load_prompts(path, DataConfig())
    assert caplog.text == ""  # nothing leaves, nothing is said


def test_sharegpt_conversations_end_in_their_answers(tmp_path, caplog):
    rows = [{"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]}]
    with caplog.at_level(logging.INFO):
        pool = load(save(tmp_path / "pool.jsonl", rows))
    assert pool.column("prompt") == [[USER]] and pool.column("answer") == ["2"]
    assert "each conversation in `conversations` up to its last assistant message" in caplog.text


def test_a_system_column_of_sharegpt_opens_the_conversation(tmp_path):
    chat = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    own = [{"from": "system", "value": "mine"}, *chat]
    rows = [("be brief", chat), ("", chat), (None, chat), ("other", own)]
    rows = [{"system": system, "conversations": talk} for system, talk in rows]
    pool = load(save(tmp_path / "a.jsonl", rows))
    first = [chat[0]["content"] if chat[0]["role"] == "system" else "" for chat in pool.column("prompt")]
    assert first == ["be brief", "", "", "mine"] and pool.column("answer") == ["a"] * 4
