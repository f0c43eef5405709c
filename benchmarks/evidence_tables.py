"""The tables and the figure of the evidence, from its lines alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saerl_fast.records.plots import Saving, law

BEGIN, END = "<!-- evidence:begin -->", "<!-- evidence:end -->"
LAW = {
    "adaptive": "default (SAE)",
    "none": "without features",
    "answer": "log-probability of the answer",
    "oracle": "oracle of pass rates",
}
Lines = list[dict[str, Any]]
OTHERS = {
    "none": "no features",
    "random": "random features",
    "length": "the prompt's length",
    "tfidf": "TF-IDF of the prompt",
    "hidden": "hidden states",
    "scalars": "scalars of the model",
    "cell": "the generator's task, level and kind",
    "answer": "the log-probability of the reference answer",
    "shuffled": "a quota of other prompts' clusters",
    "noquota": "no quota",
    "filtered": "the filter alone",
    "mopps": "MoPPS",
    "global_prompt": "easy to hard, prompt alone",
    "medium_prompt": "the predicted middle, prompt alone",
    "literal_prompt": "the paper's recipe, prompt alone",
    "literal": "the paper's recipe, answer read",
    "oracle": "an oracle of pass rates",
}


def share(line: dict[str, Any], name: str = "saved") -> str:
    """A saving with its interval, where there is one."""
    if line.get(name) is None:
        return "-"
    if name != "saved" or "low" not in line:
        return f"{line[name]:.0%}"
    return f"{line['saved']:.0%} [{line['low']:.0%}, {line['high']:.0%}]"


def chance(line: dict[str, Any]) -> str:
    """p, adjusted."""
    p = line.get("p")
    return "-" if p is None else "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def arm_table(arms: Lines) -> list[str]:
    """What every arm saved against vanilla, pool by pool."""
    head = ["pool", "arm", "draw", "target", "pairs (+left out)", "steps saved", "p (Holm)"]
    head += ["rollouts saved", "tokens saved", "groups with a gradient, first 30 steps", "final"]
    made = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in arms:
        out = f" (+{line['left_out']})" if line.get("left_out") else ""
        final = line.get(f"final_{line['arm']}")
        cells = [line["pool"], line["arm"], line["draw"], str(line["target"]), f"{line.get('pairs', 0)}{out}"]
        cells += [share(line), chance(line), share(line, "rollouts_saved"), share(line, "tokens_saved")]
        cells += [f"{line['used_early']:.0%}", "-" if final is None else f"{final:.3f}"]
        made.append("| " + " | ".join(cells) + " |")
    return made


def difference_table(against: Lines) -> list[str]:
    """Steps of the default, which reads SAE features, against those of other arms."""
    head = ["pool", "the default against", "draw", "target", "pairs", "fewer steps", "p (Holm)"]
    made = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in against:
        cells = [
            line["pool"],
            OTHERS[line["against"]],
            line["draw"],
            str(line["target"]),
            str(line.get("pairs", 0)),
        ]
        made.append("| " + " | ".join([*cells, share(line), chance(line)]) + " |")
    return made


def verdict(against: Lines) -> str:
    """What the default needs, in a sentence for each arm that it is compared with."""
    said = []
    for other, name in OTHERS.items():
        mine = [line for line in against if line["against"] == other and "p" in line]
        if not mine:
            continue
        parts = {"fewer": [], "more": [], "no claim": []}  # type: dict[str, list[str]]
        for line in mine:
            kind = "no claim" if line["p"] >= 0.05 else "fewer" if line["saved"] > 0 else "more"
            by = f"{line['saved']:+.0%}" if kind == "no claim" else f"{abs(line['saved']):.0%}"
            parts[kind].append(f"{line['pool']} {line['target']} ({by})")
        told = [
            f"{kind}{' steps' * (kind != 'no claim')}: {', '.join(at)}" for kind, at in parts.items() if at
        ]
        said.append(f"Against {name}: {'; '.join(told)}.")
    return " ".join(said)


def claim(against: Lines) -> str:
    """The sentence of README.md on what the SAE adds, at the demo's second target."""
    told = {line["against"]: line for line in against if line["pool"] == "demo" and line["target"] == 0.511}
    parts = []
    for other in ("none", "tfidf", "hidden", "literal_prompt"):
        low, mean, high = (round(100 * told[other][name]) for name in ("low", "saved", "high"))
        unclear = ", no claim when corrected" if told[other]["p"] >= 0.05 else ""
        parts.append(f"{mean} % ({low} to {high}{unclear})")
    return (
        f"To the demo's second target its SAE features save {parts[0]} of the steps against the same rule "
        f"without features, {parts[1]} against TF-IDF of the prompt, {parts[2]} against the model's hidden "
        f"states; the default saves {parts[3]} against the paper's order by a probe of the prompt alone."
    )


def tables(arms: Lines, against: Lines, named: Sequence[str]) -> str:
    """The generated part of the evidence in benchmarks/README.md, markers included; ``named``: all arms."""
    made = [BEGIN, "", "![The law](figures/law.png)", ""]
    if against:
        made += ["What the default, which reads SAE features, needs. " + verdict(against), ""]
        made += _folded("the default against other arms of the same draw", difference_table(against))
    if arms:
        made += _folded("all arms against vanilla", arm_table(arms))
    if missing := [name for name in named if name not in {line["arm"] for line in arms}]:
        made += [f"Not run yet: {', '.join(missing)}.", ""]
    return "\n".join([*made, END])


def _folded(title: str, table: list[str]) -> list[str]:
    return [f"<details><summary>{title}</summary>", "", *table, "", "</details>", ""]


def draw_law(arms: Lines, path: Path) -> None:
    """Steps saved against the share of vanilla's groups that carry a gradient, a point a pool and target."""
    shown = {
        name: [
            Saving(line["used_vanilla"], line["saved"], line["low"], line["high"])
            for line in arms
            if line["arm"] == arm and line["draw"] == "first" and "low" in line
        ]
        for arm, name in LAW.items()
    }
    law({name: points for name, points in shown.items() if points}, "vanilla", path)
