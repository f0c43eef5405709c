"""The benchmark of wrong answers: what rollouts say, what is kept, and the table made of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks import wrong_answers as bench

DEMO = Path(__file__).parents[1] / "examples"


def test_what_a_short_answer_says():
    assert bench.said(" Yes.\n\nBecause") == "Yes" and bench.said("**3.5** apples. So") == "3.5** apples"
    assert bench.said("") == bench.said("\n") == ""
    assert bench.agrees(" no, it is not", "No, it is not.") and not bench.agrees("Yes", "No")
    assert not bench.agrees("", "4") and not bench.agrees("12", "2")
    assert bench.agrees("$\\frac{1}{2}$.", "1/2")


def test_measures_are_larger_for_the_answer_that_the_model_gives():
    row = {"texts": ["7", "7", "8", "5"], "answer": "7", "wrong": ["8", "9"], "own": [-1.0, -2.0]}
    found = bench.measures(row | {"logprobs": [-1.0, -3.0, -4.0]})
    assert found["rollouts that agree"] == (0.5, 0.25) and found["agrees with the majority"] == (1, 0)
    assert found["the same, by the majority's share"] == (0.5, -0.5)
    assert found["less that of sampled answers"] == (0.5, -1.5)
    assert found["less that of other prompts' answers"] == (3, 1)


def test_the_table_tells_what_sees_and_what_does_not():
    rng = random.Random(0)
    rows = [
        {"texts": ["7", str(rng.randint(0, 9))], "answer": "7", "wrong": ["8"], "own": [-1.0]}
        | {"logprobs": [rng.random(), rng.random()]}
        for _ in range(60)
    ]
    found = bench.table(rows, 20)
    assert found["prompts"] == 60 and found["rollouts"] == 2 and found["majority is right"] > 0.9
    assert found["auc"]["rollouts that agree"]["mean"] > 0.9 > 0.7 > found["auc"]["log-probability"]["mean"]
    assert found["auc"]["all, by a regression"]["mean"] > 0.9
    assert "less that of other prompts' answers" not in found["auc"]
    told = bench.markdown({"wrong answers of": {"a": found, "b": found}})
    assert "| prompts | 60 | 60 |" in told and told.count("±") == 2 * len(found["auc"])


def test_what_was_tried_is_kept_and_other_pools_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(DEMO.parent)
    out, work = tmp_path / "out.json", tmp_path / "work"
    args = ["data.limit=60", "--config", "examples/demo.yaml", "--work", str(work), "--out", str(out)]
    bench.main(["one", *args, "--prompts", "10", "--rollouts", "3"])
    lines = (work / "one" / "tried.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    assert len(lines) == 10 and len(row["texts"]) == len(row["own"]) == 3
    assert len(row["logprobs"]) == 1 + len(row["wrong"]) and row["answer"] not in row["wrong"]
    monkeypatch.setattr("saerl_fast.rl.generate.generate", lambda *_, **__: pytest.fail("tried again"))
    (work / "two").mkdir()
    (work / "two" / "tried.jsonl").write_text("\n".join(lines) + "\n")
    bench.main(["two", *args, "--prompts", "10", "--rollouts", "3"])
    made = json.loads(out.read_text())["wrong answers of"]
    assert list(made) == ["one", "two"] and made["one"]["auc"] == made["two"]["auc"]
    text = report.fill("<!-- table out -->\n<!-- end -->", tmp_path)
    assert "| measure | one | two |" in text


def test_a_prompt_of_many_answers_has_no_row_of_its_own_answer_as_a_wrong_one():
    answers, tasks = ["1", "2", "1", "3", "2", "9"], ["a", "a", "a", "a", "a", "b"]
    found = bench._others(0, list(range(6)), tasks, answers)
    assert sorted(answers[j] for j in found) == ["2", "3"]
