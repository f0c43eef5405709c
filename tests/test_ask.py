from __future__ import annotations

import asyncio
import itertools
import signal

import numpy as np
import pytest

from saerl_fast.errors import SaerlError
from saerl_fast.rl.rewards import score_rewards


def said(fn, texts=("a", "b", "c"), **columns) -> str:
    with pytest.raises(SaerlError) as caught:
        score_rewards(fn, ["p"] * len(texts), list(texts), columns)
    assert str(caught.value).isprintable() and "test_ask.py line" in str(caught.value)
    return str(caught.value)


class Evil:
    """A number whose every method fails."""

    def __float__(self):
        raise ZeroDivisionError

    def __repr__(self):
        raise ValueError


class Mute(Exception):
    def __str__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (itertools.count(), "returned more values for 3 completions"),
        (iter([1.0]), "returned 1 values for 3 completions"),
        ([1.0, 2.0, Evil()], "returned Evil for completion 2 ('c')"),
        (np.array([1.0, {}, None], dtype=object), "returned {} for completion 1 ('b')"),
        ([0, "\x1b[31m", 0], "for completion 1 ('b')"),
        ([0, np.complex64(1 + 2j), 0], "for completion 1 ('b'); return a number"),
        ([3e38, 0, 0], "returned 3e+38 for completion 0 ('a'); return finite numbers of at most 1e+12"),
        ([0, 0, 2e12], "returned 2000000000000.0 for completion 2 ('c')"),
        ([0, -1e308, 0], "returned -1e+308 for completion 1 ('b')"),
    ],
)
def test_answers_that_are_no_rewards(returned, words):
    message = said(lambda completions, **columns: returned)
    assert words.split(";")[0] in message and words.split(";")[-1] in message


def raising(error):
    def mine(completions, **columns):
        if "b" in completions:
            raise error
        return [0.0] * len(completions)

    return mine


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (asyncio.CancelledError(), "raised CancelledError"),
        (GeneratorExit(), "raised GeneratorExit"),
        (Mute(), "raised Mute"),
        (ValueError("\x1b[31mred\nsecond line"), "raised ValueError:  [31mred"),
        (SystemExit("\x1b[2J"), "called exit("),
        (SaerlError, None),
    ],
)
def test_the_completion_that_raises_is_named(error, words):
    if words is None:  # ours are sentences already
        with pytest.raises(SaerlError, match="^as it is$"):
            score_rewards(raising(SaerlError("as it is")), ["p"], ["b"], {})
        return
    message = said(raising(error))
    assert f"reward mine {words}" in message and "for completion 1 ('b') (" in message


def test_where_no_row_alone_raises_none_is_named():
    def mine(completions, **columns):
        return [1 / (3 - len(completions))] * len(completions)

    assert "completion" not in said(mine)


def test_a_key_that_was_pressed_is_no_error_of_the_reward():
    before = signal.getsignal(signal.SIGINT)

    def pressed(*_):
        raise KeyboardInterrupt

    def press(completions, **columns):
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, pressed)
    try:
        with pytest.raises(KeyboardInterrupt):
            score_rewards(press, ["p"], ["a"], {})
        assert "raised KeyboardInterrupt" in said(raising(KeyboardInterrupt()))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_pool_cannot_be_changed_through_what_is_given():
    chats = [[{"role": "user", "content": "hi"}]]
    rows = {"tags": [["x"]], "answer": ["7"]}

    def rude(prompts, completions, tags, **columns):
        prompts[0][0]["content"] = completions[0][0]["content"] = ""
        tags[0].append("y")
        columns["answer"].clear()
        return [0.0]

    score_rewards(rude, chats, [[{"role": "assistant", "content": "7"}]], rows)
    assert chats[0][0]["content"] == "hi" and rows == {"tags": [["x"]], "answer": ["7"]}
