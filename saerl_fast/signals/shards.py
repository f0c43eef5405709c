"""Features of a large pool, shard by shard: what is done is on the disk, an interruption loses one shard."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from saerl_fast.errors import SaerlError
from saerl_fast.records.kept import Kept
from saerl_fast.signals.features import load_features, save_features

if TYPE_CHECKING:
    from saerl_kernels import CSR

log = logging.getLogger(__name__)
Pair = tuple["CSR", "CSR | None"]
Compute = Callable[[int, int, Callable[[int, int], None] | None], Pair]


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

    def _read(self, start: int, ids: Sequence[str]) -> Pair | None:
        """The shard where its files have the content that their names tell; None where it is to be made."""
        found: dict[str, CSR] = {}
        for file in self.files(f"{start:09d}.*"):
            try:
                found[file.stem.split(".")[1].partition("-")[0]] = load_features(file, ids)
            except SaerlError as err:
                log.warning("%s; this part is made again", err)
                file.unlink(missing_ok=True)
        if "alone" in found:
            return found["alone"], None
        return (found["prompt"], found["answer"]) if len(found) == 2 else None

    def _write(self, start: int, ids: Sequence[str], pair: Pair) -> None:
        """A file for each part; ``alone``: there are no answers."""
        prompt, answer = pair
        parts = {"alone": prompt} if answer is None else {"answer": answer, "prompt": prompt}
        for part, rows in parts.items():
            self.put(f"{start:09d}.{part}", partial(save_features, X=rows, prompt_ids=ids))

    def _shifted(
        self, on_progress: Callable[[int, int], None] | None, start: int, total: int
    ) -> Callable[[int, int], None]:
        return lambda done, _: None if on_progress is None else on_progress(start + done, total)
