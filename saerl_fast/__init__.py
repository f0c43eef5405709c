"""saerl-fast: sparse-autoencoder signals for RL post-training.

The names of ``__all__`` are promised: they stay importable from here, wherever their modules go. Importing
this package loads none of them; each is loaded when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saerl_fast.config import Config as Config
    from saerl_fast.config import PlanConfig as PlanConfig
    from saerl_fast.config import load_config as load_config
    from saerl_fast.errors import SaerlError as SaerlError
    from saerl_fast.integrations.columns import add_plan as add_plan
    from saerl_fast.integrations.columns import add_scores as add_scores
    from saerl_fast.integrations.columns import to_dataset as to_dataset
    from saerl_fast.integrations.ray import score_with_ray as score_with_ray
    from saerl_fast.integrations.trl import plan_trainer as plan_trainer
    from saerl_fast.integrations.verl import write_parquet as write_parquet
    from saerl_fast.models.load import load_model as load_model
    from saerl_fast.plan.base import Plan as Plan
    from saerl_fast.plan.build import build_plan as build_plan
    from saerl_fast.plan.file import load_plan as load_plan
    from saerl_fast.plan.file import save_plan as save_plan
    from saerl_fast.plan.sampler import PlanBatchSampler as PlanBatchSampler
    from saerl_fast.plan.sampler import PlanSampler as PlanSampler
    from saerl_fast.plan.static import Schedule as Schedule
    from saerl_fast.prompts.pool import Pool as Pool
    from saerl_fast.prompts.pool import load_prompts as load_prompts
    from saerl_fast.prompts.pool import load_split as load_split
    from saerl_fast.rl.engine import Engine as Engine
    from saerl_fast.rl.engine import Sample as Sample
    from saerl_fast.rl.loss import Loss as Loss
    from saerl_fast.rl.loss import Tokens as Tokens
    from saerl_fast.rl.rewards import get_reward as get_reward
    from saerl_fast.rl.trainer import train as train
    from saerl_fast.sae.files import load_sae as load_sae
    from saerl_fast.sae.files import save_sae as save_sae
    from saerl_fast.session import Session as Session
    from saerl_fast.signals.scores import Scores as Scores
    from saerl_fast.signals.scores import score as score
    from saerl_fast.stages.console import Echo as Echo

__version__ = "0.1.0"

_HOMES = {  # module -> names
    "config": "Config PlanConfig load_config",
    "errors": "SaerlError",
    "integrations.columns": "add_plan add_scores to_dataset",
    "integrations.ray": "score_with_ray",
    "integrations.trl": "plan_trainer",
    "integrations.verl": "write_parquet",
    "models.load": "load_model",
    "plan.base": "Plan",
    "plan.build": "build_plan",
    "plan.file": "load_plan save_plan",
    "plan.sampler": "PlanBatchSampler PlanSampler",
    "plan.static": "Schedule",
    "prompts.pool": "Pool load_prompts load_split",
    "rl.engine": "Engine Sample",
    "rl.loss": "Loss Tokens",
    "rl.rewards": "get_reward",
    "rl.trainer": "train",
    "sae.files": "load_sae save_sae",
    "session": "Session",
    "signals.scores": "Scores score",
    "stages.console": "Echo",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    globals()[name] = found = getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
