"""The borders to the disk: writing that cannot leave half a file, reading that says what is wrong with one.

Whatever a library raises at a file becomes a SaerlError here, which names the file and the way out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from saerl_fast.errors import SaerlError, Unreadable, first_line, halved

_DEEPEST = 100  # values inside values: what reads them recurs
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half a character
# What a killed writer leaves beside its target; the mark of the process is missing in those of version 0.1.0.
LEFTOVER = re.compile(r"\..+\.(?:([0-9a-f]{8}-\d+-\d+)\.[0-9a-f]{8}|[0-9a-f]{16})\.tmp")
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOENT: "its folder was removed meanwhile",
    errno.EACCES: "allow reading and writing there, or choose another run_dir",
    errno.EPERM: "allow reading and writing there, or choose another run_dir",
    errno.EROFS: "choose another run_dir",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network disk",
}
_ABOUT_CONTENT = (None, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
written: dict[Path, None] = {}  # files that this process has completed, in order


def reason(err: BaseException) -> str:
    """Why a file could not be read or written, and what to do."""
    number = _number(err)
    said = os.strerror(number) if number else str(err)
    return f"{said}; {ADVICE[number]}" if number in ADVICE else said


def _number(err: BaseException) -> int | None:
    """The errno of an error of the disk, of those of Rust libraries too."""
    number = getattr(err, "errno", None)
    if number is None and (found := re.search(r"(?:os error |Os \{ code: )(\d+)", str(err))):
        number = int(found[1])
    return number if isinstance(number, int) else None


def process_mark() -> str:
    """This process's name among all others: machine, boot and process-id space; process id; start time."""
    places = [platform.node()]
    with suppress(OSError):
        places.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        places.append(os.readlink("/proc/self/ns/pid"))
    machine = hashlib.sha256("\n".join(places).encode()).hexdigest()[:8]
    return f"{machine}-{os.getpid()}-{_started(os.getpid())}"


def has_ended(mark: str) -> bool | None:
    """Whether the process with this `process_mark` has ended; None where that cannot be known from here."""
    found = re.fullmatch(r"([0-9a-f]{8})-([1-9]\d*)-(\d+)", mark)
    if found is None or found[1] != process_mark()[:8] or os.name == "nt":
        return None
    started = _started(int(found[2]))
    return started is None or (started != found[3] and "0" not in (started, found[3]))


def _started(pid: int) -> str | None:
    """When a process of this machine started, as its kernel counts; "0": not known; None: no such process."""
    try:
        os.kill(pid, 0) if os.name != "nt" else None
    except (ProcessLookupError, OverflowError):
        return None
    except OSError:  # another user's
        pass
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "0"
    return None if values[0] in "ZX" else values[19]  # a zombie writes no more


def move_aside(path: Path) -> Path:
    """Rename to ``NAME.previous``, in place of an older one; of a link, the link is renamed."""
    aside = path.with_name(f"{path.name}.previous")
    remove(aside)
    os.replace(path, aside)
    return aside


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def use_umask(path: str | Path) -> None:
    """Give a file that a library made private (mode 0600) the mode of all others."""
    mask = os.umask(0o077)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


# --- writing -----------------------------------------------------------------------------------------


def check_writable(folder: str | Path) -> None:
    """SaerlError when no file can be written in ``folder`` or, where it is missing, above it."""
    folder = Path(folder)
    try:
        with tempfile.TemporaryFile(
            dir=next(at for at in (folder, *folder.absolute().parents) if at.exists())
        ):
            pass
    except OSError as err:
        raise SaerlError(f"cannot write to {folder}: {err.strerror}; choose another run_dir") from None


def cannot_write(target: str | Path, err: BaseException) -> SaerlError | None:
    """The sentence about ``err``, raised by writing ``target``; None if it is no error of the disk.

    safetensors raises a class of its own for those. A reader that has gone (``| head``) is no error.
    """
    if not isinstance(err, OSError) and type(err).__name__ != "SafetensorError":
        return None
    if isinstance(err, BrokenPipeError):
        return None
    why = reason(err)
    return SaerlError(f"cannot write {target}: {why}" + ("; choose another run_dir" * ("; " not in why)))


