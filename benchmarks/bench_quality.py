"""What the signals see of defective prompts, copies of prompts and subjects, on a pool of maths problems.

    python -m benchmarks.bench_quality POOL.jsonl --model MODEL --out benchmarks/results/quality.json

POOL: rows with id, problem, answer and pass_rate (null: there is no table of wrong answers), or
``reasoning-gym:TASK,...``. Defective copies of some prompts (`defects.DEFECTS`) and near-copies of others
(`defects.COPIES`) join it, an SAE is trained on all, and one forward pass gives pooled SAE features and
hidden states of the SAE's layer. All of that is kept under ``--work``, in parts: the same command goes on
where it stopped, and the tables need no model once the parts are there.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import normalized_mutual_info_score as nmi
from sklearn.metrics import roc_auc_score

from benchmarks.defects import COPIES, DEFECTS
from benchmarks.harness import DEVICE, environment
from benchmarks.pool import arguments, keep_features, kept_bank, rows_of
from saerl_fast.config import DiversityConfig
from saerl_fast.fileio import write_json
from saerl_fast.sae.files import load_sae
from saerl_fast.signals import ridge
from saerl_fast.signals.bank import Bank
from saerl_fast.signals.clusters import cluster_prompts
from saerl_fast.signals.copies import find_copies
from saerl_fast.signals.features import weighted
from saerl_fast.signals.text import Tfidf
from saerl_kernels import CSR, csr

PER_WAY, PER_COPY, OF = 130, 60, 4000  # made of a pool of this many prompts or more, fewer of a smaller one
STORED = ("sae", "sae_mean", "sae_last", "hidden")  # the last for `bench_signals`
KINDS = ("length", "text", "tfidf", "sae", "hidden")
SETS: dict[str, tuple[str, ...]] = {
    **{kind: (kind,) for kind in KINDS},
    "sae + text + tfidf": ("sae", "text", "tfidf"),
    "default": ("sae", "text", "tfidf", "hidden"),
}
SUBJECTS = {  # words that tell a subject, for want of a pool that names it
    "geometry": r"triangle|circle|angle|square|rectangl|radius|perimeter|polygon|trapezoid|cube|sphere|cone",
    "numbers": r"prime|divis|remainder|integer|digit|multiple|greatest common|modulo|odd|even number",
    "counting": r"probabil|how many ways|dice|coin|cards|randomly|arrange|permutation|combination|choose",
    "algebra": r"polynomial|roots|equation|solve|quadratic|expression|simplif|inequalit|logarithm",
    "functions": r"function|f\(x\)|graph of|domain|range of|inverse|asymptote|increasing",
    "sequences": r"sequence|arithmetic progression|geometric|series|a_n|a_\{n|term of|recurs",
    "vectors": r"\\sin|\\cos|\\tan|vector|matrix|complex number|determinant|polar",
    "stories": r"miles|hours|dollars|cents|minutes|percent|bought|sold|price|students|years old|speed|cost",
}


def make_pool(path: Path, out: Path) -> None:
    """The pool's rows; defective copies of some, way by way; near-copies of others."""
    rows = rows_of(path)
    share = min(1.0, len(rows) / OF)
    order = random.Random(0).sample(range(len(rows)), len(rows))
    made = [{"id": str(r["id"]), "problem": r["problem"], "answer": str(r["answer"])} for r in rows]
    for row, source in zip(made, rows, strict=True):
        row |= {"pass_rate": source["pass_rate"], "kind": "sound", "way": "", "part": "sound"}
        row["task"] = source.get("task")
    extra: list[dict[str, Any]] = []
    ways = [(kind, way.__name__, way, PER_WAY) for kind, found in DEFECTS.items() for way in found]
    ways += [("copy", name, way, PER_COPY) for name, way in COPIES.items()]
    for kind, name, spoil, most in sorted(ways, key=lambda way: way[1] != "drawing_removed"):
        wanted, rest = int(share * most), []
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
    """Train the SAE and pool features and hidden states."""
    if not (work / "pool.jsonl").is_file():
        work.mkdir(parents=True, exist_ok=True)
        make_pool(pool, work / "pool.jsonl")
    keep_features(work / "pool.jsonl", work, model, dtype, STORED)


