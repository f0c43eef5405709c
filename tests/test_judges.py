from __future__ import annotations

import json
import os

import pytest

from saerl_fast.errors import SaerlError
from saerl_fast.rl import judges
from saerl_fast.rl.judges import same_expression, solved


def test_equal_and_hanging_expressions(monkeypatch, capfd):
    pytest.importorskip("math_verify")
    assert same_expression("x^2+2x+1", "(x+1)^2") and not same_expression("x^2", "x^3")
    worker = judges._worker("math_verify")
    pid = worker._process.pid
    monkeypatch.setattr(judges, "MOST", 0.3)
    assert not same_expression("(a+b+c+d+e+f)^{31}", "x+1")  # killed long before it would be through
    assert worker._process.pid != pid and os.path.exists(f"/proc/{worker._process.pid}")
    monkeypatch.setattr(judges, "MOST", 60.0)
    assert same_expression("2y+1", "1+2y")
    assert not capfd.readouterr().err


def test_scorers_that_evaluate_what_they_are_given(monkeypatch, capfd):
    gym = pytest.importorskip("reasoning_gym")
    entry = gym.create_dataset("countdown", seed=0, size=1)[0]
    text = json.dumps(entry)
    assert solved(entry["metadata"]["expression"], text) and not solved("1 + 1", text)
    assert not solved("exit()", text)
    monkeypatch.setattr(judges, "MOST", 1.0)
    assert not solved("9**9**9**9", text)


def test_a_missing_package_is_named_each_time():
    for _ in range(2):
        with pytest.raises(SaerlError, match="the reward no-such needs its package; pip install no-such"):
            judges._asked("no_such", "mark", "", "")
