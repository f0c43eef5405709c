"""Features of a large pool, shard by shard: what is done is on the disk, an interruption loses one shard."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError, Unreadable, no_memory
from saerl_fast.records.kept import Kept
from saerl_fast.signals.kept import Parts, in_memory, join_arrays, load_part, save_part, suffix
from saerl_fast.signals.stored import Stored

log = logging.getLogger(__name__)
Compute = Callable[[int, int, Callable[[int, int], None] | None], Parts]


class Shards(Kept):
    """``<folder>/features.partial-<mark>``: finished shards of ``size`` prompts."""

    def __init__(self, folder: str | Path, mark: str, size: int) -> None:
        super().__init__(folder, "features", mark)
        self.size = size

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
    ) -> Parts:
        """All rows: shards on the disk are used, the others come from ``compute(start, end, progress)``.

        Arrays of several shards are one memory-mapped file in the folder; more than ``SAMPLE`` rows of CSR
        stay in the shards.
        """
        parts: list[Parts] = []
        total = len(prompt_ids)
        for start, end in self.ranges(total):
            ids = prompt_ids[start:end]
            found = self._read(start, ids)
            if found is None:
                found = compute(start, end, self._shifted(on_progress, start, total))
                if total <= self.size:  # a single shard is over too soon to be worth a file
                    return found
                found = self._write(start, ids, found)
            parts.append(found)
            if on_progress is not None:
                on_progress(end, total)
        return {name: self._joined(name, [part[name] for part in parts]) for name in parts[0]}

    def _joined(self, name: str, parts: list[Any]) -> Any:
        if not isinstance(parts[0], Stored):
            return parts[0] if len(parts) == 1 else join_arrays(self.folder / name, parts)
        widths = {part.n_cols for part in parts}
        if len(widths) > 1:
            raise SaerlError(f"shards of features have {sorted(widths)} columns; remove the folder of shards")
        return in_memory(Stored([file for part in parts for file in part.parts], parts[0].n_cols))

    def _read(self, start: int, ids: Sequence[str]) -> Parts | None:
        """The shard where its files have the content that their names tell; None where it is to be made."""
        found: dict[str, Any] = {}
        count = 0
        for file in self.files(f"{start:09d}.*"):
            name, total = file.stem.split(".")[1].split("-")[:2]
            try:
                found[name], count = load_part(file, ids), int(total)
            except (SaerlError, OSError, ValueError) as err:
                if no_memory(err) or isinstance(err, Unreadable):
                    raise
                log.warning("%s; this part is made again", err)
                file.unlink(missing_ok=True)
        return found if count and len(found) == count else None

    def _write(self, start: int, ids: Sequence[str], parts: Parts) -> Parts:
        """A file for each part: its name, and of how many it is one."""
        made: dict[str, Any] = {}
        for name, rows in parts.items():
            write = partial(save_part, rows=rows, ids=ids)
            made[name] = load_part(self.put(f"{start:09d}.{name}-{len(parts)}", write, suffix(rows)), ids)
        return made

    def _shifted(
        self, on_progress: Callable[[int, int], None] | None, start: int, total: int
    ) -> Callable[[int, int], None]:
        return lambda done, _: None if on_progress is None else on_progress(start + done, total)
