"""Calling a reward function, and checking what it answers.

A function is called as TRL's GRPOTrainer calls it, with keyword arguments: ``prompts`` and ``completions``
(text, or chat messages where the pool's prompts are chats), the pool's columns, ``completion_ids`` (token ids
of each completion), ``trainer_state`` (a ``State``), ``log_extra(name, values)`` (a value for each
completion, into rollouts.jsonl) and ``log_metric(name, value)`` (a number, into metrics.jsonl). A function
without ``**kwargs`` gets those that it names. It may be async. None means "not a row for me": that completion
is left out of the mean reward, its group's advantages and the pass rates.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.rl.interrupt import TimeUp, call_within

Reward = Callable[..., Any]
LARGEST = 1e30  # of a reward: the loss is computed in float32
OWN_NAMES = ("completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclass
class State:
    """What a reward may know of the run, under the names that transformers' TrainerState has."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0


@dataclass
class Notes:
    """What reward functions logged: lists by completion, numbers, and what each of several rewards paid."""

    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, list[float]] = field(default_factory=dict)

    def add(self, other: Notes) -> None:
        """Append another call's notes."""
        for kind in ("extra", "metrics", "parts"):
            for name, values in getattr(other, kind).items():
                getattr(self, kind).setdefault(name, []).extend(values)

    def means(self) -> dict[str, dict[str, float]]:
        """For a row of the log: the mean of each metric, and of each of several rewards."""
        made: dict[str, dict[str, float]] = {}
        for name, of in (("reward_parts", self.parts), ("reward_metrics", self.metrics)):
            known = {key: [v for v in values if not math.isnan(v)] for key, values in of.items()}
            if known:
                made[name] = {key: float(np.mean(v)) if v else math.nan for key, v in known.items()}
        return made


@dataclass
class Together:
    """Several reward functions as one: the weighted sum of those that judge a completion."""

    parts: list[Reward]
    weights: list[float]

    def __post_init__(self) -> None:
        self.__name__ = "+".join(name_of(part) for part in self.parts)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        own = {key: columns.pop(key) for key in OWN_NAMES if key in columns}
        scores = [_scores(part, prompts, completions, columns, own) for part in self.parts]
        return [None if math.isnan(v) else v for v in self.total(scores).tolist()]

    def total(self, scores: Sequence[np.ndarray]) -> np.ndarray:
        """float64 [n]: the weighted sum, NaN where no part judges."""
        table = np.stack(scores)
        total = np.nansum(table * np.array(self.weights)[:, None], axis=0)
        return np.where(np.isnan(table).all(0), np.nan, total)


def with_timeout(fn: Reward, seconds: float) -> Reward:
    """``fn``, except that a call of more than ``seconds`` (0: no limit) ends with a SaerlError."""
    if not seconds:
        return fn
    if isinstance(fn, Together):
        return Together([with_timeout(part, seconds) for part in fn.parts], fn.weights)

    @functools.wraps(fn)
    def limited(**arguments: Any) -> Any:
        try:
            return call_within(seconds, lambda: _settle(fn(**arguments)))
        except TimeUp:
            raise SaerlError(
                f"reward {name_of(fn)} took more than train.reward_timeout={seconds:g} s for "
                f"{len(arguments['completions'])} completions; mend it or raise the limit"
            ) from None

    limited.__name__ = name_of(fn)
    return limited


def score_rewards(
    fn: Reward,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    *,
    ids: Sequence[Sequence[int]] | None = None,
    finished: Sequence[bool] | None = None,
    state: State | None = None,
    notes: Notes | None = None,
) -> np.ndarray:
    """float64 [n]: ``fn`` called on n completions, and its answer checked; NaN where it said None.

    ``ids``: token ids of the completions. ``finished``: which ended by themselves; the built-in rewards pay
    nothing for the others (None: all are judged). ``state`` and ``notes``: what it may read and log.
    SaerlError names the function, its file and line when it raises, and the completion when it returns
    another length or anything but finite numbers and None.
    """
    n = len(completions)
    uneven = [key for key, column in columns.items() if len(column) != n]
    if uneven or len(prompts) != n:
        what = f"column {uneven[0]!r}" if uneven else "the list of prompts"
        raise SaerlError(f"{what} must have one row for each of the {n} completions")
    taken = [key for key in columns if key in OWN_NAMES]
    if taken:
        raise SaerlError(f"the pool's column {taken[0]!r} has a name that rewards are given; rename it")
    passed = {k: list(v) for k, v in columns.items() if k not in ("prompts", "completions", "prompt")}
    noted = notes if notes is not None else Notes()

    def log_extra(name: str, values: Sequence[Any]) -> None:
        noted.extra.setdefault(str(name), []).extend(values)

    def log_metric(name: str, value: float) -> None:
        noted.metrics.setdefault(str(name), []).append(float(value))

    own = {
        "completion_ids": [list(row) for row in ids] if ids is not None else [[] for _ in range(n)],
        "trainer_state": state or State(),
        "log_extra": log_extra,
        "log_metric": log_metric,
    }
    parts = fn.parts if isinstance(fn, Together) else [fn]
    scores = []
    for part in parts:
        found = _scores(part, prompts, completions, passed, own)
        if finished is not None and getattr(part, "built_in", False):
            found = np.where(np.asarray(finished, dtype=bool), found, 0.0)
        scores.append(found)
    if not isinstance(fn, Together):
        return scores[0]
    for i, (part, found) in enumerate(zip(parts, scores, strict=True)):
        name = name_of(part)
        same_name = sum(name_of(other) == name for other in parts[:i])
        noted.parts.setdefault(f"{name}-{same_name + 1}" if same_name else name, []).extend(found.tolist())
    return fn.total(scores)


