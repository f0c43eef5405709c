"""Adapters: where they may be, merging the trained ones, and what a half-precision model loses by it.

bfloat16 keeps 8 bits of a weight. A change below half the spacing of its numbers is rounded away, and what a
short run teaches LoRA adapters (arXiv 2106.09685) is mostly smaller than that. Stochastic rounding keeps the
changes on average, at the price of noise in every weight that is larger than what it saves. So ``model/`` is
written in float32, where nothing is lost, and the figures say what the model's own dtype would have kept.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saerl_fast.config import LoRAConfig
from saerl_fast.errors import SaerlError

HALF = (torch.bfloat16, torch.float16)


def add_adapters(model: Any, cfg: LoRAConfig, seed: int) -> Any:
    """``model`` itself when ``cfg.rank`` is 0, else a peft model around it that trains LoRA adapters
    (arXiv 2106.09685) alone.

    Adapters of half-precision models are float32; they start as no change at all. No dropout: the
    log-probabilities of an update must be those of the rollouts. Raises SaerlError without peft and on
    target names that the model lacks.
    """
    if cfg.rank == 0:
        return model
    try:
        import peft
    except ImportError:
        raise SaerlError(
            f"train.lora.rank={cfg.rank} needs peft; run `pip install peft` or set it to 0"
        ) from None
    _check_names(model, cfg)
    where = f"train.lora.targets={','.join(cfg.targets)}"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = peft.LoraConfig(
            r=cfg.rank,
            lora_alpha=cfg.alpha,  # type: ignore[arg-type]  # a float works
            target_modules="all-linear" if "all-linear" in cfg.targets else list(cfg.targets),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        try:
            adapted = peft.get_peft_model(model, settings).eval()
            bypassed = _bypassed(adapted)
        except ValueError as err:  # peft's own checks, which end in what to do
            raise SaerlError(f"{where}: {' '.join(str(err).split())}") from err
        except (RuntimeError, AttributeError, TypeError, IndexError) as err:
            raise SaerlError(
                f"{where}: with adapters there the model does not run ({err}); name others, such as q_proj"
            ) from err
    if bypassed:
        raise SaerlError(
            f"{where}: the model does not call {bypassed[0]} or shares its weights with another module, so "
            "its adapter would not be what is merged; name the other modules"
        )
    return adapted


def _bypassed(model: Any) -> list[str]:
    """Modules of a peft ``model`` whose adapters are left out where the model uses their weights itself, and
    those that have their weights in common with another one."""
    inner = model.get_base_model()
    found = {n: m for n, m in inner.named_modules() if "default" in getattr(m, "lora_B", ())}
    found = {n: m for n, m in found.items() if not hasattr(m, "parameter_name")}
    weights = {name: module.get_base_layer().weight for name, module in found.items()}
    first = {id(weight): name for name, weight in reversed(weights.items())}
    shared = [name for name, weight in weights.items() if first[id(weight)] != name]
    ids = torch.arange(1, 5, device=inner.device)[None] % inner.get_input_embeddings().weight.shape[0]

    def untouched(tensors: dict[str, Any]) -> list[str]:
        with torch.enable_grad():
            loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
            if not (tensors and loss.requires_grad):
                return list(tensors)
            grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
        return [name for name, grad in zip(tensors, grads, strict=True) if grad is None]

    silent = untouched({name: module.lora_B["default"].weight for name, module in found.items()})
    if not silent:  # experts that no token went to, towers for pictures: their weights are silent, too
        return shared
    with_grad = {name: weights[name].requires_grad_() for name in silent}
    idle = untouched(with_grad)
    for weight in with_grad.values():
        weight.requires_grad_(False)
    return shared + [name for name in silent if name not in idle]


def check_targets(model: Any, cfg: LoRAConfig) -> None:
    """SaerlError when adapters are asked for where they cannot be: they are tried, and taken off again."""
    if cfg.rank == 0:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    add_adapters(model, cfg, 0).unload()
    vars(model).pop("peft_config", None)
    for parameter in trained:
        parameter.requires_grad_(True)


def _check_names(model: Any, cfg: LoRAConfig) -> None:
    named = [name for name, _ in model.named_modules()]
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = inputs is not None and outputs is not None and inputs.weight is outputs.weight
    shared = {name.split(".")[-1] for name, m in model.named_modules() if tied and m in (inputs, outputs)}
    for target in cfg.targets:
        if target in shared:
            raise SaerlError(
                f"train.lora.targets={target!r}: this model's embeddings and output layer share their "
                "weights, and merging would change both; leave it out"
            )
        if target != "all-linear" and not any(name.split(".")[-1] == target for name in named):
            raise SaerlError(
                f"train.lora.targets={target!r} names no module of {type(model).__name__}; use all-linear or "
                "names such as q_proj"
            )


def half_dtype(model: Any) -> torch.dtype | None:
    """The half-precision dtype of the weights that the adapters of a peft ``model`` change; None: float32."""
    found = {weight.dtype for _, weight, _ in _adapted(model)} & set(HALF)
    return next(iter(found), None)


def _adapted(model: Any) -> list[tuple[str, Tensor, Any]]:
    """(its name in the model inside, the weight, its adapter) of every weight that has an adapter."""
    found = []
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            own = getattr(module, "parameter_name", "weight")  # of experts that are one parameter
            weight = getattr(module.get_base_layer(), own)
            found.append((_plain(f"{name}.{own}"), weight, module))
    return found


def _plain(name: str) -> str:
    """A parameter's name without peft's wrappers, of which several parameters of a module have several."""
    return re.sub(r"(\.base_layer)+\.", ".", name)


def _delta(module: Any) -> Any:
    """What its adapters add to a module's weight, float32."""
    return sum(module.get_delta_weight(adapter).float() for adapter in module.active_adapters)


@torch.no_grad()
def weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name in the model without adapters, tensor in its own dtype) of each parameter, adapters merged in."""
    base, modules = model, dict[str, Any]()
    if hasattr(model, "get_base_model"):
        base, modules = model.get_base_model(), {name: module for name, _, module in _adapted(model)}
    for name, parameter in base.named_parameters():
        plain = _plain(name)
        if plain in modules:
            yield plain, (parameter.float() + _delta(modules[plain])).to(parameter.dtype)
        elif "lora_" not in name:
            yield plain, parameter.data


@torch.no_grad()
def merged_weights(model: Any) -> tuple[dict[str, Tensor], float]:
    """(float32 state on the CPU of a peft ``model`` with its adapters merged in, share kept when rounded).

    The keys are those of the model inside. The share is what rounding the sums to the model's dtype leaves of
    the adapters' change: 1 - |rounded - exact| / |change|, over all weights, and 0 at the least.
    """
    base = model.get_base_model()
    changed: dict[str, Tensor] = {}
    lost = change = 0.0
    for name, weight, module in _adapted(model):
        delta = _delta(module)
        exact = weight.float() + delta
        lost += float((exact.to(weight.dtype).float() - exact).double().square().sum())
        change += float(delta.double().square().sum())
        changed[name] = exact.cpu()
    state, seen = {}, dict[Any, Tensor]()
    for name, tensor in base.state_dict().items():
        if "lora_" in name:
            continue
        plain = _plain(name)
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
