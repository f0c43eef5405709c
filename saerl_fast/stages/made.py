"""What a run folder holds already, whether these settings made it, and making it again (``--redo``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from saerl_fast.config import Config
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import move_aside, read_json
from saerl_fast.stages.fingerprint import (
    LABEL_SECTIONS,
    RUN_SECTIONS,
    SAE_SECTIONS,
    SCORE_SECTIONS,
    changes,
    fingerprint,
)

SCORE_FILES = ("scores.parquet", "scores.json", "features.safetensors")


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


def differences(config: Config, *, scores: bool = True) -> dict[str, str]:
    """Outputs in the run folder that were made with other settings, and which; what is missing is left out.

    ``sae/`` (unless sae.path names one) and, with ``scores``, ``labels.json`` and ``scores.parquet``, in the
    order in which they depend on each other. Reads JSON only, so it costs nothing beside loading a model.
    """
    root = Path(config.run_dir)
    records: list[tuple[str, tuple[str, ...], Callable[[], Any]]] = []
    if config.sae.path is None and (root / "sae").is_dir():
        file = root / "sae" / "train.json"
        records.append(("sae", SAE_SECTIONS, lambda: read_json(file, "saerl sae train")))
    rolled = config.difficulty.label_column is None and config.difficulty.n_labels > 0
    if scores and rolled and (root / "labels.json").is_file():
        labels = root / "labels.json"
        records.append(("labels.json", LABEL_SECTIONS, lambda: read_json(labels, "saerl score")))
    if scores and (root / "scores.json").is_file():
        table = root / "scores.json"
        read = lambda: (read_json(table, "saerl score") or {}).get("metadata", {})  # noqa: E731
        records.append(("scores.parquet", SCORE_SECTIONS, read))
    found = {}
    for name, sections, read in records:
        record = read()
        if record.get("fingerprint") != fingerprint(config, sections):
            found[name] = changes(record.get("config"), config, sections)
    return found


def refuse_other(config: Config, *, scores: bool = True) -> None:
    """SaerlError when an SAE or (``scores``) scores of other settings would be used."""
    for name, why in differences(config, scores=scores).items():
        if name != "labels.json":  # they are made again when scores are
            raise SaerlError(other_settings(Path(config.run_dir) / name, why))


def other_settings(what: Path, why: str) -> str:
    """The sentence about an output that was made with other settings."""
    return (
        f"{what} was made with other settings ({why}); add --redo to make again what depends on them, "
        "or choose another run_dir"
    )


def set_aside(config: Config, say: Callable[[str], None], *, scores: bool = True) -> None:
    """``--redo``: put what was made with other settings out of the way, and say what is kept and what is not.

    Each is renamed to ``NAME.previous``, in place of an older one of that name.
    """
    root = Path(config.run_dir)
    other = differences(config, scores=scores)
    for name in ("sae", "labels.json", "scores.parquet")[: 3 if scores else 1]:
        if not (root / name).exists():
            continue
        if name not in other:
            say(f"--redo: {root / name} is kept")
            continue
        say(f"--redo: {root / name} is made again ({other[name]}); the one before is {name}.previous")
        for file in SCORE_FILES if name == "scores.parquet" else (name,):
            if (root / file).exists():
                move_aside(root / file)
