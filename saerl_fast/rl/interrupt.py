"""The two-stage interrupt, and a time limit for calls into users' code."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)


@contextmanager
def graceful_interrupt() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a flag; a second one raises KeyboardInterrupt where the program is."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set  # only the main thread may handle signals
        return

    def handle(number: int, frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()
        log.warning("interrupted: finishing this step and saving; press again to stop at once")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


class TimeUp(BaseException):
    """Raised inside a call that took too long; no Exception, so that ``except Exception`` lets it through."""


def call_within(seconds: float, call: Callable[[], Any]) -> Any:
    """``call()``, or TimeUp after so many seconds.

    In the main thread a signal (SIGVTALRM) ends the call wherever it is: in Python code, waiting for a lock,
    a socket or ``time.sleep``, or in C code that looks at signals, as regular expressions do. It comes from
    a thread, and from the kernel's timer for C code that lets no thread run. SIGALRM is left alone, since
    rewards use it themselves (math-verify does). Other threads get no signals: there the call runs in a
    daemon thread, which is left behind.
    """
    done = threading.Event()
    main = threading.main_thread()
    if threading.current_thread() is not main or not hasattr(signal, "pthread_kill"):
        outcome: list[Any] = [None, None]

        def work() -> None:
            try:
                outcome[0] = call()
            except BaseException as err:  # carried over to the thread that waits
                outcome[1] = err
            done.set()

        threading.Thread(target=work, daemon=True).start()
        if not done.wait(seconds):
            raise TimeUp
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    end = time.monotonic() + seconds

    def watch() -> None:
        wait = seconds
        while not done.wait(wait):  # again and again, should the call swallow it
            signal.pthread_kill(main.ident or 0, signal.SIGVTALRM)
            wait = 1.0

    def handle(number: int, frame: Any) -> None:
        if time.monotonic() >= end and not done.is_set():
            raise TimeUp

    before = signal.signal(signal.SIGVTALRM, handle)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)  # of all threads' time: perhaps early, so again
    try:
        try:
            return call()
        finally:
            done.set()
    finally:  # even if the signal came between the two
        done.set()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        watcher.join()
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL if before is None else before)
