"""Functions called in a child process, which is killed when a call takes too long.

The child is a clean interpreter, never a fork, since this process may have threads and a GPU. It divides in
two: a guard, which runs nothing of the call's, and below it the worker, in a session of its own, so that a
Ctrl-C in the terminal does not reach it. The guard ends the worker when this process has ended, however
suddenly, and then the worker's process group; on Linux it is a subreaper, to which all falls that the worker
or its descendants leave behind, whatever session and environment they have, and ends that as well. So nothing
that a call has started outlives the program, unless it kills the guard first.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import glob
import importlib
import math
import os
import pickle
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from saerl_fast.errors import SaerlError, first_line, named
from saerl_fast.rl.interrupt import ENDING

PATIENCE = 600.0  # seconds for the child's imports
LOOK = 0.2  # seconds between looks at whether the child is there
_CHILD = (  # no import before the path is set: that of "-c" begins with the working folder
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from saerl_fast.rl.worker import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"
)
_SPOILT = 70  # exit code of a worker that can say nothing any more
_UNFIT = "left its process unfit to answer"
_SWEEP = 10.0  # seconds, at most, to end what is left behind
_PDEATHSIG, _CHILD_SUBREAPER = 1, 36  # of prctl(2)
_FRAME = re.compile(r'File "(.*)", line (\d+)')


class Late(Exception):
    """A call took too long; ``frames``: the (file, line) of each call that it was in, the innermost first."""

    def __init__(self, frames: list[tuple[str, int]]) -> None:
        super().__init__(frames)
        self.frames = frames


class Died(Exception):
    """The child ended, or had to be, in the middle of a call; the message says how."""


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
                self._limit(seconds)
                self._link.send_bytes(pickle.dumps((function, args)))
            except BlockingIOError:
                raise self._late() from None
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
        command = [sys.executable, "-u", "-c", _CHILD, *map(str, (*told, *sys.path))]
        try:
            self._process = subprocess.Popen(
                command,
                env=os.environ | self._environment,
                pass_fds=told,
                stdin=subprocess.PIPE,  # the guard's: it ends with this process
                start_new_session=True,
            )
        except OSError as err:
            raise SaerlError(f"cannot start a process for rewards: {err.strerror or err}") from None
        theirs.close()
        os.close(trace)
        held = self._process, self._link, self._trace, self._owner
        self._end = weakref.finalize(self, _end, *held)
        self._link.send_bytes(pickle.dumps(self._opening))

    def _restart(self) -> None:
        self._end()
        self._start()

    def _limit(self, seconds: float) -> None:
        """How long the link may stand still in the middle of a message; then it is BlockingIOError."""
        with socket.fromfd(self._link.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.setblocking(True)  # whatever socket.setdefaulttimeout says
            for way in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                link.setsockopt(socket.SOL_SOCKET, way, struct.pack("ll", math.ceil(seconds), 0))

    def _receive(self, seconds: float) -> Any:
        try:
            end = time.monotonic() + seconds
            while not self._link.poll(max(0.0, min(LOOK, end - time.monotonic()))):
                if self._process.poll() is not None and not self._link.poll():
                    raise self._death()  # what it has started may hold its end of the link
                if time.monotonic() >= end and not self._link.poll():  # this process may have been stopped
                    raise self._late()
            data = self._link.recv_bytes()
        except (Late, Died):
            raise
        except BlockingIOError:
            raise self._late() from None
        except (EOFError, OSError):
            raise self._death() from None
        except BaseException:  # an interrupt, say: the child would answer the wrong question
            self._restart()
            raise
        try:
            ok, answer = pickle.loads(data)
        except Exception as err:  # its file descriptors were written to, say
            ok, answer = False, Died(f"{_UNFIT} ({named(err)})")
        if ok:
            return answer
        if isinstance(answer, Died):
            self._restart()
        raise answer

    def _late(self) -> Late:
        frames = self._frames()
        self._restart()
        return Late(frames)

    def _death(self) -> Died:
        process, code = self._process, _SPOILT  # where it lives, and has closed the link
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(_SWEEP)
        self._restart()
        if code == _SPOILT:
            return Died(f"{_UNFIT} (were its files closed, or its modules changed?)")
        if code >= 0:
            return Died(f"ended its process with code {code}")
        name = signal.Signals(-code).name if -code in {*signal.Signals} else str(-code)
        return Died(f"crashed with {name}")

    def _frames(self) -> list[tuple[str, int]]:
        """Where the child is, written by faulthandler, which does not need Python to go on."""
        text = b""
        self._process.send_signal(signal.SIGUSR1)  # the guard passes it on
        while select.select([self._trace], [], [], 0.2)[0] and (piece := os.read(self._trace, 1 << 16)):
            text += piece
        return [(file, int(line)) for file, line in _FRAME.findall(text.decode(errors="replace"))]


def _end(process: Any, link: Connection, trace: int, owner: int) -> None:
    link.close()
    os.close(trace)
    process.stdin.close()  # upon which the guard ends all; not for a fork's copy
    if owner == os.getpid():
        process.send_signal(signal.SIGCONT)  # a call may have stopped it
        process.wait()


def serve(link: int, trace: int) -> None:
    """The child: a guard, and the worker, which answers calls until the other side is gone."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: None
    prctl(_CHILD_SUBREAPER, 1, 0, 0, 0)
    prctl(_PDEATHSIG, signal.SIGCONT, 0, 0, 0)  # should a call have stopped it
    for number in ENDING:  # a KeyboardInterrupt is then a call's own
        signal.signal(number, signal.SIG_IGN)
    if worker := os.fork():
        os.close(link)
        os.close(trace)
        _guard(worker)
    prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    # Those who end a job may signal all its processes; the program itself decides what becomes of its step.
    own = os.getpid()

    def outlive(number: int, _: Any) -> None:
        if os.getpid() != own:  # a fork, which a call may want to end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    ending = {*ENDING} - {signal.SIGINT}
    for number in ending:  # what it starts does not inherit a handler, as it does SIG_IGN
        signal.signal(number, outlive)
    block, unblock = (
        functools.partial(signal.pthread_sigmask, how, ending)
        for how in (signal.SIG_BLOCK, signal.SIG_UNBLOCK)
    )  # Python drops what a fork gets before it is ready
    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=unblock)
    faulthandler.register(signal.SIGUSR1, file=trace, all_threads=False)
    connection = Connection(link)
    receive, send = connection.recv_bytes, connection.send_bytes
    loads, dumps = pickle.loads, pickle.dumps  # a call may put others in their place
    try:
        while True:
            try:
                function, args = loads(receive())
            except EOFError:
                break
            try:
                answer = (True, _function(function)(*args))
            except SaerlError as err:
                answer = (False, err)
            except BaseException as err:
                answer = (False, Died(f"{_UNFIT} ({named(err)})"))
            try:
                data = dumps(answer)
            except Exception as err:
                error = SaerlError(f"a reward's result cannot leave its process: {first_line(err)}")
                data = dumps((False, error))
            send(data)
    except BaseException:
        os._exit(_SPOILT)
    os._exit(0)  # whatever threads a call has left


