"""What an output was made from, recorded beside it, so that stages never mix what does not belong."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from saerl_fast.config import Config, Section, to_dict
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import write_json
from saerl_fast.hub import at_home
from saerl_fast.plugins import is_function, source_digest
from saerl_fast.records import manifest
from saerl_fast.session import load_pools

log = logging.getLogger(__name__)
LARGE = 1 << 24  # bytes of a file whose hash is kept for the next command
SAE_SECTIONS = ("model", "data", "sae")  # what a trained SAE depends on
SCORE_SECTIONS = (*SAE_SECTIONS, "score", "quality", "difficulty", "diversity", "labels")
RUN_SECTIONS = (*SCORE_SECTIONS, "plan", "train")
LABEL_SECTIONS = ("model", "data", "difficulty", "labels")
LABELS = (  # what the labels depend on beyond their own section and the seed: their counts are their own
    "train.rollout.max_new_tokens",
    "train.rollout.temperature",
    "train.rollout.top_p",
    "train.reward",
    "train.reward_weights",
    "train.reward_truncated",
    "train.pass_threshold",
)
WARMUP = ("train.warmup.steps", "train.warmup.batch_size", "train.warmup.lr", "train.warmup.rows")


def after_warmup(config: Config) -> bool:
    """Whether labels are rollouts of a model that has gone through the warm-up."""
    return config.difficulty.after_warmup and config.train.warmup.steps > 0


def training_seed(config: Config) -> int:
    """The seed of sampling and order."""
    return config.seed if config.train.seed is None else config.train.seed


def settings(
    tree: dict[str, Any], sections: tuple[str, ...], without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The settings in ``tree`` (a config as plain values) that decide what comes out of a stage.

    The fields of the config say which do. ``without``: keys of the train section to leave out.
    """
    planned = "plan" in sections
    kept = {name: _kept(Config.types[name], tree[name], planned) for name in sections if name != "labels"}
    if "sae" in sections and tree["score"]["include_answer"]:  # it is trained on the answers, too
        kept.setdefault("score", {})["include_answer"] = True
    for key in without:
        kept["train"].pop(key)
    return kept


def _kept(section: type[Section], tree: dict[str, Any], planned: bool) -> dict[str, Any]:
    rules, types = section.rules, section.types
    kept: dict[str, Any] = {}
    for key, value in tree.items():
        if key in types and key not in rules:
            kept[key] = _kept(types[key], value, planned)
        elif key not in rules or rules[key].result is True or (planned and rules[key].result == "plan"):
            kept[key] = value
    return kept


def fingerprint(config: Config, sections: tuple[str, ...], *, without: tuple[str, ...] = ()) -> str:
    """A short hash of what a stage's output depends on: settings, and the content of its ``inputs``."""
    tree = settings(to_dict(config), sections, without)
    if "train" in tree:
        tree["train"]["seed"] = training_seed(config)
    if "labels" in sections and config.difficulty.label_column is None and config.difficulty.n_labels:
        plain = dict(flat(to_dict(config)))
        tree["labels"] = {key.rpartition(".")[2]: plain[key] for key in LABELS} | {"seed": config.seed}
        if after_warmup(config):
            tree["labels"]["warmup"] = {key: plain[key] for key in WARMUP} | {"seed": training_seed(config)}
    if "score" in sections:
        tree["seed"] = config.seed
    return manifest.json_digest(tree | {"inputs": inputs(config, sections)})[:16]


def inputs(config: Config, sections: tuple[str, ...]) -> dict[str, Any]:
    """What a stage reads beside its settings, each by a hash of its content.

    ``prompts``: the training rows; ``eval``, for a run: those it is evaluated on. ``model``, ``sae``,
    ``init``: all files of a local one; one of the hub is known by its name, and is left out. ``functions``:
    the files of each ``module:function``.
    """
    train, evaluation = load_pools(config)
    found: dict[str, Any] = {"prompts": train.digest}
    if "train" in sections:
        found["eval"] = evaluation.digest
    named: dict[str, str | None] = {"model": config.model.path}
    if "sae" in sections:
        named |= {"sae": config.sae.path, "init": config.sae.init}
    for name, path in named.items():
        if path and (files := _contents(at_home(path), Path(config.run_dir))):
            found[name] = manifest.json_digest(files)
    if functions := _functions(config, sections):
        found["functions"] = functions
    return found


def made_from(config: Config, sections: tuple[str, ...]) -> dict[str, Any]:
    """What a manifest says of an output that ``config`` makes."""
    return {
        "fingerprint": fingerprint(config, sections),
        "config": to_dict(config),
        "inputs": inputs(config, sections),
    }


