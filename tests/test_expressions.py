from __future__ import annotations

import os

import pytest

from saerl_fast.rl import expressions
from saerl_fast.rl.expressions import same_expression


def test_equal_and_hanging_expressions(monkeypatch, capfd):
    pytest.importorskip("math_verify")
    assert same_expression("x^2+2x+1", "(x+1)^2") and not same_expression("x^2", "x^3")
    worker = expressions._worker()
    pid = worker._process.pid
    monkeypatch.setattr(expressions, "MOST", 0.3)
    assert not same_expression("(a+b+c+d+e+f)^{31}", "x+1")  # killed long before it would be through
    assert worker._process.pid != pid and os.path.exists(f"/proc/{worker._process.pid}")
    monkeypatch.setattr(expressions, "MOST", 60.0)
    assert same_expression("2y+1", "1+2y")
    assert not capfd.readouterr().err