def _guard(worker: int) -> NoReturn:
    """Wait for the end of the worker, and bring it about when standard input ends; then end what is left
    behind, and this process in the same way."""

    def pass_on(number: int, _: Any) -> None:
        with suppress(ProcessLookupError):
            os.kill(worker, number)

    def wait_for_the_program() -> None:
        os.read(0, 1)
        pass_on(signal.SIGKILL, None)

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the worker's own is the one to be read
    signal.signal(signal.SIGUSR1, pass_on)
    threading.Thread(target=wait_for_the_program, daemon=True).start()
    while (ended := os.wait())[0] != worker:  # else it is of what the worker has left behind
        pass
    with suppress(OSError):
        os.killpg(worker, signal.SIGKILL)
    end = time.monotonic() + _SWEEP
    with suppress(ChildProcessError):  # none is left
        while time.monotonic() < end:
            for child in _children():
                with suppress(OSError):
                    os.kill(child, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.01)  # the children of those that ended fall to this process
    code = os.waitstatus_to_exitcode(ended[1])
    if code < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _children() -> Iterator[int]:
    """The processes whose parent is this one."""
    for stat in glob.glob("/proc/[0-9]*/stat"):
        with suppress(OSError):
            if int(Path(stat).read_text().rpartition(")")[2].split()[1]) == os.getpid():
                yield int(stat.split("/")[2])


@functools.cache
def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
