import io
import os
import signal
import sys

import pytest

from saerl_fast.stages.console import Echo, close_bars, within_calls
from tests.test_lock import fork, status
from tests.tiny_lm import tiny_model


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def no_bars_left():
    yield
    close_bars()


def terminal(monkeypatch):
    """stdout and stderr as one terminal, from here on."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def test_a_bar_shows_done_total_rate_and_time_left(monkeypatch):
    import tqdm.std

    screen = terminal(monkeypatch)
    monkeypatch.setattr(Echo, "bars", [])  # those of commands that were stopped in earlier tests

    now = [100.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    bar = Echo().bar("labels", "prompt")
    bar(0, 40)
    assert "labels:   0%" in screen.getvalue() and "0/40" in screen.getvalue()  # before the first one is done
    now[0] += 10
    bar(10, 40)
    assert "10/40 [00:10<00:30,  1.00prompt/s]" in screen.getvalue()
    now[0] += 5
    bar(12.4, 40)
    assert "12/40" in screen.getvalue()
    bar(40, 40)
    assert not Echo.bars


def test_a_line_stands_above_the_bar(monkeypatch):
    screen = terminal(monkeypatch)
    bar = Echo().bar("training", "step")
    bar(0, 3)
    Echo()("step 1")
    assert "\rstep 1\n" in screen.getvalue() and screen.getvalue().split("step 1\n")[1].strip("\r ")


def test_an_error_does_not_stand_in_the_bar(monkeypatch):
    screen = terminal(monkeypatch)
    Echo().bar("training")(0, 3)
    close_bars()
    assert screen.getvalue().endswith("\n") and not Echo.bars


def test_quiet_shows_results_alone(capsys):
    echo = Echo(quiet=True)
    echo.bar("training")(0, 3)
    close_bars()
    echo("a line")
    echo.result("a result")
    found = capsys.readouterr()
    assert (found.out, found.err) == ("a result\n", "")


def test_a_generation_tells_how_far_it_is():
    import torch

    model, told = tiny_model(), []
    with within_calls(model, 4, told.append):
        for _ in range(5):
            model(input_ids=torch.tensor([[3, 4]]))
    assert told == [0.25, 0.5, 0.75, 0.99, 0.99]
    model(input_ids=torch.tensor([[3, 4]]))
    assert len(told) == 5


def test_a_terminal_that_has_gone_ends_nothing():
    """As after SIGHUP: every write fails with EIO. A fork, for it gives its standard output away."""
    keeper, terminal = os.openpty()

    def speak() -> None:
        sys.stdout = os.fdopen(terminal, "w", buffering=1)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.close(keeper)
        Echo()("one")
        Echo()("two")
        sys.stdout.flush()

    child = fork(speak)
    os.close(terminal)
    os.close(keeper)
    assert status(child) == 0
