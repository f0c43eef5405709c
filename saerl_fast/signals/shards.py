"""Features of a large pool, shard by shard: what is done is on the disk, an interruption loses one shard."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import atomic_path, written
from saerl_fast.records.manifest import digest
from saerl_fast.signals import features
from saerl_fast.signals.features import Features, open_features, save_features
from saerl_fast.signals.stored import Stored
from saerl_kernels import CSR

log = logging.getLogger(__name__)
Pair = tuple[CSR, CSR | None]
Kept = tuple[Stored, Stored | None]
Compute = Callable[[int, int, Callable[[int, int], None] | None], Pair]


class Shards:
    """A folder ``<folder>/features.partial-<mark>`` of finished shards.

    ``mark`` stands for every setting that the features depend on: shards of another mark are removed
    when this one starts, because they can never be used again.
    """

    def __init__(self, folder: str | Path, mark: str, size: int) -> None:
        self.folder, self.size = Path(folder) / f"features.partial-{mark}", size
        for old in Path(folder).glob("features.partial-*"):
            if old != self.folder:
                shutil.rmtree(old, ignore_errors=True)  # another process may be at it too

    def ranges(self, total: int) -> list[tuple[int, int]]:
        """First row and end of every shard of ``total`` prompts; one, empty, for none."""
        return [(start, min(start + self.size, total)) for start in range(0, max(total, 1), self.size)]

    def fill(self, start: int, prompt_ids: Sequence[str], compute: Compute) -> None:
        """Make the shard that begins at row ``start``, unless it is on the disk: for several processes."""
        end = min(start + self.size, len(prompt_ids))
        if self._read(start, prompt_ids[start:end]) is None:
            self._write(start, prompt_ids[start:end], compute(start, end, None))

    def collect(
        self,
        prompt_ids: Sequence[str],
        compute: Compute,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Features, Features | None]:
        """All rows: shards on the disk are used, the others come from ``compute(start, end, progress)``.

        More than ``SAMPLE`` rows stay in the shards.
        """
        parts: list[Kept] = []
        total = len(prompt_ids)
        for start, end in self.ranges(total):
            ids = prompt_ids[start:end]
            pair = self._read(start, ids)
            if pair is None:
                made = compute(start, end, self._shifted(on_progress, start, total))
                if total <= self.size:  # a single shard is over too soon to be worth a file
                    return made
                pair = self._write(start, ids, made)
            parts.append(pair)
            if on_progress is not None:
                on_progress(end, total)
        return _joined([prompt for prompt, _ in parts]), _joined([answer for _, answer in parts])

    def clear(self) -> None:
        """Remove the shards; call it when what they make up is safely written elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, start: int, ids: Sequence[str]) -> Kept | None:
        """The shard where its files have the content that their names tell; None where it is to be made."""
        found: dict[str, Stored] = {}
        for file in sorted(self.folder.glob(f"{start:09d}.*.safetensors")):
            try:
                part, told = file.stem.split(".")[1].split("-")
                if digest(file)[:16] != told:
                    raise SaerlError(f"{file} does not have the content that its name tells")
                found[part] = open_features(file, ids)
            except (SaerlError, OSError, ValueError) as err:
                log.warning("%s; this part is made again", err)
                file.unlink(missing_ok=True)
        if "alone" in found:
            return found["alone"], None
        return (found["prompt"], found["answer"]) if len(found) == 2 else None

    def _write(self, start: int, ids: Sequence[str], pair: Pair) -> Kept:
        """A file for each part, named after the start of its SHA-256; ``alone``: there are no answers."""
        prompt, answer = pair
        parts = {"alone": prompt} if answer is None else {"answer": answer, "prompt": prompt}
        made: dict[str, Stored] = {}
        for part, rows in parts.items():
            with atomic_path(self.folder / f"{start:09d}.{part}") as temporary:
                save_features(temporary, rows, ids)
                name = f"{start:09d}.{part}-{digest(temporary)[:16]}.safetensors"
            os.replace(self.folder / f"{start:09d}.{part}", self.folder / name)
            written[self.folder / name] = None
            made[part] = open_features(self.folder / name)
        return made.get("alone") or made["prompt"], made.get("answer")

    def _shifted(
        self, on_progress: Callable[[int, int], None] | None, start: int, total: int
    ) -> Callable[[int, int], None]:
        return lambda done, _: None if on_progress is None else on_progress(start + done, total)


def _joined(parts: Sequence[Stored | None]) -> Any:
    """The rows of all parts; None where they are parts of nothing."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    widths = {part.n_cols for part in found}
    if len(widths) > 1:
        raise SaerlError(f"shards of features have {sorted(widths)} columns; remove the folder of shards")
    whole = Stored([file for part in found for file in part.parts], found[0].n_cols)
    return whole if whole.n_rows > features.SAMPLE else whole.rows(0, whole.n_rows)
