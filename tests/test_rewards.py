from __future__ import annotations

import json
import logging
import math
import sys
import threading

import numpy as np
import pytest
import torch

from saerl_fast.config import DataConfig
from saerl_fast.errors import SaerlError
from saerl_fast.prompts.pool import load_prompts
from saerl_fast.prompts.reasoning_gym import bands
from saerl_fast.rl import rewards
from saerl_fast.rl.rewards import final_answer, get_reward, last_number, score_rewards


def one(name: str, completion, answer: str, **columns) -> float:
    columns = {"answer": [answer]} | {key: [value] for key, value in columns.items()}
    (value,) = score_rewards(get_reward(name), ["?"], [completion], columns)
    return float(value)


def message_of(call, *args) -> str:
    with pytest.raises(SaerlError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        (" two\n words ", "two words", 1),
        ("two word", "two words", 0),
        ("12", "12", 1),
        ("012", "12", 0),
        ("", "1", 0),
    ],
)
def test_exact(completion, answer, value):
    assert one("exact", completion, answer) == value
    assert one("exact", [{"role": "assistant", "content": completion}], answer) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("it is -3.", -3),
        ("x=-3", -3),
        ("5-3", 3),
        ("3 - 5", 5),
        ("is - 5", -5),
        ("(-5)", -5),
        ("\u22127", -7),
        ("$1,234.50.", 1234.5),
        ("-$5", -5),
        ("1,2", 2),
        ("3/4", 0.75),
        ("-3/4", -0.75),
        ("\\frac{3}{4}", 0.75),
        ("= -\\dfrac{1}{2}", -0.5),
        ("1e3", 1000),
        ("2.5e-3", 0.0025),
        (".5", 0.5),
        ("50%", 50),
        ("#### 18\n", 18),
        ("7 and then none", 7),
        ("57 - 87 = -30", -30),
        ("none", None),
        ("x2", None),
        ("12/0", None),
        ("9" * 5000, None),
    ],
    ids=lambda x: str(x)[:12],
)
def test_last_number(text, value):
    found = last_number(text)
    assert found is None if value is None else found is not None and float(found) == value


def test_numeric(caplog, monkeypatch):
    assert one("numeric", "so 1,000 it is", "1000") == 1
    assert one("numeric", "0.75", "3/4") == 1
    assert one("numeric", "0.333", "1/3") == 0
    assert one("numeric", "no idea", "4") == 0
    assert one("numeric", "0", "0") == 1 and one("numeric", "0.0000001", "0") == 0
    monkeypatch.setattr(rewards, "_said", [])
    with caplog.at_level(logging.WARNING):
        assert one("numeric", "4", "none") == one("numeric", "none", "nil") == 0
    assert caplog.text.count("holds no number") == 1 and "'none'" in caplog.text


@pytest.mark.parametrize(
    ("text", "multiline", "answer"),
    [
        ("steps\nAnswer: 12\nmore", False, "12"),
        ("Answer: 1\nno, the answer is: 2.", False, "2"),
        ("**Answer:** `7`", False, "7"),
        ("so \\boxed{\\frac{1}{2}} Answer: 3", False, "\\frac{1}{2}"),
        ("\\boxed{1} or \\boxed{2}", False, "2"),
        ("\\boxed{open", False, "\\boxed{open"),
        ("first\n\n last line \n", False, "last line"),
        ("Answer:\n 1 2\n 3 4\n", True, " 1 2\n 3 4"),
        ("", False, ""),
        ("Answer:", False, ""),
    ],
)
def test_final_answer(text, multiline, answer):
    assert final_answer(text, multiline) == answer


MATHS = [
    ("so \\boxed{\\frac{1}{2}}", "1/2", 1),
    ("Answer: 0.5", "\\frac{1}{2}", 1),
    ("The answer is 42.", "42", 1),
    ("thus 1,234", "1234", 1),
    ("Answer: Yes", "Yes", 1),
    ("\\boxed{3}", "2", 0),
    ("", "2", 0),
    ("\\boxed{2", "3", 0),
]


