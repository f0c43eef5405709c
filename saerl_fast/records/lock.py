"""One writer a folder: a lock file that says who writes and since when. Readers never ask for it.

The file ``.saerl.lock`` is made as a hard link to a finished file, which either succeeds or finds one there,
on local disks and NFS alike (open(2), O_EXCL, names the method); where there are no hard links it is created
exclusively. A holder that was killed is told by its process id and start time on the machine, boot and
process-id space it ran in. From anywhere else it can only be seen to be silent: a holder touches its file
every BEAT seconds, and one that has not for SILENT seconds, by the disk's own clock, counts as dead.

Only one process may remove a dead holder's file: the one that holds a second lock, named after what that
file says. So a dead lock is taken over once, however many try, and a takeover that is killed can be taken
over too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import platform
import secrets
import shlex
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import LEFTOVER, has_ended, process_mark, reason
from saerl_fast.records.manifest import FILE as MANIFEST

log = logging.getLogger(__name__)
NAME = ".saerl.lock"
BEAT, SILENT = 15.0, 300.0
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)
_held: dict[Path, Lock] = {}
_ended: set[str] = set()  # what the lock files held that this process has given back


class Held(SaerlError):
    """Another process, ``who``, writes to ``folder``."""

    def __init__(self, folder: Path, who: str, fix: str = "wait for it, or choose another run_dir") -> None:
        super().__init__(f"{folder} is written by {who}; {fix}")
        self.folder, self.who, self.fix = folder, who, fix


class Lock:
    """A lock that this process holds, see `lock`."""

    def __init__(self, folder: Path, at: Path) -> None:
        self.folder, self.at = folder, at
        self.owner = os.getpid(), threading.get_ident()
        self.ended = threading.Event()
        name = Path(sys.argv[0]).name if sys.argv else "python"
        command = shlex.join(["saerl" if name in ("cli.py", "__main__.py") else name, *sys.argv[1:]])
        about = {"command": command[:200], "pid": os.getpid(), "host": platform.node()}
        about["since"] = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        self.text = json.dumps(about | {"mark": process_mark(), "token": secrets.token_hex(8)})

    def check(self) -> None:
        """SaerlError when the folder was removed or taken over; the lock file alone is renewed."""
        try:
            found = _text(self.at)
        except OSError as err:  # too many open files, say
            raise SaerlError(f"cannot read {self.at}: {reason(err)}") from None
        if found == self.text:
            return
        with suppress(OSError):
            if found is None and _create(self.at, self.text):
                return
        now = f"is written by {_who(found)}" if found else "was removed"
        raise SaerlError(f"{self.folder} {now} while this command was writing to it; it ends here")

    def beat(self) -> None:
        """Show a sign of life until the lock is given back."""
        while not self.ended.wait(BEAT):
            with suppress(OSError):
                os.utime(self.at)


@contextmanager
def lock(folder: str | Path, *, wait: Callable[[str], None] | None = None) -> Iterator[Lock]:
    """Hold ``folder``, made when missing, as its only writer; what killed writers left in it is removed.

    Within a block of the same thread that holds it already this does nothing. Raises `Held`, a SaerlError
    that says who holds the folder and since when; with ``wait`` it is told that sentence once and the block
    begins when the other has ended. A folder that stays empty is removed again.
    """
    folder = Path(folder)
    at = _place(folder)
    mine = _held.get(at)
    if mine is not None and mine.owner == (os.getpid(), threading.get_ident()):
        yield mine
        return
    made = [path for path in at.parents if not os.path.exists(path)]
    held = Lock(folder, at)
    try:
        _wait(held, wait)
        _held[at] = held
        threading.Thread(target=held.beat, daemon=True).start()
        sweep(folder)
        yield held
    finally:
        if held.owner[0] == os.getpid():  # not in a process that was forked meanwhile
            held.ended.set()
            _ended.add(held.text)  # also where its file cannot be read now, and so is not removed
            if _held.get(at) is held:
                del _held[at]
            with suppress(OSError):
                _drop(at, held.text)
                for path in made:
                    path.rmdir()


def _place(folder: Path) -> Path:
    try:
        real = Path(os.path.realpath(folder))
    except ValueError as err:
        raise SaerlError(f"{str(folder)!r} is no folder's name ({err}); choose another run_dir") from None
    for path in (folder, *folder.parents):  # such as to a disk that is not there now
        if os.path.islink(path) and not os.path.exists(path):
            away = os.path.realpath(path)
            raise SaerlError(f"{path} is a link to {away}, which does not exist; make that folder")
    return real / NAME


def holder(folder: str | Path) -> str | None:
    """Who writes to ``folder``, as a phrase, if anyone does."""
    at = _place(Path(folder))
    found = _read(at)
    return _who(found) if found is not None and not _dead(at, found) else None


def vacant(folder: Path, but: Collection[str] = ()) -> bool:
    """Whether there is nothing in ``folder`` but, perhaps, ``but``, its lock and a manifest."""
    names = (path.name for path in folder.iterdir()) if folder.exists() else ()
    return all(name.startswith(NAME) or name == MANIFEST or name in but for name in names)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in ``folder``, which this process holds, and one level below.

    A folder below of which nothing else was written goes too.
    """
    clean(folder)
    with suppress(OSError):
        for file in (*folder.glob(f"{NAME}.*"), *(folder / "checkpoints").glob("*.tmp")):
            file.unlink(missing_ok=True)
        if (folder / "sae").is_dir() and not any((folder / "sae").iterdir()):
            (folder / "sae").rmdir()


