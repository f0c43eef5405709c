"""The files that a run appends to while it works, opened together and checked when it goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_fast.fileio import write_text
from saerl_fast.records import manifest
from saerl_fast.records.log import JsonlLog, MetricsLog, write_logs

if TYPE_CHECKING:
    from saerl_fast.prompts.render import Prompts
    from saerl_fast.rl.rollouts import Draw

log = logging.getLogger(__name__)


class RunLogs:
    """metrics.jsonl, eval_items.jsonl and rollouts.jsonl of the run in ``out_dir``.

    ``step``: of the checkpoint that the run goes on from, None for a fresh start. ``before``: what `written`
    was then, by file. What was lost or changed since is counted in ``counters`` under ``damage``, and said.
    ``options``: of `MetricsLog`.
    """

    def __init__(
        self,
        out_dir: Path,
        step: int | None,
        before: Mapping[str, Any],
        counters: dict[str, Any],
        **options: Any,
    ) -> None:
        manifest.forget(out_dir, "result")  # until the run has ended again
        (out_dir / "summary.json").unlink(missing_ok=True)
        write_logs(out_dir, before, counters)  # before they are cut
        self.metrics = MetricsLog(out_dir, step, written=before.get("metrics.jsonl"), **options)
        names = ("eval_items.jsonl", "rollouts.jsonl")
        self.items, self.rollouts = (JsonlLog(out_dir / name, step, before.get(name)) for name in names)
        self._files = (self.metrics.lines, self.items, self.rollouts)
        if damage := [file.damage for file in self._files if file.damage]:
            counters["damage"] = [*counters.get("damage", []), *(f"{line} (step {step})" for line in damage)]
            for line in damage:
                log.warning("%s: %s; the run goes on, its record has a hole", out_dir, line)
            write_logs(out_dir, self.written(), counters)

    def written(self) -> dict[str, Any]:
        """Rows, bytes and SHA-256 of each file so far."""
        return {file.path.name: file.digest() for file in self._files}

    def write_rollouts(self, step: int, draw: Draw, limit: int) -> None:
        """The first ``limit`` prompts of a step with all their completions."""
        group = draw.rollouts.group_size
        for i in range(min(limit, len(draw.ids))):
            row = {"step": step, "prompt_id": draw.ids[i], "prompt": draw.prompts[i]}
            row |= {"answer": draw.columns["answer"][i], "rewards": draw.rewards[i].tolist()}
            row["completions"] = draw.rollouts.texts[i * group : (i + 1) * group]
            whole = {k: v for k, v in draw.notes.extra.items() if len(v) == len(draw.rollouts.texts)}
            row |= {f"extra_{k}": v[i * group : (i + 1) * group] for k, v in whole.items()}
            self.rollouts.write([row])

    def close(self) -> None:
        for file in (self.metrics, self.items, self.rollouts):
            file.close()


def write_held_out(out_dir: Path, pool: Prompts) -> None:
    """eval_prompts.jsonl: the held-out prompts, to which eval_items.jsonl refers by id."""
    columns = {
        "prompt_id": pool.column("prompt_id"),
        "prompt": pool.texts,
        "answer": pool.column("answer"),
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    write_text(out_dir / "eval_prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
