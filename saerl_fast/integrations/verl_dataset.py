"""verl's own dataset with its rows in plan order, for Parquet files that are in verl's schema already.

    data.train_files=mine.parquet data.shuffle=False trainer.total_epochs=1
    data.train_batch_size=<plan.batch_size>
    data.custom_cls.path=pkg://saerl_fast.integrations.verl_dataset data.custom_cls.name=PlanDataset
    +data.saerl_plan=runs/mine/plan.json

verl builds the training and the validation set with the same class: only files named in
``data.train_files`` are reordered. A row's prompt id is extra_info.prompt_id, or the column prompt_id.

An adaptive plan names each batch when it is loaded and is told its pass rates by the hook ``on_batch_end``,
which verl calls after every step but the last: add ``data.dataloader_num_workers=0``. verl writes a
checkpoint before it calls the hook, so a resumed run does without the pass rates of the step it goes on from.

Checked with verl 0.9.1: its own loader, sampler, batches and hook; no training run. Only verl imports this
module; `write_parquet` of integrations.verl needs none of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from verl.utils.dataset.rl_dataset import RLHFDataset

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import mismatch
from saerl_fast.integrations.journal import EVENTS, Journal, rates_of
from saerl_fast.integrations.verl import planned_batches
from saerl_fast.plan import load_plan
from saerl_fast.plan.sampler import dataset_rows
from saerl_fast.plan.static import StaticPlan


class PlanDataset(RLHFDataset):
    """RLHFDataset whose row i is the plan's i-th prompt: ``plan.total_steps * plan.batch_size`` rows.

    Raises SaerlError when verl would shuffle, use another batch size or, with an adaptive plan, load batches
    ahead, and when a planned prompt is not in the files, or was dropped for its length.
    """

    dataframe: Any  # datasets.Dataset
    journal: Journal | None = None  # of an adaptive plan

    def __len__(self) -> int:
        plan = self.journal.plan if self.journal is not None else None
        return super().__len__() if plan is None else plan.total_steps * plan.batch_size

    def __getitem__(self, item: int) -> dict[str, Any]:
        if self.journal is None:
            return super().__getitem__(item)
        size = self.journal.plan.batch_size
        name = self.journal.batch(item // size)[item % size]
        row = super().__getitem__(self._rows[name])
        row["extra_info"] = row["extra_info"] | {"prompt_id": name}  # which stays with it until the hook
        return row

    def on_batch_end(self, batch: Any) -> None:
        """Called by verl with the DataProto of a finished step."""
        if self.journal is None:
            return
        groups: dict[str, list[float]] = {}
        scores = batch.batch["token_level_scores"].sum(-1).tolist()
        for info, score in zip(batch.non_tensor_batch["extra_info"], scores, strict=True):
            groups.setdefault(info["prompt_id"], []).append(score)
        rates = [float(rates_of(np.array([rewards]), None)[0]) for rewards in groups.values()]
        self.journal.observe(list(groups), rates)

    def state_dict(self) -> dict[str, Any]:
        """What verl's data loader keeps in its checkpoint, data.pt."""
        return {"events": [] if self.journal is None else list(self.journal.events)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if fault := mismatch(state, {"events": EVENTS}):
            raise SaerlError(f"verl's checkpoint holds no plan ({fault}); it was made with another dataset")
        if self.journal is not None:
            self.journal.replay(state["events"])

    def _read_files_and_tokenize(self) -> None:
        super()._read_files_and_tokenize()
        if not set(_names(self.original_data_files)) <= set(_names(self.config.get("train_files", []))):
            return
        path = self.config.get("saerl_plan")
        if not path:
            raise SaerlError("PlanDataset needs a plan; add +data.saerl_plan=plan.json to the command")
        plan = load_plan(path)
        size = self.config.get("gen_batch_size") or self.config.get("train_batch_size")
        if self.config.get("shuffle", True):
            raise SaerlError("data.shuffle=True would undo the plan's order; set data.shuffle=False")
        if size != plan.batch_size:
            raise SaerlError(
                f"data.train_batch_size={size} but the plan has batches of {plan.batch_size}; "
                f"set data.train_batch_size={plan.batch_size}"
            )
        rows = dataset_rows(plan, _prompt_ids(self.dataframe))
        if not isinstance(plan, StaticPlan):
            if self.config.get("dataloader_num_workers", 8):
                raise SaerlError(
                    f"schedule {plan.schedule!r} chooses by pass rates, and verl's workers load batches "
                    "before those are known; set data.dataloader_num_workers=0"
                )
            self.journal, self._rows = Journal(plan), rows
            return
        order = [rows[name] for batch in planned_batches(plan) for name in batch]
        self.dataframe = self.dataframe.select(order)


def _names(files: Any) -> list[str]:
    return [files] if isinstance(files, str) else [str(name) for name in files]


def _prompt_ids(frame: Any) -> list[str]:
    if "prompt_id" in frame.column_names:
        return [str(name) for name in frame["prompt_id"]]
    infos = frame["extra_info"] if "extra_info" in frame.column_names else []
    ids = [info.get("prompt_id") for info in infos]
    if not ids or None in ids:
        raise SaerlError(
            "the Parquet rows have no prompt id; add a column prompt_id, or extra_info.prompt_id"
        )
    return [str(name) for name in ids]
