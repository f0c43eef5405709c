"""Prompt files: every format, every fault that a file can have, folders, and the layouts people bring."""

from __future__ import annotations

import gzip
import json

import pytest

from saerl_fast.config import DataConfig
from saerl_fast.prompts import files as prompt_files
from saerl_fast.prompts.pool import load_prompts
from tests.prompt_files import ROWS, load, message_of, save


@pytest.mark.parametrize("suffix", prompt_files.SUFFIXES)
def test_every_format_gives_the_same_pool(tmp_path, suffix):
    pool = load(save(tmp_path / f"pool{suffix}", ROWS))
    assert pool.column("prompt_id") == [str(i) for i in range(12)]
    assert pool.column("prompt") == [row["prompt"] for row in ROWS]
    assert pool.column("answer") == [row["answer"] for row in ROWS]
    assert pool.column("quality_label") == [row["quality_label"] for row in ROWS]
    assert len(pool) == 12


def test_columns_of_json_and_nulls_of_csv(tmp_path):
    path = tmp_path / "pool.json"
    path.write_text(json.dumps({"prompt": ["a", "b"], "answer": [1, 2.5]}))
    assert load(path).column("answer") == ["1", "2.5"]
    path = tmp_path / "pool.csv"
    path.write_text('\ufeffprompt,answer,rate,note\n"a, b",01,0.5,x\nc,2,,\n', encoding="utf-8")
    pool = load(path)
    assert pool.column("prompt") == ["a, b", "c"] and pool.column("answer") == ["01", "2"]
    assert pool.column("rate") == [0.5, None] and pool.column("note") == ["x", None]


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4\n"  # of a clone without Git LFS
)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"prompt": "x", "answer": "1"}\n\n{"prompt": \n', ["a.jsonl line 3", "JSON"]),
        ("a.jsonl", "[1]\n", ["a.jsonl line 1", "object", "list"]),
        ("a.jsonl", "", ["no column 'prompt'", "no columns"]),
        ("a.json", "[{]", ["a.json line 1", "JSON"]),
        ("a.json", '"text"', ["list of objects"]),
        ("a.json", '{"prompt": ["a"], "answer": []}', ["different lengths"]),
        ("a.json", '{"prompt": [], "answer": []}', ["a.json holds no rows"]),
        ("a.csv", "prompt,answer\na,1,2\n", ["a.csv line 2", "cells"]),
        ("a.csv", "prompt,answer\na\n", ["a.csv line 2", "cells"]),
        ("a.csv", "prompt,answer\n", ["a.csv holds no rows"]),
        *(
            (f"a.{kind}", POINTER, ["Git LFS pointer", "git lfs pull"])
            for kind in ("parquet", "csv", "jsonl.gz")
        ),
        ("a.parquet", "not parquet", ["a.parquet is not a Parquet file"]),
        (
            "a.jsonl",
            '{"prompt": "x", "solution": "1"}',
            ["'answer'", "data.answer_column", "prompt, solution"],
        ),
        ("a.jsonl", '{"prompt": "x", "answer": null}', ["1 of 1 rows have no answer", "row 0", "drop_null"]),
    ],
    ids=lambda x: x if isinstance(x, str) and len(x) < 10 else "",
)
def test_bad_files_are_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    message = message_of(load, tmp_path / name)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_files_in_another_encoding_are_one_sentence(tmp_path, name, encoding):
    text = '{"prompt": "x", "answer": "1"}\n{"prompt": "caf\u00e9", "answer": "1"}'
    (tmp_path / name).write_bytes(text.encode(encoding))
    line = 2 if encoding == "latin-1" else 1
    message = message_of(load, tmp_path / name)
    assert f"{name} line {line} is" in message and "save the file as UTF-8" in message


GOOD = '{"prompt": "a", "answer": "1"}'
JSON_FAULTS = [
    ("[" * 200_000 + "]" * 200_000, "is nested too deeply"),
    ("9" * 5000, "more digits than Python reads"),
    ('"\\ud83d"', "half of a surrogate pair"),
    ('"\\uDE00 x"', "half of a surrogate pair"),
    ("Infinity", "holds Infinity"),
    ("-Infinity", "holds -Infinity"),
    ("1e999", "too large to be read (1e999)"),
    ('{"a": 1, "b": {"c": 1, "c": 2}}', "has the key 'c' twice"),
    ('"1", "answer": "2"', "has the key 'answer' twice"),
    ('"1" "2"', "is not valid JSON"),
    ('"a\tb"', "is not valid JSON"),
]


@pytest.mark.parametrize(("value", "fault"), JSON_FAULTS, ids=[fault for _, fault in JSON_FAULTS])
def test_faults_of_json_name_file_and_line(tmp_path, value, fault):
    bad = f'{{"prompt": "b", "answer": {value}}}'
    for name, text in {
        "a.jsonl": f"{GOOD}\n\n{bad}\n",
        "a.json": f"[{GOOD},\n\n {bad}]\n",
        "b.json": f"{GOOD}\n\n{bad}\n",  # JSON Lines under another name
    }.items():
        (tmp_path / name).write_text(text)
        message = message_of(load, tmp_path / name)
        assert f"{name} line 3 " in message and fault in message, name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"[{GOOD}\n {GOOD}]", "line 2 is not valid JSON (no comma"),
        (f"[{GOOD}] x", "more text after the list"),
        (f"[{GOOD},\n{GOOD},\n]", "line 2 is not valid JSON (no comma or ] after a row)"),
        (f"[{GOOD},\n\n", "line 3 is not valid JSON"),
        ('{"prompt": ["a"],\n "answer": [}', "line 2 is not valid JSON"),
        ("", "line 1 is not valid JSON"),
    ],
)
def test_broken_lists_name_the_line(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    message = message_of(load, tmp_path / "a.json")
    assert "a.json" in message and words in message


def test_whole_surrogate_pairs_and_nan_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude00 \\\\ud800", "answer": 4, "rate": NaN}\n')
    pool = load(path)
    assert pool.column("prompt") == ["\U0001f600 \\ud800"] and pool.column("rate") == [None]


def test_json_lines_named_json_and_broken_gzip(tmp_path):
    (tmp_path / "a.json").write_text(f"{GOOD}\n{GOOD}\n")
    assert load(tmp_path / "a.json").column("answer") == ["1", "1"]
    (tmp_path / "a.jsonl.gz").write_text(GOOD)
    assert "a.jsonl.gz is not a whole gzip file" in message_of(load, tmp_path / "a.jsonl.gz")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 999)[:-20])
    assert "is not a whole gzip file" in message_of(load, tmp_path / "a.jsonl.gz")


