"""What each kind of feature says of difficulty and quality, on a pool of prompts whose pass rates are known.

    python -m benchmarks.bench_signals POOL.jsonl --model MODEL --out benchmarks/results/signals.json

POOL: rows with id, problem, answer and pass_rate. Defective copies of some prompts join it (`DEFECTS`), an
SAE is trained on all, and one forward pass gives pooled SAE features and hidden states (mean and last) of the
SAE's layer. All of that is kept under ``--work``, in parts: the same command goes on where it stopped, and
tables need no model once the parts are there.

Difficulty: Spearman with the failure rate on rows that were never labelled, mean and standard deviation over
draws of the labelled ones. Quality: AUC on 600 sound and up to 150 defective rows after fits to 200 and 50;
sound rows are such as the defect could have been made of, and never originals of defective ones.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from sklearn.metrics import roc_auc_score

from benchmarks.harness import DEVICE, environment
from saerl_fast.config import DifficultyConfig
from saerl_fast.fileio import write_json
from saerl_fast.signals import ridge
from saerl_fast.signals.bank import Bank, spearman
from saerl_fast.signals.difficulty import _fit_predict
from saerl_fast.signals.features import ProbeMatrix
from saerl_kernels import CSR

COUNTS = (64, 128, 256, 512)
KINDS = ("length", "text", "tfidf", "sae", "hidden")
SETS: dict[str, tuple[str, ...]] = {
    "elasticnet": ("sae",),  # as the paper's probe
    **{kind: (kind,) for kind in KINDS},
    "text + tfidf": ("text", "tfidf"),
    "default": ("sae", "text", "tfidf"),
    "text + tfidf + hidden": ("text", "tfidf", "hidden"),
    "all": ("sae", "text", "tfidf", "hidden"),
}
PER_KIND = 200
PART = 512  # prompts kept together
TOPICS = (
    "the sea",
    "my cat",
    "old trains",
    "rain",
    "football",
    "bread",
    "jazz",
    "holidays",
    "my garden",
    "chess",
)
FORMS = (
    "Write a short poem about {0}.",
    "Which do you like better, {0} or {1}?",
    "Tell me a joke about {0} and {1}.",
    "Please draft an email to my boss about {0}.",
    "Translate 'I love {0}' into French.",
    "Summarise the history of {0}.",
    "How do I talk with my neighbour about {0}?",
    "Give me three names for a shop about {0}.",
    "Continue this story: once there was {0}, and then {1} came.",
)
FIGURES = (
    "the value shown in the figure",
    "the length marked in the diagram",
    "the number in the table above",
    "the value read from the graph",
    "the amount given in the picture",
    "the measure shown in the drawing",
)


def truncated(text: str, rng: random.Random) -> str | None:
    """The beginning, cut between words."""
    words = text.split(" ")
    return " ".join(words[: int(len(words) * rng.uniform(0.3, 0.7))]) if len(words) >= 12 else None


def garbled(text: str, rng: random.Random) -> str | None:
    """A quarter of the characters replaced by letters, digits and signs."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789#%&@~"
    return (
        "".join(rng.choice(letters) if rng.random() < 0.25 else c for c in text) if len(text) >= 40 else None
    )


def off_topic(text: str, rng: random.Random) -> str | None:
    """Something else altogether."""
    return rng.choice(FORMS).format(*rng.sample(TOPICS, 2)) if len(text) >= 40 else None


def figure_missing(text: str, rng: random.Random) -> str | None:
    """A number (or the drawing) replaced by a reference to a figure that is not there."""
    if "[asy]" in text:
        return re.sub(r"\s*\[asy\].*?\[/asy\]\s*", " ", text, flags=re.S).strip()
    numbers = [m for m in re.finditer(r"(?<=\s)\d+(?=[\s,.?])", text)]
    if not numbers:
        return None
    chosen = rng.choice(numbers)
    return text[: chosen.start()] + rng.choice(FIGURES) + text[chosen.end() :]


def question_removed(text: str, rng: random.Random) -> str | None:
    """All but the last sentence."""
    parts = re.split(r"(?<=[.?!])\s+(?=[A-Z$\\])", text.strip())
    return " ".join(parts[:-1]) if len(parts) >= 2 and len(" ".join(parts[:-1])) >= 30 else None


