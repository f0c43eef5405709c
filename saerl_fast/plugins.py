"""Functions from outside: rewards, losses, schedules and data sources named ``module:function``.

``file.py:function`` works as well, and modules are looked for in the working folder too.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError, named

_imported: dict[str, str | None] = {}  # module -> hash of its file when it was imported here


def is_function(name: str) -> bool:
    """Whether ``name`` has the form ``module:function``."""
    module, _, function = name.rpartition(":")
    return bool(module) and function.isidentifier()


def check_name(name: str, known: Iterable[str], setting: str) -> None:
    """SaerlError, naming ``setting``, unless ``name`` is known or has the form ``module:function``."""
    known = list(known)
    if name in known or (isinstance(name, str) and is_function(name)):
        return
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    choice = f"choose one of {', '.join(known)} or module:function"
    raise SaerlError(f"{setting}={name!r} is unknown{hint}; {choice}")


def load_function(spec: str, setting: str, kind: type | None = None, takes: Sequence[str] = ()) -> Any:
    """The function that ``module:function`` names, or an object of the class ``kind``.

    Raises SaerlError, naming ``setting``, on a module that cannot be imported, a missing function, and one
    that cannot be called with as many arguments as ``takes`` names.
    """
    module_name, _, function = spec.rpartition(":")
    _look_here()
    try:
        if module_name.endswith(".py"):
            path = Path(module_name)
            if not path.is_file():
                raise SaerlError(f"{setting}={spec}: {module_name} does not exist; give file.py:function")
            found = importlib.util.spec_from_file_location(path.stem, path)
            assert found is not None and found.loader is not None
            module = importlib.util.module_from_spec(found)
            sys.modules.setdefault(path.stem, module)
            found.loader.exec_module(module)
        else:
            if module_name not in sys.modules or module_name not in _imported:
                _imported[module_name] = _digest(module_name)
            module = importlib.import_module(module_name)
    except SaerlError:
        raise
    except (Exception, SystemExit) as err:  # user code runs on import
        raise SaerlError(f"{setting}={spec}: importing {module_name} raised {named(err)}") from err
    target = getattr(module, function, None)
    if not callable(target) and (kind is None or not isinstance(target, kind)):
        public = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        has = ", ".join(public) or "none"
        raise SaerlError(f"{setting}={spec}: {module_name} has no function {function!r}; it has {has}")
    try:
        if takes and callable(target):
            inspect.signature(target).bind(*takes)
    except TypeError as err:
        raise SaerlError(f"{setting}={spec} must take ({', '.join(takes)}): {err}") from None
    except ValueError:  # one of C's, without a signature
        pass
    return target


def call(what: str, made: Callable[[], Any], let: type[Exception] = SaerlError) -> Any:
    """``made()``; what it raises becomes a SaerlError about ``what``, an exception of type ``let`` aside."""
    try:
        return made()
    except (SaerlError, let):
        raise
    except (Exception, SystemExit) as err:  # whatever a user's function raises
        raise SaerlError(f"{what} raised {named(err)}{_place(err)}; mend it") from err


def source_digest(spec: str) -> str | None:
    """A hash of the file that holds the function ``spec`` and of those that it imports from its own folder,
    its package or the working folder; None where that file is not found.

    SaerlError for a module that this process has imported from another content: what runs is not what the
    file says now.
    """
    module_name = spec.rpartition(":")[0]
    found = _digest(module_name)
    if module_name in sys.modules and _imported.get(module_name, found) != found:
        raise SaerlError(f"{spec} was changed after this process had read it; start the command again")
    return found


def _digest(module_name: str) -> str | None:
    _look_here()
    try:
        if not module_name.endswith(".py"):
            found = importlib.util.find_spec(module_name)
            module_name = (found and found.origin) or ""
        hashes = [hashlib.sha256(file.read_bytes()) for file in _sources(Path(module_name))]
        if len(hashes) == 1:
            return hashes[0].hexdigest()
        return hashlib.sha256(b"".join(found.digest() for found in hashes)).hexdigest()
    except Exception:  # a missing module or a broken package: `load_function` says so
        return None


def _sources(file: Path) -> list[Path]:
    """``file``, and what it and they import from the folder that it, or its top package, is in, or from the
    working folder: not what is installed, and not this package."""
    file = file.absolute()
    root = file.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    found = [file]
    for one in found:
        if {"site-packages", "dist-packages"} & {*one.parts}:
            continue
        for level, name in sorted(_imports(one.read_bytes())):
            parts = name.split(".") if name else []
            if not level and parts[0] in ("saerl_fast", "saerl_kernels"):
                continue
            for base in [one.parents[level - 1]] if level else [root, Path.cwd()]:
                for depth in range(1, len(parts) + 1):
                    at = base.joinpath(*parts[:depth])
                    for path in (at.with_suffix(".py"), at / "__init__.py"):
                        found += [path] * (path not in found and path.is_file())
    return found


@functools.lru_cache
def _imports(text: bytes) -> frozenset[tuple[int, str]]:
    """The modules that a source may import, each as its level (0: absolute) and its name."""
    found: set[tuple[int, str]] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.level, ".".join(filter(None, (node.module, alias.name)))) for alias in node.names}
    return frozenset(found)


def _look_here() -> None:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _place(err: BaseException) -> str:
    """`` (file line n)`` of the innermost frame that is the user's: not installed, and none of ours."""
    ours = str(Path(__file__).parent)
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(err.__traceback__)]
    own = [
        (file, line)
        for file, line in frames
        if not file.startswith((ours, "<", sys.base_prefix)) and "site-packages" not in file
    ]
    return f" ({own[-1][0]} line {own[-1][1]})" if own else ""
