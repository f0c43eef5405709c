"""Prompts that repeat others: the same text, the same but for its numbers, and near-copies (`near`)."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from saerl_fast.records.spilled import (
    arange,
    by_block,
    each,
    first_equal,
    firsts,
    flattened,
    rows_where,
    slices,
    taken,
)
from saerl_fast.signals.features import Features
from saerl_fast.signals.near import NearCopies
from saerl_fast.signals.text import NUMBER

log = logging.getLogger(__name__)
NAMED = 5  # copies that a message names
GROUPED = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")  # the digits of a number in threes
UNSEEN = str.maketrans("", "", "\u00ad\u200b\u200e\u200f\u2060\ufeff")  # soft hyphen, zero width, direction
WRITTEN = re.compile(r"-?\d{1,40}(?:\.\d{1,40}|/(\d{1,40}))?")  # no powers, whose numbers are of any size


class Copies(NamedTuple):
    """``of`` int32 [n]: the row that each row repeats, -1 for a row that stands for itself; metrics."""

    of: np.ndarray
    metrics: dict[str, Any]


def find_copies(
    X: Features,
    texts: Sequence[str],
    answers: Sequence[Any],
    ids: Sequence[str],
    *,
    near: float = 0.8,
    seed: int = 0,
) -> Copies:
    """Which of the prompts ``texts`` repeat another one; ``X``: their pooled SAE features, unweighted.

    ``near``: the least cosine of near-copies; at 1 none are looked for. Of equal texts, the first stands for
    all. Metrics: ``rows`` have a text that occurs before (`same_text`); ``conflicting`` texts have
    answers that differ, ``conflicts`` names their rows; ``renumbered`` rows repeat an earlier text with other
    numbers; ``near`` rows are further near-copies, ``examples`` names some; ``unsure`` rows had more
    neighbours than were looked at; ``recall``, in large pools: the share of the near-copies of some rows that
    were found by hashes (see `near`), else None.
    """
    of = same_text(texts)
    own = firsts(of)
    found: dict[str, Any] = {"rows": len(of) - len(own)} | _conflicts(of, answers, ids)
    shapes = first_equal(NUMBER.sub("0", _folded(texts[i])) for i in each(own))
    kept = firsts(shapes)
    found["renumbered"] = len(own) - len(kept)
    for part in slices(len(own)):
        of[own[part]] = own[shapes[part]]
    found |= {"near": 0, "examples": None, "unsure": 0, "recall": None}
    if near < 1:
        rows = taken(own, kept)
        copies = NearCopies(X, rows, texts, near, seed)
        root = copies.groups.flat()
        for part in slices(len(rows)):
            of[rows[part]] = rows[root[part]]
        found |= {"near": len(copies.pairs), "unsure": copies.unsure, "recall": copies.recall}
        found["examples"] = ", ".join(f"{ids[a]} ~ {ids[b]}" for a, b in copies.pairs[:NAMED]) or None
    of = flattened(of)
    if found["rows"]:
        log.warning("%d of %d prompts repeat an earlier prompt's text", found["rows"], len(texts))
    if found["conflicting"]:
        log.warning(
            "%d prompts occur with answers that differ, so unless those mean the same, one is wrong; ids: %s",
            found["conflicting"],
            found["conflicts"],
        )
    first = by_block(of.__getitem__, len(of), np.int32)
    first[firsts(of)] = -1
    return Copies(first, found)


def same_text(texts: Iterable[str]) -> np.ndarray:
    """int64 [n]: the first row whose text is the same but for spaces, case and what nobody sees."""
    return first_equal(map(_folded, texts))


def _folded(text: Any) -> str:
    """A text without what does not make it another: case, how its words are spaced and its accents encoded,
    and characters that nobody sees."""
    text = str(text)
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(UNSEEN)
    return " ".join(text.lower().split())


def _meant(answer: Any) -> Fraction | str | None:
    """An answer but for its look and how a number is written; None where it is unknown."""
    if answer is None:
        return None
    text = _folded(answer).strip("$ .")
    plain = text.replace(",", "") if GROUPED.fullmatch(text) else text
    number = WRITTEN.fullmatch(plain)
    return Fraction(plain) if number and (number[1] is None or int(number[1])) else text


def _conflicts(same: np.ndarray, answers: Sequence[Any], ids: Sequence[str]) -> dict[str, Any]:
    """How many texts have several answers, and whose they are."""
    later = rows_where(lambda part: same[part] != np.arange(part.start, part.stop), len(same))
    apart, stands = np.zeros(len(same), dtype=bool), arange(len(same))
    for row, first in zip(each(later), each(taken(same, later)), strict=True):
        one, other = _meant(answers[int(stands[first])]), _meant(answers[row])
        if one is None:  # the first answer that is known stands for all
            stands[first] = row
        apart[first] |= None not in (one, other) and one != other
    named = []
    for first in np.flatnonzero(apart)[:NAMED].tolist():
        rows = rows_where(lambda part: same[part] == first, len(same))[:NAMED]  # noqa: B023
        named.append(", ".join(str(ids[i]) for i in rows.tolist()))
    return {"conflicting": int(apart.sum()), "conflicts": "; ".join(named) or None}
