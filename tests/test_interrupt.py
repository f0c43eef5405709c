import contextlib
import os
import signal
import threading
import time

import pytest

from saerl_fast.rl.interrupt import Stopped, TimeUp, call_within, handled

came_back: list[str] = []  # what waited to its own end instead of being ended


def sleepy() -> None:
    time.sleep(30)
    came_back.append("sleepy")


def busy() -> None:
    while True:
        pass


def deaf() -> None:
    """Catches what ends it, as careless scorers do."""
    for _ in range(3):
        with contextlib.suppress(Exception):
            time.sleep(30)
            came_back.append("deaf")


def blocked() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@pytest.mark.parametrize("call", [sleepy, busy, deaf, blocked])
def test_a_call_that_hangs_is_ended_and_leaves_nothing_behind(call) -> None:
    before, threads = signal.getsignal(signal.SIGVTALRM), threading.active_count()
    came_back.clear()
    with pytest.raises(TimeUp):
        call_within(0.1, call)
    assert not came_back
    assert signal.getsignal(signal.SIGVTALRM) is before and threading.active_count() == threads


def test_results_and_errors_pass_through() -> None:
    threads = threading.active_count()
    assert call_within(30, lambda: [1, 2]) == [1, 2]
    with pytest.raises(KeyError, match="missing"):
        call_within(30, lambda: {}["missing"])
    assert threading.active_count() == threads


def test_alarms_of_the_call_itself_work() -> None:
    """math-verify stops long computations by SIGALRM."""
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    try:

        def call() -> None:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            time.sleep(0.2)

        call_within(30, call)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert heard == [1]


def test_outside_the_main_thread() -> None:
    found = []

    def work() -> None:
        release = threading.Event()
        try:
            call_within(0.1, release.wait)
        except TimeUp:
            found.append("time is up")
        release.set()
        found.append(call_within(30, lambda: 5))
        try:
            call_within(30, lambda: 1 / 0)
        except ZeroDivisionError:
            found.append("divided")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["time is up", 5, "divided"]


def test_a_signal_inside_a_destructor_is_not_lost() -> None:
    class Closing:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                pass  # the handler runs in here, where Python drops what it raises

    gone = []
    with pytest.raises(Stopped, match="SIGTERM"), handled():
        closing = Closing()
        del closing
        gone.append(True)
        time.sleep(30)
    assert gone
