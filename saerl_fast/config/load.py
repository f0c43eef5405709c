"""A config from a YAML file and ``key.sub=value`` overrides, and the list of all settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from saerl_fast.config.fields import Given, from_dict, to_dict, unknown, walk
from saerl_fast.config.tree import Config
from saerl_fast.errors import SaerlError
from saerl_fast.hub import at_home

Overrides = list[str] | tuple[str, ...]


def load_config(path: str | Path | None = None, overrides: Overrides = ()) -> Config:
    """Read a YAML file (or none) and apply ``key.sub=value`` overrides, in order.

    Raises SaerlError on a missing file, an unknown key and a value of the wrong type or out of range.
    """
    try:
        import yaml
    except ImportError:
        raise SaerlError(
            "the commands need more than the kernels do; "
            'run `pip install -e ".[all]"` in the clone of saerl-fast'
        ) from None

    tree: dict[str, Any] = {}
    if path is not None:
        file = Path(path)
        if not file.exists():
            raise SaerlError(f"config file {file} does not exist; pass an existing YAML file to --config")
        try:
            text = file.read_text(encoding="utf-8")
            loaded, tree_of_nodes = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
        except OSError as err:
            raise SaerlError(f"config file {file} cannot be read: {err.strerror}") from None
        except RecursionError:
            raise SaerlError(f"config file {file} is nested too deeply to be read; flatten it") from None
        except (yaml.YAMLError, ValueError) as err:  # no UTF-8, a date such as 2001-99-99
            raise SaerlError(f"config file {file} is not valid YAML: {' '.join(str(err).split())}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise SaerlError(f"config file {file} must hold sections, not a {type(loaded).__name__}")
        _check_nodes(tree_of_nodes, file)
        tree = loaded or {}
    config = from_dict(Config, _override(tree, overrides))
    if config.run_dir.startswith("~"):  # no shell has seen it
        config.run_dir = str(at_home(config.run_dir))
    return config


def _check_nodes(node: Any, file: Path, seen: set[int] | None = None) -> None:
    """SaerlError for what YAML reads in its own way: a key twice in one mapping, of which it keeps the last,
    one with dots, and the whole numbers 010 (8) and 1:30 (90)."""
    seen = set() if seen is None else seen
    if getattr(node, "tag", "").endswith(":int") and re.match(r"[-+]?0[0-7_]|.*:", node.value):
        raise SaerlError(
            f"config file {file} holds {node.value}, which YAML reads as another number; write it in decimals"
        )
    if not isinstance(getattr(node, "value", None), list) or id(node) in seen:
        return
    seen.add(id(node))
    pairs = node.value if node.id == "mapping" else []
    keys = [key.value for key, _ in pairs if isinstance(key.value, str)]
    for i, key in enumerate(keys):
        if key in keys[:i] and key != "<<":
            raise SaerlError(f"config file {file} has the key {key!r} twice in one section; keep one of them")
        if "." in key and len(seen) == 1:
            fix = ": {".join(key.split(".")) + ": VALUE" + "}" * key.count(".")
            raise SaerlError(f"config file {file} has the key {key!r}; write it in its section, as {fix}")
    for child in [value for _, value in pairs] or node.value:
        _check_nodes(child, file, seen)


def apply_overrides(config: Config, overrides: Overrides) -> Config:
    """A copy of ``config`` with ``key.sub=value`` items applied in order; errors as in `load_config`."""
    return from_dict(Config, _override(to_dict(config), overrides))


def _override(tree: dict[str, Any], overrides: Overrides) -> dict[str, Any]:
    for item in overrides:
        if not isinstance(item, str):
            raise SaerlError(f"override {item!r} is not of the form key.sub=value")
        key, sep, text = item.partition("=")
        if not sep or not key:
            raise SaerlError(f"override {item!r} is not of the form key.sub=value")
        *parents, leaf = key.split(".")
        node = tree
        for name in parents:
            if node.get(name) is None:  # absent, or an empty section of the file
                node[name] = {}
            child = node[name]
            if not isinstance(child, dict):
                raise SaerlError(f"override {item!r}: {name!r} is a value, not a section")
            node = child
        node[leaf] = Given(text)
    return tree


def describe(place: str = "") -> str:
    """One line for each setting in the section or key ``place``: default, meaning and range."""
    lines = []
    for key, cls, name in walk(Config):
        if f"{key}.".startswith(f"{place}." if place else ""):
            default = getattr(cls(), name)
            shown = ",".join(map(str, default)) if isinstance(default, (list, tuple)) else default
            shown = "null" if shown is None else str(shown).lower() if isinstance(shown, bool) else shown
            lines.append(f"{key}={shown}  # {cls.rules[name].notes(cls.types[name])}")
    if not lines:
        raise SaerlError(unknown(place, Config))
    return "\n".join(lines)
