"""What an unfinished output keeps for the next start, in files whose names tell their content."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from saerl_fast.fileio import atomic_path, remove, writing, written
from saerl_fast.records.manifest import digest

log = logging.getLogger(__name__)


class Kept:
    """A folder ``<folder>/<name>.partial-<mark>``.

    ``mark`` stands for every setting that the output depends on: what was kept under another one is removed,
    because it can never be used again.
    """

    def __init__(self, folder: str | Path, name: str, mark: str) -> None:
        self.folder = Path(folder) / f"{name}.partial-{mark}"
        drop(folder, name, but=self.folder if self.folder.is_dir() else None)

    def put(self, stem: str, write: Callable[[Path], object], suffix: str = ".safetensors") -> Path:
        """Make a file by ``write``, named ``stem`` and the start of its SHA-256."""
        with atomic_path(self.folder / stem) as temporary:
            write(temporary)
            final = self.folder / f"{stem}-{digest(temporary)[:16]}{suffix}"
        with writing(final):
            os.replace(self.folder / stem, final)
        written[final] = None
        return final

    def files(self, stems: str) -> list[Path]:
        """Those whose stem matches and that have the content that their names tell; others are removed."""
        found = []
        for file in sorted(self.folder.glob(f"{stems}-{'?' * 16}.*")):
            with suppress(OSError):
                if digest(file).startswith(file.stem.rpartition("-")[2]):
                    found.append(file)
                    continue
            log.warning("%s does not have the content that its name tells; it is made again", file)
            with suppress(OSError):
                remove(file)
        return found

    def clear(self) -> None:
        """Remove all of it; call it when what it makes up is safely written elsewhere."""
        with suppress(OSError):
            remove(self.folder)


def drop(folder: str | Path, name: str, *, mark: str = "", but: Path | None = None) -> None:
    """Remove what is kept of an output under marks that begin with ``mark``."""
    for old in Path(folder).glob(f"{name}.partial-{mark}*"):
        if old != but:
            with suppress(OSError):  # another process may be at it too
                remove(old)
