"""Writing that cannot leave half a file behind, and reading that says what is missing."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError


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

    The data are flushed to the disk before the rename, so a crash leaves the old file or the new one.
    """
    target = Path(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")  # no other process's
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
    except OSError as err:
        raise SaerlError(f"cannot write {target}: {err.strerror}; choose another run_dir") from None
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except OSError as err:
        raise SaerlError(f"cannot write {target}: {err.strerror or err}") from err
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
