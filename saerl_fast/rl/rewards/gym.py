"""The reward ``reasoning-gym``: the package's own scorers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from saerl_fast.errors import SaerlError
from saerl_fast.rl.judges import solved
from saerl_fast.rl.rewards.answers import final_answer, read_text
from saerl_fast.rl.rewards.columns import need


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
