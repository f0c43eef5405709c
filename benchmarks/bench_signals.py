"""How well each kind of features predicts difficulty, on a pool of prompts whose pass rates are known.

    python -m benchmarks.bench_signals POOL.jsonl --model MODEL --out benchmarks/results/signals.json

POOL: rows with id, problem, answer and pass_rate. An SAE is trained on the prompts, and one forward pass
through all blocks gives every kind that `saerl_fast.sae.pooled` knows. Both are kept under ``--work``, in
parts: the same command goes on where it stopped, and the tables need no model once the parts are there.

Spearman with the failure rate on rows that were never labelled, mean and standard deviation over draws of the
labelled ones; for the default also how often the interval held, and what labels chosen by `spread` give.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.model_selection import KFold

from benchmarks.harness import DEVICE, environment
from benchmarks.pool import arguments, opened, save_part
from saerl_fast.config import DifficultyConfig
from saerl_fast.fileio import write_json
from saerl_fast.signals import ridge
from saerl_fast.signals.bank import Bank, spearman
from saerl_fast.signals.choose import spread
from saerl_fast.signals.difficulty import LEVEL, _fit_predict
from saerl_fast.signals.features import ProbeMatrix
from saerl_kernels import CSR

COUNTS = (64, 128, 256, 512)
SPREAD = (64, 128, 256)  # counts for which labels are also chosen by `spread`
COVERED = 3  # draws on which the interval is tried
PART = 256  # prompts kept together
STORED = ("sae", "sae_mean", "sae_last", "hidden", "scalars", "answer_logprob")
TEXTS = ("length", "text", "tfidf")
SETS: dict[str, tuple[str, ...]] = {
    **{kind: (kind,) for kind in (*TEXTS, "answer_text", *STORED, "random")},
    "prompt and answer text": (*TEXTS, "answer_text"),
    "prompt text + sae": (*TEXTS, "sae"),
    "prompt text + sae + hidden": (*TEXTS, "sae", "hidden"),
    "default": (*TEXTS, "answer_text", "sae", "hidden"),
    "all": (*TEXTS, "answer_text", "sae", "hidden", "scalars", "answer_logprob"),
}


def extract(pool: Path, work: Path, model: str, dtype: str) -> None:
    """Train the SAE and make every kind of features, a file for every PART prompts."""
    from saerl_fast.sae.pooled import bank_pass

    session, sae, echo = opened(pool, work, model, dtype)
    prompts = session.train
    bar = echo.bar("features", "prompt")
    for start in range(0, len(prompts), PART):
        file = work / f"part-{start:07d}.npz"
        if not file.is_file():
            rows = prompts.select(range(start, min(start + PART, len(prompts))))
            answers = [answer[:64] for answer in rows.answer_ids]
            found = bank_pass(session.model, sae, rows.ids, answers, kinds=STORED, own=rows.own)
            dense = {k: v.to_dense().numpy() if isinstance(v, CSR) else v for k, v in found.items()}
            save_part(file, rows.column("prompt_id"), dense)
        bar(min(start + PART, len(prompts)), len(prompts))


def load(pool: Path, work: Path) -> tuple[Bank, np.ndarray]:
    """What `extract` has kept, as a bank, and the failure rates of its rows."""
    rows = {row["id"]: row for row in map(json.loads, pool.read_text().splitlines())}
    files = [np.load(file) for file in sorted(work.glob("part-*.npz"))]
    found = [rows[name] for file in files for name in file["ids"].tolist()]
    kept = {kind: np.concatenate([file[kind] for file in files]) for kind in STORED}
    sparse = {k: CSR.from_scipy(csr_matrix(v)) if k.startswith("sae") else v for k, v in kept.items()}
    texts, answers = [row["problem"] for row in found], [str(row["answer"]) for row in found]
    bank = Bank(sparse.pop("sae"), texts, sparse, answers)
    return bank, 1.0 - np.array([row["pass_rate"] for row in found])


def table(bank: Bank, failed: np.ndarray, draws: int) -> dict[str, Any]:
    """Set of features -> labels -> mean and deviation of Spearman; for the default the interval's share and
    the Spearman of labels chosen by `spread` out of 1,500 prompts, of which the random ones are drawn too."""
    tested, pool = np.split(np.random.default_rng(12345).permutation(bank.n_rows), [bank.n_rows * 2 // 7])
    blocks = bank.blocks(
        [*STORED, "text", "tfidf", "length", "answer_text", "random"], np.arange(bank.n_rows)
    )
    matrix = ProbeMatrix(bank.X)
    found: dict[str, dict[str, Any]] = {name: {} for name in [*SETS, "elasticnet"]}
    chosen_by: dict[str, Any] = {}
    coverage: dict[str, Any] = {}
    for count in COUNTS:
        scores: dict[str, list[float]] = {name: [] for name in found}
        covered, spread_out = [], []
        for draw in range(draws):
            candidates = np.random.default_rng(1000 + draw).choice(pool, 1500, replace=False)
            seen = candidates[:count]
            for name, kinds in SETS.items():
                made = {kind: blocks[kind] for kind in kinds}
                fit = ridge.fit(made, seen, failed[seen])
                scores[name].append(spearman(fit.predict(made, tested), failed[tested]))
                if name == "default" and draw < COVERED:
                    splits = list(KFold(5, shuffle=True, random_state=0).split(seen))
                    off = np.abs(
                        failed[seen] - np.clip(ridge.held_out(made, seen, failed[seen], splits), 0, 1)
                    )
                    half = np.sort(off)[min(int(np.ceil(LEVEL * (count + 1))), count) - 1]
                    inside = np.abs(failed[tested] - np.clip(fit.predict(made, tested), 0, 1)) <= half
                    covered.append(float(inside.mean()))
                if name == "default" and count in SPREAD:
                    best = candidates[spread(made, candidates, count)]
                    fit = ridge.fit(made, best, failed[best])
                    spread_out.append(spearman(fit.predict(made, tested), failed[tested]))
            parts = matrix[seen], failed[seen], [matrix[tested]]
            scores["elasticnet"].append(spearman(_fit_predict(*parts, DifficultyConfig())[0], failed[tested]))
        for name, values in scores.items():
            found[name][str(count)] = figures(values)
        coverage[str(count)] = figures(covered)
        if count in SPREAD:
            chosen_by[str(count)] = figures(spread_out)
        print(count, {name: row[str(count)]["mean"] for name, row in found.items()}, flush=True)
    return {"tested": len(tested), "spearman": found, "coverage_of_80": coverage, "labels_spread": chosen_by}


def figures(found: list[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(found)), 4), "std": round(float(np.std(found)), 4)}


def markdown(result: dict[str, Any]) -> str:
    """A row for a set of features."""
    lines = [
        f"| features | {' | '.join(f'{count} labels' for count in COUNTS)} |",
        "|---" * (len(COUNTS) + 1) + "|",
    ]
    rows = result["spearman"] | {"default, labels spread": result["labels_spread"]}
    for name, row in rows.items():
        cells = [f"{cell['mean']:.3f} ± {cell['std']:.3f}" for cell in row.values()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, "runs/bench_signals", extract, argv)
    bank, failed = load(args.pool, args.work)
    result = {"pool": args.pool.name, "model": Path(args.model or "").name, "prompts": bank.n_rows}
    result |= {"draws": args.draws, **table(bank, failed, args.draws), "environment": environment(DEVICE)}
    if args.out:
        write_json(args.out, result)
    print(markdown(result))


if __name__ == "__main__":
    main()
