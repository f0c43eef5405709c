"""Prompt pools: reading them, splitting off an evaluation set, rendering them for a tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import repeat
from typing import Any, Literal

import numpy as np

from saerl_fast.config import DataConfig
from saerl_fast.errors import SaerlError, halved
from saerl_fast.prompts import chats, files, layouts, sources
from saerl_fast.prompts.chats import Messages
from saerl_fast.records.packed import Column, Ragged, Rows, chosen, kept, strings
from saerl_fast.records.spilled import BLOCK, arange, first_equal, firsts, from_iter, rows_where, taken

log = logging.getLogger(__name__)

Role = Literal["train", "eval"]


@dataclass
class Pool:
    """Rows as columns: ``prompt_id`` (unique str), ``prompt`` (str, or chat messages), ``answer`` (str).

    Any further columns ride along to the reward function. Every column is a list of the same length, or, of a
    large pool, a sequence that makes its cells when they are asked for (see `packed`); prompts already carry
    the data section's template.
    """

    columns: dict[str, Sequence[Any]]

    def __post_init__(self) -> None:
        for name in ("prompt_id", "prompt", "answer"):
            if name not in self.columns:
                raise SaerlError(f"a prompt pool needs the column {name!r}; it has {_names(self.columns)}")
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise SaerlError(f"the columns of a prompt pool differ in length ({lengths}); make them equal")
        ids = self.columns["prompt_id"]
        if Rows(ids).repeated is not None:
            repeated = next(name for name, count in Counter(ids).items() if count > 1)
            where = [i for i, name in enumerate(ids) if name == repeated]
            raise SaerlError(
                f"prompt id {repeated!r} occurs in rows {where[0]} and {where[1]}; make ids unique, "
                "or unset data.id_column to number the rows"
            )

    def __len__(self) -> int:
        return len(self.columns["prompt_id"])

    @cached_property
    def digest(self) -> str:
        """Hash of all columns: what a stage's output depends on, labels and a reward's columns too."""

        def plain(value: Any) -> str:  # an object without a text of its own shows its address
            return re.sub(r" at 0x[0-9a-f]+", "", str(value))

        found = hashlib.sha256()
        for part in _json(self.columns, partial(json.dumps, default=plain, skipkeys=True)):
            found.update(part.encode())
        return found.hexdigest()

    def column(self, name: str) -> Sequence[Any]:
        """One column, or the values at a path such as ``extra_info.level``; SaerlError when there is none."""
        found = layouts.column(self.columns, name)
        if found is None:
            rest = layouts.not_found(self.columns, name)
            raise SaerlError(f"the prompt pool has no column {name!r}; {rest}")
        return found

    def select(self, indices: Sequence[int] | np.ndarray) -> Pool:
        """The rows at ``indices``, in that order."""
        return Pool({name: chosen(column, indices) for name, column in self.columns.items()})


def _json(columns: Mapping[str, Any], write: Callable[[Any], str]) -> Iterator[str]:
    """What ``write`` makes of all columns as JSON, a block at a time."""
    before = "{"
    for name, column in columns.items():
        if not (key := write({name: 0})[1:-2]):  # a name that is no key
            continue
        yield before + key
        before = ", "
        if isinstance(column, (list, Ragged)):
            for at in range(0, len(column), BLOCK):
                yield (", " if at else "[") + write(column[at : at + BLOCK])[1:-1]
            yield "]" if len(column) else "[]"
        else:
            yield write(column)
    yield "}" if before == ", " else "{}"


def load_prompts(spec: str, cfg: DataConfig, *, split_role: Role = "train", seed: int = 0) -> Pool:
    """Read or make one pool. ``split_role`` chooses the hub split, and a data source is told it.

    Raises SaerlError on a missing file or column, an empty pool, an empty prompt and duplicate ids. The row
    limits are applied by `load_split`.
    """
    if not spec:
        raise SaerlError("data.train is empty; name a file, a hub dataset or a data source")
    setting = "data.eval" if split_role == "eval" and spec == cfg.eval else "data.train"
    if sources.is_source(spec):
        size = cfg.size if split_role == "train" else cfg.eval_size
        columns = sources.make_rows(spec, setting, role=split_role, size=size, seed=seed)
        if cfg.id_column is None and "prompt_id" in columns:
            cfg = dataclasses.replace(cfg, id_column="prompt_id")
    else:
        columns = files.read_rows(
            spec,
            split=cfg.split if split_role == "train" else cfg.eval_split,
            hub_config=cfg.hub_config,
            text_columns={cfg.prompt_column, cfg.answer_column or "", cfg.id_column or "", "completion"},
        )
    columns = _canonical(files.without_nan(columns), spec, cfg, split_role)
    if cfg.template != "{prompt}":
        columns["prompt"] = kept(chats.wrap(prompt, cfg.template) for prompt in columns["prompt"])
    _check_texts(columns, spec)
    return Pool(columns | {"prompt_id": strings(columns["prompt_id"], len(columns["prompt_id"]))})


def load_split(cfg: DataConfig, seed: int = 0) -> tuple[Pool, Pool]:
    """The training and the evaluation pool, with no prompt text in common.

    Without ``cfg.eval``, `eval_size` rows of ``cfg.train`` are held out by ``seed``; a data source
    (``saerl_fast.prompts.sources``) is asked for them. Training rows whose prompt text is also
    evaluated are dropped, with a log line.
    """
    train = load_prompts(cfg.train, cfg, split_role="train", seed=seed)
    if cfg.eval:
        held_out = load_prompts(cfg.eval, cfg, split_role="eval", seed=seed)
    elif sources.is_source(cfg.train):
        held_out = load_prompts(cfg.train, cfg, split_role="eval", seed=seed)
    else:
        held_out = train.select(_pick_eval(train, cfg, seed))
    evaluated = {_key(prompt) for prompt in held_out.column("prompt")}
    own = (_key(prompt) not in evaluated for prompt in train.column("prompt"))
    rest = rows_where(np.fromiter(own, dtype=bool, count=len(train)).__getitem__, len(train))
    if not len(rest):
        fix = "give others for role='eval'" if sources.is_source(cfg.train) else "add rows"
        raise SaerlError(f"every prompt of {cfg.train} is also evaluated; {fix}, or change data.eval")
    apart = cfg.eval or sources.is_source(cfg.train)
    copies = len(train) - len(rest) - (0 if apart else len(held_out))
    if not apart:
        log.info("held out %d of %d rows for evaluation", len(held_out), len(train))
    if copies:
        holder = cfg.eval or "the evaluation set"
        log.warning("dropped %d training rows that %s also holds", copies, holder)
    return (
        _limited(train if len(rest) == len(train) else train.select(rest), cfg.limit, "limit", "training"),
        _limited(held_out, cfg.eval_limit, "eval_limit", "evaluation"),
    )


def _limited(pool: Pool, limit: int | None, name: str, what: str) -> Pool:
    """The first ``limit`` rows, with a log line when others leave."""
    if limit is None or len(pool) <= limit:
        return pool
    log.info("data.%s=%d leaves out %d of %d %s rows", name, limit, len(pool) - limit, len(pool), what)
    return pool.select(arange(limit))


def _canonical(columns: files.Columns, spec: str, cfg: DataConfig, role: Role) -> files.Columns:
    """The file's columns plus prompt_id, prompt and answer, checked; rows without one dropped on request."""
    columns, cfg, said = layouts.recognise(columns, cfg)
    for words in said:
        log.info("%s: %s", spec, words)
    prompts = layouts.need(columns, cfg.prompt_column, "data.prompt_column", spec)
    count = len(prompts)
    answers: Sequence[Any] = kept(repeat("", count))
    if cfg.answer_column is not None:
        answers = layouts.need(columns, cfg.answer_column, "data.answer_column", spec)
        answers = _texts(layouts.whole_numbers(answers), cfg.answer_column, spec, "answer")
    if cfg.id_column is not None:
        ids = layouts.need(columns, cfg.id_column, "data.id_column", spec)
        ids = _texts(layouts.whole_numbers(ids), cfg.id_column, spec, "id")
    else:
        ids = strings((f"eval-{i}" if role == "eval" else str(i) for i in range(count)), count)
    if count == 0:
        raise SaerlError(f"{spec} holds no rows; give it at least one prompt")
    columns = columns | {"prompt_id": ids, "prompt": prompts, "answer": answers}
    columns = _without_nulls(columns, spec, cfg)
    read = Column()
    for prompt in columns["prompt"]:
        try:
            read.add([chats.read_prompt(prompt)])
        except ValueError as fault:
            row = prompts.index(prompt)
            raise SaerlError(f"{spec} row {row}: the prompt {fault}; mend or remove the row") from None
    return columns | {"prompt": read.done()}


