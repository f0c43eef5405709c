"""The choice from a large pool: the best of the step's candidates, from a look at few rows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from saerl_fast.plan import wide
from saerl_fast.plan.choice import Prior, Quota, capped
from saerl_fast.plan.wide import Candidates

NONE = np.empty(0, dtype=np.int64)
WORTH = Prior(8.0, 8)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in (("MOST", 256), ("PART", 32), ("SHORT", 64), ("BLOCK", 50)):
        monkeypatch.setattr(wide, name, value)


def generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def plainly(pool, weights, worth, scale, size, waiting, quota, rng):
    """The rule, with every candidate looked at: all drawn rows, the shortlist and those with rollouts."""
    drawn = wide.draw(len(pool.rows), max(wide.MOST, 16 * size), rng)
    first = np.union1d(pool.short, pool.known)
    later = dict(zip(first, drawn.least[-1] + rng.exponential(size=len(first)), strict=True))
    later |= dict(zip(drawn.rows, drawn.least, strict=True))
    rows = np.array(sorted(later.keys() - set(waiting.tolist())))
    value = worth(wide._distance(pool.rows, rows, weights))
    own = dict(zip(pool.known, pool.worth, strict=True))
    value = np.array([own.get(row, usual) for row, usual in zip(rows, value, strict=True)])
    value += -scale * np.log([later[row] for row in rows])
    order = rows[np.lexsort((rows, -value))]
    kept = capped(order, quota)
    return np.concatenate([order[kept], order[~kept]])[:size]


@pytest.mark.parametrize("seed", range(12))
def test_it_chooses_the_best_of_its_candidates(seed):
    """While weights move a little or much, rows are rewritten, prompts wait, some are known, groups full."""
    rng = generator(99, seed)
    n_rows, width, size = int(rng.integers(150, 3000)), int(rng.integers(1, 9)), int(rng.integers(1, 20))
    rows = rng.standard_normal((n_rows, width)).astype(np.float32) / np.float32(width**0.5)
    rows[rng.integers(0, n_rows, n_rows // 3)] = rows[0]  # copies of a prompt
    weights, short = np.zeros(width + 1, dtype=np.float32), NONE
    groups = None if seed % 3 == 0 else rng.integers(0, 1 + seed, n_rows).astype(np.int32)
    for step in range(20):
        worth = Prior(float(rng.choice([0.5, 8.0, 128.0])), int(rng.choice([2, 8, 64])))
        scale = float(rng.choice([0.0, 0.02, 0.05, 1.0]))
        waiting = np.sort(rng.choice(n_rows, n_rows // 3, replace=False)) if step % 3 else NONE
        known = np.sort(rng.choice(n_rows, 40, replace=False)) if step % 2 else NONE
        pool = Candidates(rows, short, 40, known, rng.random(len(known)))
        most = int(rng.integers(1, 4))
        quota = None if groups is None else Quota(groups, most)
        asked = pool, weights, worth, scale, size, waiting, quota
        expected = plainly(*asked, generator(seed, step))
        found, short = wide.choose(*asked, generator(seed, step))
        assert found.tolist() == expected.tolist() and len(set(found.tolist())) == size
        assert len(short) <= 40 and (np.diff(short) > 0).all()
        weights += (rng.standard_normal(width + 1) * rng.choice([0, 1e-3, 0.05, 2.0])).astype(np.float32)
        rows[rng.integers(0, n_rows, 6)] = rng.standard_normal((6, width)) * rng.choice([0.1, 5.0])


def looked_at(monkeypatch) -> list[int]:
    found, look = [], wide._distance

    def counting(rows, at, *rest):
        found.append(len(at))
        return look(rows, at, *rest)

    monkeypatch.setattr(wide, "_distance", counting)
    return found


def step_of(rows, weights, scale, size, rng, short=NONE, known=NONE, room=64):
    pool = Candidates(rows, short, room, known, np.ones(len(known)))
    return wide.choose(pool, np.float32(weights), WORTH, scale, size, NONE, None, rng)


def test_where_many_rows_are_worth_as_much_the_batch_is_that_of_all_rows(monkeypatch):
    """The noise of rows that were not drawn is less than that of those drawn, so none of them is better."""
    counts, rows = looked_at(monkeypatch), np.zeros((5000, 2), dtype=np.float32)
    found, _ = step_of(rows, [0, 0, 0.25], 0.05, 16, generator(1))
    assert found.tolist() == wide.draw(5000, 256, generator(1)).rows[:16].tolist()
    assert sum(counts) < 256
    assert step_of(rows, [0, 0, 0], 0.05, 0, generator(1), short=np.arange(3))[0].tolist() == []


@pytest.mark.parametrize("scale", [0.0, 0.05])
def test_no_step_looks_at_more_than_its_candidates(monkeypatch, scale):
    """Not even when no row is worth much, or the weights have jumped."""
    counts, rng, known = looked_at(monkeypatch), generator(2), np.arange(7)
    rows, short = rng.standard_normal((50_000, 4)).astype(np.float32), NONE
    for step in range(6):
        weights = rng.standard_normal(5) * (step % 3)
        _, short = step_of(rows, weights, scale, 8, generator(3, step), short, known)
        assert 0 < sum(counts) <= wide.MOST + 64 + 7
        counts.clear()


def test_the_shortlist_gathers_the_best_of_a_pool_where_they_are_rare():
    rows, short, gaps = generator(4).standard_normal((3000, 1)).astype(np.float32), NONE, []
    for step in range(60):  # a row in a thousand is predicted to be near 1/2
        found, short = step_of(rows, [0.1, 0.3], 0.0, 4, generator(5, step), short)
        gaps.append(np.abs(rows[found, 0] * 0.1 + 0.3).mean())
    best = np.sort(np.abs(rows[:, 0] * 0.1 + 0.3))[:4].mean()
    assert gaps[0] > 2 * best and gaps[-1] == pytest.approx(best)


@pytest.mark.parametrize("n_rows", [300, 5000])
def test_noise_is_that_of_independent_gumbel_variables(n_rows):
    least, third, places = [], [], []
    for step in range(600):
        drawn = wide.draw(n_rows, 256, generator(6, step))
        assert (np.diff(drawn.least) >= 0).all() and drawn.rows[
            drawn.place
        ].tolist() == drawn.ordered.tolist()
        assert (np.diff(drawn.ordered) > 0).all() and (n_rows == 5000 or len(drawn.rows) == n_rows)
        least.append(drawn.least[0] * n_rows)  # the least of n exponential variables is one of rate n
        third.append((drawn.least[2] - drawn.least[1]) * (n_rows - 2))
        places.append(drawn.rows[0] / n_rows)
    assert kstest(least, "expon").pvalue > 0.01 and kstest(third, "expon").pvalue > 0.01
    assert kstest(places, "uniform").pvalue > 0.01


def test_a_row_scores_the_same_to_the_last_bit_in_any_company():
    rng = generator(3)
    rows = rng.standard_normal((500, 97)).astype(np.float32)
    weights = rng.standard_normal(98).astype(np.float32)
    whole = wide._distance(rows, np.arange(500), weights)
    for part in (rng.permutation(500)[:77], np.array([499]), np.arange(500)[::-1]):
        assert wide._distance(rows, part, weights).tolist() == whole[part].tolist()


def test_batches_follow_the_same_law_as_those_of_a_scan(monkeypatch):
    monkeypatch.setattr(wide, "MOST", 512)
    rows = generator(1).standard_normal((4000, 3)).astype(np.float32)
    weights = np.array([0.1, 0.05, -0.02, 0.1], dtype=np.float32)
    predicted, short = np.clip(rows @ weights[:3] + 0.6, 0, 1), NONE
    means: list[list[float]] = [[], []]
    for step in range(400):
        batch, short = step_of(rows, weights, 0.05, 8, generator(7, step), short)
        utility = 0.05 * generator(8, step).gumbel(size=4000) + WORTH(np.abs(predicted - 0.5))
        for store, chosen in zip(means, (batch, np.argsort(-utility)[:8]), strict=True):
            store.append(float(predicted[chosen].mean()))
    mine, plain = map(np.array, means)
    assert abs(mine.mean() - plain.mean()) < 3 * np.sqrt((mine.var() + plain.var()) / 400)
    assert 0.85 < mine.std() / plain.std() < 1.15
