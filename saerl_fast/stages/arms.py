"""What an arm or a pool of a comparison is called and what it sets, and what two arms differ in."""

from __future__ import annotations

from typing import Any

from saerl_fast.config import SCHEDULES, Config, to_dict
from saerl_fast.errors import SaerlError
from saerl_fast.plan.static import get_schedule
from saerl_fast.stages.fingerprint import flat
from saerl_fast.stages.preflight import unfiltered

TAKEN = ("sae", "draws", "pilot")  # folders beside those of arms and pools
OF_ALL = {  # what all arms have in common, or pairs are none -> where it is said
    "train.seed": "compare.seeds gives each arm the same seeds",
    "train.eval": "all arms are evaluated alike, as the settings outside arms say",
}
# What evaluations go by unless train.eval.mode=prob: how completions are judged, and how they are sampled.
MEASURES = ("train.reward", "train.reward_weights", "train.reward_truncated")
SAMPLED = ("train.rollout.max_new_tokens", "train.rollout.top_p")
OF_POOL = (
    "data.",
    "sae.",
    "score.",
    "quality.",
    "difficulty.",
    "diversity.",
    "train.reward",
    "compare.target",
    "compare.pilots",
)


def parse_arm(text: str) -> tuple[str, list[str]]:
    """``NAME`` (a schedule) or ``NAME:key=value;key=value`` -> the arm's name and its overrides.

    An arm named after a schedule follows it, another one the config's, unless it sets plan.schedule.
    Overrides reach ``plan`` and ``train`` only: what an arm changes must not touch data or scores.
    """
    name, _, rest = text.partition(":")
    overrides = [item.strip() for item in rest.split(";") if item.strip()]
    for item in overrides:
        if "=" not in item:
            example = f"plan.schedule={text}" if "=" not in text else "plan.filter=true;train.lr=1e-4"
            raise SaerlError(
                f"arm {text!r}: {item!r} lacks a value; write it as NAME:key=value, e.g. mine:{example}"
            )
        if not item.startswith(("plan.", "train.")):
            raise SaerlError(f"arm {text!r} sets {item!r}; an arm may set plan.* and train.* only")
        for key, why in OF_ALL.items():
            if item.startswith(key):
                raise SaerlError(f"arm {text!r} sets {item!r}, but {why}; leave it out of the arm")
    named = name in SCHEDULES or not overrides
    if named and not any(item.startswith("plan.schedule=") for item in overrides):
        overrides.insert(0, f"plan.schedule={name}")
    _check_folder("arm", name)
    return name, overrides


def parse_pool(text: str) -> tuple[str, list[str]]:
    """``NAME=SOURCE`` or ``NAME=SOURCE;key=value;...`` -> the pool's name and its overrides.

    ``SOURCE`` is what data.train takes. Overrides are of what a pool brings along: its columns and held-out
    rows, SAE, labels, reward and targets; not of what arms are compared by.
    """
    named, *rest = (item.strip() for item in text.split(";"))
    name, _, source = (part.strip() for part in named.partition("="))
    if not source:
        raise SaerlError(
            f"compare.pools: {text!r} names no source; write NAME=SOURCE, e.g. easy=easy.jsonl (one with "
            "commas in a list of quoted pools: compare.pools=['gym=reasoning-gym:gcd,lcm'])"
        )
    _check_folder("pool", name)
    for item in filter(None, rest):
        if "=" not in item:
            raise SaerlError(f"pool {name}: {item!r} lacks a value; write it as key=value")
        if not item.startswith(OF_POOL):
            raise SaerlError(
                f"pool {name} sets {item!r}; a pool may set data.*, sae.*, score.*, quality.*, difficulty.*, "
                "diversity.*, train.reward*, compare.targets, compare.target_values and compare.pilots only, "
                "and the next pool comes after a comma"
            )
    return name, [f"data.train={source}", *filter(None, rest)]


def _check_folder(what: str, name: str) -> None:
    if not name.replace("-", "_").isidentifier() or name in TAKEN:
        raise SaerlError(
            f"{what} name {name!r} must be letters, digits, '-' or '_', and none of {', '.join(TAKEN)}; it "
            "becomes a folder"
        )


def confounded(base: Config, arm: Config, overrides: list[str]) -> dict[str, tuple[Any, Any]]:
    """Settings of plan and train in which ``arm`` differs from ``base``, not named by ``overrides``.

    Key -> (value in ``base``, value in ``arm``). The quality filter is compared as it takes effect: where the
    pool has labels for it, every schedule but vanilla filters unless plan.filter says otherwise.
    """
    named = {item.partition("=")[0] for item in overrides}
    one, two = (dict(flat(to_dict(cfg))) | {"plan.filter": _filters(cfg)} for cfg in (base, arm))
    about = [key for key in one if key.startswith(("plan.", "train.")) and key not in named]
    return {key: (one[key], two[key]) for key in about if one[key] != two[key]}


def measured_apart(base: Config, arm: Config) -> dict[str, tuple[Any, Any]]:
    """Settings of train by which completions are sampled or judged otherwise when ``arm`` is evaluated.

    Key -> (value in ``base``, value in ``arm``); none with train.eval.mode=prob, which samples nothing.
    """
    if arm.train.eval.mode == "prob":
        return {}
    one, two = (dict(flat(to_dict(cfg))) for cfg in (base, arm))
    return {key: (one[key], two[key]) for key in (*MEASURES, *SAMPLED) if one[key] != two[key]}


def _filters(config: Config) -> bool:
    if unfiltered(config):
        return False
    static = get_schedule(config.plan.schedule)
    return config.plan.filter if config.plan.filter is not None else static is None or static.filtered


def differing(more: dict[str, tuple[Any, Any]], base: str) -> str:
    return ", ".join(f"{key} ({_plain(two)}, {base}: {_plain(one)})" for key, (one, two) in more.items())


def note(base: str, name: str, more: dict[str, tuple[Any, Any]]) -> str:
    equal = ";".join(f"{key}={_plain(one)}" for key, (one, _) in more.items())
    return (
        f"{name} differs from {base} in more than it names: {differing(more, base)}. What is found may be "
        f"due to either; an arm with {equal} differs in the rest alone."
    )


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