def _check_texts(columns: files.Columns, spec: str) -> None:
    """SaerlError for text that no file and no tokenizer takes."""
    for name, column in columns.items():
        row = "'s name" if halved(name) else ""
        for at in range(0, len(column), BLOCK):
            cells = [cell if isinstance(cell, str) else "" for cell in column[at : at + BLOCK]]
            if halved("".join(cells)):
                row = next(f" row {i}" for i, cell in enumerate(cells, at) if halved(cell))
                break
        if row:
            raise SaerlError(
                f"{spec} column {name!r}{row} holds half of a surrogate pair, which is no character; mend it"
            )


def _texts(cells: Sequence[Any], name: str, spec: str, what: str) -> Sequence[str | None]:
    """Answers or ids as text, None where there is none; SaerlError for a cell that is no one text."""
    texts = Column()
    for i, cell in enumerate(cells):
        text, fault = layouts.text_of(cell, name)
        if fault:
            raise SaerlError(f"{spec} row {i}: the {what} {fault}")
        texts.add([text])
    return texts.done()


def _without_nulls(columns: files.Columns, spec: str, cfg: DataConfig) -> files.Columns:
    """Rows with a prompt, an answer and an id; SaerlError for any other, unless cfg.drop_null drops them."""
    count = len(columns["prompt"])
    drop = np.zeros(count, dtype=bool)
    for name, what in (("prompt", "prompt"), ("answer", "answer"), ("prompt_id", "id")):
        null = from_iter((cell is None for cell in columns[name]), count, bool)
        if not (total := int(null.sum())):
            continue
        found = f"{total} of {count} rows have no {what} (null, NaN or an empty cell)"
        if not cfg.drop_null:
            raise SaerlError(
                f"{spec}: {found}, the first is row {null.argmax()}; fill them in, or drop them with "
                "data.drop_null=true"
            )
        log.warning("dropped rows: %s: %s", spec, found)
        drop |= null
    if drop.all():
        raise SaerlError(f"{spec}: data.drop_null leaves none of {count} rows; give it prompts with answers")
    if not drop.any():
        return columns
    keep = rows_where(lambda part: ~drop[part], count)
    return {name: chosen(column, keep) for name, column in columns.items()}


