"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: only they are trained, saved and resumed."""

from __future__ import annotations

from typing import Any

import torch

from saerl_fast.config import LoRAConfig
from saerl_fast.errors import SaerlError


def add_adapters(model: Any, cfg: LoRAConfig, seed: int) -> Any:
    """``model`` itself when ``cfg.rank`` is 0, else a peft model around it that trains adapters alone.

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
            f"train.lora.rank={cfg.rank} needs peft; run `pip install saerl-fast[lora]` or set it to 0"
        ) from None
    check_targets(model, cfg)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = peft.LoraConfig(
            r=cfg.rank,
            lora_alpha=cfg.alpha,  # type: ignore[arg-type]  # a float works
            target_modules="all-linear" if "all-linear" in cfg.targets else list(cfg.targets),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
        )
        return peft.get_peft_model(model, settings).eval()


def check_targets(model: Any, cfg: LoRAConfig) -> None:
    """SaerlError when adapters are asked for on modules that ``model`` lacks."""
    if cfg.rank == 0:
        return
    named = [name for name, _ in model.named_modules()]
    for target in cfg.targets:
        if target != "all-linear" and not any(name.split(".")[-1] == target for name in named):
            raise SaerlError(
                f"train.lora.targets={target!r} names no module of {type(model).__name__}; use all-linear or "
                "names such as q_proj"
            )
