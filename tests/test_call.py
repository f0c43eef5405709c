from __future__ import annotations

import asyncio
import functools
import json
import math
import threading

import numpy as np
import pandas
import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.rl.rewards import Notes, State, get_reward, score_rewards, with_timeout


def message_of(call, *args) -> str:
    with pytest.raises(SaerlError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], ["1 values for 2 completions"]),
        ([1.0, float("nan")], ["nan for completion 1"]),
        ([float("inf"), 0], ["inf for completion 0"]),
        ([0.5, 10**400], ["10000", "completion 1"]),
        ([0.5, 10**5000], ["an int of", "completion 1"]),
        ([1e40, 0], ["1e+40 for completion 0", "'a'"]),
        ({"a": 1.0, "b": 0.0}, ["a dict"]),
        ({1.0, 0.0}, ["a set"]),
        ("10", ["a str"]),
        (torch.tensor(1.0), ["a Tensor"]),
        (torch.zeros(2, 3), ["completion 0", "number"]),
        ([1j, 0], ["1j for completion 0"]),
        (["1", 0], ["'1' for completion 0"]),
        ([[1, 2], [3]], ["[1, 2] for completion 0"]),
        (3.0, ["float", "list of numbers"]),
        (None, ["NoneType"]),
        (pandas.DataFrame({"a": [1.0, 0.0]}), ["a DataFrame", "list of numbers"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_bad_returns_name_the_function(returned, words):
    def my_reward(prompts, completions):
        return returned

    message = message_of(score_rewards, my_reward, ["p", "p"], ["a", "b"], {})
    assert "my_reward" in message and all(word in message for word in words), message


def test_an_exception_names_function_kind_and_first_line():
    def my_reward(prompts, completions, **columns):
        return [{}["key"] for _ in completions]

    def long(**columns):
        raise RuntimeError("first\nsecond")

    assert "my_reward raised KeyError: 'key'" in message_of(score_rewards, my_reward, ["p"], ["a"], {})
    said = message_of(score_rewards, long, ["p"], ["a"], {})
    assert "RuntimeError: first for completion 0 ('a') (" in said and said.endswith("; mend it")


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


def test_a_limit_changes_nothing_for_rewards_that_keep_to_it() -> None:
    quick = with_timeout(get_reward("exact"), 30)
    assert score_rewards(quick, ["?"], ["4"], {"answer": ["4"]}).tolist() == [1.0]
    assert with_timeout(get_reward("exact"), 0) is get_reward("exact")

    def broken(prompts, completions, **columns):
        raise ValueError("no such thing")

    said = message_of(score_rewards, with_timeout(broken, 30), ["?"], ["4"], {})
    assert (
        said.startswith("reward broken raised ValueError: no such thing for") and "test_call.py line" in said
    )


# --- what TRL's trainer offers -----------------------------------------------------------------------


def test_a_function_gets_what_it_names_and_everything_with_keywords():
    seen = {}

    def narrow(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    def wide(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
        seen.update(ids=completion_ids, step=trainer_state.global_step, columns=columns)
        log_extra("length", [len(c) for c in completions])
        log_metric("longest", max(map(len, completions)))
        return [1.0] * len(completions)

    columns = {"answer": ["a", "b"], "level": [1, 2], "prompt": ["p", "q"]}
    assert score_rewards(narrow, ["p", "q"], ["a", "x"], columns).tolist() == [1.0, 0.0]
    notes = Notes()
    more = {"ids": [[5], [6, 7]], "state": State(global_step=3, max_steps=9), "notes": notes}
    score_rewards(wide, ["p", "q"], ["a", "xyz"], columns, **more)
    assert seen == {"ids": [[5], [6, 7]], "step": 3, "columns": {"answer": ["a", "b"], "level": [1, 2]}}
    assert notes.extra == {"length": [1, 3]} and notes.means() == {"reward_metrics": {"longest": 3.0}}
    with pytest.raises(SaerlError, match="'trainer_state'.*rename it"):
        score_rewards(wide, ["p"], ["a"], {"trainer_state": [1]})


def test_async_functions_and_callable_objects():
    async def slow(prompts, completions, **columns):
        await asyncio.sleep(0)
        return [float(len(c)) for c in completions]

    class Scorer:
        async def __call__(self, completions, **columns):
            return [2.0] * len(completions)

    for fn, wanted in ((slow, [1.0, 2.0]), (Scorer(), [2.0, 2.0]), (with_timeout(slow, 30), [1.0, 2.0])):
        assert score_rewards(fn, ["p", "q"], ["a", "bb"], {}).tolist() == wanted

    async def notebook():
        return score_rewards(slow, ["p"], ["abc"], {}).tolist()

    assert asyncio.run(notebook()) == [3.0]

    async def broken(completions, **columns):
        raise KeyError("gone")

    assert "broken raised KeyError" in message_of(score_rewards, broken, ["p"], ["a"], {})


def test_functions_of_every_shape():
    def by_place(prompts, completions, /):
        return [1.0] * len(completions)

    def mixed(completions, /, answer, **columns):
        return [float(a == c) for a, c in zip(answer, completions, strict=True)]

    def bare(*args):
        return [float(len(c)) for c in args[1]]

    class Scorer:
        def __call__(self, completions, **columns):
            return (1.0 for _ in completions)

        def score(self, completions):
            return torch.ones(len(completions), dtype=torch.bfloat16)

    partial = functools.partial(lambda scale, completions, **columns: [scale] * len(completions), 1.0)
    for fn in (by_place, mixed, bare, Scorer(), Scorer().score, partial):
        assert score_rewards(fn, ["p", "q"], ["a", "b"], {"answer": ["a", "b"]}).tolist() == [1.0, 1.0]

    def alone(completion):
        return 1.0

    said = message_of(score_rewards, alone, ["p"], ["a"], {"answer": ["a"]})
    assert "alone asks for 'completion'" in said and "there are prompts, completions, answer" in said
    assert said.endswith("completion_ids, each a list with one entry for each completion")
    said = message_of(score_rewards, Scorer, ["p"], ["a"], {})
    assert said.startswith("reward Scorer is a class; name an instance of it (scorer = Scorer() and ")


@pytest.mark.parametrize(
    ("logged", "words"),
    [
        (("lock", lambda n: [threading.Lock()] * n), "logged a lock as 'lock' for completion 0 ('a')"),
        (("few", lambda n: [1]), "logged 1 values as 'few' for 2 completions"),
        (("word", lambda n: "hello"), "gave log_extra('word', ...) a str"),
        (("one", lambda n: 5), "gave log_extra('one', ...) a int"),
    ],
    ids=lambda value: value[0],
)
def test_what_is_logged_fits_the_record(logged, words):
    def mine(completions, log_extra, **columns):
        log_extra(logged[0], logged[1](len(completions)))
        return [0.0] * len(completions)

    said = message_of(score_rewards, mine, ["p", "q"], ["a", "b"], {})
    assert said.startswith(f"reward mine {words}") and "test_call.py line" in said


def test_tensors_are_logged_as_numbers():
    def mine(completions, log_extra, log_metric):
        log_extra("x", torch.ones(len(completions), 2))
        log_metric("y", torch.tensor(0.5))
        return [0.0] * len(completions)

    def wrong(completions, log_metric):
        log_metric("y", "high")

    notes = Notes()
    score_rewards(mine, ["p"], ["a"], {}, notes=notes)
    assert notes.extra == {"x": [[1.0, 1.0]]} and notes.metrics == {"y": [0.5]}
    assert "log_metric('y', ...) 'high'" in message_of(score_rewards, wrong, ["p"], ["a"], {})


def test_none_is_not_a_row_for_this_function():
    def first(completions, **columns):
        return [1.0, None, None]

    def second(completions, **columns):
        return [2.0, 4.0, None]

    from saerl_fast.rl.rewards.call import Together

    rows = (["p"] * 3, ["a", "b", "c"], {})
    assert np.isnan(score_rewards(first, *rows)).tolist() == [False, True, True]
    notes = Notes()
    both = score_rewards(Together([first, second], [1.0, 0.5]), *rows, notes=notes)
    assert both[:2].tolist() == [2.0, 2.0] and math.isnan(both[2])
    assert notes.means() == {"reward_parts": {"first": 1.0, "second": 3.0}}
    assert Together([first, second], [1.0, 0.5])(*rows[:2]) == [2.0, 2.0, None]


@pytest.mark.parametrize("code", [None, 0, 3, "bye"])
def test_a_function_that_exits_ends_with_a_sentence(code):
    def leave(completions, **columns):
        raise SystemExit(code)

    said = message_of(score_rewards, leave, ["p"], ["a"], {})
    assert "reward leave called exit(" in said and "test_call.py line" in said


def test_errors_name_file_and_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import json\n"
        "def helper(text):\n"
        "    return json.loads(text)\n"
        "def score(prompts, completions, **columns):\n"
        "    return [helper(c) for c in completions]\n"
        "def few(completions, missing):\n"
        "    return [0.0]\n"
        "def escape(completions, **columns):\n"
        "    raise ValueError('\\x1b[31mred')\n"
    )
    said = message_of(score_rewards, get_reward("mine.py:score"), ["p"], ["{"], {})
    assert "reward score raised JSONDecodeError" in said and "mine.py line 3)" in said
    assert "mine.py line 6)" in message_of(score_rewards, get_reward("mine.py:few"), ["p"], ["a"], {})
    assert "\x1b" not in message_of(score_rewards, get_reward("mine.py:escape"), ["p"], ["a"], {})


def test_what_a_function_sets_for_torch_stays_its_own():
    def rude(completions, **columns):
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        return [0.0 for _ in completions]

    score_rewards(rude, ["p"], ["a"], {})
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


def test_only_built_in_rewards_leave_cut_off_text_unpaid():
    def mine(completions, **columns):
        return [1.0] * len(completions)

    rows = (["p", "p"], ["7", "7"], {"answer": ["7", "7"]})
    for name in ("exact", "numeric", "maths", "maths-boxed"):
        both = [["\\boxed{7}"] * 2 if name == "maths-boxed" else rows[1]]
        args = (rows[0], *both, rows[2])
        assert score_rewards(get_reward(name), *args, finished=[True, False]).tolist() == [1.0, 0.0]
        assert score_rewards(get_reward(name), *args).tolist() == [1.0, 1.0]
    assert score_rewards(with_timeout(get_reward("exact"), 9), *rows, finished=[True, False])[1] == 0
    assert score_rewards(mine, *rows, finished=[True, False]).tolist() == [1.0, 1.0]


def test_rewards_of_trl_run_as_they_are():
    rewards = pytest.importorskip("trl.rewards")
    texts = ["<think>\nhm\n</think>\nIt is \\boxed{7}.", "It is \\boxed{8}."]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    prompts = [[{"role": "user", "content": "3 + 4?"}]] * 2
    given = {"solution": ["$7$", "$7$"], "answer": ["7", "7"], "level": [1, 1]}

    def run(fn, **more):
        return score_rewards(fn, prompts, chats, given, **more).tolist()

    notes = Notes()
    assert run(rewards.accuracy_reward, notes=notes) == [1.0, 0.0] and notes.extra["solution"] == [
        "$7$",
        "$7$",
    ]
    assert run(get_reward("trl.rewards:think_format_reward")) == [1.0, 0.0]
    assert run(rewards.reasoning_accuracy_reward) == [1.0, 0.0]
    long = rewards.get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)
    assert run(long, ids=[[1], [1, 2, 3]]) == [0.0, -0.5]
    cosine = rewards.get_cosine_scaled_reward(max_len=4)
    assert run(cosine, ids=[[1], [1, 2]])[0] > 0.5
    unread = score_rewards(rewards.accuracy_reward, prompts[:1], chats[:1], {"solution": ["none at all"]})
    assert np.isnan(unread).all()
    both = get_reward("trl.rewards:accuracy_reward,trl.rewards:think_format_reward", [1.0, 0.5])
    assert run(both) == [1.5, 0.0]
    assert json.dumps(notes.extra)


def test_the_logging_functions_take_the_keywords_of_trl():
    def noted(completions, log_extra, log_metric, **columns):
        log_extra(column="size", values=[1, 2])
        log_metric(name="share", value=0.5)
        return [0.0] * len(completions)

    notes = Notes()
    score_rewards(noted, ["p", "p"], ["a", "b"], {}, notes=notes)
    assert notes.extra == {"size": [1, 2]} and notes.metrics == {"share": [0.5]}
