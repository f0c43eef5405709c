"""What an output was made from, as a short hash beside it, so that stages never mix what does not belong."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from saerl_fast.config import Config, DataConfig, to_dict
from saerl_fast.errors import SaerlError

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


def training_seed(config: Config) -> int:
    """The seed of sampling and order."""
    return config.seed if config.train.seed is None else config.train.seed


def fingerprint(config: Config, sections: tuple[str, ...], *, without: tuple[str, ...] = ()) -> str:
    """A short hash of what a stage's output depends on: settings, and the prompts themselves.

    ``labels`` stands for what the difficulty labels depend on beyond their own section. A model or SAE is
    known by its name, and a local one by the sizes and ends of its files too.
    """
    tree: dict[str, Any] = {name: to_dict(getattr(config, name)) for name in sections if name != "labels"}
    for name, left_out in NOT_RESULTS.items():
        for key in left_out if name in tree else ():
            del tree[name][key]
    if "train" in tree:
        tree["train"]["seed"] = training_seed(config)
        for key in without:
            del tree["train"][key]
    if "labels" in sections and config.difficulty.label_column is None and config.difficulty.n_labels:
        tree["labels"] = {**to_dict(config.train.rollout), "reward": config.train.reward, "seed": config.seed}
        del tree["labels"]["batch_size"]
    if "score" in sections:
        tree["seed"] = config.seed
    tree["prompts"] = _prompts_digest(json.dumps(tree["data"]), config.seed, _stamp(config.data))
    tree["files"] = [_files_digest(Path(name)) for name in (config.model.path, config.sae.path) if name]
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _prompts_digest(data: str, seed: int, stamp: tuple[int, ...]) -> str:
    """Hash of the training prompts and answers that the settings ``data`` (JSON of the section) load.

    Loading takes a while, so it is done once for each ``stamp``, the state of the files it reads.
    """
    from saerl_fast.prompts import load_split

    columns = load_split(DataConfig(**json.loads(data)), seed)[0].columns
    rows = [columns[name] for name in ("prompt_id", "prompt", "answer") if name in columns]
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()


def _stamp(data: DataConfig) -> tuple[int, ...]:
    files = [Path(name) for name in (data.train, data.eval or "") if name and Path(name).is_file()]
    return tuple(part for file in files for part in (file.stat().st_mtime_ns, file.stat().st_size))


def _files_digest(path: Path, tail: int = 1 << 16) -> list[list[Any]]:
    """Name, size and hash of the last bytes of a local model's files; nothing for a hub id."""
    found = []
    for file in sorted(f for f in (path.iterdir() if path.is_dir() else [path]) if f.is_file()):
        with open(file, "rb") as opened:
            opened.seek(max(0, file.stat().st_size - tail))
            found.append([file.name, file.stat().st_size, hashlib.sha256(opened.read()).hexdigest()])
    return found


def check_same(
    found: str | None, config: Config, sections: tuple[str, ...], what: Path, command: str
) -> None:
    """SaerlError when ``what`` carries another fingerprint than these settings give."""
    if found != fingerprint(config, sections):
        raise SaerlError(
            f"{what} was made with other settings in {', '.join(sections)}; run `{command}` again with this "
            "config, or choose another run_dir"
        )
