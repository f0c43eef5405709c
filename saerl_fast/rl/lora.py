"""Merging trained adapters, and what a half-precision model loses by it.

bfloat16 keeps 8 bits of a weight. A change below half the spacing of its numbers is rounded away, and what a
short run teaches LoRA adapters (arXiv 2106.09685) is mostly smaller than that. Stochastic rounding keeps the
changes on average, at the price of noise in every weight that is larger than what it saves. So ``model/`` is
written in float32, where nothing is lost, and the figures say what the model's own dtype would have kept.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def half_dtype(model: Any) -> torch.dtype | None:
    """The half-precision dtype of the weights that the adapters of a peft ``model`` change; None: float32."""
    found = {module.get_base_layer().weight.dtype for _, module in _adapted(model)} & set(HALF)
    return next(iter(found), None)


def _adapted(model: Any) -> list[tuple[str, Any]]:
    modules = model.get_base_model().named_modules()
    return [(name, module) for name, module in modules if hasattr(module, "get_delta_weight")]


@torch.no_grad()
def merged_weights(model: Any) -> tuple[dict[str, Tensor], float]:
    """(float32 state on the CPU of a peft ``model`` with its adapters merged in, share kept when rounded).

    The keys are those of the model inside. The share is what rounding the sums to the model's dtype leaves of
    the adapters' change: 1 - |rounded - exact| / |change|, over all weights, and 0 at the least.
    """
    base = model.get_base_model()
    changed: dict[str, Tensor] = {}
    lost = change = 0.0
    for name, module in _adapted(model):
        weight = module.get_base_layer().weight
        delta = sum(module.get_delta_weight(adapter).float() for adapter in module.active_adapters)
        exact = weight.float() + delta
        lost += float((exact.to(weight.dtype).float() - exact).double().square().sum())
        change += float(delta.double().square().sum())
        changed[f"{name}.weight"] = exact.cpu()
    state, seen = {}, dict[Any, Tensor]()
    for name, tensor in base.state_dict().items():
        if "lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        place = (tensor.data_ptr(), tensor.shape) if tensor.numel() else plain
        if plain in changed:
            state[plain] = changed[plain]
        else:  # tied tensors stay one
            whole = seen.setdefault(place, tensor.detach().cpu())
            state[plain] = whole if not whole.is_floating_point() else whole.float()
            seen[place] = state[plain]
    kept = 1.0 if change == 0 else max(0.0, 1.0 - (lost / change) ** 0.5)
    return state, kept


@torch.no_grad()
def merge(model: Any, state: dict[str, Tensor] | None = None) -> Any:
    """The model inside a peft ``model``, adapters merged in; ``state``: of `merged_weights`, rounded once."""
    merged = model.merge_and_unload()
    if state is not None:
        for name, tensor in merged.state_dict().items():
            tensor.copy_(state[name])
    return merged


def save_float32(model: Any, state: dict[str, Tensor], target: Path) -> None:
    """Write the merged ``model`` with the weights ``state`` (see `merged_weights`) in place of its own."""
    model.save_pretrained(target, state_dict=state)
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        part.dtype = torch.float32  # what `from_pretrained` loads it in
    config.save_pretrained(target)


def sentence(record: dict[str, Any], accuracy: float) -> str:
    """What became of the adapters (``record``: of the summary, ``merged``), beside their own ``accuracy``."""
    dtype, saved = record["rounded_to"], record["saved_as"]
    end = "model/ is float32 and keeps all of it"
    if saved != "float32":
        end = f"model/ is that one; train.lora.merge_dtype=float32 or adapter/ in {dtype} keeps all of it"
    return (
        f"figures are of the model with adapter/ (accuracy {accuracy:.4g}); merged and rounded to {dtype} "
        f"it keeps {record['change_kept']:.0%} of what the adapters changed (accuracy "
        f"{record['accuracy']:.4g}); {end}"
    )
