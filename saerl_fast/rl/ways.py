"""How a model's completions are decoded, and the proof that what was sampled is what the model says.

Caches differ by family and by release of transformers: states without a sequence axis, windows, masks that
are read in one form only, states that left padding leaks into. Rather than know them all, the loop checks
its own results: the recorded log-probabilities of a few completions against one plain forward pass over the
whole sequence, without cache or padding. It does so the first time, and again whenever a prompt, a gap of
padding or a completion is longer than any that passed. What fails goes on in the next, more careful way,
with a line in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from saerl_fast.errors import SaerlError

log = logging.getLogger(__name__)

# Mean absolute difference of a row's log-probabilities, at temperature 1, that rounding explains. Ten random
# models, cached against plain: up to 3e-6 in float32, .013 in bfloat16, .015 in float16 (rounding that picks
# another expert). Wrong caches are off by .03 to 5.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


def tolerance(model: Any, temperature: float = 1.0) -> float:
    """Mean |difference| of log-probabilities at this temperature that rounding does not explain."""
    return TOLERANCE.get(next(model.parameters()).dtype, 0.1) / (temperature or 1.0)


@dataclass(frozen=True)
class Way:
    """One manner of decoding.

    ready: masks are handed over ready-made, [N, 1, 1, T]; equal: prompts of one length are decoded together,
    without padding; own: the cache is the one that the model makes itself; cached: there is one at all.
    """

    name: str
    ready: bool = False
    equal: bool = False
    own: bool = False
    cached: bool = True


LADDER = (
    Way("on a cache with ready-made masks", ready=True),
    Way("on a cache of padded prompts"),
    Way("on the model's own cache of padded prompts", own=True),
    Way("on a cache, prompts of equal length together", equal=True),
    Way("on the model's own cache, prompts of equal length together", own=True, equal=True),
    Way("without a cache (slow)", equal=True, cached=False),
)


class Proof:
    """For which sizes something has been compared with the plain forward pass and was equal."""

    def __init__(self) -> None:
        self.sizes: tuple[int, ...] = ()

    def covers(self, *sizes: int) -> bool:
        return len(self.sizes) == len(sizes) and all(a <= b for a, b in zip(sizes, self.sizes, strict=True))

    def extend(self, *sizes: int) -> None:
        old = self.sizes or (0,) * len(sizes)
        self.sizes = tuple(max(a, b) for a, b in zip(sizes, old, strict=True))


class Decoding:
    """The way that a model is decoded in, and what it has been proved for."""

    def __init__(self, ready: bool) -> None:
        """``ready``: whether masks may be handed over ready-made."""
        self.step = 0 if ready else 1
        self.proof = Proof()

    @property
    def way(self) -> Way:
        return LADDER[self.step]

    def give_up(self, model: Any, reason: str, error: Exception | None = None) -> None:
        """Go on in the next way; SaerlError when there is none."""
        name = type(_inner(model)).__name__
        if self.step + 1 == len(LADDER):
            raise SaerlError(
                f"{name} cannot be decoded: {reason}; use a decoder-only causal language model, "
                "or another version of transformers"
            ) from error
        before, self.step, self.proof = self.way, self.step + 1, Proof()
        log.warning("%s: decoding %s %s; now decoding %s", name, before.name, reason, self.way.name)


_decodings: WeakKeyDictionary[Any, Decoding] = WeakKeyDictionary()


def decoding(model: Any, ready: bool) -> Decoding:
    """The model's, kept for as long as the model is."""
    inner = _inner(model)
    if inner not in _decodings or (_decodings[inner].way.ready and not ready):
        _decodings[inner] = Decoding(ready)
    return _decodings[inner]


def telling_rows(starts: Tensor, lengths: Tensor) -> Tensor:
    """A few row numbers in which an error would show: int64, at most 4.

    ``starts``, ``lengths`` [N]: tokens of the prompt and of the completion. They are the longest completion,
    those of the shortest prompt (with most padding) and of the longest sequence, and the last row.
    """
    most = int(lengths.max()) + 1
    found = (lengths.argmax(), (lengths - starts * most).argmax(), (starts + lengths).argmax())
    return torch.stack([*found, torch.as_tensor(len(starts) - 1, device=starts.device)]).unique()


def short(error: Exception) -> str:
    """The first line of an error, for a log line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150].rstrip(".")


def equal_lengths(rows: Sequence[int], lens: Sequence[int], width: int) -> list[list[int]]:
    """``rows`` in batches of at most ``width`` prompts of one length; ``lens``: of every prompt."""
    by_length: dict[int, list[int]] = {}
    for row in rows:
        by_length.setdefault(lens[row], []).append(row)
    groups = (group for _, group in sorted(by_length.items(), reverse=True))
    return [group[i : i + width] for group in groups for i in range(0, len(group), width)]


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
