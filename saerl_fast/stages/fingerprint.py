"""What an output was made from, as a short hash beside it, so that stages never mix what does not belong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saerl_fast.config import Config, Section, to_dict
from saerl_fast.plugins import is_function, source_digest
from saerl_fast.session import load_pools

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
    """A short hash of what a stage's output depends on: settings, and the prompts themselves.

    ``labels`` stands for what the difficulty labels depend on beyond their own section. A model or SAE is
    known by its name, and a local one by the sizes and ends of its files too; a ``module:function`` by its
    name and the content of its file; a data source by its name and the training rows it gives.
    """
    tree = settings(to_dict(config), sections, without)
    if "train" in tree:
        tree["train"]["seed"] = training_seed(config)
    if "labels" in sections and config.difficulty.label_column is None and config.difficulty.n_labels:
        plain = dict(flat(to_dict(config)))
        tree["labels"] = {key.rpartition(".")[2]: plain[key] for key in LABELS} | {"seed": config.seed}
    if "score" in sections:
        tree["seed"] = config.seed
    functions = _functions(config, sections)
    if functions:
        tree["functions"] = functions
    tree["prompts"] = load_pools(config)[0].digest
    names = (config.model.path, config.sae.path if "sae" in sections else None)
    tree["files"] = [_files_digest(Path(name)) for name in names if name]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _functions(config: Config, sections: tuple[str, ...]) -> dict[str, str | None]:
    """The functions from outside that a stage's output depends on, each with a hash of its file."""
    names = [config.plan.schedule] * ("plan" in sections)
    names += [config.train.loss.kind] * ("train" in sections)
    rolled_out = config.difficulty.label_column is None and config.difficulty.n_labels > 0
    if "train" in sections or ("labels" in sections and rolled_out):
        names += config.train.reward
    return {name: source_digest(name) for name in names if is_function(name)}


def _files_digest(path: Path, tail: int = 1 << 16) -> list[list[Any]]:
    """Name, size and hash of the last bytes of a local model's files; nothing for a hub id."""
    found = []
    for file in sorted(f for f in (path.iterdir() if path.is_dir() else [path]) if f.is_file()):
        with open(file, "rb") as opened:
            opened.seek(max(0, file.stat().st_size - tail))
            found.append([file.name, file.stat().st_size, hashlib.sha256(opened.read()).hexdigest()])
    return found


def changes(before: Any, config: Config, sections: tuple[str, ...], without: tuple[str, ...] = ()) -> str:
    """What differs between the config in a record (plain values) and ``config``, for a message."""
    now = json.loads(json.dumps(to_dict(config)))  # with lists for tuples, as a record has them
    try:
        old, new = (_covered(tree, sections, without) for tree in (before, now))
    except (KeyError, TypeError, AttributeError):
        return "a record of another version"
    found = [f"{key} was {old.get(key)}" for key in new if old.get(key) != new[key]]
    if not found:
        return "the same settings, but other prompts, functions or model files"
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
        plain |= {key: value for key, value in flat({"train": tree["train"]}) if key in LABELS}
    plain["seed"] = tree.get("seed")
    if plain.get("train.seed", 0) is None:
        plain["train.seed"] = plain["seed"]
    return plain
