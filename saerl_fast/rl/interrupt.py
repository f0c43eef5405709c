"""Signals that end a program, at once or after a step, and a time limit for calls into users' code."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)


ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_received: list[int] | None = None  # inside graceful_interrupt


class Stopped(KeyboardInterrupt):
    """A signal (``number``) ends the program, as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def _stop(number: int, frame: Any) -> None:
    raise Stopped(number)


@contextmanager
def handled(handle: Callable[[int, Any], None] = _stop) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP go to ``handle``, by default raise `Stopped`; ignored ones (nohup) stay so.

    Python drops what is raised inside a ``__del__`` or a callback of C code; such a `Stopped` is sent again.
    Only the main thread may handle signals; in another this does nothing.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in ENDING if main}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    dropped = sys.unraisablehook

    def again(lost: Any) -> None:
        if isinstance(lost.exc_value, Stopped):  # not here, where it would be dropped too
            threading.Timer(0.05, os.kill, (os.getpid(), lost.exc_value.number)).start()
        else:
            dropped(lost)

    try:
        if before:
            sys.unraisablehook = again
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        if before:  # else it is that of another block
            sys.unraisablehook = dropped
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def graceful_interrupt() -> Iterator[Callable[[], int]]:
    """Keeps the number of the first SIGINT, SIGTERM or SIGHUP, which what it yields tells (0: none so far).

    A second one raises `Stopped` where the program is. Inside another such block it tells that one's.
    """
    global _received
    if _received is not None or threading.current_thread() is not threading.main_thread():
        outer = _received if threading.current_thread() is threading.main_thread() else None
        yield lambda: outer[0] if outer else 0
        return
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received:
            raise Stopped(number)
        received.append(number)
        log.warning("interrupted: finishing this step and saving; once more stops at once")

    _received = received
    try:
        with handled(handle):
            yield lambda: received[0] if received else 0
    finally:
        _received = None


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
