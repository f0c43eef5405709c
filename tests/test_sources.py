"""Data sources: reasoning-gym and functions of the user's under one contract."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from saerl_fast.config import DataConfig
from saerl_fast.errors import SaerlError
from saerl_fast.prompts import reasoning_gym, sources
from saerl_fast.prompts.pool import load_prompts, load_split

CODE = """
import random

CALLS = []


def rows(role, size, seed, argument=None):
    CALLS.append((role, size, seed, argument))
    draw = random.Random(f"{role} {seed}")
    kind = 0 if role == "train" else 1
    pairs = [(2 * draw.randrange(10**6) + kind, i) for i in range(size)]
    return [{"prompt": f"{a}+{b}=", "answer": a + b, "n": i} for i, (a, b) in enumerate(pairs)]


def columns(**asked):
    found = rows(**asked)
    return {key: tuple(row[key] for row in found) for key in found[0]}


def lazily(**asked):
    yield from rows(**asked)


def dataset(**asked):
    import datasets

    return datasets.Dataset.from_list(rows(**asked))


def with_ids(**asked):
    return [row | {"prompt_id": f"{asked['role']}/{row['n']}"} for row in rows(**asked)]


def same(role, size, seed):
    return rows("train", size, seed)


def ragged(**asked):
    return {"prompt": ["a", "b"], "answer": ["1"]}


def text(**asked):
    return {"prompt": "ab", "answer": "12"}


def breaks(**asked):
    raise RuntimeError("out of\\nluck")


def narrow(size):
    return rows("train", size, 0)


def breaks_late(**asked):
    yield {"prompt": "a", "answer": "1"}
    raise RuntimeError("too late")


BAD = {"nothing": None, "number": 3, "empty": [], "no_columns": {}, "strings": ["a", "b"], "mixed": [{}, 3]}
for name, value in BAD.items():
    globals()[name] = lambda value=value, **asked: value
unnamed = lambda **asked: [{"question": "a", "answer": "1"}]
blank = lambda **asked: [{"prompt": " ", "answer": "1"}]
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "saerl_source.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("saerl_source", None)


def test_all_kinds_of_rows_give_the_same_pool():
    pytest.importorskip("datasets")
    cfg = DataConfig(size=7)
    want = load_prompts("saerl_source:rows", cfg, seed=3)
    assert len(want) == 7 and want.column("prompt_id") == [str(i) for i in range(7)]
    assert all(isinstance(answer, str) for answer in want.column("answer"))
    for name in ("columns", "lazily", "dataset"):
        assert load_prompts(f"saerl_source:{name}", cfg, seed=3) == want
    assert load_prompts("saerl_source:rows", cfg, seed=4) != want


def test_roles_sizes_and_arguments_are_told():
    cfg = DataConfig(train="saerl_source:rows@a@b:c", size=5, eval_size=3)
    train, held_out = load_split(cfg, seed=2)
    assert (len(train), len(held_out)) == (5, 3)
    assert sys.modules["saerl_source"].CALLS == [("train", 5, 2, "a@b:c"), ("eval", 3, 2, "a@b:c")]
    assert held_out.column("prompt_id") == ["eval-0", "eval-1", "eval-2"]


def test_the_columns_may_be_named_and_ids_are_the_functions_own():
    pool = load_prompts(
        "saerl_source:with_ids", DataConfig(size=2, answer_column="n", template="Q: {prompt}")
    )
    assert pool.column("prompt_id") == ["train/0", "train/1"] and pool.column("answer") == ["0", "1"]
    assert all(prompt.startswith("Q: ") for prompt in pool.column("prompt"))
    named = DataConfig(prompt_column="question")
    assert load_prompts("saerl_source:unnamed", named).column("prompt") == ["a"]


def test_another_source_may_be_evaluated_on(caplog):
    cfg = DataConfig(train="saerl_source.py:rows", eval="saerl_source.py:same", size=5, eval_size=2)
    with caplog.at_level(logging.WARNING):
        with pytest.raises(SaerlError, match="every prompt .* is also evaluated"):
            load_split(DataConfig(train="saerl_source:same", size=5, eval_size=5))
        train, held_out = load_split(cfg)
    assert not set(train.column("prompt")) & set(held_out.column("prompt"))
    assert "dropped 2 training rows" in caplog.text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "returned a NoneType; return a list of dicts"),
        ("number", "returned a int"),
        ("empty", "returned no rows for role='train'"),
        ("no_columns", "returned no rows"),
        ("strings", "a list of other things"),
        ("mixed", "a list of other things"),
        ("text", "columns that are no lists"),
        ("ragged", "columns of different lengths"),
        ("unnamed", "has no column 'prompt' (data.prompt_column); it has question, answer"),
        ("blank", "row 0: the prompt is empty"),
        ("breaks", "raised RuntimeError: out of ("),
        ("breaks_late", "raised RuntimeError: too late ("),
        ("narrow", "raised TypeError"),
        ("gone", "has no function 'gone'"),
    ],
)
def test_a_wrong_result_is_one_sentence(name, said):
    with pytest.raises(SaerlError) as caught:
        load_prompts(f"saerl_source:{name}", DataConfig())
    assert said in str(caught.value) and f"saerl_source:{name}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_setting_is_named():
    for cfg, said in [
        (DataConfig(train="no_such:rows"), "data.train=no_such:rows: importing"),
        (
            DataConfig(train="saerl_source:rows", eval="saerl_source:nothing"),
            "data.eval=saerl_source:nothing",
        ),
    ]:
        with pytest.raises(SaerlError, match=said):
            load_split(cfg)


@pytest.mark.parametrize(
    "spec", ["owner/name", "name", "pool.jsonl", "C:\\data\\pool.jsonl", "reasoning-gym"]
)
def test_what_is_no_source(spec):
    assert not sources.is_source(spec)


def test_reasoning_gym_is_reached_by_the_same_contract():
    pytest.importorskip("reasoning_gym")
    direct = reasoning_gym.rows(role="train", size=6, seed=5, argument="chain_sum,gcd@0")
    pool = load_prompts("reasoning-gym:chain_sum,gcd@0", DataConfig(size=6), seed=5)
    assert pool.columns == direct and pool.column("prompt_id")[1] == "chain_sum@1/train/0"


def test_questions_are_the_same_in_every_process():
    """Those of these generators follow the order of a set, and thus the interpreter's hash seed."""
    pytest.importorskip("reasoning_gym")
    call = "rows(role='train', size=12, seed=5, argument='ransom_note,isomorphic_strings')"
    code = f"from saerl_fast.prompts.reasoning_gym import rows; print({call}['prompt'])"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
