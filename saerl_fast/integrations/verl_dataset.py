"""verl's own dataset with its rows in plan order, for Parquet files that are in verl's schema already.

    data.train_files=mine.parquet data.shuffle=False trainer.total_epochs=1
    data.train_batch_size=<plan.batch_size>
    data.custom_cls.path=pkg://saerl_fast.integrations.verl_dataset data.custom_cls.name=PlanDataset
    +data.saerl_plan=runs/mine/plan.json

verl builds the training and the validation set with the same class: only files named in
``data.train_files`` are reordered. A row's prompt id is extra_info.prompt_id, or the column prompt_id.
Checked with verl 0.9.1. Only verl imports this module; `write_parquet` of integrations.verl needs none of it.
"""

from __future__ import annotations

from typing import Any

from verl.utils.dataset.rl_dataset import RLHFDataset

from saerl_fast.errors import SaerlError
from saerl_fast.integrations.verl import planned_batches
from saerl_fast.plan import load_plan
from saerl_fast.plan.sampler import dataset_rows


class PlanDataset(RLHFDataset):
    """RLHFDataset whose row i is the plan's i-th prompt: ``plan.total_steps * plan.batch_size`` rows.

    Raises SaerlError when the plan is adaptive, when verl would shuffle or use another batch size, and
    when a planned prompt is not in the files, or was dropped for its length.
    """

    dataframe: Any  # datasets.Dataset

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
