"""What the benchmarks on a pool of prompts share: their arguments, a pool made of reasoning-gym's tasks, and
the session behind a pass."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from saerl_fast.fileio import write_text
from saerl_fast.session import Session
from saerl_fast.signals.bank import Bank
from saerl_fast.stages.console import Echo
from saerl_kernels import CSR

Extract = Callable[[Path, Path, str, str], None]  # pool, work, model, dtype
SOURCE = "reasoning-gym:"
DRAWN, TRIED, ROLLOUTS = 800, 608, 16  # prompts that are made here, how many are tried, and how often
UNTRIED = 1200  # prompts of a pool that needs no pass rates
PART = 256  # prompts kept together


def arguments(
    about: str, work: str, extract: Extract, argv: list[str] | None = None, *, tried: bool = True
) -> argparse.Namespace:
    """POOL --model --dtype --work --out --draws; ``extract`` makes the features that ``--work`` lacks.

    POOL is a file, or ``reasoning-gym:TASK,...``; ``tried``: with pass rates of MODEL (see `made`).
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
    if args.name == args.pool:
        args.pool = (
            made(args.pool, args.work, args.model, args.dtype) if tried else drawn(args.pool, args.work)
        )
    args.pool = Path(args.pool)
    if not (args.work / "complete").is_file():
        if not args.model:
            parser.error(f"{args.work} holds no complete features; give --model")
        extract(args.pool, args.work, args.model, args.dtype)
        (args.work / "complete").touch()
    return args


def made(source: str, work: Path, model: str | None, dtype: str) -> Path:
    """A file of TRIED prompts of these tasks, with pass rates of ROLLOUTS short completions by ``model``.

    The rollouts are kept beside it: the same command goes on where it stopped.
    """
    from saerl_fast.config import load_config
    from saerl_fast.stages.labels import difficulty_labels

    file = work / "pool.jsonl"
    if file.is_file():
        return file
    settings = {
        "model.path": model,
        "model.dtype": dtype,
        "data.train": source,
        "data.size": DRAWN,
        "data.eval_size": 1,
        "data.prefill": "Answer:",
        "difficulty.n_labels": TRIED,
        "difficulty.rollouts": ROLLOUTS,
        "train.reward": "reasoning-gym",
        "train.rollout.max_new_tokens": 8,
        "run_dir": work / "rollouts",
    }
    config, echo = load_config(None, [f"{key}={value}" for key, value in settings.items()]), Echo()
    session = Session.open(config, echo)
    rates, _ = difficulty_labels(config, echo, session)
    assert rates is not None
    columns = {"id": "prompt_id", "problem": "prompt", "answer": "answer", "task": "task"}
    rows = [
        dict(zip(columns, row, strict=True)) | {"pass_rate": rate}
        for *row, rate in zip(*map(session.train.column, columns.values()), rates.tolist(), strict=True)
        if np.isfinite(rate)
    ]
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


def drawn(source: str, work: Path) -> Path:
    """A file of UNTRIED prompts of these tasks, without pass rates."""
    from saerl_fast.prompts.reasoning_gym import rows

    found = rows(role="train", size=UNTRIED, seed=0, argument=source.removeprefix(SOURCE))
    columns = zip(*(found[name] for name in ("prompt_id", "prompt", "answer", "task")), strict=True)
    named = [dict(zip(("id", "problem", "answer", "task"), row, strict=True)) for row in columns]
    lines = [json.dumps(row | {"pass_rate": None}) + "\n" for row in named]
    return write_text(work / "drawn.jsonl", "".join(lines))


def rows_of(pool: Path) -> list[dict[str, Any]]:
    """The rows of a pool: id, problem, answer, pass_rate (None where unknown), and what else there is."""
    return [json.loads(line) for line in pool.read_text().splitlines() if line.strip()]


def keep_features(pool: Path, work: Path, model: str, dtype: str, kinds: Sequence[str]) -> None:
    """Train the SAE and make these kinds of features of `bank_pass`, a file for every PART prompts."""
    from saerl_fast.sae.pooled import bank_pass

    session, sae, echo = opened(pool, work, model, dtype)
    prompts = session.train
    bar = echo.bar("features", "prompt")
    for start in range(0, len(prompts), PART):
        file = work / f"part-{start:07d}.npz"
        if not file.is_file():
            rows = prompts.select(range(start, min(start + PART, len(prompts))))
            answers = [answer[:64] for answer in rows.answer_ids] if "answer_logprob" in kinds else None
            found = bank_pass(session.model, sae, rows.ids, answers, kinds=kinds, own=rows.own)
            dense = {k: v.to_dense().numpy() if isinstance(v, CSR) else v for k, v in found.items()}
            temporary = file.with_name("part.tmp.npz")
            np.savez_compressed(temporary, ids=np.array(rows.column("prompt_id")), **dense)
            temporary.replace(file)
        bar(min(start + PART, len(prompts)), len(prompts))


def kept_bank(rows: list[dict[str, Any]], work: Path) -> tuple[Bank, list[dict[str, Any]]]:
    """What `keep_features` has kept of these rows, as a bank, and the rows in its order; of a longer pool the
    others are left out."""
    by_name = {str(row["id"]): row for row in rows}
    files = [np.load(file) for file in sorted(work.glob("part-*.npz"))]
    ours = [np.isin(file["ids"], list(by_name)) for file in files]
    found = [
        by_name[name] for file, some in zip(files, ours, strict=True) for name in file["ids"][some].tolist()
    ]
    kept: dict[str, Any] = {
        kind: np.concatenate([file[kind][some] for file, some in zip(files, ours, strict=True)])
        for kind in files[0]
        if kind != "ids"
    }
    kept = {k: CSR.from_scipy(csr_matrix(v)) if k.startswith("sae") else v for k, v in kept.items()}
    texts, answers = [row["problem"] for row in found], [str(row["answer"]) for row in found]
    return Bank(kept.pop("sae"), texts, kept, answers), found


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
