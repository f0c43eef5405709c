"""The choice from a large pool: the same batch as a scan of all rows, from a look at few of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest, pearsonr

from saerl_fast.plan import wide
from saerl_fast.plan.belief import Prior, capped
from saerl_fast.plan.wide import Noise, Wide

WORTH = Prior(8.0, 8)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in (("BUCKET", 8), ("SEGMENT", 128), ("FIRST", 16), ("MOST", 512), ("BLOCK", 50)):
        monkeypatch.setattr(wide, name, value)


def generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def scan(rows, weights, worth, noise, size, waiting, known=((), ()), groups=None, most=0):
    """The plain rule on the same noise."""
    scores = (rows.astype(np.float64) * weights[:-1].astype(np.float64)).sum(axis=1)
    utility = worth(np.abs(np.clip(scores + float(weights[-1]) + 0.5, 0.0, 1.0) - 0.5))
    utility[list(known[0])] = known[1]
    utility += noise.of(noise.ranks(np.arange(len(rows))))
    order = np.lexsort((np.arange(len(rows)), -utility))
    order = order[~np.isin(order, waiting)]
    first = capped(order, groups, most)
    return np.concatenate([order[first], order[~first]])[:size]


@pytest.mark.parametrize("n_rows", [1, 2, 7, 64, 1000, 4095])
def test_ranks_are_a_bijection_and_read_backwards(n_rows):
    noise = Noise(n_rows, 1.0, generator(n_rows))
    ranks = noise.ranks(np.arange(n_rows))
    assert len(set(ranks.tolist())) == n_rows and ranks.max() < noise.places
    by_rank = noise.rows(0, noise.places)
    assert by_rank.tolist() == np.argsort(ranks).tolist()
    drawn = noise.of(noise.ranks(by_rank))
    assert (np.diff(drawn) <= 0).all() and np.isfinite(drawn).all()
    for at in range(0, n_rows, max(1, n_rows // 7)):
        assert drawn[at] <= noise.below(int(noise.ranks(by_rank[at : at + 1])[0]))
    assert (Noise(n_rows, 0.0, generator(1)).of(ranks) == 0).all()


def test_noise_is_gumbel_and_differs_between_steps_and_neighbours():
    rows = np.arange(3000)
    first, second = (Noise(3000, 1.0, generator(0, step)) for step in (1, 2))
    first, second = first.of(first.ranks(rows)), second.of(second.ranks(rows))
    assert kstest(first, "gumbel_r").pvalue > 0.01
    for other in (second, np.roll(first, 1), np.roll(first, 2), np.roll(first, 64)):
        assert abs(pearsonr(first, other)[0]) < 0.06
    # Of one row over the steps, which is what decides how often it is drawn.
    single = [
        float(noise.of(noise.ranks(rows[5:6]))[0])
        for noise in (Noise(3000, 1.0, generator(0, s)) for s in range(800))
    ]
    assert kstest(single, "gumbel_r").pvalue > 0.01


@pytest.mark.parametrize("seed", range(12))
def test_it_chooses_what_a_scan_of_all_rows_chooses(seed):
    """While weights move a little or much, rows are rewritten, prompts wait, some are known, groups full."""
    rng = generator(99, seed)
    n_rows, width, size = int(rng.integers(150, 3000)), int(rng.integers(1, 9)), int(rng.integers(1, 20))
    rows = rng.standard_normal((n_rows, width)).astype(np.float32) / np.float32(width**0.5)
    rows[rng.integers(0, n_rows, n_rows // 3)] = rows[0]  # copies of a prompt
    weights = np.zeros(width + 1, dtype=np.float32)
    groups = None if seed % 3 == 0 else rng.integers(0, 1 + seed, n_rows).astype(np.int32)
    index = Wide(rows)
    for step in range(25):
        worth = Prior(float(rng.choice([0.5, 8.0, 128.0])), int(rng.choice([2, 8, 64])))
        noise = Noise(n_rows, float(rng.choice([0.0, 0.02, 0.05, 1.0])), generator(seed, step))
        waiting = np.sort(rng.choice(n_rows, n_rows // 3, replace=False)) if step % 3 else np.empty(0, int)
        known = np.sort(rng.choice(n_rows, 40, replace=False)) if step % 2 else np.empty(0, int)
        more = (known, rng.random(len(known))), groups, int(rng.integers(1, 4))
        expected = scan(rows, weights, worth, noise, size, waiting, *more)
        assert index.choose(weights, worth, noise, size, waiting, *more).tolist() == expected.tolist()
        weights += (rng.standard_normal(width + 1) * rng.choice([0, 1e-3, 0.05, 2.0])).astype(np.float32)
        changed = rng.integers(0, n_rows, 6)
        rows[changed] = rng.standard_normal((6, width)) * rng.choice([0.1, 5.0])
        index.changed(changed)


def test_a_row_scores_the_same_to_the_last_bit_in_any_company():
    rng = generator(3)
    rows = rng.standard_normal((500, 97)).astype(np.float32)
    weights = rng.standard_normal(98).astype(np.float32)
    index = Wide(rows)
    whole = index._distance(np.arange(500), weights)
    for part in (rng.permutation(500)[:77], np.array([499]), np.arange(500)[::-1]):
        assert index._distance(part, weights).tolist() == whole[part].tolist()


@pytest.mark.parametrize(
    ("bias", "noise", "first", "then"), [(0.0, 0.05, 1000, 1000), (-0.45, 0.002, 21_000, 2000)]
)
def test_few_rows_are_looked_at(bias, noise, first, then):
    """Where many are worth about as much, by their noise; else by their worth, once everything was scored."""
    rows = generator(0).standard_normal((20_000, 4)).astype(np.float32) / 2
    weights = np.array([0.2, -0.1, 0.1, 0.0, bias], dtype=np.float32)
    index, looked_at = Wide(rows), []
    for step in range(4):
        index.choose(weights, WORTH, Noise(20_000, noise, generator(step)), 16, np.empty(0, int))
        looked_at.append(index.looked_at)
        weights[0] += np.float32(0.005)
    assert looked_at[0] < first and max(looked_at[1:]) < then


def test_batches_follow_the_same_law_as_those_of_independent_noise(monkeypatch):
    monkeypatch.undo()
    rng = generator(1)
    rows = rng.standard_normal((4000, 3)).astype(np.float32)
    weights = np.array([0.1, 0.05, -0.02, 0.1], dtype=np.float32)
    predicted = np.clip(rows @ weights[:3] + 0.6, 0, 1)
    index = Wide(rows)
    means: list[list[float]] = [[], []]
    for step in range(400):
        batch = index.choose(weights, WORTH, Noise(4000, 0.05, generator(7, step)), 8, np.empty(0, int))
        utility = 0.05 * generator(8, step).gumbel(size=4000) + WORTH(np.abs(predicted - 0.5))
        for store, chosen in zip(means, (batch, np.argsort(-utility)[:8]), strict=True):
            store.append(float(predicted[chosen].mean()))
    mine, plain = map(np.array, means)
    assert abs(mine.mean() - plain.mean()) < 3 * np.sqrt((mine.var() + plain.var()) / 400)
    assert 0.85 < mine.std() / plain.std() < 1.15


def test_it_chooses_so_at_its_real_sizes(monkeypatch):
    monkeypatch.undo()
    rng = generator(5)
    rows = rng.standard_normal((300_001, 4)).astype(np.float32) / 2
    index, weights = Wide(rows), np.zeros(5, dtype=np.float32)
    for step, move in enumerate((0.0, 0.3, 0.01, 0.0)):
        weights[:4] += np.float32(move) * rng.standard_normal(4).astype(np.float32)
        weights[4] = -0.4 * (step > 0)  # few lie near the target
        noise, waiting = Noise(300_001, 0.05, generator(6, step)), np.arange(0, 300_001, 3)
        expected = scan(rows, weights, WORTH, noise, 64, waiting)
        assert index.choose(weights, WORTH, noise, 64, waiting).tolist() == expected.tolist()
    assert index.looked_at < 100_000