def _pick_eval(pool: Pool, cfg: DataConfig, seed: int) -> list[int]:
    """Rows to hold out: `eval_size` distinct prompts, drawn by ``seed`` from those `eval_filter` allows."""
    allowed = arange(len(pool))
    if cfg.eval_filter is not None:
        wanted = pool.column(cfg.eval_filter)
        allowed = rows_where(lambda part: np.array([*map(_true, wanted[part])], dtype=bool), len(pool))
    prompts = pool.columns["prompt"]
    first = first_equal(map(_key, prompts if len(allowed) == len(pool) else chosen(prompts, allowed)))
    distinct = taken(allowed, firsts(first))
    if len(distinct) < cfg.eval_size or len(pool) <= cfg.eval_size:
        which = f" that data.eval_filter={cfg.eval_filter} allows" if cfg.eval_filter else ""
        raise SaerlError(
            f"data.eval_size={cfg.eval_size} cannot be held out of {cfg.train}: {len(pool)} rows, "
            f"{len(distinct)} distinct prompts{which}; lower it, or name an evaluation set in data.eval"
        )
    drawn = random.Random(f"held-out {seed}").sample(range(len(distinct)), cfg.eval_size)
    return sorted(distinct[drawn].tolist())


def _true(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("true", "1", "yes")
    return value is not None and bool(value > 0)


def _key(prompt: str | Messages) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _names(columns: files.Columns) -> str:
    return ", ".join(columns) or "no columns"
