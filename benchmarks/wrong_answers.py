"""What tells a wrong reference answer from a right one: the model's own rollouts, and log-probabilities.

    python -m benchmarks.wrong_answers NAME key=value ... --out benchmarks/results/wrong-answers.json

``key=value``: settings of the project, or ``--config FILE``; model, data and train.rollout.max_new_tokens
matter. Each prompt is tried ``--rollouts`` times. Every measure is then taken twice, of the prompt's own
answer and of a wrong one: another prompt's of the same ``task``, if there are tasks. Rows with a ``kind``
other than clean are left out. What each prompt gave is kept under ``--work``: the same command goes on where
it stopped. NAME's entry of ``--out`` is made anew, others stay.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.harness import DEVICE, environment
from saerl_fast.fileio import read_json, write_json
from saerl_fast.rl.rewards.equal import same
from saerl_fast.session import Session

OTHERS = 4  # answers of other prompts whose log-probabilities are compared
CHUNK = 8  # prompts that are tried together
FEW = 4  # rollouts of a cheaper measure
END = re.compile(r"(?<=\D)[.;!?](?:\s|$)|[.;!?]$")  # of a sentence, but no decimal point
WORDS = re.compile(r"[\w ,]*")  # equal only if they are the same


def said(text: str) -> str:
    """What a short answer says: its first line up to the end of a sentence, without marks around it."""
    lines = text.strip().splitlines()
    return END.split(lines[0])[0].strip(" .,:;!?*'\"`") if lines else ""


@cache
def agrees(text: str, answer: str) -> bool:
    """Whether a text says this answer, case aside, or what equals it as an expression."""
    one, other = said(text), said(answer)
    formulas = one and other and not (WORDS.fullmatch(one) and WORDS.fullmatch(other))
    return one.lower() == other.lower() or bool(formulas and same(one, other))


def keep(config: Any, work: Path, prompts: int, rollouts: int) -> list[dict[str, Any]]:
    """Try the prompts that ``work`` lacks; all that was kept of each."""
    from saerl_fast.rl.decode import Sampling
    from saerl_fast.rl.generate import generate
    from saerl_fast.stages.console import Echo

    work.mkdir(parents=True, exist_ok=True)
    file = work / "tried.jsonl"
    kept = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    if len(kept) >= prompts:  # the table needs no model
        return kept[:prompts]
    echo = Echo()
    session = Session.open(config, echo)
    rows = session.train
    ids, answers = rows.column("prompt_id"), [str(answer) for answer in rows.column("answer")]
    tasks = rows.column("task") if "task" in rows.columns else [None] * len(rows)
    clean = [
        i for i, kind in enumerate(rows.columns.get("kind", [None] * len(rows))) if kind in (None, "clean")
    ]
    todo, known = random.Random(5).sample(clean, min(prompts, len(clean))), {row["id"] for row in kept}
    sampling = Sampling.of(config.train.rollout, group_size=rollouts, temperature=1.0)
    bar = echo.bar("wrong answers", "prompt")
    for start in range(0, len(todo), CHUNK):
        part = [i for i in todo[start : start + CHUNK] if ids[i] not in known]
        if part:
            some = rows.select(part)
            made = generate(session.model, session.tokenizer, some.ids, sampling, seed=start)
            own = (made.logprobs.sum(1) / made.lengths).view(len(part), rollouts).tolist()
            other = [_others(i, clean, tasks, answers) for i in part]
            of = [[i, *found] for i, found in zip(part, other, strict=True)]
            told = logprobs(session, some.ids, [[rows.answer_ids[j] for j in found] for found in of])
            texts = [made.texts[p * rollouts : (p + 1) * rollouts] for p in range(len(part))]
            with file.open("a") as out:
                for p, i in enumerate(part):
                    row = {"id": ids[i], "answer": answers[i], "wrong": [answers[j] for j in other[p]]}
                    row |= {"texts": texts[p], "logprobs": told[p], "own": own[p]}
                    kept.append(row)
                    out.write(json.dumps(row) + "\n")
        bar(min(start + CHUNK, len(todo)), len(todo))
    return kept


def _others(i: int, clean: list[int], tasks: Sequence[Any], answers: list[str]) -> list[int]:
    """Rows of the same task whose answers are wrong for row ``i``, all different: at most OTHERS + 1."""
    found: list[int] = []
    for j in random.Random(i).sample(clean, len(clean)):
        if tasks[j] == tasks[i] and not any(agrees(answers[j], answers[k]) for k in (i, *found)):
            found.append(j)
            if len(found) > OTHERS:
                break
    return found


@torch.no_grad()
def logprobs(
    session: Session, prompts: Sequence[list[int]], tails: list[list[list[int]]]
) -> list[list[float]]:
    """Mean log-probability of a token of every tail after its prompt."""
    from saerl_fast.rl.logprobs import completion_logprobs

    rows = [(p, [*prompt, *tail], len(tail)) for p, prompt in enumerate(prompts) for tail in tails[p]]
    owner, joined, lengths = (list(column) for column in zip(*rows, strict=True))
    width, sizes = max(map(len, joined)), torch.tensor(lengths)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in joined])
    starts = torch.tensor(list(map(len, joined))) - sizes
    given = (at.to(session.model.device) for at in (ids, starts, sizes))
    how: dict[str, Any] = {"owner": torch.tensor(owner), "with_entropy": False}
    found, _ = completion_logprobs(session.model, *given, **how)
    means = [float(part.mean()) for part in found.split(lengths)]
    return [[mean for mean, of in zip(means, owner, strict=True) if of == p] for p in range(len(prompts))]


def measures(row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Of the right and of the wrong answer of a prompt; larger where the answer should be right."""
    texts, both = row["texts"], (row["answer"], row["wrong"][0])
    keys = [said(text).lower() for text in texts]
    most, count = Counter(keys).most_common(1)[0]
    votes = count / len(keys)
    (right, wrong, *rest), own = row["logprobs"], float(np.mean(row["own"]))
    found = {}
    for name, some in (("rollouts that agree", slice(None)), (f"the same of {FEW} rollouts", slice(FEW))):
        found[name] = tuple(np.mean([agrees(text, answer) for text in texts[some]]) for answer in both)
    agree = [float(agrees(most, answer)) for answer in both]
    found["agrees with the majority"] = tuple(agree)
    found["the same, by the majority's share"] = tuple(votes if one else -votes for one in agree)
    found["log-probability"] = right, wrong
    found["less that of sampled answers"] = right - own, wrong - own
    if rest:
        found["less that of other prompts' answers"] = right - np.mean(rest), wrong - np.mean(rest)
    return {name: (float(a), float(b)) for name, (a, b) in found.items()}


