"""One reward function asked about some completions: its answer checked, its failures put into a sentence."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import math
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from saerl_fast.errors import SaerlError, named
from saerl_fast.rl.interrupt import TimeUp
from saerl_fast.rl.rewards.contain import Intact, contained

Reward = Callable[..., Any]
LARGEST = 1e12  # of a reward: squares of the gradient's entries are summed up in float32


@dataclass
class State:
    """What a reward may know of the run, under the names that transformers' TrainerState has."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0


@dataclass
class Rows:
    """What a reward is asked about: n completions and all that belongs to them."""

    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, list[Any]]
    ids: list[list[int]]  # token ids of the completions
    state: State = field(default_factory=State)

    def only(self, i: int) -> Rows:
        """Row ``i`` alone."""
        one = slice(i, i + 1)
        columns = {name: column[one] for name, column in self.columns.items()}
        return Rows(self.prompts[one], self.completions[one], columns, self.ids[one], self.state)


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


class Failed(SaerlError):
    """A reward that raised, returned no rewards or took too long.

    ``at``: the completion, where it is known. ``search``: whether to ask for single rows to find it.
    """

    def __init__(
        self, name: str, what: str, fix: str, where: str = "", at: str = "", search: bool = False
    ) -> None:
        super().__init__(name, what, fix, where, at, search)
        self.name, self.what, self.fix, self.where = name, what, fix, where
        self.at, self.search = at, search

    def __str__(self) -> str:
        return f"reward {self.name} {self.what}{self.at}{self.where}; {self.fix}"


def ask(fn: Reward, rows: Rows, notes: Notes) -> np.ndarray:
    """The rewards float64 [n] of n completions, NaN where ``fn`` said None.

    It is given copies. What it logs is added to ``notes``. Failed, naming its file and line, when it raises
    or returns anything but n numbers; the interpreter's state is put back either way.
    """
    n, noted = len(rows.completions), Notes()
    fail = functools.partial(Failed, name_of(fn))

    def log_extra(column: str, values: Any) -> None:  # TRL's names: they may be given as keywords
        if isinstance(values, (str, bytes, Mapping)) or not _is_list(values):
            what = f"gave log_extra({shown(column)}, ...) a {type(values).__name__}"
            raise fail(what, "give a list with one value for each completion", place(fn))
        noted.extra.setdefault(str(column), []).extend(values)

    def log_metric(name: str, value: float) -> None:
        try:
            noted.metrics.setdefault(str(name), []).append(float(value))
        except (TypeError, ValueError):
            raise fail(
                f"gave log_metric({shown(name)}, ...) {shown(value)}", "give a number", place(fn)
            ) from None

    given: dict[str, Any] = {"prompts": rows.prompts, "completions": rows.completions, **rows.columns}
    given = {key: _copied(value) for key, value in (given | {"completion_ids": rows.ids}).items()}
    given |= {"trainer_state": rows.state, "log_extra": log_extra, "log_metric": log_metric}
    if inspect.isclass(fn):
        fix = f"name an instance of it (scorer = {fn.__name__}() and file.py:scorer) or a function"
        raise fail("is a class", fix)
    try:
        with contained(), Intact():
            by_place, by_name = _accepted(fn, given, place(fn))
            with Intact():  # or its answer could not be read
                raw = fn(*by_place, **by_name)
            raw = _settle(raw)
            if isinstance(raw, (str, bytes, Mapping, set, frozenset)) or not _is_list(raw):
                raise fail(f"returned a {type(raw).__name__}", "return a list of numbers", place(fn))
            values = list(islice(raw, n + 1))  # it may have no end
            if len(values) != n:
                found = len(raw) if hasattr(raw, "__len__") else len(values) if len(values) < n else "more"
                what = f"returned {found} values for {n} completions"
                raise fail(what, "return one for each", place(fn))
            scores = np.array([_number(fn, value, i, rows) for i, value in enumerate(values)])
            _check_extra(fn, noted.extra, rows)
        notes.add(noted)
        return scores
    except (SaerlError, TimeUp):
        raise
    except KeyboardInterrupt as err:
        if _pressed(err):
            raise
        raise fail("raised KeyboardInterrupt", "mend it", place(fn, err), search=True) from err
    except SystemExit as err:
        code = "" if err.code is None else shown(err.code)
        raise fail(f"called exit({code})", "mend it", place(fn, err), search=True) from err
    except BaseException as err:  # whatever a user's function raises
        what = f"raised {named(err)}"
        raise fail(what, "mend it", place(fn, err), search=True) from err


def at(rows: Rows, i: int) -> str:
    """`` for completion i ('its text')``."""
    last = rows.completions[i]
    return f" for completion {i} ({shown(last if isinstance(last, str) else last[-1]['content'])})"


