"""The README.md beside a trained SAE: what it reads, what it was trained on and how, and its figures."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from saerl_fast.config import Config
from saerl_fast.hub import at_home, is_local
from saerl_fast.sae.model import SAE

_FIGURES = {  # what is said, and of which figure
    "fvu": "fraction of variance unexplained, held-out tokens",
    "train_fvu": "the same, training tokens",
    "l0": "features per token (L0)",
    "dead_fraction": "share of features that never fire",
    "ce": "loss of the language model on held-out prompts, nats a token",
    "ce_sae": "the same with reconstructions in its stream",
    "ce_zero": "the same with zeros there",
    "ce_recovered": "loss recovered: (zeros - SAE) / (zeros - model)",
    "tokens": "training tokens",
    "held_out_tokens": "held-out tokens",
    "sink_tokens": "attention sinks left out",
    "fvu_before": "variance unexplained by the SAE it went on from, same tokens",
    "drift_cosine": "mean cosine with the decoder rows of that SAE",
    "drift_moved": "share of features with a cosine below 0.9",
}


def model_card(sae: SAE, config: Config, hook: str | None, figures: Mapping[str, Any]) -> str:
    """README.md of an SAE that ``config`` has trained, with the front matter of the Hugging Face hub.

    Models and data on this machine go by their last name, so no path is told.
    """
    model, data = short_name(config.model.path), short_name(config.data.train)
    front = ["---", "library_name: saelens", "tags: [sparse-autoencoder, saerl-fast]"]
    front += [f"base_model: {model}"] * (not is_local(config.model.path)) + ["---", ""]
    settings = {name: value for name, value in asdict(config.sae).items() if value is not None}
    settings |= {"layer": sae.layer}
    if config.sae.init is not None:
        settings["init"] = short_name(config.sae.init)
    read = "prompts and answers" if config.score.include_answer else "prompts"
    facts = {
        "model": model,
        "hook": f"{hook}, the residual stream after {sae.layer} blocks",
        "data": f"{data} ({read})",
        "shape": f"{sae.d_in} -> {sae.d_sae} features, {sae.architecture}, k={sae.cfg.k}",
        "inputs": f"normalize_activations={sae.cfg.normalize_activations}; the rest is folded in",
    }
    if sae.cfg.max_norm is not None:
        facts["attention sinks"] = f"tokens of a norm above {sae.cfg.max_norm:.6g} were left out of training"
    shown = {text: f"{figures[name]:.6g}" for name, text in _FIGURES.items() if figures.get(name) is not None}
    lines = [*front, f"# SAE of {model}, layer {sae.layer}", ""]
    lines += [
        "`SAE.load_from_disk(folder)` of SAELens reads this folder; so does saerl-fast (`--sae folder`).",
        "",
    ]
    for title, rows in (
        ("", facts),
        ("Figures", shown),
        ("Settings", {f"`sae.{k}`": v for k, v in settings.items()}),
    ):
        lines += [f"## {title}", ""] * bool(title)
        lines += [
            "| | |",
            "|---|---|",
            *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()),
            "",
        ]
    return "\n".join(lines)


def short_name(name: str) -> str:
    """A hub id as it is; of a path the last part."""
    if is_local(name):
        return os.path.basename(os.path.abspath(at_home(name)))
    return name if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) else name.rpartition("/")[2]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