@contextmanager
def writing(target: str | Path) -> Iterator[None]:
    """What goes wrong on the disk inside the block becomes a SaerlError about ``target``."""
    try:
        yield
    except Exception as err:
        if (fault := cannot_write(target, err)) is None:
            raise
        raise fault from err


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """A temporary path beside ``target`` that replaces it when the block ends without an error.

    The data are flushed to the disk before the rename, so a crash leaves the old file or the new one. A link
    stays; what it points to is replaced. SaerlError where that is a device: root could replace /dev/null.
    """
    given, target = Path(target), Path(os.path.realpath(target))
    temporary = target.with_name(f".{target.name[:180]}.{process_mark()}.{secrets.token_hex(4)}.tmp")
    with writing(given):
        if target.is_char_device() or target.is_block_device():
            raise SaerlError(f"{given} is a device, {target}; remove it, or choose another place")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        try:
            yield temporary
            use_umask(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
            written[given] = None
        finally:
            temporary.unlink(missing_ok=True)


def write_text(target: str | Path, text: str) -> Path:
    """Write ``text`` atomically as UTF-8 (halves of surrogate pairs as escapes) and return the path."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return Path(target)


def write_json(target: str | Path, value: Any) -> Path:
    """Write ``value`` as indented JSON, atomically, and return the path."""
    return write_text(target, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(
    target: str | Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None
) -> Path:
    """Write tensors or arrays as safetensors, atomically, and return the path."""
    import torch
    from safetensors.torch import save_file

    made = {name: torch.as_tensor(value).detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(target) as temporary:
        save_file(made, temporary, metadata)
    return Path(target)


# --- reading -----------------------------------------------------------------------------------------


def damaged(path: str | Path, err: BaseException, again: str, what: str = "") -> SaerlError:
    """The sentence about ``err``, raised by reading ``path``: that it is damaged, or `Unreadable`.

    ``what`` opens what is said of the damage, ``again`` ends that sentence.
    """
    if _number(err) == errno.ENOENT:
        return SaerlError(f"{path} is missing; {again}")
    if _number(err) in _ABOUT_CONTENT:
        return SaerlError(f"{path} is damaged ({what}{first_line(err)}); {again}")
    why = reason(err)
    return Unreadable(f"cannot read {path}: {why}" + "; make it readable" * ("; " not in why))


def read_json(path: str | Path, made_by: str, form: Any = None) -> Any:
    """The value in a JSON file, which must be of ``form`` (see `mismatch`; by default, any object).

    ``made_by`` names the command that writes it, for the error message. NaN is read as null.
    """
    path = Path(path)
    again = f"make it again with `{made_by}`"
    if not path.is_file():
        raise SaerlError(f"{path} does not exist; make it with `{made_by}`")
    try:
        value = parse_json(path.read_text(encoding="utf-8"), str(path), whole=False)
    except UnicodeDecodeError as err:
        raise SaerlError(f"{path} is not valid JSON (no UTF-8 text: {err.reason}); {again}") from None
    except OSError as err:
        raise damaged(path, err, again) from err
    except SaerlError as err:
        raise SaerlError(f"{str(err).removesuffix('; mend it')}; {again}") from None
    if fault := mismatch(value, {} if form is None else form):
        raise SaerlError(f"{path} is damaged ({fault}); {again}")
    return value


def mismatch(value: Any, form: Any, at: str = "it") -> str | None:
    """What in ``value`` is not of ``form``, such as "seed is 'x', not a whole number"; None: nothing.

    A form is Any, None, a type (int: of 64 bits and no bool; float: any finite number), a tuple of forms of
    which one must fit, [form] for a list of such values, {str: form} for an object of such values, or
    {"key": form, "other?": form} for one with these keys among others, of which "other" may be missing.
    """
    if form is Any:
        return None
    if isinstance(form, tuple):
        faults = [mismatch(value, one, at) for one in form]
        return None if None in faults else faults[-1]
    if isinstance(form, list) and isinstance(value, list):
        bad = next((i for i, part in enumerate(value) if mismatch(part, form[0])), None)
        return None if bad is None else mismatch(value[bad], form[0], f"{at}[{bad}]")
    if isinstance(form, dict) and isinstance(value, dict):
        asked = dict.fromkeys(value, form[str]) if str in form else form
        for key, wanted in asked.items():
            name = key if str in form else key.removesuffix("?")
            if name not in value and name == key:
                return f"{at} has no {name!r}"
            if name in value and (fault := mismatch(value[name], wanted, f"{at}.{name}".removeprefix("it."))):
                return fault
        return None
    wanted, fits = _KINDS[form if isinstance(form, type) else type(form)]
    huge = type(value) is int and not _whole(value)
    shown = "a huge number" if huge else repr(value)
    return None if fits(value) else f"{at} is {shown[:40]}{'...' * (len(shown) > 40)}, not {wanted}"


def _whole(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


_KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number", _whole),
    float: ("a number", lambda value: _whole(value) or (type(value) is float and math.isfinite(value))),
    str: ("text", lambda value: isinstance(value, str)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    list: ("a list", lambda value: isinstance(value, list)),
    dict: ("an object", lambda value: isinstance(value, dict)),
    type(None): ("null", lambda value: value is None),
}


def check_fetched(path: str | Path) -> None:
    """SaerlError where the file is what a clone without Git LFS leaves in its place."""
    with suppress(OSError), open(path, "rb") as file:  # who reads it next says what is wrong
        if file.read(24).startswith(b"version https://git-lfs"):
            raise SaerlError(
                f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
            )


def read_tensors(path: str | Path, again: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors of a safetensors file, on the CPU, and its metadata; ``again`` ends the sentence of a fault."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise SaerlError(f"reading {path} needs safetensors; pip install safetensors") from None
    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except Exception as err:  # safetensors raises its own type, built in Rust
        raise damaged(path, err, again) from err


def read_table(path: str | Path, again: str, names: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """The columns of a Parquet file, or those of ``names`` that are there, as Python values; ``again`` ends
    the sentence of an error."""
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            there = None if names is None else [name for name in names if name in file.schema_arrow.names]
            return file.read(there).to_pydict()
    except Exception as err:  # Arrow's own, OSError, and what single values raise
        raise damaged(path, err, again) from err


# --- JSON, read strictly -----------------------------------------------------------------------------


class _Fault(Exception):
    """The end of a sentence about a value that is not read."""


def parse_json(text: str, where: str, *, whole: bool = True) -> Any:
    """The value in ``text``; ``where`` ("pool.jsonl line 3") opens the sentence of any error.

    NaN, which Python and pandas write for a missing value, becomes None. Refused: infinite numbers, integers
    of more digits than Python reads, a key twice in one object, nesting beyond Python's recursion limit and,
    if ``whole``, half a surrogate pair.
    """
    return guarded_json(text, where, lambda: DECODER.decode(text), whole=whole)


def guarded_json(text: str, where: str, read: Any, *, whole: bool = True) -> Any:
    """``read()``, which decodes ``text``, with the errors of `parse_json`."""
    try:
        value = read()
    except json.JSONDecodeError as err:
        inside = err.lineno > 1 and " line " not in where
        at = f"{where} line {err.lineno}" if inside or " line " not in where else where
        raise SaerlError(f"{at} is not valid JSON ({err.msg}); mend it") from None
    except RecursionError:
        raise SaerlError(f"{where} is nested too deeply to be read; flatten it") from None
    except _Fault as fault:
        raise SaerlError(f"{where} {fault}") from None
    except ValueError:  # sys.get_int_max_str_digits
        raise SaerlError(
            f"{where} holds an integer of more digits than Python reads; write it as text, in quotes"
        ) from None
    level = [value]
    for _ in range(_DEEPEST):
        level = [part for one in level for part in _parts(one) if isinstance(part, (dict, list))]
    if level:
        raise SaerlError(f"{where} is nested too deeply to be read; flatten it")
    if whole and _SURROGATE.search(text) and halved(json.dumps(value, ensure_ascii=False)):
        raise SaerlError(
            f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; mend it"
        )
    return value


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Fault(f"has the key {twice!r} twice in one object; keep one of them")
    return made


def _constant(name: str) -> None:
    if name != "NaN":
        raise _Fault(f"holds {name}, which is no number of JSON; write null or text")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _Fault(f"holds a number too large to be read ({digits[:20]}); write it as text, in quotes")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
