"""``manifest.json``: what a folder's outputs are, by the hash of their content, and from what they were made.

One object in each folder of outputs (run_dir, its ``sae/``, every run, its ``model/``)::

    {"format": "saerl-manifest-1", "artefacts": {name: [entry, ...]}}

An entry has ``files``, path below the folder -> ``sha256`` and ``size``, and where a command made it
``fingerprint``, ``config`` and ``inputs``. A name has one entry, and two, the new one first, while it is
written: all new files are complete beside the old ones, both entries are recorded, the files are renamed, and
the old entry is dropped. So a process that ends anywhere leaves files of the one or the other entry, which is
then found by their content, or a mixture, which is found as well and never used.

Hashes are SHA-256. The writer is the only one in its folder; readers need no lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import atomic_path, damaged, write_json
from saerl_fast.fileio import written as completed

FILE = "manifest.json"
FORMAT = "saerl-manifest-1"
Entry = dict[str, Any]
SETTLED = 2.0  # seconds after which a file's times tell any further change, on every file system
_hashed: dict[tuple[Any, ...], str] = {}


@dataclass
class Found:
    """An artefact as it is recorded: ``entry`` None where it is not; ``fault``: what its files lack, or "".

    ``partial``: files are missing or of two generations, as after a process that ended while it wrote.
    """

    entry: Entry | None = None
    fault: str = ""
    partial: bool = False


def stamp(path: str | Path) -> tuple[Any, ...]:
    """What changes whenever the content of a file does: its place, size, times and number."""
    stat = os.stat(path)
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def digest(path: str | Path) -> str:
    """SHA-256 of a file's content, in hex; a file that stays the same is read once in a process."""
    mark = stamp(path)
    if mark not in _hashed:
        found = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while block := file.read(1 << 20):
                found.update(block)
        if time.time() - max(mark[2], mark[3]) / 1e9 < SETTLED:
            return found.hexdigest()
        _hashed[mark] = found.hexdigest()
    return _hashed[mark]


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value, in hex, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def publish(
    folder: str | Path, name: str, made: Mapping[str, Any] | None = None
) -> Iterator[Callable[[str], Path]]:
    """Write the files of an artefact so that they are all there or none is, and record them.

    Yields ``new(path below the folder)`` -> the temporary file to write instead. ``made``: the rest of the
    entry; None records nothing in a folder without a manifest. An error in the block leaves everything as it
    was.
    """
    folder = Path(folder)
    written: dict[str, Path] = {}
    with ExitStack() as renaming:

        def new(relative: str) -> Path:
            written[relative] = renaming.enter_context(atomic_path(folder / relative))
            return written[relative]

        yield new
        recorded = made is not None or read(folder) is not None
        entry = _entry(written, made)
        before = (read(folder) or {}).get(name, [])
        if recorded:
            _put(folder, name, [entry, *before])
    if lost := [file for file in written if not (folder / file).is_file()]:
        raise SaerlError(f"{folder / lost[0]} was removed while it was written; run the command again")
    if recorded and before:
        _put(folder, name, [entry])
    for stale in {file for old in before for file in old["files"]} - written.keys():
        (folder / stale).unlink(missing_ok=True)


def record(
    folder: str | Path,
    name: str,
    files: Iterable[str] | None = None,
    made: Mapping[str, Any] | None = None,
) -> None:
    """Record files that are in place already; without ``files`` all below the folder."""
    folder = Path(folder)
    if files is None:
        inside = (file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file())
        files = [file for file in inside if file != FILE]
    _put(folder, name, [_entry({file: folder / file for file in files}, made)])


def forget(folder: str | Path, name: str) -> None:
    """Drop what is recorded of an artefact, before its files are moved away or written in place."""
    if (read(folder) or {}).get(name):
        begin(folder, name)


def begin(folder: str | Path, name: str) -> None:
    """Record that an artefact is being written in place: until `record` it is partial."""
    _put(Path(folder), name, [])


def read(folder: str | Path) -> dict[str, list[Entry]] | None:
    """Artefact -> its entries; {} where the manifest is damaged, None where there is none of saerl's."""
    path = Path(folder) / FILE
    if path.exists() and not path.is_file():  # to read a pipe would take for ever
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as err:  # what it records is not known, and must not be written anew
        raise damaged(path, err, "make it readable") from err
    except (ValueError, RecursionError):
        return {}
    if not value or isinstance(value, (str, int, float)):  # nobody's
        return {}
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        return None
    artefacts = value.get("artefacts")
    return artefacts if isinstance(artefacts, dict) and all(map(_is_entries, artefacts.values())) else {}


def look(folder: str | Path, name: str) -> Found:
    """The artefact as the manifest and its files have it; every file is read to its end."""
    entries = (read(folder) or {}).get(name)
    if entries == []:
        return Found(None, "it was being replaced", partial=True)
    first = Found()
    for entry in entries or []:
        found = _compare(Path(folder), entry)
        if not found.fault:
            return found
        first = first if first.entry else found
    return Found(first.entry, first.fault, first.partial or len(entries or []) > 1)


def check(folder: str | Path, name: str, made_by: str) -> Entry | None:
    """The entry of an artefact whose files are intact; None in a folder without a manifest.

    Raises SaerlError, with ``made_by`` as the command that mends it, where the manifest records no such
    artefact or other content than its files have.
    """
    if read(folder) is None:
        return None
    found = look(folder, name)
    if found.entry is None:
        raise SaerlError(f"{Path(folder) / FILE} does not record the {name} here; make it with `{made_by}`")
    if found.fault:
        raise SaerlError(f"{found.fault}; make it again with `{made_by}`")
    return found.entry


def _entry(files: Mapping[str, Path], made: Mapping[str, Any] | None) -> Entry:
    listed = {name: {"sha256": digest(file), "size": file.stat().st_size} for name, file in files.items()}
    return {"files": listed, **(made or {})}


def _compare(folder: Path, entry: Entry) -> Found:
    for name, kept in entry["files"].items():
        file = folder / name
        try:
            if not file.is_file():
                raise FileNotFoundError
            same = file.stat().st_size == kept["size"] and digest(file) == kept["sha256"]
        except FileNotFoundError:
            return Found(entry, f"{file} is missing", partial=True)
        except OSError as err:
            raise damaged(file, err, "make it readable") from err
        if not same:
            return Found(entry, f"{file} is damaged or was changed: its content is not what {FILE} records")
    return Found(entry)


def _put(folder: Path, name: str, entries: list[Entry]) -> None:
    artefacts = read(folder)
    if artefacts is None and (folder / FILE).exists():
        raise SaerlError(f"{folder / FILE} is a file of something else; remove it, or choose another folder")
    write_json(folder / FILE, {"format": FORMAT, "artefacts": (artefacts or {}) | {name: entries}})
    completed.pop(folder / FILE, None)  # nothing that a user asked for


def _is_entries(value: Any) -> bool:
    """Whether a manifest's list is one; it names no file outside its folder."""
    if not isinstance(value, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("inputs", {}), dict) for entry in value
    ):
        return False
    listed = [entry.get("files") for entry in value]
    return all(isinstance(files, dict) for files in listed) and all(
        ".." not in Path(name).parts
        and not Path(name).is_absolute()
        and isinstance(kept, dict)
        and {"sha256", "size"} <= kept.keys()
        for files in listed
        for name, kept in files.items()
    )
