"""Prompt pools: reading them, splitting off an evaluation set, rendering them for a tokenizer."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from saerl_fast.config import DataConfig
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import atomic_path
from saerl_fast.prompts import chats, files, reasoning_gym
from saerl_fast.prompts.chats import Messages

log = logging.getLogger(__name__)

Role = Literal["train", "eval"]


@dataclass
class Pool:
    """Rows as columns: ``prompt_id`` (unique str), ``prompt`` (str, or chat messages), ``answer`` (str).

    Any further columns ride along to the reward function. Every column is a list of the same length;
    prompts already carry the data section's template.
    """

    columns: dict[str, list[Any]]

    def __post_init__(self) -> None:
        for name in ("prompt_id", "prompt", "answer"):
            if name not in self.columns:
                raise SaerlError(f"a prompt pool needs the column {name!r}; it has {_names(self.columns)}")
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise SaerlError(f"the columns of a prompt pool differ in length ({lengths}); make them equal")
        repeated = [name for name, count in Counter(self.columns["prompt_id"]).items() if count > 1]
        if repeated:
            where = [i for i, name in enumerate(self.columns["prompt_id"]) if name == repeated[0]]
            raise SaerlError(
                f"prompt id {repeated[0]!r} occurs in rows {where[0]} and {where[1]}; make ids unique, "
                "or unset data.id_column to number the rows"
            )

    def __len__(self) -> int:
        return len(self.columns["prompt_id"])

    @cached_property
    def digest(self) -> str:
        """Hash of ids, prompts and answers: what a stage's output depends on."""
        rows = [self.columns[name] for name in ("prompt_id", "prompt", "answer")]
        return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()

    def column(self, name: str) -> list[Any]:
        """One column; SaerlError when there is none of that name."""
        if name not in self.columns:
            raise SaerlError(f"the prompt pool has no column {name!r}; it has {_names(self.columns)}")
        return self.columns[name]

    def select(self, indices: Sequence[int]) -> Pool:
        """The rows at ``indices``, in that order."""
        return Pool({name: [column[i] for i in indices] for name, column in self.columns.items()})

    def to_parquet(self, path: str | Path) -> Path:
        """Write every column to a Parquet file, atomically."""
        import pyarrow as pa
        import pyarrow.parquet as parquet

        try:
            table = pa.table(self.columns)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as err:
            raise SaerlError(
                f"the pool cannot be written to {path}: {err}; give each column one type"
            ) from None
        with atomic_path(path) as temporary:
            parquet.write_table(table, temporary)
        return Path(path)

    @classmethod
    def from_parquet(cls, path: str | Path) -> Pool:
        """Read what `to_parquet` wrote."""
        if not Path(path).is_file():
            raise SaerlError(f"prompt pool {path} does not exist; write it with Pool.to_parquet")
        return cls(files.read_parquet(Path(path), set()))


def load_prompts(spec: str, cfg: DataConfig, *, split_role: Role = "train", seed: int = 0) -> Pool:
    """Read or generate one pool. ``split_role`` chooses the hub split and the reasoning-gym half.

    Raises SaerlError on a missing file or column, an empty pool, an empty prompt, duplicate ids or a
    row limit below 1 (`load_split` applies the limits).
    """
    for name, value in (("limit", cfg.limit), ("eval_limit", cfg.eval_limit)):
        if value is not None and value < 1:
            raise SaerlError(f"data.{name}={value} keeps no row; use at least 1, or null for all")
    if not spec:
        raise SaerlError("data.train is empty; name a file, a hub dataset or reasoning-gym:NAME")
    if spec.startswith(reasoning_gym.PREFIX):
        size = cfg.size if split_role == "train" else cfg.eval_size
        columns = reasoning_gym.generate(spec, size, role=split_role, seed=seed)
    else:
        columns = files.read_rows(
            spec,
            split=cfg.split if split_role == "train" else cfg.eval_split,
            hub_config=cfg.hub_config,
            text_columns={cfg.prompt_column, cfg.answer_column or "", cfg.id_column or ""},
        )
        columns = _canonical(columns, spec, cfg, split_role)
    if "{prompt}" not in cfg.template:
        raise SaerlError(f"data.template={cfg.template!r} lacks {{prompt}}; say where the prompt goes")
    columns["prompt"] = [chats.wrap(prompt, cfg.template) for prompt in columns["prompt"]]
    return Pool(columns)


