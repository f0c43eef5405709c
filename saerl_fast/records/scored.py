"""What a report shows of scores: the map, probes and clusters; from scores.json and scores.parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saerl_fast.errors import SaerlError, named, printable
from saerl_fast.fileio import read_table
from saerl_fast.records.samples import Table

AGAIN = "make them again with `saerl score`"
NAMES = ("cluster", "difficulty", "quality", "pass_rate")
COLUMNS = ["prompt_id", "quality_label", *(f"saerl_{name}" for name in NAMES)]
SIGNALS_NOTE = (
    "Out of fold, on rows whose labels the fit had not seen: quality.auc or quality.spearman, "
    "quality.accuracy (calibrated on the other folds), difficulty.spearman and difficulty.r2. Silhouette and "
    "purity describe the rows that were clustered, next to their values by chance."
)
BASELINES_NOTE = (
    "Out of fold, on the same folds, by the same regression. difficulty.spearman_error, of the signals, is "
    "the standard error of the difference to the best of them: less than 2.5 of it is noise."
)
CARDS_NOTE = (
    "Means over the prompts of the cluster where known. Features are those that weigh more in it than "
    "elsewhere, by their lift, each with the prompt that has most of it; all of this is in scores.json."
)
CARRIERS_NOTE = (
    "The SAE features that move the predictions most: what a standard deviation more of each adds to the "
    "predicted failure rate (difficulty) or label (quality), and the prompts that have most of it."
)
SNIPPET = 80  # characters of a prompt in a table


class Points(NamedTuple):
    """The map: ``x``, ``y``, ``texts`` [n]; ``signals`` float64 [n] by name (see NAMES); a ``note``; ``rows``
    of the pool [n]."""

    x: np.ndarray
    y: np.ndarray
    texts: list[str]
    signals: dict[str, np.ndarray]
    note: str
    rows: list[int]

    def centres(self) -> dict[int, tuple[float, float]]:
        """Of each cluster, where the prompt of it lies that is nearest to its median."""
        found = {}
        for c in np.unique(self.signals["cluster"]).astype(int).tolist():
            at = np.flatnonzero(self.signals["cluster"] == c)
            x, y = self.x[at], self.y[at]
            nearest = np.argmin(np.hypot(x - np.median(x), y - np.median(y)))
            found[c] = (float(x[nearest]), float(y[nearest]))
        return found


def read_columns(file: Path) -> dict[str, list[Any]]:
    """The columns of scores.parquet that reports read, no prompts."""
    return read_table(file, AGAIN.replace("them", "it"), COLUMNS)


def read_map(scores: dict[str, Any], columns: dict[str, list[Any]]) -> Points | None:
    """The map in the metadata of scores.json with the signals of its prompts; None where there is none."""
    found = scores.get("map")
    if not found:
        return None
    try:
        rows, x, y = (np.array([float(v) for v in found[name]]) for name in ("row", "x", "y"))
        at, texts = rows.astype(np.int64), [printable(text) for text in found["text"]]
        if not len(at) == len(x) == len(y) == len(texts) or not np.isfinite(x + y).all() or (at < 0).any():
            raise ValueError("its columns do not belong together")
        signals = {
            name: np.array([columns[f"saerl_{name}"][i] for i in at], dtype=np.float64)
            for name in NAMES
            if f"saerl_{name}" in columns
        }
        unknown = np.full(len(at), np.nan)
        signals = {name: signals.get(name, unknown) for name in NAMES}
        if not np.isfinite(signals["cluster"]).all():
            raise ValueError("clusters are missing")
        note = _map_note(found, len(at))
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as err:
        why = named(err)
        raise SaerlError(f"the map of prompts in scores.json is damaged ({why}); {AGAIN}") from err
    return Points(x, y, texts, signals, note, at.tolist())


def _map_note(found: dict[str, Any], shown: int) -> str:
    """What the map shows, of how many prompts."""
    count = (
        f"All {shown:,}" if shown == found["of"] else f"A random sample of {shown:,} of the {found['of']:,}"
    )
    if found["method"] == "pca":
        share = sum(float(v) for v in found["explained"])
        how = f"the first two principal components ({share:.0%} of the variance)"
    else:
        how = "UMAP, whose distances between far groups mean little,"
    return f"{count} prompts, by {how} of the features that clusters are made of."


def calibrated(columns: dict[str, list[Any]]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Expected (held out) and observed pass rates of the prompts that have a label, and their rows, [n]."""
    empty = [None] * len(columns.get("prompt_id", []))
    said, seen = (
        np.asarray(columns.get(name, empty), dtype=np.float64)
        for name in ("saerl_difficulty", "saerl_pass_rate")
    )
    known = np.isfinite(said) & np.isfinite(seen)
    return 1.0 - said[known], seen[known], np.flatnonzero(known).tolist()


