"""What everything that touches a model is handed: the model, its tokenizer, and the prompts made for them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saerl_fast.config import Config, DataConfig, to_dict
from saerl_fast.errors import SaerlError
from saerl_fast.hub import hub_access, is_local
from saerl_fast.models.layout import max_positions
from saerl_fast.models.load import check_named_layer, load_model
from saerl_fast.prompts.pool import Pool, load_split
from saerl_fast.prompts.render import Prompts, prepare
from saerl_fast.prompts.sources import is_source
from saerl_fast.records import manifest


@dataclass
class Session:
    """A causal language model, its tokenizer (padding on the left), and both pools as it reads them."""

    model: Any
    tokenizer: Any
    train: Prompts
    eval: Prompts

    @classmethod
    def open(cls, config: Config, echo: Callable[[str], None] | None = None) -> Session:
        """Load what the config names. ``echo`` is told what was loaded, in two lines."""
        config.recheck()
        train, evaluation = load_pools(config)
        check_named_layer(config.model, config.sae.layer)
        manifest.check(config.model.path, "model", "saerl train")
        model, tokenizer = load_model(config.model)
        new = config.train.rollout.max_new_tokens
        session = cls.of(model, tokenizer, train, evaluation, config.data, max_new_tokens=new)
        if echo is not None:
            size = sum(p.numel() for p in model.parameters()) / 1e6
            echo(f"model {config.model.path}: {size:.1f}M parameters on {model.device}, {model.dtype}")
            echo(f"prompts: {len(session.train)} to train on, {len(session.eval)} held out")
        return session

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Any,
        train: Pool,
        evaluation: Pool,
        data: DataConfig | None = None,
        *,
        max_new_tokens: int = 0,
    ) -> Session:
        """A session of a loaded model and pools; prompts that leave no room for new tokens are dropped."""
        for pool, name in ((train, "train"), (evaluation, "evaluation")):
            if not isinstance(pool, Pool):
                raise SaerlError(
                    f"{name} must be a Pool, not a {type(pool).__name__}; make one with load_prompts, "
                    "or with Pool of a dictionary of columns"
                )
        positions = max_positions(model)
        limit = None if positions is None else positions - max_new_tokens
        pools = (prepare(pool, tokenizer, data, limit=limit) for pool in (train, evaluation))
        return cls(model, tokenizer, *pools)


def load_pools(config: Config) -> tuple[Pool, Pool]:
    """The training and the evaluation pool of the config, read once as long as their files stay the same."""
    named = [Path(name) for name in (config.data.train, config.data.eval or "") if name]
    files = [file for path in named for file in (path, *sorted(path.glob("*")), *sorted(path.glob("*/*")))]
    stamp = tuple((f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file())
    names = [name for name in (config.data.train, config.data.eval) if name]
    with hub_access(any(not is_local(name) and not is_source(name) for name in names)):
        return _load_pools(json.dumps(to_dict(config.data)), config.seed, stamp)


@functools.lru_cache(maxsize=2)
def _load_pools(data: str, seed: int, stamp: tuple[tuple[int, int], ...]) -> tuple[Pool, Pool]:
    return load_split(DataConfig(**json.loads(data)), seed)
