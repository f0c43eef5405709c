"""Score a pool with Ray Data: the features' shards are shared among actors, the rest is `saerl score`.

    pip install "ray[data]"
    python examples/ray_scoring.py --config examples/demo.yaml --actors 2 score.shard=256

Writes what `saerl score` writes, where it writes it. On GPUs: --gpus 1 reserves one for each actor.
"""

from __future__ import annotations

import argparse

from saerl_fast import Echo, Scores, load_config, score_with_ray


def main(config: str, overrides: list[str], actors: int = 2, gpus: float = 0) -> Scores:
    """The scores, also on the disk."""
    return score_with_ray(load_config(config, overrides), actors=actors, num_gpus=gpus, echo=Echo())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="examples/demo.yaml")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    main(options.config, options.overrides, options.actors, options.gpus)
