"""The runs of the evidence: pools, arms, one run of an arm, and what is kept of it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.demo_pool import make_pool
from saerl_fast.config import Config, apply_overrides, load_config
from saerl_fast.fileio import write_text
from saerl_fast.records.runs import RunRecord, open_run
from saerl_fast.records.stats import past
from saerl_fast.stages.compare import parse_arm
from saerl_fast.stages.console import Echo
from saerl_fast.stages.made import needs_scores
from saerl_fast.stages.pipeline import sae_stage
from saerl_fast.stages.train import train_stage

POOLS = {"easy": (0.0, (0.463, 0.511)), "demo": (0.4, (0.463, 0.511)), "hard": (0.75, (0.436, 0.476))}
STEPS, SMOOTH = 80, 3
EARLY = 30  # steps whose share of informative groups is compared


class Arm(NamedTuple):
    """``text`` as compare.arms has it; what the rule reads; all steps made; difficulty without the answer."""

    text: str
    features: str | None = None
    whole: bool = False
    prompt: bool = False


def _adaptive(features: str, more: str = "") -> Arm:
    return Arm(f"x:plan.schedule=adaptive;plan.adaptive.features=[{features}]{more}", features)


ARMS = {
    "vanilla": Arm("vanilla", whole=True),
    "adaptive": Arm("adaptive", "sae", whole=True),
    "hidden": _adaptive("hidden"),
    "tfidf": _adaptive("tfidf"),
    "length": _adaptive("length"),
    "scalars": _adaptive("scalars"),
    "none": _adaptive("none"),
    "random": _adaptive("random"),
    "answer": _adaptive("answer_logprob"),
    "cell": _adaptive("columns", ";plan.adaptive.columns=[task,level,kind]"),
    "shuffled": _adaptive("sae", ";plan.adaptive.shuffle_clusters=true"),
    "noquota": _adaptive("sae", ";plan.adaptive.quota=null"),
    "mopps": Arm("mopps"),
    "bots": Arm("bots"),
    "greso": Arm("x:plan.schedule=greso;train.dynamic_sampling=3"),
    "dapo": Arm("x:plan.schedule=vanilla;train.dynamic_sampling=3"),
    "speed": Arm("x:plan.schedule=vanilla;train.rollout.screen=4;train.dynamic_sampling=3"),
    "oracle": Arm("oracle"),
    "twice": Arm("x:plan.schedule=vanilla;train.rollout.prompts_per_step=32"),
    "filtered": Arm("x:plan.schedule=vanilla;plan.filter=true"),
    "literal": Arm("literal"),
    "literal_prompt": Arm("literal", prompt=True),
    "global_prompt": Arm("global", prompt=True),
    "medium_prompt": Arm("medium", prompt=True),
}
PROMPT = "[length,text,tfidf,sae,hidden]"  # what difficulty reads by default, without the answer's text
ROOT = Path(__file__).parents[1]
NO_SAE = "no SAE"  # the draw of arms that read neither an SAE nor scores
Runs = dict[str, dict[str, dict[str, Any]]]  # arm -> seed -> curves


def configured(pool: str, arm: str, seed: int, work: Path) -> Config:
    """The demo's config with another pool, arm and seed; the pool is written to ``work``."""
    data = work / f"{pool}.jsonl"
    if not data.is_file():
        write_text(data, "".join(json.dumps(row) + "\n" for row in make_pool(0, hard=POOLS[pool][0])))
    settings: dict[str, Any] = {
        "run_dir": work / pool,
        "data.train": data,
        "data.eval": ROOT / "examples" / "demo" / "eval.jsonl",
        "model.path": ROOT / "examples" / "demo" / "model",
        "score.features": "[sae,sae_mean,hidden,scalars,answer_logprob]",
        "train.seed": seed,
        "train.steps": STEPS,
        "train.save_every": 0,
        "train.save_model": "false",
    }
    if ARMS[arm].prompt:  # scores of their own, by the SAE of the others
        settings["run_dir"] = work / f"{pool}-prompt"
        settings |= {"sae.path": work / pool / "sae", "difficulty.features": PROMPT}
    config = load_config(
        ROOT / "examples" / "demo.yaml", [f"{key}={value}" for key, value in settings.items()]
    )
    return apply_overrides(config, parse_arm(ARMS[arm].text)[1])


def make(pool: str, arm: str, seed: int, work: Path) -> None:
    """The run, up to where nothing after it can matter; one that has ended is kept."""
    out = work / pool / f"{arm}.seed-{seed}"
    if (out / "summary.json").is_file():
        return
    enough = None if ARMS[arm].whole else partial(_enough, POOLS[pool][1][-1])
    config = configured(pool, arm, seed, work)
    if ARMS[arm].prompt and not (work / pool / "sae").exists():
        sae_stage(configured(pool, "adaptive", seed, work), Echo(quiet=True))
    train_stage(config, Echo(quiet=True), out=out, arm=arm, resume=out.exists(), enough=enough)


def _enough(target: float, evaluations: Sequence[tuple[int, float]]) -> bool:
    steps, values = zip(*evaluations, strict=True)
    return past(steps, values, target, SMOOTH)


def curve(run: RunRecord) -> dict[str, Any]:
    """Of a run its evaluations, rollouts and tokens until each, and the share of groups with a gradient."""
    early = run.train["step"] <= EARLY
    return {
        "steps": run.eval_steps,
        "accuracy": [round(a, 5) for a in run.accuracy],
        "rollouts": run.spent("rollouts").astype(int).tolist(),
        "tokens": run.spent("tokens").astype(int).tolist(),
        "used": round(float(np.nanmean(run.train["used"])), 4),
        "used_early": round(float(np.nanmean(run.train["used"][early])), 4),
    }


def collect(work: Path, draw: str) -> dict[str, dict[str, Runs]]:
    """pool -> draw of the SAE (``draw``, if any) -> arm -> seed -> curve, of finished runs in ``work``."""
    found: dict[str, dict[str, Runs]] = {}
    for pool in POOLS:
        for arm in ARMS:
            for out in sorted((work / pool).glob(f"{arm}.seed-*")):
                if not (out / "summary.json").is_file():
                    continue
                seed = out.name.rpartition("-")[2]
                run = open_run(out)
                run.read(whole=True)
                read = draw if needs_scores(configured(pool, arm, int(seed), work)) else NO_SAE
                found.setdefault(pool, {}).setdefault(read, {}).setdefault(arm, {})[seed] = curve(run)
    return found


def pack(found: dict[str, dict[str, Runs]], out: Path) -> None:
    """Write POOL.json, a line a run; what was not run this time stays as it is."""
    for pool, draws in found.items():
        file = out / f"{pool}.json"
        kept = json.loads(file.read_text()) if file.is_file() else {}
        for draw, arms in draws.items():
            mine = kept.setdefault(draw, {})
            mine |= {arm: mine.get(arm, {}) | seeds for arm, seeds in arms.items()}
        text = json.dumps(kept, indent=1)
        text = re.sub(
            r"\{\s+\"steps\".*?\}", lambda run: json.dumps(json.loads(run.group())), text, flags=re.DOTALL
        )
        write_text(file, text + "\n")
