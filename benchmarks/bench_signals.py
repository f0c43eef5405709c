"""How well each kind of features predicts difficulty, on a pool of prompts whose pass rates are known.

    python -m benchmarks.bench_signals POOL.jsonl --model MODEL --out benchmarks/results/signals.json

POOL: rows with id, problem, answer and pass_rate, or ``reasoning-gym:TASK,...``, on whose prompts the model
is then tried first (`pool.made`). An SAE is trained on the prompts, and one forward pass through all blocks
gives every kind that `saerl_fast.sae.pooled` knows. All is kept under ``--work``, in parts: the same command
goes on where it stopped, and the tables need no model once the parts are there. ``--work`` may also be what
`bench_quality` has kept of the same pool: then sets with kinds that take the whole model are left out.

Spearman with the failure rate on rows that were never labelled, mean and standard deviation over draws of the
labelled ones; for the default also how often the interval held, and what labels chosen by `spread` give.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.model_selection import KFold

from benchmarks.harness import DEVICE, environment
from benchmarks.pool import arguments, keep_features, kept_bank, rows_of
from saerl_fast.config import DifficultyConfig
from saerl_fast.fileio import write_json
from saerl_fast.signals import ridge
from saerl_fast.signals.bank import Bank, spearman
from saerl_fast.signals.choose import spread
from saerl_fast.signals.difficulty import LEVEL, _fit_predict
from saerl_fast.signals.features import ProbeMatrix

COUNTS = (64, 128, 256, 512)
SPREAD = (64, 128, 256)  # counts for which labels are also chosen by `spread`
COVERED = 3  # draws on which the interval is tried
FEW = 2000  # prompts with a pass rate, below which each draw tests on others
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
    """Train the SAE and make every kind of features."""
    keep_features(pool, work, model, dtype, STORED)


def load(pool: Path, work: Path) -> tuple[Bank, np.ndarray, np.ndarray]:
    """What `extract` has kept, as a bank; of its rows the failure rates, NaN where unknown, and the tasks."""
    bank, rows = kept_bank(rows_of(pool), work)
    failed = 1.0 - np.array([row["pass_rate"] for row in rows], dtype=float)
    return bank, failed, np.array([str(row.get("task")) for row in rows])


def split(known: np.ndarray, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to test on, and rows to label some of; of a small pool a half each, others in each draw."""
    if len(known) >= FEW:
        tested, pool = np.split(np.random.default_rng(12345).permutation(known), [len(known) * 2 // 7])
        return tested, np.random.default_rng(1000 + draw).choice(pool, 1500, replace=False)
    mixed = np.random.default_rng(1000 + draw).permutation(known)
    return mixed[len(known) // 2 :], mixed[: len(known) // 2]


def table(bank: Bank, failed: np.ndarray, tasks: np.ndarray, draws: int) -> dict[str, Any]:
    """Set of features -> labels -> mean and deviation of Spearman, and of several tasks the mean of Spearman
    within each, by the most labels; for the default the interval's share and the Spearman of labels chosen by
    `spread` out of 1,500 prompts, of which the random ones are drawn too."""
    known = np.flatnonzero(np.isfinite(failed))
    sets = {name: kinds for name, kinds in SETS.items() if set(kinds) <= set(bank.kinds)}
    blocks = bank.blocks(sorted({kind for kinds in sets.values() for kind in kinds}), np.arange(bank.n_rows))
    matrix = ProbeMatrix(bank.X)
    found: dict[str, dict[str, Any]] = {name: {} for name in [*sets, "elasticnet"]}
    chosen_by: dict[str, Any] = {}
    coverage: dict[str, Any] = {}
    for count in (count for count in COUNTS if count <= len(split(known, 0)[1])):
        scores: dict[str, list[float]] = {name: [] for name in found}
        within: dict[str, list[float]] = {name: [] for name in found}
        covered, spread_out = [], []
        for draw in range(draws):
            tested, candidates = split(known, draw)
            seen = candidates[:count]
            for name, kinds in sets.items():
                made = {kind: blocks[kind] for kind in kinds}
                fit = ridge.fit(made, seen, failed[seen])
                predicted = fit.predict(made, tested)
                scores[name].append(spearman(predicted, failed[tested]))
                within[name].append(_within(predicted, failed[tested], tasks[tested]))
                if name == "default" and draw < COVERED:
                    splits = list(KFold(5, shuffle=True, random_state=0).split(seen))
                    off = np.abs(
                        failed[seen] - np.clip(ridge.held_out(made, seen, failed[seen], splits), 0, 1)
                    )
                    half = np.sort(off)[min(int(np.ceil(LEVEL * (count + 1))), count) - 1]
                    inside = np.abs(failed[tested] - np.clip(predicted, 0, 1)) <= half
                    covered.append(float(inside.mean()))
                if name == "default" and count in SPREAD:
                    best = candidates[spread(made, candidates, count)]
                    fit = ridge.fit(made, best, failed[best])
                    spread_out.append(spearman(fit.predict(made, tested), failed[tested]))
            parts = matrix[seen], failed[seen], [matrix[tested]]
            predicted = _fit_predict(*parts, DifficultyConfig())[0]
            scores["elasticnet"].append(spearman(predicted, failed[tested]))
            within["elasticnet"].append(_within(predicted, failed[tested], tasks[tested]))
        for name, values in scores.items():
            found[name][str(count)] = figures(values)
        coverage[str(count)] = figures(covered)
        if count in SPREAD:
            chosen_by[str(count)] = figures(spread_out)
        print(count, {name: row[str(count)]["mean"] for name, row in found.items()}, flush=True)
    if len(set(tasks)) > 1:
        for name, values in within.items():
            found[name]["within tasks"] = figures(values)
    return {
        "tested": len(split(known, 0)[0]),
        "spearman": found,
        "coverage_of_80": coverage,
        "labels_spread": chosen_by,
    }


def _within(predicted: np.ndarray, failed: np.ndarray, tasks: np.ndarray) -> float:
    """The mean over tasks of the Spearman within each."""
    return float(np.mean([spearman(predicted[one], failed[one]) for one in map(tasks.__eq__, set(tasks))]))


def figures(found: list[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(found)), 4), "std": round(float(np.std(found)), 4)}


def markdown(result: dict[str, Any]) -> str:
    """A row for a set of features."""
    counts = result["spearman"]["default"]
    heads = [f"{count} labels" if count.isdecimal() else f"the same, {count}" for count in counts]
    lines = [
        f"| features | {' | '.join(heads)} |",
        "|---" * (len(counts) + 1) + "|",
    ]
    rows = result["spearman"] | {"default, labels spread": result["labels_spread"]}
    for name, row in rows.items():
        cells = [f"{row[n]['mean']:.3f} ± {row[n]['std']:.3f}" if n in row else "" for n in counts]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, "runs/bench_signals", extract, argv)
    bank, failed, tasks = load(args.pool, args.work)
    result = {"pool": args.name, "model": Path(args.model or "").name, "prompts": bank.n_rows}
    result |= {
        "draws": args.draws,
        **table(bank, failed, tasks, args.draws),
        "environment": environment(DEVICE),
    }
    if args.out:
        write_json(args.out, result)
    print(markdown(result))


if __name__ == "__main__":
    main()
