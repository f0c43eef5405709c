"""Writing that cannot leave half a file behind, and reading that says what is missing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError

# What a killed writer leaves beside its target; the mark of the process is missing in those of version 0.1.0.
LEFTOVER = re.compile(r"\..+\.(?:([0-9a-f]{8}-\d+-\d+)\.[0-9a-f]{8}|[0-9a-f]{16})\.tmp")
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOENT: "its folder was removed meanwhile",
    errno.EACCES: "allow writing there, or choose another run_dir",
    errno.EPERM: "allow writing there, or choose another run_dir",
    errno.EROFS: "choose another run_dir",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network disk",
}
written: dict[Path, None] = {}  # files that this process has completed, in order


def reason(err: Exception) -> str:
    """Why a file could not be written, and what to do; understands the errors of Rust libraries too."""
    number = getattr(err, "errno", None)
    if number is None and (found := re.search(r"os error (\d+)", str(err))):
        number = int(found[1])
    said = os.strerror(number) if number else str(err)
    return f"{said}; {ADVICE[number]}" if number in ADVICE else said


def process_mark() -> str:
    """This process's name among all others: machine, boot and process-id space; process id; start time."""
    places = [platform.node()]
    with suppress(OSError):
        places.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        places.append(os.readlink("/proc/self/ns/pid"))
    machine = hashlib.sha256("\n".join(places).encode()).hexdigest()[:8]
    return f"{machine}-{os.getpid()}-{_started(os.getpid())}"


def has_ended(mark: str) -> bool | None:
    """Whether the process with this `process_mark` has ended; None where that cannot be known from here."""
    found = re.fullmatch(r"([0-9a-f]{8})-([1-9]\d*)-(\d+)", mark)
    if found is None or found[1] != process_mark()[:8] or os.name == "nt":
        return None
    started = _started(int(found[2]))
    return started is None or (started != found[3] and "0" not in (started, found[3]))


def _started(pid: int) -> str | None:
    """When a process of this machine started, as its kernel counts; "0": not known; None: no such process."""
    try:
        os.kill(pid, 0) if os.name != "nt" else None
    except (ProcessLookupError, OverflowError):
        return None
    except OSError:  # another user's
        pass
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "0"
    return None if values[0] in "ZX" else values[19]  # a zombie writes no more


def move_aside(path: Path) -> Path:
    """Rename to ``NAME.previous``, in place of an older one; of a link, the link is renamed."""
    aside = path.with_name(f"{path.name}.previous")
    remove(aside)
    os.replace(path, aside)
    return aside


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def use_umask(path: str | Path) -> None:
    """Give a file that a library made private (mode 0600) the mode of all others."""
    mask = os.umask(0o077)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def check_writable(folder: str | Path) -> None:
    """SaerlError when no file can be written in ``folder`` or, where it is missing, above it."""
    folder = Path(folder)
    try:
        with tempfile.TemporaryFile(
            dir=next(at for at in (folder, *folder.absolute().parents) if at.exists())
        ):
            pass
    except OSError as err:
        raise SaerlError(f"cannot write to {folder}: {err.strerror}; choose another run_dir") from None


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """A temporary path beside ``target`` that replaces it when the block ends without an error.

    The data are flushed to the disk before the rename, so a crash leaves the old file or the new one. A link
    stays; what it points to is replaced.
    """
    given, target = Path(target), Path(os.path.realpath(target))
    temporary = target.with_name(f".{target.name[:180]}.{process_mark()}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
    except OSError as err:
        raise SaerlError(f"cannot write {given}: {err.strerror}; choose another run_dir") from None
    try:
        yield temporary
        use_umask(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        written[given] = None
    except OSError as err:
        raise SaerlError(f"cannot write {given}: {reason(err)}") from err
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: str | Path, text: str) -> Path:
    """Write ``text`` atomically and return the path."""
    with atomic_path(target) as temporary:
        temporary.write_text(text)
    return Path(target)


def write_json(target: str | Path, value: Any) -> Path:
    """Write ``value`` as indented JSON, atomically, and return the path."""
    return write_text(target, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path, made_by: str) -> Any:
    """The value in a JSON file; ``made_by`` names the command that writes it, for the error message."""
    path = Path(path)
    if not path.is_file():
        raise SaerlError(f"{path} does not exist; make it with `{made_by}`")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise SaerlError(f"{path} is not valid JSON ({err}); make it again with `{made_by}`") from None
