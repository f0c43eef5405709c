"""What every stage starts from: the process set up, model, tokenizer and prompts loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_fast.config import Config
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import atomic_path

if TYPE_CHECKING:
    from saerl_fast.prompts.pool import Pool


@dataclass
class Session:
    """A loaded model with its tokenizer, and the pools rendered for it."""

    model: Any
    tokenizer: Any
    train: Pool
    eval: Pool


def set_up(config: Config) -> None:
    """CPU threads, a quiet transformers, and a run folder that can be written to, all before any work."""
    from saerl_kernels.dispatch import check_name

    try:
        check_name(config.score.backend, "score.backend")
    except ValueError as err:
        raise SaerlError(str(err)) from None
    probe = Path(config.run_dir) / ".writable"
    with atomic_path(probe):
        pass
    probe.unlink()
    try:
        from transformers.utils import logging
    except ImportError:
        raise SaerlError("transformers is not installed; run `pip install saerl-fast[all]`") from None
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft's, not the user's
    if config.threads is not None:
        import torch

        torch.set_num_threads(config.threads)


def open_session(config: Config, echo: Callable[[str], None]) -> Session:
    """Load model, tokenizer and prompts; prompts that do not fit the context are dropped and counted."""
    from saerl_fast.models import load_model, max_positions
    from saerl_fast.prompts.pool import load_split
    from saerl_fast.prompts.render import fit_context

    train, evaluation = load_split(config.data, config.seed)
    model, tokenizer = load_model(config.model)
    positions = max_positions(model)
    limit = None if positions is None else positions - config.train.rollout.max_new_tokens
    train = fit_context(train, tokenizer, config.data, limit=limit)
    evaluation = fit_context(evaluation, tokenizer, config.data, limit=limit)
    parameters = sum(p.numel() for p in model.parameters())
    echo(f"model {config.model.path}: {parameters / 1e6:.1f}M parameters on {model.device}, {model.dtype}")
    echo(f"prompts: {len(train)} to train on, {len(evaluation)} held out")
    return Session(model, tokenizer, train, evaluation)