def quality(bank: Bank, rows: list[dict[str, Any]], draws: int) -> dict[str, Any]:
    """AUC on rows without labels, by kind of defect and set of features.

    ``alone``: fits to 200 sound and 50 bad rows of the kind, in all its ways; ``mixed``: one fit to 200 sound
    rows and 50 of all kinds, told apart by kind; ``unseen``: fits to 50 bad rows of the kind in all ways but
    one, tested on that one, the mean over ways.
    """
    kind, way = (np.array([row[name] for row in rows]) for name in ("kind", "way"))
    sound = np.flatnonzero(np.array([row.get("part") == "sound" for row in rows]))
    seen_kinds = [name for name in DEFECTS if name != "wrong_answer"]
    bad = np.flatnonzero(np.isin(kind, list(DEFECTS)))
    at = np.r_[sound, bad]
    blocks, kind, way = bank.blocks(KINDS, at), kind[at], way[at]
    texts = bank.texts(at)
    table: dict[str, Any] = {}

    def test(
        told: str, name: str, good: np.ndarray, broken: np.ndarray, tested: dict[str, np.ndarray]
    ) -> None:
        """Fit to 200 of ``good`` and ``broken``; AUC of the rest of ``good`` and of each of ``tested``."""
        seen = np.r_[good[:200], broken]
        flags = np.r_[np.ones(200), np.zeros(len(broken))]
        for features, names in SETS.items():
            chosen = {one: blocks[one] for one in names}
            scores = ridge.fit(chosen, seen, flags).predict(chosen)
            for one, where in tested.items():
                others = good[200:1000]
                truth = np.r_[np.ones(len(others)), np.zeros(len(where))]
                auc = roc_auc_score(truth, scores[np.r_[others, where]])
                cells = table.setdefault(told, {}).setdefault(one or name, {}).setdefault(features, [])
                cells.append(float(auc))

    for draw in range(draws):
        rng = np.random.default_rng(2000 + draw)
        good = rng.permutation(np.flatnonzero(kind == "sound"))
        broken = {name: rng.permutation(np.flatnonzero(kind == name)) for name in DEFECTS}
        for name in seen_kinds:
            could = [any(way(texts[i], random.Random(int(i))) for way in DEFECTS[name]) for i in good]
            every_good, good = good, good[could]  # such as the defect could have been made of
            test("alone", name, good, broken[name][:50], {"": broken[name][50:]})
            for one in np.unique(way[broken[name]]) if len(DEFECTS[name]) > 1 else []:
                this = way[broken[name]] == one
                test("unseen", name, good, broken[name][~this][:50], {"": broken[name][this]})
            good = every_good
        every = np.concatenate([broken[name][:10] for name in seen_kinds])
        test("mixed", "", good, every, {name: broken[name][10:] for name in seen_kinds})
    return {
        told: {
            name: {features: round(float(np.mean(found)), 4) for features, found in cells.items()}
            for name, cells in found.items()
        }
        for told, found in table.items()
    }


