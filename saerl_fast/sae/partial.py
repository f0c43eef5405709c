"""What an unfinished SAE keeps for the next start: activations shard by shard, and the training's state."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saerl_fast.errors import SaerlError
from saerl_fast.records.kept import Kept

log = logging.getLogger(__name__)

EVERY = 60.0  # seconds between savings, at least
_SHARE = 50  # and at least so many times what the last one took: 2 % of the time


class Partial(Kept):
    """``<folder>/sae.partial-<mark>``; ``interrupted`` tells whether to save at once and ``stop``."""

    def __init__(
        self,
        folder: str | Path,
        mark: str,
        interrupted: Callable[[], Any] = lambda: 0,
        stop: Callable[[Any], BaseException] = KeyboardInterrupt,
    ) -> None:
        super().__init__(folder, "sae", mark)
        self._interrupted, self._stop = interrupted, stop
        self._last, self._pause = time.monotonic(), EVERY

    def due(self) -> bool:
        """Whether it is time to save."""
        return bool(self._interrupted()) or time.monotonic() - self._last > self._pause

    def save(self, kind: str, number: int, tensors: dict[str, Tensor]) -> None:
        """Write ``<kind>-<number>``; raises ``stop`` when that was due to an interrupt.

        When it cannot be written, that is logged, and not tried again: the training is worth more.
        """
        from safetensors.torch import save

        start = time.monotonic()
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        try:
            self.put(f"{kind}-{number:09d}", lambda path: path.write_bytes(data))
            self._pause = max(EVERY, _SHARE * (time.monotonic() - start))
        except SaerlError as err:
            log.warning("an interruption would lose this SAE: %s", err)
            self._pause = float("inf")
        self._last = time.monotonic()
        self.check()

    def check(self) -> None:
        """Raise ``stop`` when interrupted."""
        if said := self._interrupted():
            raise self._stop(said)

    def latest(self, kind: str) -> dict[str, Tensor] | None:
        """The intact file of a kind with the highest number."""
        found = self.saved(kind)
        return found[-1] if found else None

    def saved(self, kind: str) -> list[dict[str, Tensor]]:
        """The intact files of a kind by rising number, on the CPU."""
        from safetensors.torch import load

        return [load(file.read_bytes()) for file in self.files(f"{kind}-*")]

    def keep_only(self, kind: str, number: int) -> None:
        """Remove the files of a kind with other numbers."""
        for file in self.folder.glob(f"{kind}-*-*.safetensors"):
            if not file.name.startswith(f"{kind}-{number:09d}-"):
                file.unlink(missing_ok=True)

    def shards(self) -> tuple[int, list[Tensor]]:
        """How many rows of ids were captured without a gap, and their activations in order."""
        rows, parts = 0, []
        for shard in self.saved("activations"):
            if shard["rows"].tolist()[0] == rows:
                rows = int(shard["rows"][1])
                parts.append(shard["x"])
        return rows, parts

    def add_shard(self, start: int, end: int, parts: list[Tensor]) -> None:
        """Write the activations of rows ``start`` to ``end``."""
        self.save("activations", end, {"rows": torch.tensor([start, end]), "x": torch.cat(parts)})
