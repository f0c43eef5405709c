"""Where prompts and answers stand in the layouts that people have, and what a cell of an answer column is.

Read without a setting, and said aloud: verl's rows (``reward_model.ground_truth``), TRL's prompt-completion
rows (``completion``) and conversations in a column ``messages`` (or ShareGPT's ``conversations``), whose last
assistant message is the answer.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import difflib
import fractions
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from saerl_fast.config import DataConfig
from saerl_fast.errors import SaerlError
from saerl_fast.prompts import chats
from saerl_fast.records.packed import Column, kept

Columns = dict[str, Sequence[Any]]

_PROMPT, _ANSWER = "prompt", "answer"  # the defaults of data.prompt_column and data.answer_column
_GOLD = "reward_model.ground_truth"
_PLAIN = (str, bool, int, float, decimal.Decimal, fractions.Fraction, datetime.date, datetime.time, uuid.UUID)


def recognise(columns: Columns, cfg: DataConfig) -> tuple[Columns, DataConfig, list[str]]:
    """(columns, ``cfg`` with the column names that hold, what to say about it).

    Only names that were left at their defaults and are no column are looked for elsewhere.
    """
    said = []
    name = next((name for name in ("messages", "conversations") if name in columns), None)
    if cfg.prompt_column == _PROMPT and _PROMPT not in columns and name is not None:
        columns, dropped = _split_messages(columns, name, cfg)
        words = f"each conversation in `{name}`{' up to its last assistant message' if dropped else ''}"
        said.append(f"prompts are {words}")
        if cfg.answer_column == _ANSWER and _ANSWER in columns and dropped == "answers":
            said.append("the last assistant messages are the answers")
    if cfg.answer_column == _ANSWER and _ANSWER not in columns:
        if "completion" in columns:
            columns = columns | {_ANSWER: kept(map(_completion, columns["completion"]))}
            said.append("answers are read from `completion`")
        elif has(columns, _GOLD):
            cfg = replace(cfg, answer_column=_GOLD)
            said.append(f"answers are read from {_GOLD} (verl's layout)")
    return columns, cfg, said


def has(columns: Columns, name: str) -> bool:
    """Whether ``name`` is a column, or the path of a value inside one (``reward_model.ground_truth``)."""
    return name in columns or _inside(columns, name) is not None


def column(columns: Mapping[str, Sequence[Any]], name: str) -> Sequence[Any] | None:
    """The column ``name``, or the values at such a path (None in a row without); None: no such column."""
    return columns[name] if name in columns else _inside(columns, name)


_OTHERS = {  # what other data sets call them
    "prompt": ("question", "problem", "instruction", "query", "input", "text"),
    "answer": ("solution", "output", "response", "target", "label", "expected_answer", "final_answer"),
}


def not_found(columns: Mapping[str, Sequence[Any]], name: str) -> str:
    """The end of a sentence: what there is instead of the column ``name``."""
    paths = [*columns, *(path for head in columns for path in _paths(head, columns[head]))]
    close = difflib.get_close_matches(name, paths, n=1) or [p for p in _OTHERS.get(name, ()) if p in columns]
    inside = [path for path in paths if path.split(".")[-1] == name]
    hint = f" (did you mean {(inside or close)[0]}?)" if inside or close else ""
    return f"it has {', '.join(columns) or 'no columns'}{hint}"


def text_of(cell: Any, name: str) -> tuple[str | None, str | None]:
    """(a cell as the text of an answer or an id, None where it is missing; what is wrong with it, or None).

    Text, numbers, dates and truth values are written as Python writes them. A list or an array of one such
    value is that value. Anything else has no one text: several values, an object, bytes.
    """
    if hasattr(cell, "tolist") and not isinstance(cell, _PLAIN):  # a NumPy array or number
        cell = cell.tolist()
    if isinstance(cell, (list, tuple)) and len(cell) == 1 and not isinstance(cell[0], (list, tuple, dict)):
        return text_of(cell[0], name)
    if cell is None or (isinstance(cell, (float, decimal.Decimal)) and cell != cell):
        return None, None
    if isinstance(cell, _PLAIN):
        return str(cell), None
    if isinstance(cell, (list, tuple)):
        what = "is an empty list"
        if cell:
            what = f"is a list of {len(cell)} {'objects' if isinstance(cell[0], dict) else 'values'}"
        return None, (
            f"{what}, not one text or number; keep one, or rename the column, set data.answer_column=null "
            "and let the reward read it under its new name"
        )
    if isinstance(cell, dict):
        inside = [f"{name}.{key}" for key, value in cell.items() if text_of(value, name)[0] is not None]
        fix = f"name the value inside it, such as {' or '.join(inside[:3])}" if inside else "give it as text"
        return None, f"is an object with {', '.join(map(str, cell)) or 'no keys'}, not text; {fix}"
    return None, f"is of type {type(cell).__name__}, not text or a number; write it as text"


def whole_numbers(cells: Sequence[Any]) -> Sequence[Any]:
    """Cells of a column with gaps: whole floats as integers when every number is one.

    pandas and Arrow turn a column of integers into floats where a value is missing, and the answer 4 is
    not the text 4.0.
    """
    if any(cell is not None and not isinstance(cell, float) for cell in cells):
        return cells
    gaps = any(cell is None or cell != cell for cell in cells)
    if not gaps or not all(cell is None or cell != cell or cell.is_integer() for cell in cells):
        return cells
    return kept(int(cell) if cell is not None and cell == cell else None for cell in cells)


def _inside(columns: Mapping[str, Sequence[Any]], name: str) -> Sequence[Any] | None:
    heads = [head for head in columns if name.startswith(f"{head}.")]
    if not heads:
        return None
    head = max(heads, key=len)
    steps = name[len(head) + 1 :].split(".")
    found = kept(_walk(cell, steps) for cell in columns[head])
    return found if any(value is not None for value in found) else None


def _walk(value: Any, steps: list[str]) -> Any:
    for step in steps:
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _paths(head: str, cells: Sequence[Any]) -> Iterable[str]:
    first = next((cell for cell in cells if cell is not None), None)
    return [f"{head}.{key}" for key in first] if isinstance(first, dict) else []


def _split_messages(columns: Columns, name: str, cfg: DataConfig) -> tuple[Columns, str]:
    """Columns with ``prompt`` (and ``answer``, where there is none) from ``messages``; what was cut off."""
    prompts, answers = Column(), Column()
    systems = columns.get("system", []) if name == "conversations" else []
    cut_off = False
    for i, cell in enumerate(columns[name]):
        with contextlib.suppress(ValueError):  # said with its row, later
            cell = chats.read_prompt(cell)
            system = systems[i] if i < len(systems) else None  # ShareGPT has it in a column
            if isinstance(system, str) and system.strip() and isinstance(cell, list):
                begun = cell[0]["role"] == "system"
                cell = cell if begun else [{"role": "system", "content": system}, *cell]
        last = cell[-1] if isinstance(cell, list) and cell and isinstance(cell[-1], dict) else {}
        cut = last.get("role") == "assistant" and len(cell) > 1
        prompts.add([cell[:-1] if cut else cell])
        answer = _content(last.get("content")) if cut else None
        answers.add([answer])
        cut_off = cut_off or answer is not None
    made = columns | {_PROMPT: prompts.done()}
    if cut_off and cfg.answer_column == _ANSWER and _ANSWER not in columns and not has(columns, _GOLD):
        return made | {_ANSWER: answers.done()}, "answers"
    return made, "messages" if cut_off else ""


def _completion(cell: Any) -> Any:
    """The text of a completion; messages that are not one assistant message stay, and are refused."""
    if isinstance(cell, list) and len(cell) == 1 and isinstance(cell[0], dict):
        return _content(cell[0].get("content"))
    return cell


def _content(content: Any) -> Any:
    """The text of a message, also where it is a list of text parts; anything else as it is."""
    parts = content if isinstance(content, list) else []
    texts = [
        str(part.get("text", "")) for part in parts if isinstance(part, dict) and part.get("type") == "text"
    ]
    return "".join(texts) if texts and len(texts) == len(parts) else content


def need(columns: Columns, name: str, setting: str, spec: str) -> Sequence[Any]:
    """`column`, or SaerlError naming the setting."""
    found = column(columns, name)
    if found is None:
        none = ", or null where there are no answers" if setting == "data.answer_column" else ""
        raise SaerlError(f"{spec} has no column {name!r} ({setting}{none}); {not_found(columns, name)}")
    return found
