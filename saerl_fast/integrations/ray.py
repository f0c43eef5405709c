"""Scoring a large pool with Ray Data: actors share the features' shards, the rest is `saerl score`.

    scores = score_with_ray(load_config("mine.yaml"), actors=8, num_gpus=1)

Each actor holds the model and the SAE, and writes the pooled CSR features of ``score.shard`` prompts at a
time into the run folder, which every node must be able to reach. Finished shards are kept: after an
interruption only the missing ones are made, by this function or by `saerl score` alone. An actor that dies is
restarted by Ray, and its shard made again. Quality, difficulty (with its rollouts) and clusters are then
fitted in the calling process. Checked with Ray 2.60: two actors on one machine, one of them killed.

Several machines: on the first ``ray start --head --port=6379``, on the others ``ray start
--address=FIRST:6379``; then, on the first,

    RAY_ADDRESS=auto python examples/ray_scoring.py --config mine.yaml --actors 8 --gpus 1

with the package installed, and ``run_dir``, ``data.train``, ``model.path`` and ``sae.path`` at one place on
all of them: a shared file system. A lost actor costs at most the shard that it was making. Not run on more
than one machine yet.
"""

from __future__ import annotations

import os
from typing import Any

from saerl_fast.config import Config
from saerl_fast.errors import SaerlError
from saerl_fast.session import Session
from saerl_fast.signals.scores import Scores, feature_pass
from saerl_fast.stages.console import Echo
from saerl_fast.stages.pipeline import find_sae, score_shards, score_stage
from saerl_fast.stages.preflight import set_up


def score_with_ray(
    config: Config, *, actors: int = 1, num_cpus: float = 1, num_gpus: float = 0, echo: Echo | None = None
) -> Scores:
    """What `saerl score` writes and returns, its features computed by ``actors`` Ray actors.

    ``num_cpus``, ``num_gpus``: what Ray reserves for each actor. Ray is started when it is not running yet.
    Raises SaerlError when Ray is missing, and whatever `saerl score` raises.
    """
    try:
        import ray.data
    except ImportError:
        raise SaerlError("score_with_ray needs Ray; pip install 'ray[data]'") from None
    if actors < 1:
        raise SaerlError(f"actors={actors} must be at least 1")
    echo = echo or Echo(quiet=True)
    set_up(config)
    session = Session.open(config, echo)
    shards = score_shards(config, find_sae(config, echo, session))
    starts = [{"start": start} for start, _ in shards.ranges(len(session.train))]
    done = ray.data.from_items(starts, override_num_blocks=len(starts)).map_batches(
        _Actor,
        fn_constructor_args=(config, os.getcwd()),
        batch_size=1,
        concurrency=actors,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )
    bar = echo.bar("features", "shard")
    bar(0, len(starts))
    for i, _ in enumerate(done.iter_rows()):
        bar(i + 1, len(starts))
    return score_stage(config, echo, session)


class _Actor:
    """Makes the shards it is told the first row of."""

    def __init__(self, config: Config, folder: str) -> None:
        os.chdir(folder)  # relative paths in the config are the caller's
        set_up(config)
        quiet = Echo(quiet=True)
        session = Session.open(config)
        sae = find_sae(config, quiet, session)
        self.ids, self.shards = session.train.column("prompt_id"), score_shards(config, sae)
        self.compute = feature_pass(session, sae, config)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for start in batch["start"]:
            self.shards.fill(int(start), self.ids, self.compute)
        return batch
