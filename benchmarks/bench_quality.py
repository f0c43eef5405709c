"""What the signals see of defective prompts, copies of prompts and subjects, on a pool of maths problems.

    python -m benchmarks.bench_quality POOL.jsonl --model MODEL --out benchmarks/results/quality.json

POOL: rows with id, problem, answer and pass_rate. Defective copies of some prompts (`defects.DEFECTS`) and
near-copies of others (`defects.COPIES`) join it, an SAE is trained on all, and one forward pass gives pooled
SAE features and hidden states of the SAE's layer. All of that is kept under ``--work``, in parts: the same
command goes on where it stopped, and the tables need no model once the parts are there.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.defects import COPIES, DEFECTS

PER_WAY, PER_COPY = 130, 60
PART = 512  # prompts kept together


def make_pool(path: Path, out: Path) -> None:
    """The pool's rows; defective copies of some, way by way; near-copies of others."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    order = random.Random(0).sample(range(len(rows)), len(rows))
    made = [{"id": str(r["id"]), "problem": r["problem"], "answer": str(r["answer"])} for r in rows]
    for row, source in zip(made, rows, strict=True):
        row |= {"pass_rate": source["pass_rate"], "kind": "sound", "way": "", "part": "sound"}
    extra: list[dict[str, Any]] = []
    ways = [(kind, way.__name__, way, PER_WAY) for kind, found in DEFECTS.items() for way in found]
    ways += [("copy", name, way, PER_COPY) for name, way in COPIES.items()]
    for kind, name, spoil, most in sorted(ways, key=lambda way: way[1] != "drawing_removed"):
        wanted, rest = most, []
        for i in order:
            text = spoil(rows[i]["problem"], random.Random(f"{name} {i}")) if wanted else None
            if not text or not text.strip():
                rest.append(i)
                continue
            bad = {"id": f"{kind} {name} {i}", "problem": text, "answer": made[i]["answer"]}
            extra.append(bad | {"pass_rate": None, "kind": kind, "way": name, "of": made[i]["id"]})
            made[i]["part"] = "original"  # no defect is told from the very prompt it was made of
            wanted -= 1
        order = rest
    out.write_text("".join(json.dumps(row) + "\n" for row in [*made, *extra]))


def extract(pool: Path, work: Path, model: str, dtype: str) -> None:
    """Train the SAE and pool features and hidden states, a file for every PART prompts."""
    from saerl_fast.config import load_config
    from saerl_fast.sae.capture import iter_hidden_ids, resolve_layer
    from saerl_fast.sae.files import load_sae
    from saerl_fast.session import Session
    from saerl_fast.stages.console import Echo
    from saerl_fast.stages.pipeline import sae_stage

    if not (work / "pool.jsonl").is_file():
        work.mkdir(parents=True, exist_ok=True)
        make_pool(pool, work / "pool.jsonl")
    settings = {
        "model.path": model,
        "model.dtype": dtype,
        "data.train": work / "pool.jsonl",
        "data.prompt_column": "problem",
        "data.id_column": "id",
        "data.eval_size": 1,
        "data.max_prompt_tokens": 512,
        "run_dir": work,
    }
    config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
    echo = Echo()
    session = Session.open(config, echo)
    sae = load_sae(work / "sae") if (work / "sae").is_dir() else sae_stage(config, echo, session)
    layer = resolve_layer(session.model, sae, None)
    ids, rows = session.train.column("prompt_id"), session.train.ids
    before, after = _shared(rows)
    bar = echo.bar("features", "prompt")
    for start in range(0, len(rows), PART):
        file = work / f"part-{start:07d}.npz"
        if file.is_file():
            continue
        found: dict[int, dict[str, torch.Tensor]] = {}
        with torch.inference_mode():
            for chosen, x, offsets in iter_hidden_ids(session.model, rows[start : start + PART], layer):
                sizes = (offsets[1:] - offsets[:-1]).tolist()
                pooled = {r: sae.pool(x, offsets, reduce=r).to_dense() for r in ("max", "mean")}
                tokens = x.float().split(sizes)
                own = [part[before : len(part) - after] for part in tokens]
                ends = torch.tensor([0, *map(len, own)]).cumsum(0)
                inner = torch.cat(own).to(x.dtype)
                pooled |= {f"own_{r}": sae.pool(inner, ends, reduce=r).to_dense() for r in ("max", "mean")}
                pooled["hidden_mean"] = torch.stack([part.mean(0) for part in own])
                pooled["hidden_last"] = torch.stack([part[-1] for part in tokens])
                for place, i in enumerate(chosen):
                    found[int(i)] = {name: value[place] for name, value in pooled.items()}
        stacked = {
            name: torch.stack([found[i][name] for i in range(len(found))]).numpy().astype(np.float32)
            for name in found[0]
        }
        np.savez_compressed(work / "part.tmp.npz", ids=np.array(ids[start : start + PART]), **stacked)
        (work / "part.tmp.npz").replace(file)
        bar(min(start + PART, len(rows)), len(rows))
    (work / "complete").touch()


def _shared(rows: list[list[int]]) -> tuple[int, int]:
    """How many tokens all prompts begin and end with: the chat template's."""
    least = min(map(len, rows))
    first = next((i for i in range(least) if len({row[i] for row in rows}) > 1), least)
    last = next((i for i in range(least) if len({row[-1 - i] for row in rows}) > 1), least)
    return first, min(last, least - first - 1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool", type=Path)
    parser.add_argument("--model", help="what model.path takes; not needed once --work is complete")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_quality"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draws", type=int, default=10)
    args = parser.parse_args(argv)
    if not (args.work / "complete").is_file():
        if not args.model:
            parser.error(f"{args.work} holds no complete features; give --model")
        extract(args.pool, args.work, args.model, args.dtype)


if __name__ == "__main__":
    main()