def wrong_answer(text: str, rng: random.Random) -> str | None:
    """The prompt itself: the answer beside it would be another one, which no prompt shows."""
    return text


DEFECTS: dict[str, Callable[[str, random.Random], str | None]] = {
    name: globals()[name]
    for name in ("truncated", "garbled", "off_topic", "figure_missing", "question_removed", "wrong_answer")
}


def make_pool(path: Path, out: Path) -> None:
    """The pool's rows, half of them `quality`'s sound ones; of the others, defective copies by kind."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    order = random.Random(0).sample(range(len(rows)), len(rows))
    made = [{"id": str(r["id"]), "problem": r["problem"], "answer": str(r["answer"])} for r in rows]
    for row, source in zip(made, rows, strict=True):
        row |= {"pass_rate": source["pass_rate"], "kind": "sound", "part": "difficulty"}
    extra: list[dict[str, Any]] = []
    share = len(rows) // (2 * len(DEFECTS))
    for name, spoil in DEFECTS.items():
        mine, order = order[:share], order[share:]
        texts = {i: spoil(rows[i]["problem"], random.Random(f"{name} {i}")) for i in mine}
        for i in [i for i, text in texts.items() if text and text.strip()][:PER_KIND]:
            bad = {"id": f"{name}-{i}", "problem": texts[i], "answer": made[i]["answer"]}
            extra.append(bad | {"pass_rate": None, "kind": name, "part": "quality"})
    for i in order:  # no original of a defective one, nor passed over for one
        made[i]["part"] = "quality"
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
        "score.include_answer": "false",
        "run_dir": work,
    }
    config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
    echo = Echo()
    session = Session.open(config, echo)
    sae = load_sae(work / "sae") if (work / "sae").is_dir() else sae_stage(config, echo, session)
    layer = resolve_layer(session.model, sae, None)
    ids, rows = session.train.column("prompt_id"), session.train.ids
    bar = echo.bar("features", "prompt")
    for start in range(0, len(rows), PART):
        file = work / f"part-{start:07d}.npz"
        if file.is_file():
            continue
        seen: list[int] = []
        parts: list[Any] = []
        with torch.inference_mode():
            for chosen, x, offsets in iter_hidden_ids(session.model, rows[start : start + PART], layer):
                seen += chosen
                tokens = x.float()
                each = tokens.split((offsets[1:] - offsets[:-1]).tolist())
                mean = torch.stack([part[1:].mean(0) for part in each])  # the first token is a sink
                parts.append((sae.pool(x, offsets, reduce="max").to_dense(), mean, tokens[offsets[1:] - 1]))
        found = {}
        for name, tensors in zip(("sae", "mean", "last"), zip(*parts, strict=True), strict=True):
            found[name] = torch.cat(tensors)[torch.tensor(seen).argsort()].numpy().astype(np.float32)
        np.savez_compressed(work / "part.tmp.npz", ids=np.array(ids[start : start + PART]), **found)
        (work / "part.tmp.npz").replace(file)
        bar(min(start + PART, len(rows)), len(rows))
    (work / "complete").touch()


def load(work: Path) -> tuple[Bank, list[dict[str, Any]]]:
    """What `extract` has kept: a bank with ``hidden`` as a further kind of features, and its rows."""
    rows = {}
    for line in (work / "pool.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["id"]] = row
    files = [np.load(file) for file in sorted(work.glob("part-*.npz"))]
    found = [rows[name] for file in files for name in file["ids"].tolist()]
    features = csr_matrix(np.concatenate([file["sae"] for file in files]))
    hidden = np.concatenate([np.hstack([file["mean"], file["last"]]) for file in files])
    bank = Bank(CSR.from_scipy(features), [row["problem"] for row in found])
    bank.kinds["hidden"] = hidden.__getitem__
    return bank, found


def difficulty(bank: Bank, rows: list[dict[str, Any]], draws: int) -> dict[str, Any]:
    """Set of features -> labels -> mean and standard deviation of Spearman over the draws."""
    known = np.array([i for i, row in enumerate(rows) if row["pass_rate"] is not None])
    labels = 1.0 - np.array([rows[i]["pass_rate"] for i in known])
    order = np.random.default_rng(12345).permutation(len(known))
    tested, pool = np.split(order, [len(known) * 2 // 7])
    blocks = bank.blocks(KINDS, known)
    matrix = ProbeMatrix(bank.X)
    table: dict[str, Any] = {}
    for name, kinds in SETS.items():
        for count in COUNTS:
            found = []
            for draw in range(draws):
                seen = np.random.default_rng(1000 + draw).choice(pool, count, replace=False)
                if name == "elasticnet":
                    parts = matrix[known[seen]], labels[seen], [matrix[known[tested]]]
                    scores = _fit_predict(*parts, DifficultyConfig())[0]
                else:
                    chosen = {kind: blocks[kind] for kind in kinds}
                    scores = ridge.fit(chosen, seen, labels[seen]).predict(chosen, tested)
                found.append(spearman(scores, labels[tested]))
            table.setdefault(name, {})[str(count)] = figures(found)
    return {"tested": len(tested), "spearman": table}


def quality(bank: Bank, rows: list[dict[str, Any]], draws: int) -> dict[str, Any]:
    """Defect -> set of features -> mean and standard deviation of AUC over the draws."""
    table: dict[str, Any] = {}
    for kind, spoil in DEFECTS.items():
        bad = [i for i, row in enumerate(rows) if row["kind"] == kind]
        free = [i for i, row in enumerate(rows) if row["kind"] == "sound" and row["part"] == "quality"]
        good = [i for i in free if spoil(rows[i]["problem"], random.Random(i))]
        for draw in range(draws):
            rng = np.random.default_rng(2000 + draw)
            sound, broken = rng.permutation(good)[:800], rng.permutation(bad)
            at = np.r_[sound, broken]
            flags = np.r_[np.ones(len(sound)), np.zeros(len(broken))]
            share, few = len(sound) // 4, len(broken) // 4
            seen = np.r_[np.arange(share), len(sound) + np.arange(few)]
            tested = np.setdiff1d(np.arange(len(at)), seen)
            blocks = bank.blocks(KINDS, at)
            for name, kinds in SETS.items():
                if name == "elasticnet":
                    continue
                chosen = {kind: blocks[kind] for kind in kinds}
                scores = ridge.fit(chosen, seen, flags[seen]).predict(chosen, tested)
                auc = roc_auc_score(flags[tested], scores)
                table.setdefault(kind, {}).setdefault(name, []).append(float(auc))
    return {kind: {name: figures(found) for name, found in row.items()} for kind, row in table.items()}


def figures(found: list[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(found)), 4), "std": round(float(np.std(found)), 4)}


def markdown(result: dict[str, Any]) -> str:
    """Both tables, a row for a set of features."""
    spearmans, aucs = result["difficulty"]["spearman"], result["quality"]
    head = ["features", *(f"{count} labels" for count in COUNTS), *(name.replace("_", " ") for name in aucs)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in SETS:
        cells = [f"{cell['mean']:.3f} ± {cell['std']:.3f}" for cell in spearmans[name].values()]
        cells += [f"{row[name]['mean']:.3f}" if name in row else "" for row in aucs.values()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool", type=Path)
    parser.add_argument("--model", help="what model.path takes; not needed once --work is complete")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_signals"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draws", type=int, default=10)
    args = parser.parse_args(argv)
    if not (args.work / "complete").is_file():
        if not args.model:
            parser.error(f"{args.work} holds no complete features; give --model")
        extract(args.pool, args.work, args.model, args.dtype)
    bank, rows = load(args.work)
    result = {
        "pool": args.pool.name,
        "model": json.loads((args.work / "sae" / "train.json").read_text())["config"]["model"]["path"],
        "prompts": sum(row["kind"] == "sound" for row in rows),
        "draws": args.draws,
        "difficulty": difficulty(bank, rows, args.draws),
        "quality": quality(bank, rows, args.draws),
        "environment": environment(DEVICE),
    }
    result["model"] = Path(result["model"]).name
    if args.out:
        write_json(args.out, result)
    print(markdown(result))


if __name__ == "__main__":
    main()