def _number(fn: Reward, value: Any, i: int, rows: Rows) -> float:
    if value is None:
        return math.nan
    why = "return a number, or None for a row that it does not judge"
    try:
        if isinstance(value, (str, bytes, complex, np.complexfloating)):
            raise TypeError
        number = float(value)
        if math.isfinite(number) and abs(number) <= LARGEST:
            return number
        why = f"return finite numbers of at most {LARGEST:g}"
    except OverflowError:
        why = f"return finite numbers of at most {LARGEST:g}"
    except Exception:  # an object may have a __float__ of its own
        pass
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an int of more digits than Python writes, say
        text = f"an int of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    text = "".join(c if c.isprintable() else " " for c in text)
    text = text if len(text) <= 60 else text[:57] + "..."
    raise Failed(name_of(fn), f"returned {text}", why, place(fn), at(rows, i))


def _is_list(raw: Any) -> bool:
    """Whether it has a value for each row; a table (DataFrame) has one for each column."""
    return hasattr(raw, "__iter__") and getattr(raw, "ndim", 1) > 0 and not hasattr(raw, "columns")


def _check_extra(fn: Reward, extra: dict[str, list[Any]], rows: Rows) -> None:
    """Make what a function logged fit for JSON, or raise Failed."""
    for column, values in extra.items():
        fail = functools.partial(Failed, name_of(fn))
        if len(values) != len(rows.completions):
            what = f"logged {len(values)} values as {shown(column)} for {len(rows.completions)} completions"
            raise fail(what, "log one for each", place(fn))
        for i, value in enumerate(values):
            values[i] = value.tolist() if hasattr(value, "tolist") else value
            try:
                json.dumps(values[i])
            except (TypeError, ValueError, RecursionError):
                what, fix = (
                    f"logged a {type(value).__name__} as {shown(column)}",
                    "log text, numbers or lists of them",
                )
                raise fail(what, fix, place(fn), at(rows, i)) from None


def _copied(value: Any) -> Any:
    """``value`` with lists and dicts of its own, so that a function that changes them changes no pool."""
    if isinstance(value, list):
        return [_copied(item) for item in value] if any(map(_nested, value)) else value.copy()
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def _nested(value: Any) -> bool:
    return isinstance(value, (list, dict))


def _accepted(fn: Reward, given: dict[str, Any], where: str) -> tuple[list[Any], dict[str, Any]]:
    """What ``fn`` takes by place and by name: all with ``**kwargs`` or an unknown signature, else what it
    names. Failed when it needs more."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return [], given
    needed = [
        p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.default is p.empty
    ]
    if absent := [p.name for p in needed if p.name not in given]:
        lists = ", ".join(name for name, value in given.items() if isinstance(value, list))
        fix = f"there are {lists}, each a list with one entry for each completion"
        raise Failed(name_of(fn), f"asks for {absent[0]!r}, which is not given", fix, where)
    by_place = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in given]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        names = given.keys() - by_place
    else:
        names = {
            p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        } & given.keys()
        if not names and any(p.kind is p.VAR_POSITIONAL for p in parameters):
            by_place = ["prompts", "completions"]
    return [given[name] for name in by_place], {key: given[key] for key in given if key in names}


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


def _pressed(err: KeyboardInterrupt) -> bool:
    """Whether a key was pressed: Python's own handler is at work, or ours raised it."""
    handler = signal.getsignal(signal.SIGINT)
    frames = [frame for frame, _ in traceback.walk_tb(err.__traceback__)]
    return handler is signal.default_int_handler or frames[-1].f_code is getattr(handler, "__code__", None)


def name_of(fn: Reward) -> str:
    """What messages call a reward function."""
    return str(getattr(fn, "reward_name", None) or getattr(fn, "__name__", type(fn).__name__))


def place(fn: Reward, err: BaseException | None = None, frames: list[tuple[str, int]] | None = None) -> str:
    """`` (file line n)`` of ``fn``: the innermost of ``frames`` or of where ``err`` came from that is in its
    file, else its definition."""
    inner = inspect.unwrap(fn)
    inner = inner.func if isinstance(inner, functools.partial) else inner
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    if code is None:
        return ""
    if err is not None:
        frames = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(err.__traceback__)][::-1]
    lines = [line for file, line in frames or [] if file == code.co_filename]
    return f" ({code.co_filename} line {(lines or [code.co_firstlineno])[0]})"


def shown(text: Any, most: int = 40) -> str:
    """The start of a text in quotes, in one line that is safe to print."""
    text = "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))
    return repr(text if len(text) <= most else text[: most - 3] + "...")