def signal_tables(scores: dict[str, Any], sae: dict[str, Any], cost: str) -> dict[str, Table]:
    """By name: the probes and what is cheaper, their features, cluster cards, every figure, the SAE's."""
    try:
        cards, carried = cards_table(scores), carriers_table(scores)
    except (AttributeError, LookupError, TypeError, ValueError) as err:
        why = named(err)
        raise SaerlError(f"the cluster cards in scores.json are damaged ({why}); {AGAIN}") from err
    tables = {"probes": probes_table(scores), "features": carried, "clusters": cards}
    for name, title, record, note in (
        ("signals", "Signals", scores, SIGNALS_NOTE),
        ("sae", "SAE training", sae, cost),
    ):
        known = [(key, value) for key, value in _flatten(record) if value is not None]
        rows = [[key, _cell(value)] for key, value in known if not isinstance(value, (list, dict))]
        tables[name] = (title, ["figure", "value"], rows, note)
    return tables


def probes_table(scores: dict[str, Any]) -> Table:
    """Each probe's held-out figure, and those of single kinds of features."""
    probes = {name: scores.get(name) or {} for name in ("difficulty", "quality")}
    baselines = {name: probe.get("baselines") for name, probe in probes.items()}
    shown = [name for name in probes if baselines[name]]
    kinds = list(dict.fromkeys(kind for name in shown for kind in baselines[name] or ()))
    header = ["features", *(f"{name} ({_measure(probes[name])})" for name in shown)]
    rows = [["as set", *(_cell(probes[name].get(_measure(probes[name]))) for name in shown)]]
    behind = (probes["difficulty"].get("note") or "").capitalize()
    rows += [
        [f"{kind} alone", *(_cell((baselines[name] or {}).get(kind, "-")) for name in shown)]
        for kind in kinds
    ]
    note = f"{BASELINES_NOTE} {behind}".strip()
    return ("Probes against one kind of features", header, rows if shown else [], note)


def carriers_table(scores: dict[str, Any]) -> Table:
    """One row a feature: which way it moves a probe, and the prompts that have most of it."""
    rows = []
    for probe, ways in (("difficulty", ("easier", "harder")), ("quality", ("worse", "better"))):
        for found in (scores.get(probe) or {}).get("features") or []:
            effect = float(found["effect"])
            prompts = "\n".join(prompt["text"][:SNIPPET] for prompt in found["prompts"])
            rows.append([probe, str(found["feature"]), f"{effect:+.4f} ({ways[effect > 0]})", prompts])
    header = ["probe", "feature", "effect", "prompts that have most of it"]
    return ("Features that carry the probes", header, rows, CARRIERS_NOTE)


def cards_table(scores: dict[str, Any]) -> Table:
    """One row a cluster, the largest first: what it is made of, from the cards of its scoring."""
    rows = []
    for card in (scores.get("clusters") or {}).get("cards") or []:
        features = [
            f"{feature['feature']} (+{feature['lift']:.2f}): {feature['prompts'][0]['text'][:SNIPPET]}"
            for feature in card["features"]
        ]
        known = [card.get(name) for name in ("difficulty", "pass_rate", "quality")]
        rows.append(
            [
                str(card["cluster"]),
                str(card["size"]),
                *("-" if value is None else f"{value:.2f}" for value in known),
                "\n".join(features),
                "\n".join(prompt["text"][:SNIPPET] for prompt in card["prompts"]),
            ]
        )
    header = ["cluster", "prompts", "difficulty", "pass rate", "quality", "features (lift): first prompt"]
    return ("Clusters", [*header, "typical prompts"], rows, CARDS_NOTE if rows else "")


def by_kind(scores: dict[str, Any]) -> dict[str, float]:
    """The quality probe's held-out AUC of each kind of bad row, as far as it is known."""
    found = (scores.get("quality") or {}).get("by_kind") or {}
    known = found.items() if isinstance(found, dict) else ()
    return {str(name): float(auc) for name, auc in known if isinstance(auc, (int, float))}


def _measure(probe: dict[str, Any]) -> str:
    """The figure that a probe's baselines are figures of."""
    return "auc" if probe.get("auc") is not None else "spearman"


def _flatten(record: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in record.items():
        if key in ("config", "fingerprint", "format", "version", "baselines"):
            continue
        if isinstance(value, dict):
            flat += _flatten(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
