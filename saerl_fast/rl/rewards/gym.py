"""The reward ``reasoning-gym``: the package's own scorers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from saerl_fast.errors import SaerlError
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
            generator, gold = entry["metadata"]["source_dataset"], str(entry["answer"])
        except (TypeError, KeyError, ValueError):
            raise SaerlError(f"column rg_entry holds {str(text)[:80]!r}, not a reasoning-gym entry") from None
        candidate = final_answer(read_text(completion), gold)
        if candidate.endswith(".") and not gold.rstrip().endswith("."):
            candidate = candidate[:-1].rstrip(" \t*`$")
        scorer = _scorer(generator)
        try:
            scores.append(float(candidate != "" and scorer(candidate, entry) >= 0.99))
        except Exception:  # scorers raise on text they cannot parse (prime_factorization does)
            scores.append(0.0)
    return scores


@cache
def _scorer(generator: str) -> Callable[[str, dict[str, Any]], float]:
    try:
        import reasoning_gym as package
    except ImportError:
        raise SaerlError("the reward reasoning-gym needs its package; pip install reasoning-gym") from None
    try:
        return package.create_dataset(generator, seed=0, size=1).score_answer
    except ValueError:
        raise SaerlError(f"column rg_entry names the unknown reasoning-gym generator {generator!r}") from None