def _scores(
    fn: Reward,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
    own: Mapping[str, Any],
) -> np.ndarray:
    """One function's answer as float64 [n], NaN for None."""
    name = name_of(fn)
    given = {"prompts": list(prompts), "completions": list(completions), **columns, **own}
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        raw = _settle(fn(**_accepted(fn, given)))
        if isinstance(raw, (str, bytes, Mapping, set, frozenset)) or not _is_list(raw):
            raise _NoList
        values = list(raw)
    except _NoList:
        raise SaerlError(f"reward {name} returned a {type(raw).__name__}; return a list of numbers") from None
    except SaerlError:
        raise
    except SystemExit as err:
        raise SaerlError(f"reward {name} called exit({_code(err)}){_where(fn, err)}; mend it") from err
    except Exception as err:  # whatever a user's function raises
        raise SaerlError(
            f"reward {name} raised {type(err).__name__}: {first_line(err)}{_where(fn, err)}; mend it"
        ) from err
    finally:
        torch.set_grad_enabled(grad)  # what a function sets for itself must not reach the training
        torch.set_default_dtype(dtype)
    if len(values) != len(completions):
        raise SaerlError(f"reward {name} returned {len(values)} values for {len(completions)} completions")
    scores = np.empty(len(values))
    for i, value in enumerate(values):
        scores[i] = _number(value, name, i, completions[i])
    return scores


class _NoList(Exception):
    pass


def _is_list(raw: Any) -> bool:
    return hasattr(raw, "__iter__") and getattr(raw, "ndim", 1) > 0


def _number(value: Any, name: str, i: int, completion: Any) -> float:
    if value is None:
        return math.nan
    why = "return a number, or None for a row that it does not judge"
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        number = float(value)
        if math.isfinite(number) and abs(number) <= LARGEST:
            return number
        why = f"return finite numbers of at most {LARGEST:g}"
    except OverflowError:
        why = f"return finite numbers of at most {LARGEST:g}"
    except (TypeError, ValueError, RuntimeError):
        pass
    try:
        shown = " ".join(repr(value).split())
    except ValueError:  # an int of more digits than Python writes
        shown = f"an int of {value.bit_length()} bits"
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    text = completion if isinstance(completion, str) else str(completion[-1]["content"])
    raise SaerlError(f"reward {name} returned {shown} for completion {i} ({_short(text)}); {why}")


def _accepted(fn: Reward, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that ``fn`` takes: all with ``**kwargs`` or an unknown signature, else those it names."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return given
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return given
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {key: value for key, value in given.items() if key in names}


def _settle(raw: Any) -> Any:
    """``raw``, or what it becomes when it is awaited; also where an event loop runs already (a notebook)."""
    if not inspect.isawaitable(raw):
        return raw

    async def wait() -> Any:
        return await raw

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    outcome: list[Any] = [None, None]

    def work() -> None:
        try:
            outcome[0] = asyncio.run(wait())
        except BaseException as err:  # carried over to the thread that waits
            outcome[1] = err

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join()
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def is_built_in(fn: Reward) -> bool:
    """Whether ``fn``, or one of several, reads answers by this package's own rules."""
    parts = fn.parts if isinstance(fn, Together) else [fn]
    return any(getattr(part, "built_in", False) for part in parts)


def name_of(fn: Reward) -> str:
    """What messages call a reward function."""
    return str(getattr(fn, "reward_name", None) or getattr(fn, "__name__", type(fn).__name__))


def first_line(err: BaseException) -> str:
    """An exception's message in one line that is safe to print."""
    line = (str(err).strip().splitlines() or ["no message"])[0]
    return "".join(c if c.isprintable() else " " for c in line)[:300]


def _where(fn: Reward, err: BaseException) -> str:
    """`` (file line n)`` of the user's code that raised; its definition when the call itself failed."""
    inner = inspect.unwrap(fn)
    inner = inner.func if isinstance(inner, functools.partial) else inner
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    file = getattr(code, "co_filename", None)
    frames = traceback.extract_tb(err.__traceback__)
    mine = [frame for frame in frames if frame.filename == file]
    if mine:
        return f" ({mine[-1].filename} line {mine[-1].lineno})"
    if code is None:
        return ""
    return f" ({file} line {code.co_firstlineno})"


def _code(err: SystemExit) -> str:
    return "" if err.code is None else _short(str(err.code))


def _short(text: str, most: int = 40) -> str:
    text = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return repr(text if len(text) <= most else text[: most - 3] + "...")