@pytest.mark.parametrize(("completion", "answer", "value"), MATHS)
@pytest.mark.parametrize("installed", [True, False], ids=["math-verify", "fallback"])
def test_maths(completion, answer, value, installed, monkeypatch):
    if installed:
        pytest.importorskip("math_verify")
    else:
        monkeypatch.setattr(rewards, "_math_verify", lambda: None)
    assert one("maths", completion, answer) == value


def test_maths_compares_expressions_in_any_thread():
    pytest.importorskip("math_verify")
    found = []

    def work():
        found.append(one("maths", "\\boxed{1+x^2}", "x^2+1"))
        found.append(one("maths", "\\boxed{9^{9^{9^{9}}}}", "7"))  # must not be evaluated
        found.append(one("maths", "\\boxed{9^{9^{9}}} = 7", "7"))

    work()
    assert found[:2] == [1, 0]
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert found[3:5] == [1, 0]


def test_maths_without_its_package_says_so_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    rewards._math_verify.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert [one("maths", "\\boxed{3}", "3"), one("maths", "3", "4")] == [1, 0]
        assert caplog.text.count("math-verify is not installed") == 1
    finally:
        rewards._math_verify.cache_clear()


# --- reasoning-gym ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(bands()))
def test_reasoning_gym_accepts_its_answers_and_no_others(name):
    pytest.importorskip("reasoning_gym")
    pool = load_prompts(f"reasoning-gym:{name}", DataConfig(size=8))
    entries, answers = pool.column("rg_entry"), pool.column("answer")
    reward = get_reward("reasoning-gym")
    assert set(pool.column("level")) == {0, 1, 2, 3}
    for form in ("{}", "I add them up.\nAnswer: {}\n", "Hence \\boxed{{{}}}.", "  {} \n"):
        scores = reward(pool.column("prompt"), [form.format(a) for a in answers], rg_entry=entries)
        assert scores == [1.0] * len(pool), form
    for wrong in ("", "no idea", "-987654321", "((", "None", "0x"):
        assert reward(pool.column("prompt"), [wrong] * len(pool), rg_entry=entries) == [0.0] * len(pool), (
            wrong
        )


def test_reasoning_gym_gives_no_partial_credit():
    pytest.importorskip("reasoning_gym")
    pool = load_prompts("reasoning-gym:chain_sum@0", DataConfig(size=4))
    near = [f"{answer} or so" for answer in pool.column("answer")]
    assert (
        get_reward("reasoning-gym")(pool.column("prompt"), near, rg_entry=pool.column("rg_entry"))
        == [0.0] * 4
    )


def test_reasoning_gym_without_entries_is_one_sentence():
    assert "'rg_entry'" in message_of(one, "reasoning-gym", "1", "1")
    with pytest.raises(SaerlError, match="'nonsense'"):
        one("reasoning-gym", "1", "1", rg_entry="nonsense")
    pytest.importorskip("reasoning_gym")
    entry = json.dumps({"answer": "1", "metadata": {"source_dataset": "gone"}})
    with pytest.raises(SaerlError, match="unknown reasoning-gym generator 'gone'"):
        one("reasoning-gym", "1", "1", rg_entry=entry)


