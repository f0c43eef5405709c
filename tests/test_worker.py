from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from saerl_fast.errors import SaerlError
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


def hang(file: str) -> None:
    """Processes of its own, and then C code that lets no thread run and looks at no signals."""
    apart = [subprocess.Popen(["sleep", "100"], start_new_session=away).pid for away in (False, True)]
    Path(file).write_text(" ".join(map(str, apart)) + "\n")
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
    assert (__file__, hang.__code__.co_firstlineno + 4) in late.value.frames
    assert gone(first, *map(int, (tmp_path / "pid").read_text().split()))
    again = worker.call(f"{me}:word", seconds=60)
    assert again[0] == "hello" and again[1] != first
    with pytest.raises(Died, match="ended its process with code 3"):
        worker.call(f"{me}:leave", 3, seconds=60)
    with pytest.raises(Died, match="ended its process with code 4"):
        worker.call(f"{me}:leave_a_child", 4, seconds=60)
    with pytest.raises(Died, match="crashed with SIGSEGV"):
        worker.call(f"{me}:crash", seconds=60)
    last = worker.call(f"{me}:word", seconds=60)[1]
    child = os.fork()
    if child == 0:  # a fork does not speak to its parent's child
        os._exit(int(worker.call(f"{me}:word", seconds=60)[1] == last))
    assert os.waitpid(child, 0)[1] == 0
    assert worker.call(f"{me}:word", seconds=60) == ("hello", last)
    worker.kill()
    assert gone(last)


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