def table(kept: list[dict[str, Any]], draws: int = 200) -> dict[str, Any]:
    """AUC of each measure, and its deviation over prompts drawn again; of all by a held-out regression."""
    each = [measures(row) for row in kept if row["wrong"]]
    names = [name for name in each[0] if all(name in row for row in each)]
    values = np.array([[row[name] for name in names] for row in each])  # [prompts, measures, right and wrong]
    both = np.concatenate([values[:, :, 0], values[:, :, 1]])
    truth = np.r_[np.ones(len(each)), np.zeros(len(each))]
    fold = np.empty(len(each), np.int64)  # of a prompt, with both of its answers
    for number, held in enumerate(
        np.array_split(np.random.RandomState(0).permutation(len(each)), min(5, len(each)))
    ):
        fold[held] = number
    split = PredefinedSplit(np.tile(fold, 2))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    together = cross_val_predict(model, both, truth, cv=split, method="decision_function")
    values = np.concatenate([values, np.stack(np.split(together, 2), 1)[:, None]], axis=1)
    rng, found = np.random.default_rng(0), {}
    for at, name in enumerate([*names, "all, by a regression"]):
        right, wrong = values[:, at].T
        again = [_auc(right[some], wrong[some]) for some in rng.integers(0, len(each), (draws, len(each)))]
        found[name] = {"mean": round(_auc(right, wrong), 4), "std": round(float(np.std(again)), 4)}
    right = [float(values[:, names.index(name), 0].mean()) for name in (names[0], names[2])]
    about = {"prompts": len(each), "rollouts": len(kept[0]["texts"])}
    return {**about, "pass rate": round(right[0], 4), "majority is right": round(right[1], 4), "auc": found}


def _auc(right: np.ndarray, wrong: np.ndarray) -> float:
    return float(roc_auc_score(np.r_[np.ones(len(right)), np.zeros(len(wrong))], np.r_[right, wrong]))


def markdown(result: dict[str, Any]) -> str:
    """A row for a measure, a column for a pool."""
    pools = result["wrong answers of"]
    lines = ["| measure | " + " | ".join(pools) + " |", "|---" * (len(pools) + 1) + "|"]
    names = list(dict.fromkeys(name for pool in pools.values() for name in pool["auc"]))
    for fact in ("prompts", "rollouts", "pass rate", "majority is right"):
        lines.append(f"| {fact} | " + " | ".join(f"{pool[fact]:.4g}" for pool in pools.values()) + " |")
    for name in names:
        found = [pool["auc"].get(name) for pool in pools.values()]
        cells = ["" if one is None else f"{one['mean']:.3f} ± {one['std']:.3f}" for one in found]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    from saerl_fast.config import load_config

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--config")
    parser.add_argument("--work", type=Path, default=Path("runs/wrong_answers"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prompts", type=int, default=608)
    parser.add_argument("--rollouts", type=int, default=16)
    args = parser.parse_args(argv)
    config = load_config(args.config, args.settings)
    kept = keep(config, args.work / args.name, args.prompts, args.rollouts)
    entry = {**table(kept), "model": Path(config.model.path or "").name, "environment": environment(DEVICE)}
    known = read_json(args.out, "this command") if args.out and args.out.is_file() else {}
    result = {"wrong answers of": {**known.get("wrong answers of", {}), args.name: entry}}
    if args.out:
        write_json(args.out, result)
    print(markdown(result))


if __name__ == "__main__":
    main()
