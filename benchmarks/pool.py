"""What the benchmarks on a pool of prompts share: their arguments, a pool made of reasoning-gym's tasks, and
the session behind a pass."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from saerl_fast.fileio import write_text
from saerl_fast.session import Session
from saerl_fast.stages.console import Echo

Extract = Callable[[Path, Path, str, str], None]  # pool, work, model, dtype
SOURCE = "reasoning-gym:"
MADE, ROLLOUTS = 800, 16  # prompts of a pool that is made here, and completions of each


def arguments(about: str, work: str, extract: Extract, argv: list[str] | None = None) -> argparse.Namespace:
    """POOL --model --dtype --work --out --draws; ``extract`` makes the features that ``--work`` lacks.

    POOL is a file, or ``reasoning-gym:TASK,...``, whose pass rates are then those of MODEL (see `made`).
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("pool")
    parser.add_argument("--model", help="what model.path takes; not needed once --work is complete")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path, default=Path(work))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draws", type=int, default=10)
    args = parser.parse_args(argv)
    args.name = args.pool if args.pool.startswith(SOURCE) else Path(args.pool).name
    args.pool = made(args.pool, args.model, args.dtype) if args.name == args.pool else Path(args.pool)
    if not (args.work / "complete").is_file():
        if not args.model:
            parser.error(f"{args.work} holds no complete features; give --model")
        extract(args.pool, args.work, args.model, args.dtype)
        (args.work / "complete").touch()
    return args


def made(source: str, model: str | None, dtype: str) -> Path:
    """A file of MADE prompts of these tasks, with pass rates of ROLLOUTS short completions by ``model``.

    Kept under ``runs``, and so are the rollouts until it is complete: the same command goes on.
    """
    from saerl_fast.config import load_config
    from saerl_fast.stages.labels import difficulty_labels

    work = Path("runs") / f"pool-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    file = work / "pool.jsonl"
    if file.is_file():
        return file
    settings = {
        "model.path": model,
        "model.dtype": dtype,
        "data.train": source,
        "data.size": MADE,
        "data.eval_size": 1,
        "data.prefill": "Answer:",
        "difficulty.n_labels": MADE,
        "difficulty.rollouts": ROLLOUTS,
        "train.reward": "reasoning-gym",
        "train.rollout.max_new_tokens": 8,
        "run_dir": work,
    }
    config, echo = load_config(None, [f"{key}={value}" for key, value in settings.items()]), Echo()
    session = Session.open(config, echo)
    rates, _ = difficulty_labels(config, echo, session)
    assert rates is not None
    columns = [session.train.column(name) for name in ("prompt_id", "prompt", "answer", "task")]
    rows = zip(*columns, rates.tolist(), strict=True)
    names = ("id", "problem", "answer", "task", "pass_rate")
    write_text(file, "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return file


def opened(data: Path, work: Path, model: str, dtype: str) -> tuple[Session, Any, Echo]:
    """The model with the problems in ``data``, and the SAE kept in ``work``, trained on them if need be."""
    from saerl_fast.config import load_config
    from saerl_fast.sae.files import load_sae
    from saerl_fast.stages.pipeline import sae_stage

    settings = {
        "model.path": model,
        "model.dtype": dtype,
        "data.train": data,
        "data.prompt_column": "problem",
        "data.id_column": "id",
        "data.eval_size": 1,
        "data.max_prompt_tokens": 512,
        "run_dir": work,
    }
    config, echo = load_config(None, [f"{key}={value}" for key, value in settings.items()]), Echo()
    session = Session.open(config, echo)
    sae = load_sae(work / "sae") if (work / "sae").is_dir() else sae_stage(config, echo, session)
    return session, sae, echo


def save_part(file: Path, ids: Any, arrays: dict[str, Any]) -> None:
    """Keep the features of some prompts, whole or not at all."""
    temporary = file.with_name("part.tmp.npz")
    np.savez_compressed(temporary, ids=np.array(ids), **arrays)
    temporary.replace(file)