def _functions(config: Config, sections: tuple[str, ...]) -> dict[str, str | None]:
    """The functions from outside that a stage's output depends on, each with a hash of its file."""
    names = [config.plan.schedule] * ("plan" in sections)
    names += [config.train.loss.kind, config.train.rollout.engine] * ("train" in sections)
    rolled_out = config.difficulty.label_column is None and config.difficulty.n_labels > 0
    if "train" in sections or ("labels" in sections and rolled_out):
        names += config.train.reward
    return {name: source_digest(name) for name in names if is_function(name)}


def _contents(path: Path, run_dir: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files in a folder (or of the one file), without hidden ones and the outputs."""
    if path.is_file():
        return {path.name: _remembered([path])[path]}
    path, run_dir = path.absolute(), run_dir.absolute()
    kept, holds_run = {}, path in run_dir.parents
    for file in path.rglob("*"):
        name = file.relative_to(path)
        hidden = any(part.startswith(".") for part in name.parts) or name.name == manifest.FILE
        if not hidden and not (holds_run and run_dir in file.parents) and file.is_file():
            kept[name.as_posix()] = file
    hashes = _remembered(list(kept.values()))
    return {name: hashes[kept[name]] for name in sorted(kept)}


def _remembered(files: list[Path]) -> dict[Path, str]:
    """The hashes of these files; those of large ones are kept in the user's cache folder.

    A kept hash counts as long as size, times and number of the file stay the same; a cache that cannot be
    read or written is done without.
    """
    stamps = {file: manifest.stamp(file) for file in files}
    large = {file: json.dumps(stamp) for file, stamp in stamps.items() if stamp[1] >= LARGE}
    known: dict[str, str] = {}
    with suppress(OSError, ValueError, LookupError, TypeError, RuntimeError):  # damaged
        held = json.loads(_cache().read_text(encoding="utf-8"))
        known = dict(held["digests"]) if held["sha256"] == manifest.json_digest(held["digests"]) else {}
    new = {file for file, key in large.items() if key not in known}
    if (size := sum(stamps[file][1] for file in new)) >= 1 << 30:
        log.info("reading %.1f GB of model files once, to know them by their content", size / 1e9)
    try:
        found = {file: known.get(large.get(file, "")) or manifest.digest(file) for file in files}
    except OSError as err:
        raise SaerlError(f"cannot read {err.filename}: {err.strerror}; make it readable") from None
    now = time.time() - manifest.SETTLED
    settled = {large[file]: found[file] for file in new if max(stamps[file][2:4]) / 1e9 < now}
    if settled:
        read = {stamps[file][0] for file in new}
        places = ((key, json.loads(key)[0]) for key in known)
        others = {key: known[key] for key, at in places if at not in read and os.path.exists(at)}
        with suppress(SaerlError, OSError, RuntimeError):
            write_json(
                _cache(), {"digests": others | settled, "sha256": manifest.json_digest(others | settled)}
            )
    return found


def _cache() -> Path:
    """Of hashes; RuntimeError for a user without a home folder, as containers have them."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home) / "saerl-fast" / "digests.json"


def changes(before: Any, config: Config, sections: tuple[str, ...], without: tuple[str, ...] = ()) -> str:
    """What differs between the config in a record (plain values) and ``config``, for a message."""
    now = json.loads(json.dumps(to_dict(config)))  # with lists for tuples, as a record has them
    try:
        old, new = (_covered(tree, sections, without) for tree in (before, now))
    except (KeyError, TypeError, AttributeError):
        return "a record of another version"
    found = [f"{key} was {old.get(key)}" for key in new if old.get(key) != new[key]]
    if not found:
        return "by name the same, but other prompts, functions or model files"
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(full key, value) of every setting in a config as plain values."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _covered(tree: dict[str, Any], sections: tuple[str, ...], without: tuple[str, ...]) -> dict[str, Any]:
    """What a fingerprint covers of the config ``tree``, by full key."""
    plain = dict(flat(settings(tree, sections, without)))
    if "labels" in sections:
        plain |= {key: value for key, value in flat({"train": tree["train"]}) if key in LABELS + WARMUP}
    if "sae" in sections:
        plain["score.include_answer"] = tree["score"]["include_answer"]
    plain["seed"] = tree.get("seed")
    if plain.get("train.seed", 0) is None:
        plain["train.seed"] = plain["seed"]
    return plain
