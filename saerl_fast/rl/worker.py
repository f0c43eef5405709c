"""Functions called in a child process, which is killed when a call takes too long.

The child is a clean interpreter, never a fork, since this process may have threads and a GPU. It leads a
process group of its own, so that a Ctrl-C in the terminal does not reach it, and a shell that waits for this
process's end, however sudden, kills the whole group, and on Linux also what has left it but still has the
mark in its environment: nothing that a call has started outlives the program, but for what hides from both.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import json
import os
import pickle
import re
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from saerl_fast.errors import SaerlError, first_line

PATIENCE = 600.0  # seconds for the child's imports
LOOK = 0.2  # seconds between looks at whether the child is there
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from saerl_fast.rl.worker import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)
_MARK = "SAERL_WORKER"
_GUARD = (  # its input ends with the process that holds the other end
    'read -r _; kill -s KILL -- "-$0"; '
    f'for found in $(grep -ls "{_MARK}=$1" /proc/[0-9]*/environ); do '
    'pid="${found#/proc/}"; kill -s KILL "${pid%/environ}"; done'
)
_FRAME = re.compile(r'File "(.*)", line (\d+)')


class Late(Exception):
    """A call took too long; ``frames``: the (file, line) of each call that it was in, the innermost first."""

    def __init__(self, frames: list[tuple[str, int]]) -> None:
        super().__init__(frames)
        self.frames = frames


class Died(Exception):
    """The child ended in the middle of a call; the message says how."""


class Worker:
    """A child process, started at once and again whenever it had to be killed.

    ``opening``: a call ("module:function" and its arguments) that prepares each new child, in the background
    until the first call needs it. ``environment``: variables that differ from this process's.
    """

    _ready: bool
    _link: Connection

    def __init__(
        self, opening: tuple[str, tuple[Any, ...]], environment: Mapping[str, str] | None = None
    ) -> None:
        self._opening, self._environment = opening, dict(environment or {})
        self._lock = threading.Lock()
        self._start()

    def call(self, function: str, *args: Any, seconds: float) -> Any:
        """What "module:function" returns for picklable ``args``.

        Raises the SaerlError that it raised, Late after ``seconds``, and Died when the child did; then a new
        child has been started. After a fork the new process has a child of its own.
        """
        with self._lock:
            if self._owner != os.getpid():
                self._start()
            if not self._ready:
                try:
                    self._receive(PATIENCE)
                except SaerlError:
                    self._restart()
                    raise
                self._ready = True
            try:
                self._link.send_bytes(pickle.dumps((function, args)))
            except OSError:
                raise self._death() from None
            except BaseException:  # half a message, perhaps
                self._restart()
                raise
            return self._receive(seconds)

    def kill(self) -> None:
        """End the child and all that it has started."""
        self._end()

    def _start(self) -> None:
        self._owner, self._ready = os.getpid(), False
        self._link, theirs = Pipe()
        self._trace, trace = os.pipe()
        told = (theirs.fileno(), trace)
        command = [sys.executable, "-u", "-c", _CHILD, json.dumps([*map(str, sys.path)]), *map(str, told)]
        apart: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True}
        try:
            mark = secrets.token_hex(16)
            environment = os.environ | self._environment | {_MARK: mark}
            self._process = subprocess.Popen(command, env=environment, pass_fds=told, **apart)
            apart |= {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            guard = subprocess.Popen(["/bin/sh", "-c", _GUARD, str(self._process.pid), mark], **apart)
        except OSError as err:
            raise SaerlError(f"cannot start a process for rewards: {err.strerror or err}") from None
        theirs.close()
        os.close(trace)
        held = self._process, guard, self._link, self._trace, self._owner
        self._end = weakref.finalize(self, _end, *held)
        self._link.send_bytes(pickle.dumps(self._opening))

    def _restart(self) -> None:
        self._end()
        self._start()

    def _receive(self, seconds: float) -> Any:
        try:
            end = time.monotonic() + seconds
            while not self._link.poll(max(0.0, min(LOOK, end - time.monotonic()))):
                if self._process.poll() is not None and not self._link.poll():
                    raise self._death()  # what it has started may hold its end of the link
                if time.monotonic() < end:
                    continue
                frames = self._frames()
                self._restart()
                raise Late(frames)
            ok, answer = pickle.loads(self._link.recv_bytes())
        except (Late, Died):
            raise
        except (EOFError, OSError):
            raise self._death() from None
        except BaseException:  # an interrupt, say: the child would answer the wrong question
            self._restart()
            raise
        if ok:
            return answer
        raise answer

    def _death(self) -> Died:
        process = self._process
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
        self._restart()
        code = process.returncode
        if code >= 0:
            return Died(f"ended its process with code {code}")
        name = signal.Signals(-code).name if -code in {*signal.Signals} else str(-code)
        return Died(f"crashed with {name}")

    def _frames(self) -> list[tuple[str, int]]:
        """Where the child is, written by faulthandler, which does not need Python to go on."""
        text = b""
        self._process.send_signal(signal.SIGUSR1)
        while select.select([self._trace], [], [], 0.05)[0] and (piece := os.read(self._trace, 1 << 16)):
            text += piece
        return [(file, int(line)) for file, line in _FRAME.findall(text.decode(errors="replace"))]


def _end(process: Any, guard: Any, link: Connection, trace: int, owner: int) -> None:
    link.close()
    os.close(trace)
    if owner != os.getpid():  # a fork's copy
        guard.stdin.close()
        return
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    guard.stdin.close()  # it kills what a dead child has left behind
    guard.wait()


def serve(link: int, trace: int) -> None:
    """The child: answer calls until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a KeyboardInterrupt is then a call's own
    faulthandler.register(signal.SIGUSR1, file=trace, all_threads=False)
    connection = Connection(link)
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            break
        try:
            answer = (True, _function(function)(*args))
        except SaerlError as err:
            answer = (False, err)
        try:
            connection.send_bytes(pickle.dumps(answer))
        except OSError:
            break
        except Exception as err:
            error = SaerlError(f"a reward's result cannot leave its process: {first_line(err)}")
            connection.send_bytes(pickle.dumps((False, error)))
    os._exit(0)  # whatever threads a call has left


@functools.cache
def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
