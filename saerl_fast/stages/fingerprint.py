"""What an output was made from, as a short hash beside it, so that stages never mix what does not belong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saerl_fast.config import Config, to_dict
from saerl_fast.errors import SaerlError
from saerl_fast.session import load_pools

SAE_SECTIONS = ("model", "data", "sae")  # what a trained SAE depends on
SCORE_SECTIONS = (*SAE_SECTIONS, "score", "quality", "difficulty", "diversity", "labels")
RUN_SECTIONS = (*SCORE_SECTIONS, "plan", "train")
LABEL_SECTIONS = ("model", "data", "difficulty", "labels")
NOT_RESULTS = {  # where, how fast and what is kept of it: no part of what comes out
    "model": ("device", "attn", "trust_remote_code"),
    "score": ("batch_tokens", "shard", "backend"),
    "train": (
        "micro_tokens",
        "save_every",
        "keep",
        "rollout_log",
        "trackers",
        "save_model",
        "reward_timeout",
    ),
}

FILTER = ("threshold", "filter_ratio")  # of quality: the plan's business, since the scores stay the same
REWARD = ("reward", "reward_weights", "reward_truncated", "pass_threshold")  # what labels depend on
FOR_LABELS = ("max_new_tokens", "temperature", "top_p")  # of train.rollout: the labels have their own counts


def training_seed(config: Config) -> int:
    """The seed of sampling and order."""
    return config.seed if config.train.seed is None else config.train.seed


def settings(
    tree: dict[str, Any], sections: tuple[str, ...], without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The settings in ``tree`` (a config as plain values) that decide what comes out of a stage.

    ``without``: keys of the train section to leave out.
    """
    dropped = {name: set(keys) for name, keys in NOT_RESULTS.items()}
    dropped["train"] |= set(without)
    if "plan" not in sections:
        dropped["quality"] = set(FILTER)
    kept: dict[str, Any] = {}
    for name in sections:
        if name != "labels":
            kept[name] = {key: v for key, v in tree[name].items() if key not in dropped.get(name, ())}
    return kept


def fingerprint(config: Config, sections: tuple[str, ...], *, without: tuple[str, ...] = ()) -> str:
    """A short hash of what a stage's output depends on: settings, and the prompts themselves.

    ``labels`` stands for what the difficulty labels depend on beyond their own section. A model or SAE is
    known by its name, and a local one by the sizes and ends of its files too.
    """
    tree = settings(to_dict(config), sections, without)
    if "train" in tree:
        tree["train"]["seed"] = training_seed(config)
    if "labels" in sections and config.difficulty.label_column is None and config.difficulty.n_labels:
        sampling = {key: getattr(config.train.rollout, key) for key in FOR_LABELS}
        paid = {key: getattr(config.train, key) for key in REWARD}
        tree["labels"] = {**sampling, **paid, "seed": config.seed}
    if "score" in sections:
        tree["seed"] = config.seed
    tree["prompts"] = load_pools(config)[0].digest
    tree["files"] = [_files_digest(Path(name)) for name in (config.model.path, config.sae.path) if name]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


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
    try:
        old = dict(_flat(settings(before, sections, without)))
    except (KeyError, TypeError, AttributeError):
        return "a record of another version"
    new = dict(_flat(settings(to_dict(config), sections, without)))
    if "labels" in sections:
        keys = [f"rollout.{key}" for key in FOR_LABELS] + [*REWARD]
        old |= {f"train.{key}": value for key, value in _flat(before["train"]) if key in keys}
        new |= {f"train.{key}": value for key, value in _flat(to_dict(config)["train"]) if key in keys}
    for tree, of in ((old, before), (new, to_dict(config))):
        tree["seed"] = of.get("seed")
        if tree.get("train.seed", 0) is None:
            tree["train.seed"] = tree["seed"]
    found = [f"{key} was {old.get(key)}" for key in new if _plain(old.get(key)) != _plain(new[key])]
    if not found:
        return "the same settings, but other prompts or model files"
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_same(
    record: dict[str, Any], config: Config, sections: tuple[str, ...], what: Path, command: str
) -> None:
    """SaerlError when ``what``, described by ``record``, was made with other settings than these."""
    if record.get("fingerprint") != fingerprint(config, sections):
        why = changes(record.get("config"), config, sections)
        raise SaerlError(
            f"{what} was made with other settings ({why}); run `{command}` again with this "
            "config, or choose another run_dir"
        )