def test_cells_of_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,answer\n" + "x" * 200_000 + ",1\n")  # beyond the csv module's own limit
    assert len(load(path).column("prompt")[0]) == 200_000
    path.write_text("prompt,answer,answer\na,1,2\n")
    assert "line 1 names the column 'answer' twice" in message_of(load, path)
    path.write_text("prompt,completion\na,007\n")
    assert load(path).column("answer") == ["007"]
    path = tmp_path / "a.tsv"
    path.write_text('prompt\tanswer\n"a\tb, c"\t1\n')
    assert load(path).column("prompt") == ["a\tb, c"]
    for broken in ('"hi" she said\t1\nb\t2\n', '"hi she said\t1\nb\t2\n'):  # no quote of its text is lost
        path.write_text("prompt\tanswer\n" + broken)
        assert "is not valid CSV" in message_of(load, path)


# --- folders ---------------------------------------------------------------------------------------


def test_a_folder_of_shards_is_one_pool(tmp_path):
    save(tmp_path / "part-1.jsonl.gz", ROWS[6:])
    save(tmp_path / "part-0.jsonl.gz", ROWS[:6])
    (tmp_path / "README.md").write_text("#")
    (tmp_path / ".part-2.jsonl.gz").write_text("half a download")
    assert load(tmp_path).column("n") == list(range(1, 13))
    save(tmp_path / "part-2.jsonl.gz", [{"prompt": "x", "gold": "1"}])
    message = message_of(load, tmp_path)
    assert "part-2.jsonl.gz and part-0.jsonl.gz differ in columns (answer, gold, n" in message
    save(tmp_path / "more.csv", ROWS)
    assert "files of several kinds (.csv, .jsonl.gz)" in message_of(load, tmp_path)


def test_folders_that_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    assert load(tmp_path / "one").column("n") == list(range(1, 13))
    both = datasets.DatasetDict({"train": data, "test": data.select(range(3))})
    both.save_to_disk(tmp_path / "two")
    assert len(load(tmp_path / "two")) == 12
    assert len(load_prompts(str(tmp_path / "two"), DataConfig(), split_role="eval")) == 3
    assert "no split 'dev' (data.split, data.eval_split); it has train, test" in message_of(
        load, tmp_path / "two", split="dev"
    )
    (tmp_path / "one" / "state.json").write_text("{}")
    assert "is no whole save_to_disk folder" in message_of(load, tmp_path / "one")


def test_a_folder_of_splits_is_left_to_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    save(tmp_path / "train-00000-of-00001.jsonl", ROWS)
    save(tmp_path / "test-00000-of-00001.jsonl", ROWS[:2])
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load(tmp_path)) == 12 and asked == [(str(tmp_path), None, "train")]


def test_hub_sets_are_asked_for_by_split_and_configuration(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        if args[0] == "gone/gone":
            raise RuntimeError("not on the hub\nsecond line")
        return datasets.Dataset.from_dict({"question": ["a", "b"], "answer": ["1", "2"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    cfg = DataConfig(prompt_column="question", hub_config="main", split="train", eval_split="validation")
    assert load_prompts("openai/gsm8k", cfg).column("prompt") == ["a", "b"]
    assert load_prompts("openai/gsm8k", cfg, split_role="eval").column("prompt_id") == ["eval-0", "eval-1"]
    assert asked == [
        (("openai/gsm8k", "main"), {"split": "train"}),
        (("openai/gsm8k", "main"), {"split": "validation"}),
    ]
    message = message_of(load_prompts, "gone/gone", cfg)
    assert "gone/gone (configuration main)" in message and "not on the hub" in message


def test_what_spreadsheets_write(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(
        'prompt, answer, code, key, rate\n"a, b", "2", 007, 12345678901234567, 0.5\n  \nc, 3, 8, 1, 1e5\n'
    )
    pool = load(path)
    assert pool.column("prompt") == ["a, b", "c"] and pool.column("answer") == ["2", "3"]
    assert pool.column("code") == ["007", "8"] and pool.column("key") == ["12345678901234567", "1"]
    assert pool.column("rate") == [0.5, 1e5]
    path.write_text("prompt;answer\n1+1;2\n")
    assert "line 1 is separated by ';'" in message_of(load, path)


@pytest.mark.parametrize("name", ["a.xlsx", "a.txt", "a.jsonl.zst", "a.parquet.gz"])
def test_a_file_of_another_kind_is_not_looked_for_on_the_hub(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("x")
    assert f"data file {name} is of a kind that is not read; save it as one of .parquet" in message_of(
        load, name
    )


def test_the_cause_in_a_folder_that_datasets_reads_is_named(tmp_path):
    pytest.importorskip("datasets")
    said = message_of(load, str(tmp_path))
    assert said.startswith(f"cannot load split 'train' of the folder {tmp_path} (EmptyDatasetError")
    assert said.endswith("check its files and data.split, or pass a local file")
