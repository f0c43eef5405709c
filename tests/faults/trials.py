"""The trials: each spoils one thing, goes on as a user would, and says how it ended."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement, product
from pathlib import Path

from tests.faults.hooks import (
    at_each_sync,
    counted,
    each_operation,
    full_at,
    killed_at,
    no_file_above,
    refused_at,
    signalled_at,
    unreadable_at,
    unsynced_at,
)
from tests.faults.workbench import (
    MORE,
    READING,
    STAGES,
    Ended,
    command,
    fresh,
    leftovers,
    run,
    scratch,
    start,
    written,
)

SAME, SAID, REFUSED = "same result", "said aloud", "refused in a sentence"
TRACEBACK, WRONG, STUCK, HUNG, LEFT = "traceback", "silently wrong", "stuck folder", "hung", "leftovers"
GOOD, BAD = (SAME, SAID, REFUSED), (TRACEBACK, WRONG, STUCK, HUNG, LEFT)
OTHER = {"sae train": "sae.seed=7", "score": "score.reduce=max", "plan": "plan.adaptive.svd=6"}
OTHER |= {"train": "train.lr=1e-4", "compare": "train.lr=1e-4"}
ON = {"train": "train --resume"}  # how a user goes on
ERRORS = (
    "EIO",
    "EROFS",
    "EACCES",
    "EPERM",
    "EDQUOT",
    "ESTALE",
    "EBUSY",
    "EINTR",
)  # of disks
OTHER_KIND = "compare.pools; choose another run_dir"  # no --redo makes one kind of comparison of the other
TRAINING = {"train", "train --overwrite", "compare", "compare --pools", "demo"}


@dataclass(frozen=True)
class Trial:
    kind: str
    name: str
    call: Callable[[], tuple[str, str]]  # outcome, and what was said


class Bench:
    """The templates, what they hold, and the trials over them."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        chain = [*STAGES, "end"]
        self.after = {stage: folders[chain[chain.index(stage) + 1]] for stage in STAGES}
        self.after |= {name: folders[f"after {name}"] for name in MORE}
        self.patterns = STAGES | {name: patterns for name, (_, patterns) in MORE.items()}
        self.expected = {name: written(self.after[name], self.patterns[name]) for name in self.patterns}

    def all(self) -> Iterator[Trial]:
        """Every trial, in an order that mixes the kinds."""
        yield from self.kills()
        yield from self.mixtures()
        yield from self.full_disks()
        yield from self.other_errors()
        yield from self.damages()
        yield from self.signals()
        yield from self.signals_twice()
        yield from self.races()
        yield from self.unreadable()

    @cache  # noqa: B019
    def operations(self, stage: str, template: Path, *settings: str) -> tuple[bytes, float]:
        """A byte for each time that the stage writes, renames or deletes (see `counted`), and its seconds."""
        folder, to = fresh(template), scratch("count")
        began = time.monotonic()
        run(stage, folder, *settings, before=counted(folder, to))
        return to.read_bytes(), time.monotonic() - began

    # --- judging ---------------------------------------------------------------------------------------

    def judge(
        self,
        stage: str,
        folder: Path,
        ended: Ended,
        about: str = "\0",
        wanted: dict[str, str] | None = None,
        patterns: tuple[str, ...] | None = None,
    ) -> tuple[str, str]:
        """Whether what ``stage`` has written is as it should be. ``about``: what a line that tells names."""
        wanted = self.expected[stage] if wanted is None else wanted
        patterns = self.patterns[stage] if patterns is None else patterns
        if ended.code is None:
            return HUNG, ended.text[-300:]
        if ended.traceback:
            return TRACEBACK, ended.text[-600:]
        if ended.code:
            return (REFUSED, ended.said) if ended.said else (TRACEBACK, ended.text[-300:])
        found = written(folder, patterns)
        if found != wanted:
            differing = [n for n in sorted(found.keys() | wanted.keys()) if found.get(n) != wanted.get(n)]
            return (SAID if about in ended.text else WRONG), f"{', '.join(differing)} differ"
        left = leftovers(folder)
        return (LEFT, ", ".join(left)) if left else (SAME, "")

    def go_on(self, stage: str, folder: Path, *settings: str) -> tuple[str, str]:
        """The command again; where it is refused, with --redo, which has to work."""
        found = self.judge(stage, folder, run(ON.get(stage, stage), folder, *settings))
        if found[0] != REFUSED or stage in READING or OTHER_KIND in found[1]:
            return found
        redone = self.judge(stage, folder, run(f"{stage} --redo", folder, *settings))
        return (REFUSED, found[1]) if redone[0] == SAME else (STUCK, f"{found[1]} / --redo: {redone}")

    # --- kinds -----------------------------------------------------------------------------------------

    def kills(self) -> Iterator[Trial]:
        """SIGKILL at every operation on files; then the same command again."""
        for stage in self.patterns:
            for number in range(1, len(self.operations(stage, self.folders[stage])[0]) + 1):

                def trial(stage: str = stage, number: int = number) -> tuple[str, str]:
                    folder = fresh(self.folders[stage])
                    run(stage, folder, before=killed_at(folder, number))
                    return self.go_on(stage, folder)

                yield Trial("killed at an operation", f"{stage} {number}", trial)

    def mixtures(self) -> Iterator[Trial]:
        """Made again with other settings, killed on the way; then on with the first ones."""
        for stage, setting in OTHER.items():
            trains = stage in ("train", "compare")
            complete = self.after[stage] if trains else self.folders["train"]  # SAE, scores and plan
            then = stage if trains else "plan"
            total = len(self.operations(f"{stage} --redo", complete, setting)[0])
            for number in range(1, total + 1):

                def trial(
                    stage: str = stage,
                    said: str = setting,
                    number: int = number,
                    complete: Path = complete,
                    then: str = then,
                ) -> tuple[str, str]:
                    folder = fresh(complete)
                    run(f"{stage} --redo", folder, said, before=killed_at(folder, number))
                    return self.go_on(then, folder)

                yield Trial("killed under other settings", f"{stage} {number}", trial)

    def full_disks(self) -> Iterator[Trial]:
        """No space left at every operation, or for large files only; then with space again."""
        for stage in self.patterns:
            total = self.operations(stage, self.folders[stage])[0].count(b"M")
            sizes = [0, 100, 3_000, 20_000, 100_000, 400_000, 1_000_000]
            for number in [*range(1, total + 1), *(-size for size in sizes)]:

                def trial(stage: str = stage, number: int = number) -> tuple[str, str]:
                    folder = fresh(self.folders[stage])
                    fault = full_at(folder, number) if number > 0 else no_file_above(-number)
                    return self.failed(stage, folder, fault)

                yield Trial("disk full", f"{stage} {number}", trial)

    def other_errors(self) -> Iterator[Trial]:
        """Another error of the disk at every operation, for once or for good; then with the disk mended."""
        for stage in self.patterns:
            for number in range(1, len(self.operations(stage, self.folders[stage])[0]) + 1):
                name, once = ERRORS[number % len(ERRORS)], number % 3 == 0

                def trial(
                    stage: str = stage, number: int = number, name: str = name, once: bool = once
                ) -> tuple[str, str]:
                    folder = fresh(self.folders[stage])
                    return self.failed(
                        stage, folder, refused_at(folder, number, getattr(errno, name), once=once)
                    )

                said = f"{stage} {number} {name}{' once' * once}"
                yield Trial("other errors of the disk", said, trial)

            for number in range(1, self.syncs(stage) + 1):
                name = ("EIO", "ENOSPC", "EDQUOT")[number % 3]

                def unsynced(stage: str = stage, number: int = number, name: str = name) -> tuple[str, str]:
                    folder = fresh(self.folders[stage])
                    return self.failed(stage, folder, unsynced_at(number, getattr(errno, name)))

                yield Trial("other errors of the disk", f"{stage} fsync {number} {name}", unsynced)

    @cache  # noqa: B019
    def syncs(self, stage: str) -> int:
        """How often the stage asks the disk to have written a file."""
        folder, to = fresh(self.folders[stage]), scratch("count")
        handle = os.open(to, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        run(stage, folder, before=at_each_sync(lambda number: os.write(handle, b".") and None))
        return to.stat().st_size

    def failed(self, stage: str, folder: Path, fault: Callable[[], None]) -> tuple[str, str]:
        """The command with a fault of the disk, then without."""
        found = self.judge(stage, folder, run(stage, folder, before=fault))
        return found if found[0] in (TRACEBACK, HUNG, WRONG) else self.go_on(stage, folder)

    def damages(self) -> Iterator[Trial]:
        """Every file of a finished run damaged in four ways, read by every command."""
        whole, longer, again = self.folders["end"], fresh(self.folders["end"]), fresh(self.folders["end"])
        assert run("train --resume", longer, "train.steps=6").code == 0
        assert run("compare", again).code == 0
        files = [file.relative_to(whole) for file in sorted(whole.rglob("*")) if _matters(file)]
        readers = {
            "plan": ("plan", whole, ("plan.*",)),
            "train": ("train --resume", longer, ("*.parquet", "adaptive/*.jsonl", "adaptive/model/*")),
            "compare": ("compare", again, ("report.md",)),
            "report": ("report", again, ("report.md",)),
            "sae info": ("sae info", whole, ()),
            "sae convert": ("sae convert", whole, STAGES["sae convert"]),
            "score": ("score", whole, ("scores.parquet", "features.safetensors")),
            "export": ("export", self.after["export"], MORE["export"][1]),
            "watch": ("watch", whole, ()),
        }
        for name, (way, spoil), reader in product(files, WAYS.items(), readers):
            if reader == "sae convert" and name.parts[0] == "converted":  # which it makes
                continue

            def trial(
                name: Path = name, spoil: Callable[[Path], None] = spoil, reader: str = reader
            ) -> tuple[str, str]:
                command, goal, patterns = readers[reader]
                folder = fresh(whole)
                spoil(folder / name)
                if reader == "sae convert":
                    shutil.rmtree(folder / "converted")
                before = written(folder, (str(name),))
                ended = run(command, folder, *["train.steps=6"] * (reader == "train"))
                untouched = before if written(folder, (str(name),)) == before else {}
                wanted = written(goal, patterns)
                wanted |= {key: value for key, value in untouched.items() if key in wanted}  # it was not read
                return self.judge(reader, folder, ended, name.name, wanted, patterns)

            yield Trial("damaged", f"{name} {way} {reader}", trial)

    def signals(self) -> Iterator[Trial]:
        """Signals at random times; then the same command again."""
        for stage in self.patterns:
            lasts = self.operations(stage, self.folders[stage])[1]
            for sent in ("KILL", "TERM", "INT", "HUP"):
                for number in range(4):

                    def trial(
                        stage: str = stage, sent: str = sent, number: int = number, lasts: float = lasts
                    ) -> tuple[str, str]:
                        folder = fresh(self.folders[stage])
                        child = start(command(stage, folder))
                        time.sleep(lasts * random.Random(f"{stage} {sent} {number}").uniform(0.02, 0.95))
                        os.kill(child.pid, getattr(signal, f"SIG{sent}"))  # not waited for yet: it is there
                        ended = child.wait()
                        if ended.code is None or "Traceback" in ended.text:
                            return self.judge(stage, folder, ended)
                        return self.go_on(stage, folder)

                    yield Trial("signal", f"{stage} {sent} {number}", trial)

    def signals_twice(self) -> Iterator[Trial]:
        """A signal at an operation, and another there or soon after; then the same command again."""
        for stage in self.patterns:
            total = len(self.operations(stage, self.folders[stage])[0])
            for number in range(12):
                chance = random.Random(f"{stage} {number}")
                at, gap = chance.randint(1, total), chance.choice([0, 0, 1, 3])
                both = [chance.choice(["TERM", "INT", "HUP"]) for _ in range(2)]

                def trial(
                    stage: str = stage, at: int = at, gap: int = gap, both: list[str] = both
                ) -> tuple[str, str]:
                    folder = fresh(self.folders[stage])
                    first, second = (getattr(signal, f"SIG{name}") for name in both)
                    sent = {at: [first, second]} if not gap else {at: [first], at + gap: [second]}
                    ended = run(stage, folder, before=signalled_at(folder, sent))
                    if ended.code is None or ended.traceback:
                        return self.judge(stage, folder, ended)
                    return self.go_on(stage, folder)

                yield Trial("signal twice", f"{stage} {at} {both[0]} {both[1]} after {gap}", trial)

    def races(self) -> Iterator[Trial]:
        """Two commands on one folder at once; then both again, one after the other."""
        for first, second in combinations_with_replacement(self.patterns, 2):
            if "watch" in (first, second) and not {first, second} & TRAINING:  # it would wait for a run
                continue
            for delay in (0.0, 0.02, 0.3):

                def trial(first: str = first, second: str = second, delay: float = delay) -> tuple[str, str]:
                    folder = fresh(self.folders[first])
                    one = start(command(first, folder))
                    time.sleep(delay)
                    two = start(command(second, folder))
                    for ended in (one.wait(), two.wait()):
                        if ended.code is None or ended.traceback:
                            return self.judge(first, folder, ended)
                    pair = dict.fromkeys((first, second))
                    for stage in [stage for stage in pair if stage not in ("report", "watch")] or pair:
                        found = self.go_on(stage, folder)
                        if found[0] not in (SAME, REFUSED):
                            return found
                    return found

                yield Trial("two at once", f"{first} + {second} after {delay} s", trial)

    def unreadable(self) -> Iterator[Trial]:
        """A file that cannot be opened for once, which is no reason to make anything again."""
        for stage in self.patterns:
            for number in range(1, self.readings(stage) + 1):

                def trial(stage: str = stage, number: int = number) -> tuple[str, str]:
                    folder = fresh(self.folders[stage])
                    first = run(stage, folder, before=unreadable_at(folder, number))
                    if first.code is None or first.traceback:
                        return self.judge(stage, folder, first)
                    if any(advice in first.said for advice in ("again", "--redo", "--overwrite")):
                        return WRONG, first.said
                    return self.go_on(stage, folder)

                yield Trial("unreadable for once", f"{stage} {number}", trial)

    @cache  # noqa: B019
    def readings(self, stage: str) -> int:
        """How often the stage opens a file of its folder to read it."""
        folder, to = fresh(self.folders[stage]), scratch("count")
        handle = os.open(to, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        count = each_operation(folder, lambda n: os.write(handle, b".") and None, {"open"}, reading=True)
        run(stage, folder, before=count)
        return to.stat().st_size


def _matters(file: Path) -> bool:
    return file.suffix in (".json", ".jsonl", ".safetensors", ".parquet")


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    place = random.Random(file.name).randrange(len(content) // 3, len(content))
    content[place] ^= 1 << 2
    file.write_bytes(content)


def _zero(file: Path) -> None:
    content = file.read_bytes()
    half = len(content) // 2
    file.write_bytes(content[:half] + bytes(len(content) - half))


WAYS: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "emptied": _empty,
    "one bit flipped": _flip,
    "second half zeroed": _zero,
}
