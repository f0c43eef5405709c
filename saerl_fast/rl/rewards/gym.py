"""The reward ``reasoning-gym``: the package's own scorers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from saerl_fast.errors import SaerlError
from saerl_fast.rl.judges import solved
from saerl_fast.rl.rewards.answers import MARK, boxed, read_text, spoken
from saerl_fast.rl.rewards.columns import need

_REMARK = re.compile(r"[a-zA-Z]{2,}[,;]?\s+[a-zA-Z]{2,}.*[.:!?]\W*$")  # a line of prose


def reasoning_gym(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    r"""1.0 when reasoning-gym's own scorer gives full marks (its partial credit counts as 0).

    Needs the column ``rg_entry``. The candidate is \boxed{...}, else what is in <answer>, else what follows
    the last "Answer:", else the last line; for answers of several lines all that follows serves, less code
    fences and remarks.
    A full stop at its end counts as the sentence's where the reference answer ends without one.
    """
    scores = []
    for completion, text in zip(completions, need(columns, "rg_entry", "reasoning-gym"), strict=True):
        try:
            entry = json.loads(text)
            _, gold = entry["metadata"]["source_dataset"], str(entry["answer"])
        except (TypeError, KeyError, ValueError):
            raise SaerlError(f"column rg_entry holds {str(text)[:80]!r}, not a reasoning-gym entry") from None
        candidate = final_answer(read_text(completion), gold)
        if candidate.endswith(".") and not gold.rstrip().endswith("."):
            candidate = candidate[:-1].rstrip(" \t*`$")
        scores.append(float(candidate != "" and solved(candidate, text)))
    return scores


def final_answer(text: str, gold: str = "") -> str:
    r"""What a completion offers as its answer, as it is written: \boxed{...}, else after the last "Answer:"
    or <answer>, else its last line.

    Where ``gold`` has several lines (a grid), so has the answer: the lines after the mark, or the whole text,
    without a code fence around them and without remarks before and after.
    """
    text = spoken(text)
    grid = "\n" in gold.strip("\n")
    marks = list(MARK.finditer(text))
    inside = boxed(text)
    if inside is not None and not (grid and "\n" not in inside and marks):
        return inside
    rest = text[marks[-1].end() :] if marks else text
    rest = re.split(r"</answer>", rest, flags=re.IGNORECASE)[0]
    if grid:
        return _block(rest, gold)
    lines = [line for line in rest.splitlines() if line.strip(" \t*`_$")]
    if not lines:
        return ""
    return (lines[0] if marks else lines[-1]).strip(" \t*`$")


def _block(text: str, gold: str) -> str:
    """The lines of a grid in ``text``; blank lines and prose belong to it only where ``gold`` has such."""
    fences = re.findall(r"```[a-zA-Z]*[ \t]*\n(.*?)\n?[ \t]*```", text, re.DOTALL)
    if fences:
        return fences[-1].strip("\n")
    text = re.sub(r"^(?:\*+|[_`]+(?=[ \t]*\n))", "", text)
    text = text.lstrip(" \t") if text.lstrip(" \t")[:1] not in ("", "\n", "\r") else text
    lines = text.strip("\n").splitlines()
    prose = [bool(_REMARK.search(line)) for line in gold.splitlines()]
    if not any(prose):
        while lines and (_REMARK.search(lines[0]) or not lines[0].strip(" *_`")):
            lines.pop(0)
        end = next((i for i, line in enumerate(lines) if _REMARK.search(line)), len(lines))
        lines = lines[:end]
    if all(line.strip() for line in gold.strip("\n").splitlines()):
        blank = next((i for i, line in enumerate(lines) if not line.strip()), len(lines))
        lines = lines[:blank]
    return "\n".join(lines).rstrip("\n")
