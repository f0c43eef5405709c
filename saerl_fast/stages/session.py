"""What every stage starts from: the process set up, model, tokenizer and prompts loaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from saerl_fast.config import Config
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import atomic_path

if TYPE_CHECKING:
    pass


def set_up(config: Config) -> None:
    """CPU threads, a quiet transformers, and a run folder that can be written to, all before any work."""
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
