from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.rl.rewards import Notes, State, get_reward, score_rewards, with_timeout
from saerl_fast.rl.rewards.apart import Limited

SOURCE = """import os, random, re
import numpy as np, torch
def score(completions, level, trainer_state, log_extra, log_metric, completion_ids, **columns):
    log_extra("size", [len(row) for row in completion_ids])
    log_metric("step", trainer_state.global_step)
    drawn = random.random() + np.random.rand() + float(torch.rand(()))
    if "stop" in completions:
        raise KeyboardInterrupt
    return [drawn + n if judge(text) else None for text, n in zip(completions, level)]
def judge(text):
    if text == "exit":
        os._exit(3)
    return not re.match(r"(a+)+$", text)
"""


def test_a_reward_in_its_own_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("saerl_fast.rl.rewards.call.SEARCH", 300.0)  # a child starts slowly on a busy machine
    (tmp_path / "apart_mine.py").write_text(SOURCE)
    here = get_reward("apart_mine.py:score")
    there, site = with_timeout(here, 3), tmp_path / "apart_mine.py"

    def run(fn, texts, **more):
        columns = {"level": [*range(len(texts))]}
        return score_rewards(fn, ["?"] * len(texts), texts, columns, **more)

    def said(texts):
        with pytest.raises(SaerlError) as caught:
            run(there, texts)
        return str(caught.value)

    found = []
    for fn in (here, there):  # what is drawn at random is the same, and so are the generators afterwards
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        notes = Notes()
        more = {"ids": [[1], [2, 3], [4]], "state": State(global_step=7), "notes": notes}
        scores = [run(fn, ["b", "a", "c"], **more).tolist() for _ in range(2)]
        rest = random.random(), np.random.rand(), float(torch.rand(()))
        found.append((repr(scores), rest, notes))
    assert found[0] == found[1] and found[1][2].extra == {"size": [1, 2, 1] * 2}
    assert found[1][2].metrics == {"step": [7.0, 7.0]} and np.isnan(run(there, ["b", "a"]))[1]

    regex = "a" * 40 + "b"  # holds the interpreter's lock for centuries
    late = f"reward score took more than train.reward_timeout=3 s for completion 1 ('{regex[:37]}...')"
    assert said(["b", regex, "c"]) == f"{late} ({site} line 13); mend it or raise the limit"
    assert run(there, ["b"]).shape == (1,)
    crashed = f"reward score ended its process with code 3 for completion 0 ('exit') ({site} line 3); mend it"
    assert said(["exit"]) == crashed
    raised = f"reward score raised KeyboardInterrupt for completion 1 ('stop') ({site} line 8); mend it"
    assert said(["b", "stop"]) == raised


def test_a_function_object_is_called_here(caplog):
    calls = []

    def mine(completions, **columns):
        calls.append(len(completions))
        import re

        return [float(bool(re.match(r"(a+)+$", text))) for text in completions]

    limited = with_timeout(mine, 0.3)
    assert isinstance(limited, Limited) and "mine is given as an object" in caplog.text
    assert score_rewards(limited, ["?"] * 2, ["a", "b"], {}).tolist() == [1.0, 0.0] and calls == [2]
    with pytest.raises(SaerlError, match="for completion 1 .*test_apart.py line"):
        score_rewards(limited, ["?"] * 2, ["a", "a" * 40 + "b"], {})


def test_a_wrapper_of_a_named_reward_is_not_taken_for_it():
    from functools import wraps

    @wraps(get_reward("exact"))
    def other(*args, **columns):
        return [0.5]

    assert score_rewards(with_timeout(other, 30), ["?"], ["7"], {"answer": ["7"]}).tolist() == [0.5]