def copies(bank: Bank, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many near-copies are found, way by way, and how often the original is the nearest prompt."""
    at = np.flatnonzero(np.isin([row["kind"] for row in rows], ["sound", "copy"]))
    rows, place = [rows[i] for i in at], {rows[i]["id"]: n for n, i in enumerate(at)}
    X = bank.X.select_rows(torch.from_numpy(at))
    texts = [row["problem"] for row in rows]
    found = find_copies(X, texts, [row["answer"] for row in rows], [row["id"] for row in rows])
    group = np.where(found.of < 0, np.arange(len(rows)), found.of)
    spaces = {"sae": weighted(X, csr.idf(X)).to_scipy(), "tfidf": Tfidf(texts)(texts)}
    table: dict[str, Any] = {}
    for n, row in enumerate(rows):
        if row["kind"] != "copy" or row["of"] not in place:
            continue
        original, cells = place[row["of"]], table.setdefault(row["way"], {"copies": 0, "found": 0})
        cells["copies"] += 1
        cells["found"] += int(group[n] == group[original])
        for name, space in spaces.items():
            close = np.asarray((space @ space[n].T).todense()).ravel()
            close[n] = -1
            cells[f"nearest by {name}"] = cells.get(f"nearest by {name}", 0) + int(
                close[original] >= close.max() - 1e-6
            )
    return {"ways": table, "found in all": {k: v for k, v in found.metrics.items() if isinstance(v, int)}}


def clusters(bank: Bank, rows: list[dict[str, Any]], seeds: int = 3) -> dict[str, Any]:
    """NMI of the clusters with subjects and with looks, of 1600 prompts; the subject is the row's ``task``,
    or what its words tell, where they do."""
    counts = np.array([[len(re.findall(p, row["problem"], re.I)) for p in SUBJECTS.values()] for row in rows])
    told = np.sort(counts, axis=1)
    named = all(row.get("task") for row in rows if row["kind"] == "sound")
    clear = np.array([row["kind"] == "sound" for row in rows]) & (named | (told[:, -1] > told[:, -2]))
    some = np.random.default_rng(0).permutation(np.flatnonzero(clear))[:1600]
    texts = [rows[i]["problem"] for i in some]
    tasks = np.array([str(row.get("task")) for row in rows])[some]
    subject = np.unique(tasks, return_inverse=True)[1] if named else counts[some].argmax(axis=1)
    looks = [(t.count("$") > 8, "[asy]" in t, "\\(" in t, "$$" in t or "\\[" in t, "\n" in t) for t in texts]
    style = np.unique(looks, axis=0, return_inverse=True)[1].ravel()
    table: dict[str, Any] = {}
    for name in ("sae", "sae_mean"):
        X = CSR.from_scipy(bank.kinds[name](some))
        for look in (1.0, 0.0):
            for count in (7, 16):
                found = []
                for seed in range(seeds):
                    cfg = DiversityConfig(n_clusters=count, look=look, seed=seed, null_rounds=0)
                    labels = cluster_prompts(X, cfg, texts=lambda at: [texts[i] for i in at]).labels
                    found.append([nmi(subject, labels), nmi(style, labels)])
                mean = np.mean(found, axis=0).round(3).tolist()
                pooling = "max" if name == "sae" else "mean"
                table[f"{pooling}, look {look:g}, {count} clusters"] = mean
    X = CSR.from_scipy(bank.kinds["sae_mean"](some))
    auto = cluster_prompts(X, DiversityConfig(n_clusters="auto"), texts=lambda at: [texts[i] for i in at])
    return {"nmi with subject, look": table, "auto": auto.metrics["n_clusters"]}


def wrong_answers(rows: list[dict[str, Any]]) -> dict[str, float]:
    """AUC of pass rates for answers exchanged among prompts (see `benchmarks.wrong_answers` for more).

    No rollout reaches an answer of another prompt, so the pass rate of such a row counts as 0; sound rows
    have the pool's pass rate, or one drawn for as few rollouts as the labels have.
    """
    rates = np.array([row["pass_rate"] for row in rows if row["kind"] == "sound"], dtype=float)
    if np.isnan(rates).any():
        return {}
    rng = np.random.default_rng(0)
    reached = {count: rng.binomial(count, rates) > 0 for count in (4, 8, 16)} | {128: rates > 0}
    return {
        f"pass rate of {count} rollouts": round(0.5 + 0.5 * float(found.mean()), 4)
        for count, found in reached.items()
    }


def markdown(result: dict[str, Any]) -> str:
    """A row for a set of features, a column for a kind: AUC alone / of an unseen way / of all kinds mixed."""
    told = [result["quality"][name] for name in ("alone", "unseen", "mixed")]
    kinds = list(told[0])
    lines = ["| features | " + " | ".join(kind.replace("_", " ") for kind in kinds) + " |"]
    lines.append("|---" * (len(kinds) + 1) + "|")
    for name in SETS:
        cells = [[table.get(kind, {}).get(name) for table in told] for kind in kinds]
        shown = [" / ".join("-" if auc is None else f"{auc:.3f}" for auc in cell) for cell in cells]
        lines.append("| " + " | ".join([name, *shown]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, "runs/bench_quality", extract, argv, tried=False)
    bank, rows = kept_bank(rows_of(args.work / "pool.jsonl"), args.work)
    result = {
        "pool": args.name,
        "model": Path(load_sae(args.work / "sae").cfg.model_name).name,
        "prompts": sum(row["kind"] == "sound" for row in rows),
        "draws": args.draws,
        "quality": quality(bank, rows, args.draws),
        "wrong answers": wrong_answers(rows),
        "copies": copies(bank, rows),
        "clusters": clusters(bank, rows),
        "environment": environment(DEVICE),
    }
    if args.out:
        write_json(args.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
