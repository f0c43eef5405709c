"""One writer a folder, whatever is killed, raced, left over or removed."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import process_mark, write_json
from saerl_fast.records import lock as module
from saerl_fast.records.lock import NAME, SILENT, Held, holder, lock, sweep, vacant


def fork(work: Callable[[], None]) -> int:
    """A child process that does ``work`` and ends with status 0, or 1 for Held, or 2 for another error."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except Held:
        os._exit(1)
    except BaseException:
        os._exit(2)


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_holder(folder: Path) -> None:
    """A process that held ``folder`` and was killed with SIGKILL; it is not reaped when this returns."""

    def hold() -> None:
        with lock(folder):
            os.kill(os.getpid(), signal.SIGKILL)

    assert status(fork(hold)) == -signal.SIGKILL
    assert (folder / NAME).is_file()


def foreign(folder: Path, silent: float, **about: object) -> None:
    """The lock of a process on another machine that has shown no sign of life for ``silent`` seconds."""
    folder.mkdir(exist_ok=True)
    text = {"command": "saerl train", "pid": 7, "host": "far", "since": "yesterday", "mark": "0" * 8 + "-7-7"}
    (folder / NAME).write_text(json.dumps(text | about))
    then = time.time() - silent
    os.utime(folder / NAME, (then, then))


def test_a_second_process_is_told_who_writes_and_since_when(tmp_path):
    with lock(tmp_path / "run"):
        assert status(fork(lambda: lock(tmp_path / "run").__enter__())) == 1
        words = holder(tmp_path / "run")
        assert f"process {os.getpid()} on {os.uname().nodename}, since {time.strftime('%Y-')}" in words
        with lock(tmp_path / "run"):  # this thread may write already
            pass
        assert holder(tmp_path / "run") == words
        assert vacant(tmp_path / "run")
    assert holder(tmp_path / "run") is None and not list(tmp_path.iterdir())


def test_another_thread_is_another_writer(tmp_path):
    said: list[str] = []

    def work() -> None:
        with pytest.raises(Held) as caught, lock(tmp_path):
            pass
        said.append(str(caught.value))

    with lock(tmp_path):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert said[0].startswith(f"{tmp_path} is written by ") and "wait for it" in said[0]


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    killed_holder(tmp_path)
    assert holder(tmp_path) is None
    with lock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert not list(tmp_path.iterdir())


def test_a_zombie_holds_nothing(tmp_path):
    def hold() -> None:
        lock(tmp_path).__enter__()
        os.kill(os.getpid(), signal.SIGKILL)

    child = fork(hold)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # dead, and not reaped
    with lock(tmp_path):
        pass
    assert status(child) == -signal.SIGKILL


def test_a_process_that_got_the_dead_ones_id_does_not_hold_its_lock(tmp_path):
    machine, pid, started = process_mark().split("-")
    foreign(tmp_path, 0, mark=f"{machine}-{pid}-{int(started) + 1}")
    with lock(tmp_path):
        pass
    foreign(tmp_path, 10 * SILENT, mark=process_mark())  # silent, but known to live
    with pytest.raises(Held), lock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "[]", "{}", "\x00\xff", "[" * 100_000, '{"mark": 3, "pid": []}'])
def test_a_lock_that_says_nothing_is_held_until_it_has_been_silent_for_long(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(Held, match=f"remove {tmp_path / NAME}"), lock(tmp_path):
        pass
    os.utime(tmp_path / NAME, (0, 0))
    with lock(tmp_path):
        pass


def test_what_is_no_file_in_the_place_of_a_lock_is_not_waited_for(tmp_path):
    (tmp_path / NAME).symlink_to("/dev/zero")  # reading it has no end
    assert module._text(tmp_path / NAME) == ""
    (tmp_path / NAME).unlink()
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(Held, match="unknown process"), lock(tmp_path):
        pass


def test_the_lock_of_another_machine(tmp_path):
    foreign(tmp_path, 100, command="saerl \x1b[31mtrain")
    with pytest.raises(Held) as caught, lock(tmp_path):
        pass
    said = str(caught.value)
    assert "`saerl ?[31mtrain` (process 7 on far, since yesterday)" in said
    assert "no sign of life for 100 s" in said and f"remove {tmp_path / NAME}" in said
    foreign(tmp_path, SILENT + 5)
    with lock(tmp_path):
        pass


def test_a_holder_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.01)
    with lock(tmp_path):
        os.utime(tmp_path / NAME, (0, 0))
        while (tmp_path / NAME).stat().st_mtime == 0:
            time.sleep(0.005)


@pytest.mark.parametrize("links", [True, False])
def test_however_many_start_at_once_one_writes_at_any_time(tmp_path, links, monkeypatch):
    """Each round begins with the lock of a killed process; a writer that meets another leaves a mark."""
    if not links:
        monkeypatch.setattr(os, "link", no_links)

    def write(folder: Path, go: float) -> None:
        time.sleep(max(0.0, go - time.time()))
        with lock(folder):
            inside = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)
            time.sleep(0.004)
            os.close(inside)
            os.unlink(folder / "inside")
            with (folder / "done").open("a") as done:
                done.write("x")

    for number in range(20):
        folder = tmp_path / str(number)
        killed_holder(folder)
        go = time.time() + 0.01
        children = [fork(partial(write, folder, go + 0.001 * (i % 3))) for i in range(2 + number % 7)]
        codes = [status(child) for child in children]
        assert 0 in codes and 2 not in codes, codes
        assert len((folder / "done").read_text()) == codes.count(0)
        assert {path.name for path in folder.iterdir()} == {"done"}


