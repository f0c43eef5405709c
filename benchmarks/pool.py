"""What the benchmarks on a pool of maths problems share: their arguments, and the session behind a pass."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from saerl_fast.session import Session
from saerl_fast.stages.console import Echo

Extract = Callable[[Path, Path, str, str], None]  # pool, work, model, dtype


def arguments(about: str, work: str, extract: Extract, argv: list[str] | None = None) -> argparse.Namespace:
    """POOL --model --dtype --work --out --draws; ``extract`` makes the features that ``--work`` lacks."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("pool", type=Path)
    parser.add_argument("--model", help="what model.path takes; not needed once --work is complete")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path, default=Path(work))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draws", type=int, default=10)
    args = parser.parse_args(argv)
    if not (args.work / "complete").is_file():
        if not args.model:
            parser.error(f"{args.work} holds no complete features; give --model")
        extract(args.pool, args.work, args.model, args.dtype)
        (args.work / "complete").touch()
    return args


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
