from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from saerl_fast.errors import SaerlError
from saerl_fast.rl.interrupt import ENDING
from saerl_fast.rl.worker import Died, Late, Worker

ROOT = Path(__file__).parents[1]


def alive(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(*pids: int) -> bool:
    """Wait for the end of processes."""
    for _ in range(200):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.05)
    return False


# --- called in the child ---


def opening(word: str) -> None:
    os.environ["WORD"] = word


def word() -> tuple[str, int]:
    return os.environ["WORD"], os.getpid()


def refuse() -> None:
    raise SaerlError("not like this")


def unpicklable() -> object:
    return lambda: 0


def leave(code: int) -> None:
    os._exit(code)


def leave_a_child(code: int) -> None:
    """It holds all that this process has open."""
    if not os.fork():
        time.sleep(60)
    os._exit(code)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave_behind(file: str) -> None:
    """Processes in this one's session, in another, and there without environment, below it and orphaned."""
    hidden: dict[str, Any] = {"start_new_session": True, "env": {}}
    apart = [subprocess.Popen(["/bin/sleep", "100"], start_new_session=away).pid for away in (False, True)]
    apart.append(subprocess.Popen(["/bin/sleep", "100"], **hidden).pid)
    command = ["/bin/sh", "-c", "/bin/sleep 100 >/dev/null 2>&1 & echo $!"]
    apart.append(int(subprocess.run(command, capture_output=True, timeout=60, **hidden).stdout))
    Path(file).write_text(" ".join(map(str, apart)) + "\n")


def spoil(what: str) -> None:
    if what.startswith("files"):
        os.closerange(0, 1000)
        time.sleep(60 if what.endswith("for long") else 0)
    elif what == "link":
        for file in range(3, 1000):
            with suppress(OSError):
                os.write(file, b"neither a length nor as much")
    elif what == "answer":
        own = type("Own", (SaerlError,), {"__module__": __name__})
        globals()["Own"] = own  # a class that is here only
        raise own("not like this")
    elif what == "pickle":
        pickle.dumps = pickle.loads = None  # type: ignore[assignment]
    else:
        raise ValueError("not expected")


def stop_the_guard() -> tuple[int, int]:
    os.kill(os.getppid(), signal.SIGSTOP)
    return os.getppid(), os.getpid()


def signalled() -> list[int]:
    """The signals that end a fork of this process, after this one and its guard got all."""
    for number in ENDING:
        os.kill(os.getppid(), number)
        os.kill(os.getpid(), number)
    ended = []
    for number in ENDING:
        if not (fork := os.fork()):
            time.sleep(60)
        os.kill(fork, number)
        time.sleep(0.1)
        os.kill(fork, signal.SIGKILL)
        ended.append(-os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]))
    return ended


def crash_behind(file: str) -> None:
    leave_behind(file)
    os.kill(os.getpid(), signal.SIGKILL)


def hang(file: str) -> None:
    """Processes of its own, and then C code that lets no thread run and looks at no signals."""
    leave_behind(file)
    9**9**9  # noqa: B018