def no_links(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("place", ["_drop", "_create", "_read"])
def test_killed_while_it_takes_over(tmp_path, place, monkeypatch):
    """At every call of these, one after the other; the next process takes over all the same."""
    real = getattr(module, place)
    for last in range(1, 4):
        killed_holder(tmp_path)
        calls: list[int] = []

        def counted(*args: object, last: int = last, calls: list[int] = calls) -> object:
            calls.append(1)
            if len(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        def try_it(counted: Callable = counted) -> None:
            setattr(module, place, counted)
            with lock(tmp_path):
                pass

        status(fork(try_it))
        with lock(tmp_path):
            assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_waiting_for_the_other(tmp_path):
    read, write = os.pipe()

    def hold() -> None:
        with lock(tmp_path):
            os.write(write, b"x")
            time.sleep(0.1)

    child = fork(hold)
    os.read(read, 1)
    said: list[str] = []
    with lock(tmp_path, wait=said.append):
        pass
    assert status(child) == 0
    assert len(said) == 1 and said[0].startswith(f"waiting for {tmp_path}, which is written by ")


def test_a_folder_that_is_removed_or_taken_over_is_noticed(tmp_path):
    folder = tmp_path / "run"
    with lock(folder) as held:
        (folder / "file").touch()
        held.check()
        (folder / NAME).unlink()
        held.check()  # only the lock was removed, by hand: it is renewed
        assert (folder / NAME).read_text() == held.text
        foreign(folder, 0)
        with pytest.raises(SaerlError, match="is written by `saerl train` .process 7 on far"):
            held.check()
        folder.rename(tmp_path / "moved")
        with pytest.raises(SaerlError, match="run was removed while"):
            held.check()
        assert not folder.exists()
    assert "far" in (tmp_path / "moved" / NAME).read_text()  # another's lock is not ours to remove


def test_a_lock_that_cannot_be_read_when_it_is_given_back_holds_nobody_up(tmp_path, monkeypatch):
    def no_files(at):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with lock(tmp_path):
        monkeypatch.setattr(module, "_text", no_files)
    monkeypatch.undo()
    assert (tmp_path / NAME).is_file() and holder(tmp_path) is None
    with lock(tmp_path):
        assert holder(tmp_path)
    assert not (tmp_path / NAME).exists()


def test_a_lock_that_cannot_be_read_is_not_taken_for_a_removed_folder(tmp_path, monkeypatch):
    with lock(tmp_path) as held:
        with monkeypatch.context() as patch, pytest.raises(SaerlError, match="open files.*ulimit -n"):
            patch.setattr("builtins.open", Mock(side_effect=OSError(errno.EMFILE, "Too many open files")))
            held.check()
        held.check()


def test_leftovers_of_killed_processes_go_and_nothing_else(tmp_path):
    def die(name: str) -> None:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        write_json(tmp_path / name, {})

    for name in ("run.json", "sae/cfg.json", "features.partial-1/0.safetensors"):
        assert status(fork(partial(die, name))) == -signal.SIGKILL
    mine = tmp_path / f".live.png.{process_mark()}.00000000.tmp"  # a reader writes its figure
    away = [tmp_path / f".x.json.00000000-7-7.0000000{i}.tmp" for i in (0, 1)]
    old = tmp_path / ".run.json.0123456789abcdef.tmp"  # as version 0.1.0 called them
    kept = [mine, away[0], tmp_path / ".notes.tmp", tmp_path / "a.0123456789abcdef.tmp", tmp_path / "x.tmp"]
    (tmp_path / "checkpoints").mkdir()
    for path in (*kept, away[1], old, tmp_path / "checkpoints" / "step-000003.tmp"):
        path.touch()
    os.utime(away[1], (0, 0))
    sweep(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(kept)


def test_folders_that_cannot_be_held(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    for name, words in (("file/run", "cannot write to"), ("file", "cannot write to"), ("a\0b", "no folder")):
        with pytest.raises(SaerlError, match=words), lock(tmp_path / name):
            pass
    for name in ("link", "link/run"):
        with pytest.raises(SaerlError, match="link is a link to .*absent, which does not exist"):
            lock(tmp_path / name).__enter__()
    assert not (tmp_path / "absent").exists()
    with pytest.raises(SaerlError, match="cannot write to"):
        lock(tmp_path / ("x" * 300)).__enter__()
    with pytest.raises(SaerlError, match="cannot write to /proc/x: "):  # where no folder can be made
        lock("/proc/x").__enter__()


def test_a_link_and_its_folder_are_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with lock(tmp_path / "link"):
        assert status(fork(lambda: lock(tmp_path / "real").__enter__())) == 1
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").is_dir()


def test_a_holder_that_was_last_seen_in_the_future_is_silent_for_no_time(tmp_path):
    foreign(tmp_path, -1e6)
    with pytest.raises(Held, match="no sign of life for 0 s"), lock(tmp_path):
        pass
