"""What the config tree is made of: fields that state their range, and sections that check what is assigned.

A value is read as its field's type (``"3e-6"`` is a float, ``"a,b"`` a list) and checked against its range
whenever it is assigned: by a constructor, ``dataclasses.replace``, a file, the command line or ``cfg.x = y``.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import math
import operator
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Union

from saerl_fast.config.names import place
from saerl_fast.errors import SaerlError
from saerl_fast.plugins import is_function

SEED: dict[str, Any] = {"at_least": 0, "at_most": 2**32 - 1}  # what scikit-learn takes
TEXT = (str, int, float, os.PathLike, datetime.date)  # YAML reads some names as numbers or dates
REQUIRED = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


class Setting(NamedTuple):
    """All that a field states about itself beside its type and default."""

    meaning: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    or_function: bool = False  # or module:function
    form: tuple[str, str] | None = None  # the pattern of the whole text, and what text must do to have it
    filled: bool = False  # text or a list that may not be empty
    distinct: bool = False  # a list without repeats
    result: bool | str = True  # whether a stage's output depends on it; "plan": from the plan on

    def range(self) -> str:
        """``at least 0 and below 1``, or empty."""
        limits = [(name, getattr(self, name)) for name in REQUIRED]
        return " and ".join(f"{name.replace('_', ' ')} {at}" for name, at in limits if at is not None)

    def notes(self, hint: Any) -> str:
        """Meaning, range or choices, and whether results depend on it, for a field of type ``hint``."""
        inner = next((a for a in typing.get_args(hint) if typing.get_origin(a) is Literal), hint)
        choices = typing.get_args(inner) if typing.get_origin(inner) is Literal else self.choices
        word = (
            "or"
            if choices and typing.get_origin(hint) in (Union, types.UnionType) and len(choices) == 1
            else "one of"
        )
        named = f"{word} {', '.join(choices)}" if choices else ""
        function = "or module:function" if self.or_function else ""
        kept = "" if self.result else "no part of the result"
        return "; ".join(filter(None, (self.meaning, self.range(), f"{named} {function}".strip(), kept)))

    def fault(self, value: Any) -> str | None:
        """What ``value``, of the right type, must do and does not."""
        items = value if isinstance(value, (list, tuple)) else [value]
        if self.filled and (not items or any(isinstance(item, str) and not item.strip() for item in items)):
            return "must not be empty"
        if self.distinct and len(set(items)) < len(items):
            return "must not name anything twice"
        for item in items:
            for name, holds in REQUIRED.items():
                limit = getattr(self, name)
                if limit is not None and not isinstance(item, str) and not holds(item, limit):
                    return f"{'must be' if items is not value else 'must hold numbers'} {self.range()}"
            if self.form and not re.fullmatch(self.form[0], item, re.DOTALL):
                return f"must {self.form[1]}"
        return None


def setting(default: Any, meaning: str, **rules: Any) -> Any:
    """A dataclass field; ``rules``: the other fields of :class:`Setting`."""
    metadata = {"setting": Setting(meaning, **rules)}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type) -> Any:
    """A dataclass field that holds a section."""
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass(eq=False)
class Section:
    """Base of the config's dataclasses. SaerlError, naming the full key, for an assignment that is wrong."""

    where: ClassVar[str]  # the section's place in the tree, as "plan.adaptive."
    types: ClassVar[dict[str, Any]]  # of all its fields
    rules: ClassVar[dict[str, Setting]]  # of those that are settings, not sections
    root: ClassVar[type[Section]]  # the class of the whole tree

    def __new__(cls, *args: Any, **given: Any) -> Section:  # before dataclasses' own word on unknown names
        for name, value in given.items():
            if name not in cls.types:
                key, seen = f"{cls.where}{name}", []
                while isinstance(value, dict) and value and id(value) not in seen:  # YAML: it may hold itself
                    seen.append(id(value))
                    name, value = next(iter(value.items()))
                    key += f".{name}"
                raise SaerlError(unknown(key, cls))
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        key, about = self.where + name, self.rules.get(name)
        if name not in self.types:
            raise SaerlError(unknown(key, type(self)))
        value = read(value, self.types[name], key, about)
        fault = about.fault(value) if about is not None and value is not None else None
        if fault:
            shown = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            raise SaerlError(f"{key}={shown} {fault}")
        before = dict(self.__dict__)
        self.__dict__[name] = value
        fault = self.conflict() if len(self.__dict__) == len(self.types) else None
        if fault:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise SaerlError(fault)

    def recheck(self) -> None:
        """SaerlError for a value changed in place (``cfg.compare.seeds.append(-3)``) that is wrong."""
        from_dict(type(self), to_dict(self))

    def conflict(self) -> str | None:
        """A sentence about settings that do not go together; asked once all are set."""
        return None