# --- a user's own function -------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_function_from_the_working_folder(folder):
    (folder / "saerl_user_rewards.py").write_text(
        "def length(prompts, completions, level, **columns):\n"
        "    return [len(c) * n for c, n in zip(completions, level)]\n"
    )
    for spec in ("saerl_user_rewards:length", f"{folder}/saerl_user_rewards.py:length"):
        reward = get_reward(spec)
        scores = score_rewards(reward, ["p", "q"], ["ab", "c"], {"level": [2, 3], "prompt": ["p", "q"]})
        assert scores.dtype == np.float64 and scores.tolist() == [4.0, 3.0]
    sys.modules.pop("saerl_user_rewards")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("exat", ["'exat'", "did you mean exact?"]),
        ("zzzz", ["'zzzz'", "numeric", "module:function"]),
        ("saerl_no_module:f", ["saerl_no_module", "ModuleNotFoundError"]),
        ("nofile.py:f", ["nofile.py does not exist"]),
        ("broken_reward.py:f", ["broken_reward.py", "ZeroDivisionError"]),
        ("fine_reward.py:missing", ["'missing'", "it has score"]),
        ("fine_reward.py:value", ["'value'"]),
    ],
)
def test_unknown_rewards_are_one_sentence(folder, spec, words):
    (folder / "broken_reward.py").write_text("1 / 0\n")
    (folder / "fine_reward.py").write_text("value = 3\ndef score(**k):\n    return []\n")
    message = message_of(get_reward, spec)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], ["1 values for 2 completions"]),
        ([1.0, float("nan")], ["nan for completion 1"]),
        ([float("inf"), 0], ["inf for completion 0"]),
        ([0.5, None], ["None for completion 1"]),
        (["1", 0], ["'1' for completion 0"]),
        ([[1, 2], [3]], ["[1, 2] for completion 0"]),
        (3.0, ["float", "list of numbers"]),
        (None, ["NoneType"]),
    ],
    ids=str,
)
def test_bad_returns_name_the_function(returned, words):
    def my_reward(prompts, completions):
        return returned

    message = message_of(score_rewards, my_reward, ["p", "p"], ["a", "b"], {})
    assert "my_reward" in message and all(word in message for word in words), message


def test_an_exception_names_function_kind_and_first_line():
    def my_reward(prompts, completions, **columns):
        return [{}["key"] for _ in completions]

    def narrow(completions):
        return [0.0 for _ in completions]

    def long(**columns):
        raise RuntimeError("first\nsecond")

    assert "my_reward raised KeyError: 'key'" in message_of(score_rewards, my_reward, ["p"], ["a"], {})
    assert "narrow raised TypeError" in message_of(score_rewards, narrow, ["p"], ["a"], {})
    assert message_of(score_rewards, long, ["p"], ["a"], {}).endswith("RuntimeError: first; mend it")


@pytest.mark.parametrize(
    "returned",
    [[True, False], np.array([1, 0]), torch.tensor([1.0, 0.0]), [torch.tensor(1.0), np.float32(0)], (1, 0)],
    ids=["bool", "numpy", "torch", "scalars", "tuple"],
)
def test_usual_kinds_of_numbers_pass(returned):
    scores = score_rewards(lambda prompts, completions: returned, ["p", "p"], ["a", "b"], {})
    assert scores.tolist() == [1.0, 0.0] and math.isclose(scores.mean(), 0.5)


def test_rows_must_match_the_completions():
    assert "'answer'" in message_of(score_rewards, get_reward("exact"), ["p"], ["a"], {"answer": ["1", "2"]})
    assert "prompts" in message_of(score_rewards, get_reward("exact"), ["p", "q"], ["a"], {"answer": ["1"]})
    assert "'answer'" in message_of(score_rewards, get_reward("exact"), ["p"], ["a"], {"n": [1]})


@pytest.mark.parametrize("name", ["exact", "numeric", "maths"])
def test_empty_answers_throughout_are_refused(name):
    prompts, completions = ["p", "q"], ["", "1"]
    message = message_of(score_rewards, get_reward(name), prompts, completions, {"answer": ["", " "]})
    assert name in message and "data.answer_column" in message
    scores = score_rewards(get_reward(name), prompts, completions, {"answer": ["", "1"]})
    assert scores[1] == 1
    # rollouts of one prompt: a bad row among good ones must not end the run
    assert len(score_rewards(get_reward(name), ["p", "p"], completions, {"answer": ["", ""]})) == 2


def test_a_limit_changes_nothing_for_rewards_that_keep_to_it() -> None:
    quick = rewards.with_timeout(get_reward("exact"), 30)
    assert score_rewards(quick, ["?"], ["4"], {"answer": ["4"]}).tolist() == [1.0]
    assert rewards.with_timeout(get_reward("exact"), 0) is get_reward("exact")

    def broken(prompts, completions, **columns):
        raise ValueError("no such thing")

    said = message_of(score_rewards, rewards.with_timeout(broken, 30), ["?"], ["4"], {})
    assert said == "reward broken raised ValueError: no such thing; mend it"
