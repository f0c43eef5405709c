"""Features of a large pool, shard by shard: what is done is on the disk, an interruption loses one shard."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import atomic_path, written
from saerl_fast.records.manifest import digest
from saerl_fast.signals.features import load_features, save_features

if TYPE_CHECKING:
    from saerl_kernels import CSR

log = logging.getLogger(__name__)
Pair = tuple["CSR", "CSR | None"]
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
    ) -> Pair:
        """All rows: shards on the disk are read, the others come from ``compute(start, end, progress)``."""
        from saerl_kernels import CSR

        parts: list[Pair] = []
        total = len(prompt_ids)
        for start, end in self.ranges(total):
            ids = prompt_ids[start:end]
            pair = self._read(start, ids)
            if pair is None:
                pair = compute(start, end, self._shifted(on_progress, start, total))
                if total > self.size:  # a single shard is over too soon to be worth a file
                    self._write(start, ids, pair)
            parts.append(pair)
            if on_progress is not None:
                on_progress(end, total)
        answers = [answer for _, answer in parts if answer is not None]
        return CSR.concat([prompt for prompt, _ in parts]), CSR.concat(answers) if answers else None

    def clear(self) -> None:
        """Remove the shards; call it when what they make up is safely written elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, start: int, ids: Sequence[str]) -> Pair | None:
        """The shard where its files have the content that their names tell; None where it is to be made."""
        found: dict[str, CSR] = {}
        for file in sorted(self.folder.glob(f"{start:09d}.*.safetensors")):
            try:
                part, told = file.stem.split(".")[1].split("-")
                if digest(file)[:16] != told:
                    raise SaerlError(f"{file} does not have the content that its name tells")
                found[part] = load_features(file, ids)
            except (SaerlError, OSError, ValueError) as err:
                log.warning("%s; this part is made again", err)
                file.unlink(missing_ok=True)
        if "alone" in found:
            return found["alone"], None
        return (found["prompt"], found["answer"]) if len(found) == 2 else None

    def _write(self, start: int, ids: Sequence[str], pair: Pair) -> None:
        """A file for each part, named after the start of its SHA-256; ``alone``: there are no answers."""
        prompt, answer = pair
        parts = {"alone": prompt} if answer is None else {"answer": answer, "prompt": prompt}
        for part, rows in parts.items():
            with atomic_path(self.folder / f"{start:09d}.{part}") as temporary:
                save_features(temporary, rows, ids)
                name = f"{start:09d}.{part}-{digest(temporary)[:16]}.safetensors"
            os.replace(self.folder / f"{start:09d}.{part}", self.folder / name)
            written[self.folder / name] = None

    def _shifted(
        self, on_progress: Callable[[int, int], None] | None, start: int, total: int
    ) -> Callable[[int, int], None]:
        return lambda done, _: None if on_progress is None else on_progress(start + done, total)