def test_calls_and_their_ends(tmp_path) -> None:
    worker, me = Worker((f"{__name__}:opening", ("hello",))), __name__
    said, first = worker.call(f"{me}:word", seconds=60)
    assert said == "hello" and first != os.getpid()
    with pytest.raises(SaerlError, match="not like this"):
        worker.call(f"{me}:refuse", seconds=60)
    with pytest.raises(SaerlError, match="cannot leave its process"):
        worker.call(f"{me}:unpicklable", seconds=60)
    assert worker.call(f"{me}:word", seconds=60) == ("hello", first)

    with pytest.raises(Late) as late:
        worker.call(f"{me}:hang", str(tmp_path / "pid"), seconds=0.5)
    assert (__file__, hang.__code__.co_firstlineno + 3) in late.value.frames
    assert gone(first, *map(int, (tmp_path / "pid").read_text().split()))
    again = worker.call(f"{me}:word", seconds=60)
    assert again[0] == "hello" and again[1] != first
    with pytest.raises(Died, match="ended its process with code 3"):
        worker.call(f"{me}:leave", 3, seconds=60)
    with pytest.raises(Died, match="ended its process with code 4"):
        worker.call(f"{me}:leave_a_child", 4, seconds=60)
    with pytest.raises(Died, match="crashed with SIGSEGV"):
        worker.call(f"{me}:crash", seconds=60)
    with pytest.raises(Died, match="crashed with SIGKILL"):
        worker.call(f"{me}:crash_behind", str(tmp_path / "behind"), seconds=60)
    assert gone(*map(int, (tmp_path / "behind").read_text().split()))
    last = worker.call(f"{me}:word", seconds=60)[1]
    child = os.fork()
    if child == 0:  # a fork does not speak to its parent's child
        os._exit(int(worker.call(f"{me}:word", seconds=60)[1] == last))
    assert os.waitpid(child, 0)[1] == 0
    assert worker.call(f"{me}:word", seconds=60) == ("hello", last)
    worker.kill()
    assert gone(last)


def test_a_child_that_a_call_has_spoilt(capfd, monkeypatch) -> None:
    """It ends in a sentence, without a traceback, and another takes its place."""
    worker, me = Worker((f"{__name__}:opening", ("again",))), __name__
    with pytest.raises(Died, match=r"unfit to answer \(were its files closed"):
        worker.call(f"{me}:spoil", "files", seconds=60)
    assert worker.call(f"{me}:spoil", "pickle", seconds=60) is None  # what it had before is used
    first = worker.call(f"{me}:word", seconds=60)[1]
    with pytest.raises(Died, match=r"unfit to answer \(ValueError: not expected\)"):
        worker.call(f"{me}:spoil", "", seconds=60)
    assert worker.call(f"{me}:word", seconds=60)[0] == "again" and gone(first)
    with pytest.raises(Died, match=r"unfit to answer \(AttributeError"):
        worker.call(f"{me}:spoil", "answer", seconds=60)
    assert worker.call(f"{me}:word", seconds=60)[0] == "again"
    with pytest.raises(Late):  # an answer that begins and has no end
        worker.call(f"{me}:spoil", "link", seconds=1)
    assert worker.call(f"{me}:word", seconds=60)[0] == "again"
    monkeypatch.setattr("saerl_fast.rl.worker._SWEEP", 0.5)
    with pytest.raises(Died, match=r"unfit to answer \(were its files closed"):
        worker.call(f"{me}:spoil", "files for long", seconds=60)
    worker.kill()
    assert capfd.readouterr().err == ""


def test_a_stopped_child_and_signals_to_all_of_a_job(tmp_path, monkeypatch) -> None:
    """The program alone decides what SIGTERM means; and what a call stops is ended like the rest. Names of
    files in the working folder mean nothing."""
    for name in ("json", "re", "resource", "saerl_fast"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    worker, me = Worker((f"{__name__}:opening", ("on",))), __name__
    first = worker.call(f"{me}:word", seconds=60)[1]
    ended = worker.call(f"{me}:signalled", seconds=60)
    assert ended == [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP]  # SIGINT is ignored below, too
    assert worker.call(f"{me}:word", seconds=60)[1] == first
    guard = worker.call(f"{me}:stop_the_guard", seconds=60)
    worker.kill()
    assert gone(*guard)


def test_the_child_dies_with_its_parent(tmp_path) -> None:
    """Killed at once, in the middle of a call that lets no thread run: nothing stays."""
    code = (
        f"from saerl_fast.rl.worker import Worker; w = Worker(('{__name__}:opening', ('x',))); "
        f"print(w.call('{__name__}:word', seconds=60)[1], flush=True); "
        f"w.call('{__name__}:hang', {str(tmp_path / 'pid')!r}, seconds=60)"
    )
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels/torch-ext'}"}
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | path, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    while not (tmp_path / "pid").is_file() or "\n" not in (tmp_path / "pid").read_text():
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid, *map(int, (tmp_path / "pid").read_text().split()))