def name_sections(root: type[Section], cls: type[Section] | None = None, where: str = "") -> None:
    """Tell every section in the tree of ``root`` its place, and read its fields."""
    cls = cls or root
    cls.where, cls.root = where, root
    fields, hints = dataclasses.fields(cls), typing.get_type_hints(cls)
    cls.types = {field.name: hints[field.name] for field in fields}
    cls.rules = {field.name: field.metadata["setting"] for field in fields if field.metadata}
    for name, hint in cls.types.items():
        if is_section(hint):
            name_sections(root, hint, f"{where}{name}.")


def is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def walk(cls: type[Section]) -> Iterator[tuple[str, type[Section], str]]:
    """(full key, class, field name) of every setting in and below the section ``cls``."""
    for name, hint in cls.types.items():
        if is_section(hint):
            yield from walk(hint)
        else:
            yield cls.where + name, cls, name


def from_dict(cls: type[Section], tree: dict[Any, Any]) -> Any:
    """The inverse of :func:`to_dict` for the section ``cls``; SaerlError on unknown or wrong values."""
    return cls(**{str(name): value for name, value in tree.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """A config (or a section) as plain values, as written beside a run's results."""
    return dataclasses.asdict(config)


def unknown(key: str, cls: type[Section]) -> str:
    """The sentence about a key that does not exist, typed where the keys of ``cls`` are."""
    hint = place(key, [found for found, _, _ in walk(cls.root)]) or f"known keys: {', '.join(cls.types)}"
    return f"unknown config key {key}; {hint}"


@functools.cache
def _decimal() -> Any:
    """A YAML loader that reads 010 and 1:30 as text, not as 8 and 90."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    kinds = {f"tag:yaml.org,2002:{name}": name for name in ("int", "float")}
    Loader.yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag not in kinds]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    whole, rest = re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$"
    special = r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", whole, [*"-+0123456789"])
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rest + special), [*"-+0123456789."])
    return Loader


class Given(str):
    """The text of a ``key=value`` argument, read as YAML only where the field is not plain text."""

    def parsed(self) -> Any:
        import yaml

        try:
            return yaml.load(self, _decimal()) if self else ""
        except (yaml.YAMLError, ValueError, RecursionError):  # 2001-99-99 looks like a date
            return str(self)


RANGE = re.compile(r"(\d{1,9})\s*(?:-|:|\.\.+)\s*(\d{1,9})")
BLANKS = re.compile(r"[-+.\deE]+(\s+[-+.\deE]+)+")
COMMA = re.compile(r",(?![^\[\]]*\])")  # not those of a list inside an arm


def read(value: Any, hint: Any, key: str, about: Setting | None = None) -> Any:
    """``value`` as the field's type; PyYAML reads 3e-6 as a string, so numbers are parsed here too."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, Given):
        parsed = value.parsed()
        # Text stays as it is unless it is quoted: YAML would read {prompt} as a mapping, and drop line ends,
        # blanks at the end and what follows " #".
        optional = origin in (Union, types.UnionType) and str in args
        keep = hint is str or (optional and parsed is not None)
        quoted = isinstance(parsed, str) and value[:1] in ("'", '"')
        value = str(value) if keep and not quoted else parsed
    if is_section(hint):
        if value is None or isinstance(value, dict):
            return from_dict(hint, value or {})
        if isinstance(value, hint):
            return value
        shown = type(value).__name__ if isinstance(value, Section) else repr(value)
        first = next(iter(hint.types))
        raise SaerlError(
            f"{key} is a section, not a value (got {shown}); set its keys, such as {key}.{first}"
        )
    if origin is dict:
        if value in (None, ""):
            return {}
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise SaerlError(f"{key}={value!r} must be a mapping of names to values")
        return {name: _free(part) for name, part in value.items()}
    if isinstance(value, dict):
        raise SaerlError(
            f"{key} is one value, not a section (got {value!r}); write {key}=VALUE, in quotes or without the "
            "blank where it holds ': '"
        )
    if origin in (Union, types.UnionType):
        if any(typing.get_origin(arg) is Literal and value in typing.get_args(arg) for arg in args):
            return value  # a word in place of a number
        if type(None) in args and (value is None or (isinstance(value, str) and not value)):
            return None
        return read(value, next(a for a in args if a is not type(None)), key, about)
    if origin is Literal:
        return choose(value, args, key)
    try:
        if origin in (list, tuple):
            items = [part.strip() for part in COMMA.split(value)] if isinstance(value, str) else value
            items = [] if items == [""] else items if isinstance(items, (list, tuple)) else [items]
            if args[0] is int and (span := next(filter(None, map(RANGE.fullmatch, map(str, items))), None)):
                first, last = map(int, span.groups())
                meant = [*map(str, range(first, min(last + 1, first + 12)))] + ["..."] * (last > first + 11)
                fix = f"write {key}={','.join(meant or ['0', '1'])}"
                raise SaerlError(f"{key}={span[0]} is no list of numbers; {fix}")
            if args[0] in (int, float) and (
                span := next(filter(None, map(BLANKS.fullmatch, map(str, items))), None)
            ):
                raise SaerlError(f"{key}={span[0]} lacks commas; write {key}={','.join(span[0].split())}")
            found = [read(item, args[min(i, len(args) - 1)], key, about) for i, item in enumerate(items)]
            if origin is tuple and len(found) != len(args):
                raise ValueError
            return origin(found)
        if isinstance(value, bool) != (hint is bool) or value is None:
            raise ValueError
        if hint is int:
            return _whole(value)
        if hint is float:
            if not math.isfinite(float(value)):
                raise ValueError
            return float(value)
        if hint is str:
            if not isinstance(value, TEXT):
                raise ValueError
            if "\0" in str(value):
                raise SaerlError(f"{key}={value!r} holds a null character; remove it")
            if str(value) == "null":  # of a setting that may be null it is None
                raise SaerlError(f"{key} cannot be null; give a value, or leave it out")
            str(value).encode()  # what came from the command line may be bytes that are no UTF-8
            return choose(str(value), about.choices, key, about.or_function) if about else str(value)
    except SaerlError:  # of an item of a list
        raise
    except (ValueError, TypeError, OverflowError):
        wanted = getattr(hint, "__name__", None) if origin is None else str(hint)
        raise SaerlError(f"{key}={value!r} is not a valid {wanted}") from None
    return value


def _free(value: Any) -> Any:
    """A value of a mapping whose names are not ours, with what came from the command line read as YAML."""
    if isinstance(value, dict):
        return {name: _free(part) for name, part in value.items()}
    return value.parsed() if isinstance(value, Given) else value


def choose(value: Any, names: Sequence[Any], key: str, or_function: bool = False) -> Any:
    """``value`` if it is one of ``names`` (any, if there are none), or module:function where that is allowed.

    Whether the function exists is found out when it is loaded.
    """
    if not names or value in names or (or_function and is_function(value)):
        return value
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f"did you mean {close[0]}? C" if close else "c"
    known = ", ".join(map(str, names)) + (" or module:function" if or_function else "")
    raise SaerlError(f"{key}={value!r} is unknown; {hint}hoose one of {known}")


def _whole(value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = int(float(value))
        if number != float(value):
            raise ValueError from None
    if abs(number) >= 2**63:
        raise ValueError
    return number
