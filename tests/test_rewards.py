from __future__ import annotations

import sys

import numpy as np
import pytest

from saerl_fast.errors import SaerlError
from saerl_fast.rl.rewards import equal, get_reward, score_rewards


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
        ("caf\u00e9", "cafe\u0301", 1),
        ("cafe", "caf\u00e9", 0),
        ("", "1", 0),
    ],
)
def test_exact(completion, answer, value):
    assert one("exact", completion, answer) == value
    assert one("exact", [{"role": "assistant", "content": completion}], answer) == value


def test_numeric():
    assert one("numeric", "so 1,000 it is", "1000") == 1
    assert one("numeric", "0.75", "3/4") == 1
    assert one("numeric", "0.333", "1/3") == 0
    assert one("numeric", "no idea", "4") == 0
    assert one("numeric", "0", "0") == 1 and one("numeric", "0.0000001", "0") == 0
    assert one("numeric", "it is 18", "3 * 6 = <<3*6=18>>18\n#### 18") == 1
    assert one("numeric", "3 * 6 = 17", "3 * 6 = <<3*6=18>>18\n#### 18") == 0
    assert one("numeric", "10000001", "10000000") == 0  # whole numbers exactly


@pytest.mark.parametrize(
    ("answer", "completion"),
    [("12:30", "11:30"), ("2:3", "1:3"), ("(1,2)", "(0,2)"), ("1,2", "9,2"), ("2024-01-02", "2023-05-02")],
)
def test_numeric_pays_nothing_for_an_answer_of_several_numbers(answer, completion):
    assert one("numeric", completion, answer) == one("numeric", answer, answer) == 0


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
        monkeypatch.setattr(equal, "math_verify", lambda: False)
    assert one("maths", completion, answer) == value


def test_several_rewards_are_added_up_with_their_weights():
    def names(spec, weights=None):
        return score_rewards(
            get_reward(spec, weights), ["?", "?"], ["7", "8"], {"answer": ["7", "9"]}
        ).tolist()

    assert names("exact,numeric") == [2.0, 0.0] == names(["exact", "numeric"])
    assert names(["exact", "numeric"], [0.5, 2.0]) == [2.5, 0.0] and names("exact", [3.0]) == [3.0, 0.0]
    together = get_reward(["exact", "numeric"])
    assert together(["?"], ["7"], answer=["7"]) == [2.0] and together.__name__ == "exact+numeric"
    for bad, words in (
        (("exact", [1, 2]), "2 numbers for 1"),
        (("", None), "no reward"),
        (([], None), "no reward"),
    ):
        with pytest.raises(SaerlError, match=words):
            get_reward(*bad)


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


@pytest.mark.parametrize("name", ["exact", "numeric", "maths"])
def test_empty_answers_throughout_are_refused(name):
    prompts, completions = ["p", "q"], ["", "1"]
    message = message_of(score_rewards, get_reward(name), prompts, completions, {"answer": ["", " "]})
    assert name in message and "data.answer_column" in message
    scores = score_rewards(get_reward(name), prompts, completions, {"answer": ["", "1"]})
    assert scores[1] == 1
    # rollouts of one prompt: a bad row among good ones must not end the run
    assert len(score_rewards(get_reward(name), ["p", "p"], completions, {"answer": ["", ""]})) == 2
