"""Every random draw of a run comes from (seed, purpose, step): a resumed run needs no generator state."""

from __future__ import annotations

import numpy as np

ROLLOUT, EVAL, ADAPTER, GLOBAL, REST = 1, 2, 3, 4, 5  # purposes under a run's seed; REST: of a group
PROMPT = 3  # purpose under a step's seed: the engine's seed of each prompt


def derived_seed(seed: int, purpose: int, step: int, draw: int = 0) -> int:
    """An independent seed for each purpose, step and draw within the step."""
    return int(np.random.SeedSequence([seed, purpose, step, draw]).generate_state(1)[0])
