"""One pass of each static order: every row once, whatever the sizes of the clusters."""

import numpy as np
import pytest

from saerl_fast.config import PlanConfig
from saerl_fast.plan import static as orders


def columns(n: int, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random(n).astype(np.float32), rng.zipf(1.5, n).clip(max=clusters).astype(np.int32)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("clusters", [1, 3, 50])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_every_row_comes_once(batch_size, clusters, mix):
    difficulty, cluster = columns(100, clusters, seed=clusters)
    rows = np.random.default_rng(1).permutation(100)[: 84 // batch_size * batch_size]
    common = ({"difficulty": difficulty, "cluster": cluster}, PlanConfig(mix=mix, window=3))
    for batches in (
        orders.shuffled(rows, batch_size, np.random.default_rng(0), *common),
        orders.literal(rows, batch_size, np.random.default_rng(0), *common),
        orders.easy_to_hard(rows, batch_size, np.random.default_rng(0), *common),
    ):
        assert batches.shape == (len(rows) // batch_size, batch_size)
        assert sorted(batches.ravel()) == sorted(rows)


def test_literal_spreads_a_large_cluster_over_the_pass():
    cluster = np.repeat([0, 1], [60, 20])
    batches = orders.literal(
        np.arange(80),
        10,
        np.random.default_rng(0),
        {"difficulty": np.zeros(80), "cluster": cluster},
        PlanConfig(mix=0.0),
    )
    small = np.flatnonzero(cluster[batches].mean(axis=1) == 1)
    assert len(small) == 2 and small[1] - small[0] >= 3


def test_ties_are_broken_by_the_generator():
    common = ({"difficulty": np.zeros(40), "cluster": np.zeros(40, dtype=int)}, PlanConfig(mix=0.0, window=4))
    first, again, other = (
        orders.easy_to_hard(np.arange(40), 8, np.random.default_rng(seed), *common) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("keep, expected", [(0.5, [2, 3, 4, 5]), (1.0, list(range(8))), (0.01, [3])])
def test_middle_by_rank(keep, expected):
    assert orders.middle(np.arange(8) ** 2.0, np.arange(8), keep).tolist() == expected


def test_clusters_take_turns_in_another_order_each_pass():
    cluster = np.repeat([0, 1, 2, 3], 4)
    table, starts = {"difficulty": np.zeros(16), "cluster": cluster}, set()
    for seed in range(12):
        batches = orders.literal(np.arange(16), 4, np.random.default_rng(seed), table, PlanConfig(mix=0.0))
        starts.add(int(cluster[batches[0, 0]]))
    assert len(starts) > 1


def test_what_is_drawn_anywhere_is_a_random_part_of_the_pass():
    rows, cfg = np.arange(80), PlanConfig(mix=0.25, window=1)
    table = {"difficulty": rows / 80, "cluster": np.zeros(80, int)}
    batches = orders.easy_to_hard(rows, 8, np.random.default_rng(0), table, cfg)
    assert batches[:, -2:].max() > 40 and batches[:, -2:].min() < 40