def clean(folder: Path) -> None:
    """Remove temporary files of dead processes in ``folder`` and one level below; this needs no lock."""
    with suppress(OSError):
        for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            for file in place.glob(".*.tmp"):
                if (found := LEFTOVER.fullmatch(file.name)) and _is_left(file, found[1]):
                    file.unlink(missing_ok=True)


def _wait(held: Lock, tell: Callable[[str], None] | None) -> None:
    while True:
        try:
            return _acquire(held.at, held.text)
        except OSError as err:
            raise SaerlError(f"cannot write to {held.folder}: {reason(err)}") from None
        except Held as err:
            if tell is None:
                raise Held(held.folder, err.who, err.fix) from None
            tell(f"waiting for {held.folder}, which is written by {err.who}")
            while holder(held.folder):
                time.sleep(0.2)
            tell = lambda line: None  # noqa: E731


def _acquire(at: Path, text: str) -> None:
    """Make ``at`` this process's; `Held` where another's is not dead."""
    found, gone = None, None
    for attempt in range(500):
        time.sleep(0.002 * min(attempt, 10))
        try:
            at.parent.mkdir(parents=True, exist_ok=True)
            if _create(at, text) or _read(at) == text:  # NFS may carry out what it reports as failed
                return
            gone = None
        except FileNotFoundError as err:  # the folder was removed meanwhile, empty as it was
            gone = err
        found = _read(at)
        if found is None:
            continue
        if not _dead(at, found):
            break
        warrant = at.with_name(f"{at.name}.{hashlib.sha256(found.encode()).hexdigest()[:12]}")
        with suppress(Held):
            _acquire(warrant, text)
            try:
                if _read(at) == found:
                    at.unlink()
                    log.info("%s was left by %s, which has ended", at.parent, _who(found))
            finally:
                _drop(warrant, text)
    if found is None and gone is not None:  # nobody's: such a place cannot be made
        raise gone
    if found is not None and has_ended(_about(found).get("mark", "")) is None:
        silent = f"it has shown no sign of life for {_silence(at):.0f} s"
        fix = f"{silent} and counts as dead after {SILENT:.0f}; if it has ended, remove {at}"
        raise Held(at.parent, _who(found), fix)
    raise Held(at.parent, _who(found or ""))


def _create(at: Path, text: str) -> bool:
    temporary = at.with_name(f".{NAME}.{process_mark()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text)
        try:
            os.link(temporary, at)
        except OSError as err:
            if err.errno not in _NO_LINKS:
                raise
            with at.open("x") as file:
                file.write(text)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _text(at: Path) -> str | None:
    try:  # a pipe in its place would let nobody go on, a device would have no end
        with open(at, errors="replace", opener=lambda path, how: os.open(path, how | os.O_NONBLOCK)) as file:
            return file.read() if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else ""
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read(at: Path) -> str | None:
    try:
        return _text(at)
    except OSError:  # somebody else's, and not for us to read
        return ""


def _drop(at: Path, text: str) -> None:
    if _read(at) == text:
        at.unlink(missing_ok=True)


def _about(text: str) -> dict[str, str]:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    return {key: str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _who(text: str) -> str:
    about = _about(text)
    if not about:
        return "an unknown process"
    command, pid, host, since = (about.get(key, "?") for key in ("command", "pid", "host", "since"))
    said = f"`{command}` (process {pid} on {host}, since {since})"
    return "".join(char if char.isprintable() else "?" for char in said)[:400]


def _dead(at: Path, text: str) -> bool:
    ended = text in _ended or has_ended(_about(text).get("mark", ""))
    return _silence(at) > SILENT if ended is None else ended


def _is_left(file: Path, mark: str | None) -> bool:
    ended = True if mark is None else has_ended(mark)
    return _silence(file) > SILENT if ended is None else ended


def _silence(at: Path) -> float:
    """Seconds since the file was last touched, by the clock of the disk that it is on."""
    try:
        with tempfile.TemporaryFile(dir=at.parent) as now:
            return max(0.0, os.fstat(now.fileno()).st_mtime - at.stat().st_mtime)
    except OSError:
        return 0.0
