"""Prompts that a function makes: reasoning-gym, and ``module:function`` of the user's.

    def rows(role, size, seed, argument=None):
        return [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(size)]

A source is called with keywords: ``role`` "train" or "eval"; ``size``, how many rows are asked for (data.size
or data.eval_size; another number is fine); ``seed``; and ``argument``, the text after @ in
module:function@argument, where there is one. It returns rows as dicts, a dict of equally long columns, or a
``datasets.Dataset``. The same arguments must give the same rows, and the two roles different prompts, unless
data.eval names another source. Columns are named as those of a file; ids are those of a column ``prompt_id``
where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from saerl_fast import plugins
from saerl_fast.errors import SaerlError
from saerl_fast.prompts import files, reasoning_gym

SOURCES: dict[str, Callable[..., Any]] = {"reasoning-gym": reasoning_gym.rows}


def is_source(spec: str) -> bool:
    """Whether a function makes the rows of ``spec``; else it is a file or a hub dataset."""
    name, colon, _ = spec.partition(":")
    function = spec.partition("@")[0]
    return bool(colon) and (name in SOURCES or (plugins.is_function(function) and not Path(spec).is_file()))


def make_rows(spec: str, setting: str, *, role: str, size: int, seed: int) -> files.Columns:
    """The columns of the source ``spec``; SaerlError, naming ``setting``, for anything but rows."""
    name, _, rest = spec.partition(":")
    function, _, argument = spec.partition("@")
    if name in SOURCES:
        source, argument = SOURCES[name], rest
    else:
        source = plugins.load_function(function, setting)
    more = {"argument": argument} if argument else {}
    what = f"{setting}={spec}"

    def made() -> Any:
        got = source(role=role, size=size, seed=seed, **more)
        if isinstance(getattr(got, "column_names", None), list):  # a datasets.Dataset
            return {name: got[name][:] for name in got.column_names}
        return list(got) if hasattr(got, "__next__") or isinstance(got, tuple) else got

    got = plugins.call(what, made)
    if isinstance(got, list) and all(isinstance(row, dict) for row in got):
        got = files.columns_of(got)
    if not isinstance(got, dict) or any(isinstance(column, (str, bytes, dict)) for column in got.values()):
        kind = "a list of other things" if isinstance(got, list) else f"a {type(got).__name__}"
        kind = "columns that are no lists" if isinstance(got, dict) else kind
        raise SaerlError(f"{what} returned {kind}; return a list of dicts, one a row, or a dict of columns")
    columns = plugins.call(what, lambda: {str(name): list(column) for name, column in got.items()})
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise SaerlError(f"{what} returned columns of different lengths ({lengths}); make them equal")
    if not any(lengths.values()):
        raise SaerlError(f"{what} returned no rows for role={role!r}; give it at least one prompt")
    return columns
