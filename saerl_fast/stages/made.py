"""What a run folder holds already, whether these settings made it, and making it again (``--redo``).

Every answer comes from the manifests: settings by their fingerprint, files and inputs by their content.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

from saerl_fast.config import Config, Stored
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import mismatch, move_aside, writing
from saerl_fast.records import manifest
from saerl_fast.sae.formats import SAELENS_WEIGHTS
from saerl_fast.signals.kept import ENDS
from saerl_fast.stages.fingerprint import (
    LABEL_SECTIONS,
    RUN_SECTIONS,
    SAE_SECTIONS,
    SCORE_SECTIONS,
    changes,
    fingerprint,
)

SCORE_FILES = ("scores.parquet", "scores.json", "features.safetensors")
BANK_FILES = tuple(f"bank.{name}{end}" for name in get_args(Stored) for end in ENDS)


class Artefact(NamedTuple):
    """Where a stage's output is: the folder of its manifest, files, and what is moved away for another."""

    place: Path
    name: str
    files: tuple[str, ...]
    sections: tuple[str, ...]
    moved: tuple[str, ...]  # below run_dir; the first one is what messages call it


def artefact(config: Config, name: str) -> Artefact:
    """The ``sae``, ``labels`` or ``scores`` of a run folder."""
    root = Path(config.run_dir)
    if name == "sae":
        return Artefact(root / "sae", name, (SAELENS_WEIGHTS, "cfg.json"), SAE_SECTIONS, ("sae",))
    if name == "labels":
        return Artefact(root, name, ("labels.json",), LABEL_SECTIONS, ("labels.json",))
    return Artefact(root, name, SCORE_FILES, SCORE_SECTIONS, SCORE_FILES + BANK_FILES)


def needs_scores(config: Config) -> bool:
    """Whether the plan that the config asks for reads scores; ``vanilla`` without a filter does not."""
    from saerl_fast.plan.static import get_schedule

    static, wanted = get_schedule(config.plan.schedule), config.plan.filter
    filtered = wanted or (wanted is None and static is not None and static.filtered)
    return not static or bool(static.needs or static.keep or filtered)


def run_sections(config: Config, *, planned: bool = False) -> tuple[str, ...]:
    """Sections that a training run depends on: those behind the scores only where its plan reads them.

    ``planned``: the plan is a file.
    """
    return RUN_SECTIONS if planned or needs_scores(config) else ("model", "data", "plan", "train")


def is_there(config: Config, name: str, say: Callable[[str], None]) -> bool:
    """Whether the run folder holds this output, of whatever settings.

    One that a process left half-written is none, which is said: it is made again.
    """
    place, _, files, _, (shown, *_) = artefact(config, name)
    if not any((place / file).exists() for file in files):
        return False
    found = manifest.look(place, name)
    if found.partial:
        say(f"{Path(config.run_dir) / shown} is incomplete ({found.fault}) and is made again")
    return not found.partial


def differences(config: Config, *, scores: bool = True) -> dict[str, str]:
    """Outputs in the run folder that these settings may not use, each with what it is instead.

    ``sae`` (unless sae.path names one) and, with ``scores``, ``labels`` and ``scores``, in the order in which
    they depend on each other; what is missing is left out. Loads no model.
    """
    found = {}
    rolled = config.difficulty.label_column is None and config.difficulty.n_labels > 0
    names = ["sae"] * (config.sae.path is None) + ["labels"] * (scores and rolled) + ["scores"] * scores
    for name in names:
        if is_there(config, name, lambda _: None) and (why := _fault(config, name)):
            found[name] = why
    return found


def _fault(config: Config, name: str) -> str:
    """Why an output that is there may not be used, as the end of a sentence about it; "" where it may."""
    place, _, _, sections, _ = artefact(config, name)
    found = manifest.look(place, name)
    entry = found.entry
    if entry is None:
        return f"is not recorded in {place / manifest.FILE} (an earlier version made it, or it was copied)"
    if found.fault:
        return f"cannot be used: {found.fault}"
    if entry.get("fingerprint") != fingerprint(config, sections):
        return f"was made with other settings ({changes(entry.get('config'), config, sections)})"
    if name == "scores" and other_inputs(entry, {"sae_weights": sae_weights(config)}):
        return "was made from another SAE than the one beside it"
    return ""


def sae_weights(config: Config) -> str | None:
    """The hash of the SAE that was trained in the run folder; None where there is none."""
    return _recorded(artefact(config, "sae"), SAELENS_WEIGHTS) if config.sae.path is None else None


def score_hashes(config: Config) -> dict[str, str | None]:
    """The hashes of the scores that a plan is made from; {} where it is made without, None while missing."""
    if not needs_scores(config):
        return {}
    made = artefact(config, "scores")
    hashes = {file: _recorded(made, file) for file in ("scores.parquet", "features.safetensors")}
    read = [file for file in BANK_FILES if file.split(".")[1] in config.plan.adaptive.features]
    return hashes | {file: found for file in read if (found := _recorded(made, file))}


def _recorded(made: Artefact, file: str) -> str | None:
    found = manifest.look(made.place, made.name)
    return found.entry["files"].get(file, {}).get("sha256") if found.entry and not found.fault else None


def other_inputs(entry: dict[str, Any], now: dict[str, str | None]) -> list[str]:
    """Which of the inputs that an entry and ``now`` both know differ."""
    before = entry.get("inputs", {})
    return [name for name, found in now.items() if found and before.get(name) not in (None, found)]


def run_entry(out: Path) -> dict[str, Any] | None:
    """What the manifest says of the run in ``out``; None where it records none."""
    entry = manifest.look(out, "run").entry
    if entry and (fault := mismatch(entry, {"config": {"train": {"steps": int}}})):
        raise SaerlError(f"{out / manifest.FILE} is damaged ({fault}); add --overwrite to make the run again")
    return entry


def finished(out: Path) -> tuple[bool, str]:
    """Whether the run in ``out`` has ended, and what its results lack, or ""."""
    found = manifest.look(out, "result")
    return found.entry is not None, found.fault if found.entry else ""


def refuse_other(config: Config, *, scores: bool = True) -> None:
    """SaerlError when an SAE or (``scores``) scores of other settings, or damaged ones, would be used."""
    for name, why in differences(config, scores=scores).items():
        if name != "labels":  # they are made again when scores are
            raise SaerlError(
                f"{Path(config.run_dir) / artefact(config, name).moved[0]} {why}; add --redo to make again "
                "what depends on them, or choose another run_dir"
            )


def set_aside(config: Config, say: Callable[[str], None], *, scores: bool = True) -> None:
    """``--redo``: put what these settings may not use out of the way, and say what is kept and what is not.

    Each is renamed to ``NAME.previous``, in place of an older one of that name.
    """
    root = Path(config.run_dir)
    other = differences(config, scores=scores)
    for name in ("sae", "labels", "scores")[: 3 if scores else 1]:
        place, _, _, _, moved = artefact(config, name)
        if not is_there(config, name, lambda _: None):
            continue
        if name not in other:
            say(f"--redo: {root / moved[0]} is kept")
            continue
        aside = f"{moved[0]}.previous"
        say(f"--redo: {root / moved[0]} is made again: it {other[name]}; the one before is {aside}")
        if place == root:
            manifest.forget(root, name)
        for file in moved:
            if (root / file).exists():
                with writing(root / file):
                    move_aside(root / file)