def load_split(cfg: DataConfig, seed: int = 0) -> tuple[Pool, Pool]:
    """The training and the evaluation pool, with no prompt text in common.

    Without ``cfg.eval``, `eval_size` rows of ``cfg.train`` are held out by ``seed``; reasoning-gym
    generates them. Training rows whose prompt text is also evaluated are dropped, with a log line.
    """
    if cfg.eval_size < 1 and not cfg.eval:
        raise SaerlError(f"data.eval_size={cfg.eval_size} leaves nothing to evaluate; use at least 1")
    train = load_prompts(cfg.train, cfg, split_role="train", seed=seed)
    if cfg.eval:
        held_out = load_prompts(cfg.eval, cfg, split_role="eval", seed=seed)
    elif cfg.train.startswith(reasoning_gym.PREFIX):
        held_out = load_prompts(cfg.train, cfg, split_role="eval", seed=seed)
    else:
        held_out = train.select(_pick_eval(train, cfg, seed))
    evaluated = {_key(prompt) for prompt in held_out.column("prompt")}
    rest = [i for i, prompt in enumerate(train.column("prompt")) if _key(prompt) not in evaluated]
    if not rest:
        raise SaerlError(f"every prompt of {cfg.train} is also evaluated; add rows, or change data.eval")
    if cfg.eval and len(rest) < len(train):
        log.warning("dropped %d training rows that %s also holds", len(train) - len(rest), cfg.eval)
    return train.select(rest[: cfg.limit]), held_out.select(range(len(held_out))[: cfg.eval_limit])


def _canonical(columns: files.Columns, spec: str, cfg: DataConfig, role: Role) -> dict[str, list[Any]]:
    """The file's columns plus prompt_id, prompt and answer, checked."""
    named = {
        "prompt_column": cfg.prompt_column,
        "answer_column": cfg.answer_column,
        "id_column": cfg.id_column,
    }
    for field, name in named.items():
        if name is not None and name not in columns:
            raise SaerlError(f"{spec} has no column {name!r} (data.{field}); it has {_names(columns)}")
    count = len(columns[cfg.prompt_column])
    if count == 0:
        raise SaerlError(f"{spec} holds no rows; give it at least one prompt")
    prompts = []
    for i, prompt in enumerate(columns[cfg.prompt_column]):
        try:
            prompts.append(chats.read_prompt(prompt))
        except ValueError as fault:
            raise SaerlError(f"{spec} row {i}: the prompt {fault}; mend or remove the row") from None
    answers = columns[cfg.answer_column] if cfg.answer_column else [""] * count
    if None in answers:
        raise SaerlError(f"{spec} row {answers.index(None)}: the answer is null; mend or remove the row")
    if cfg.id_column:
        ids = columns[cfg.id_column]
        if None in ids:
            raise SaerlError(f"{spec} row {ids.index(None)}: {cfg.id_column} is null; give it an id")
    else:
        ids = [f"eval-{i}" if role == "eval" else str(i) for i in range(count)]
    return columns | {
        "prompt_id": [str(name) for name in ids],
        "prompt": prompts,
        "answer": [str(answer) for answer in answers],
    }


def _pick_eval(pool: Pool, cfg: DataConfig, seed: int) -> list[int]:
    """Rows to hold out: `eval_size` distinct prompts, drawn by ``seed`` from those `eval_filter` allows."""
    allowed = list(range(len(pool)))
    if cfg.eval_filter is not None:
        allowed = [i for i, value in enumerate(pool.column(cfg.eval_filter)) if _true(value)]
    first = {_key(pool.columns["prompt"][i]): i for i in reversed(allowed)}
    distinct = sorted(first.values())
    if len(distinct) < cfg.eval_size or len(pool) <= cfg.eval_size:
        which = f" that data.eval_filter={cfg.eval_filter} allows" if cfg.eval_filter else ""
        raise SaerlError(
            f"data.eval_size={cfg.eval_size} cannot be held out of {cfg.train}: {len(pool)} rows, "
            f"{len(distinct)} distinct prompts{which}; lower it, or name an evaluation set in data.eval"
        )
    return sorted(random.Random(f"held-out {seed}").sample(distinct, cfg.eval_size))


def _true(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("true", "1", "yes")
    return value is not None and bool(value > 0)


def _key(prompt: str | Messages) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _names(columns: dict[str, list[Any]]) -> str:
    return ", ".join(columns) or "no columns"
