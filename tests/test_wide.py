"""The choice from a large pool: the best of the step's candidates, from a look at few rows."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from saerl_fast.plan import wide

NONE = np.empty(0, dtype=np.int64)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in (("MOST", 256), ("PART", 32), ("SHORT", 64), ("BLOCK", 50)):
        monkeypatch.setattr(wide, name, value)


def generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def plainly(rows, weights, target, scale, size, waiting, short, seed):
    """The rule, with every candidate looked at: all drawn rows and the whole shortlist."""
    rng = generator(*seed)
    drawn, later, _ = wide.draw(len(rows), max(wide.MOST, 16 * size), rng)
    rest = np.setdiff1d(short, drawn)
    noise = -scale * np.log(np.concatenate([later, later[-1] + rng.exponential(size=len(rest))]))
    candidates = np.concatenate([drawn, rest])
    utility = noise - wide._distance(rows, candidates, weights, target)
    utility[np.isin(candidates, waiting)] = -np.inf
    return candidates[np.lexsort((candidates, -utility))[:size]]


@pytest.mark.parametrize("seed", range(10))
def test_it_chooses_the_best_of_its_candidates(seed):
    """While weights move a little or much, rows are rewritten, prompts wait and targets lie anywhere."""
    rng = generator(99, seed)
    n_rows, width, size = int(rng.integers(150, 3000)), int(rng.integers(1, 9)), int(rng.integers(1, 20))
    rows = rng.standard_normal((n_rows, width)).astype(np.float32) / np.float32(width**0.5)
    rows[rng.integers(0, n_rows, n_rows // 3)] = rows[0]  # copies of a prompt
    weights, short = np.zeros(width + 1, dtype=np.float32), NONE
    for step in range(25):
        target, scale = float(rng.choice([0.0, 0.4, 0.75, 1.0])), float(rng.choice([0.0, 0.02, 0.05, 1.0]))
        waiting = np.sort(rng.choice(n_rows, n_rows // 3, replace=False)) if step % 3 else NONE
        asked = rows, weights, target, scale, size, waiting, short
        expected = plainly(*asked, (seed, step))
        found, short = wide.choose(*asked, 40, generator(seed, step))
        assert found.tolist() == expected.tolist() and len(set(found.tolist())) == size
        assert len(short) <= 40 and (np.diff(short) > 0).all()
        weights += (rng.standard_normal(width + 1) * rng.choice([0, 1e-3, 0.05, 2.0])).astype(np.float32)
        rows[rng.integers(0, n_rows, 6)] = rng.standard_normal((6, width)) * rng.choice([0.1, 5.0])


def looked_at(monkeypatch) -> list[int]:
    found, look = [], wide._distance
    monkeypatch.setattr(
        wide, "_distance", lambda rows, at, *rest: found.append(len(at)) or look(rows, at, *rest)
    )
    return found


def test_where_many_rows_are_near_the_batch_is_that_of_all_rows(monkeypatch):
    """The noise of rows that were not drawn is less than that of those drawn, so none of them is better."""
    counts = looked_at(monkeypatch)
    rows = np.zeros((5000, 2), dtype=np.float32)
    found, _ = wide.choose(
        rows, np.array([0, 0, 0.25], dtype=np.float32), 0.75, 0.05, 16, NONE, NONE, 64, generator(1)
    )
    assert found.tolist() == wide.draw(5000, 256, generator(1))[0][:16].tolist()
    assert sum(counts) == wide.PART


@pytest.mark.parametrize("scale", [0.0, 0.05])
def test_no_step_looks_at_more_than_its_candidates(monkeypatch, scale):
    """Not even when no row lies near, or the weights have jumped."""
    counts, rng = looked_at(monkeypatch), generator(2)
    rows, short = rng.standard_normal((50_000, 4)).astype(np.float32), NONE
    for step in range(6):
        weights = (rng.standard_normal(5) * (step % 3)).astype(np.float32)
        _, short = wide.choose(rows, weights, 0.9, scale, 8, NONE, short, 64, generator(3, step))
        assert 0 < sum(counts) <= wide.MOST + 64
        counts.clear()


def test_the_shortlist_gathers_the_nearest_of_a_pool_where_they_are_rare():
    rng = generator(4)
    rows = rng.standard_normal((3000, 1)).astype(np.float32)
    weights = np.array([0.1, 0.0], dtype=np.float32)  # within 0.8 of the target, a row in a thousand is near
    short, gaps = NONE, []
    for step in range(60):
        found, short = wide.choose(rows, weights, 0.8, 0.0, 4, NONE, short, 64, generator(5, step))
        gaps.append(np.abs(rows[found, 0] * 0.1 - 0.3).mean())
    best = np.sort(np.abs(rows[:, 0] * 0.1 - 0.3))[:4].mean()
    assert gaps[0] > 2 * best and gaps[-1] == pytest.approx(best)


@pytest.mark.parametrize("n_rows", [300, 5000])
def test_noise_is_that_of_independent_gumbel_variables(n_rows):
    greatest, third, places = [], [], []
    for step in range(600):
        drawn, later, ordered = wide.draw(n_rows, 256, generator(6, step))
        assert (np.diff(later) >= 0).all() and np.array_equal(np.sort(drawn), ordered)
        assert len(ordered) == len(np.unique(drawn)) == (n_rows if n_rows == 300 else len(drawn))
        greatest.append(later[0] * n_rows)  # the least of n exponential variables is one of rate n
        third.append((later[2] - later[1]) * (n_rows - 2))
        places.append(drawn[0] / n_rows)
    assert kstest(greatest, "expon").pvalue > 0.01 and kstest(third, "expon").pvalue > 0.01
    assert kstest(places, "uniform").pvalue > 0.01


def test_a_row_scores_the_same_to_the_last_bit_in_any_company():
    rng = generator(3)
    rows = rng.standard_normal((500, 97)).astype(np.float32)
    weights = rng.standard_normal(98).astype(np.float32)
    whole = wide._distance(rows, np.arange(500), weights, 0.4)
    for part in (rng.permutation(500)[:77], np.array([499]), np.arange(500)[::-1]):
        assert wide._distance(rows, part, weights, 0.4).tolist() == whole[part].tolist()


def test_batches_follow_the_same_law_as_those_of_a_scan(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(wide, "MOST", 512)
    rng = generator(1)
    rows = rng.standard_normal((4000, 3)).astype(np.float32)
    weights = np.array([0.1, 0.05, -0.02, 0.1], dtype=np.float32)
    predicted, short = np.clip(rows @ weights[:3] + 0.6, 0, 1), NONE
    means: list[list[float]] = [[], []]
    for step in range(400):
        batch, short = wide.choose(rows, weights, 0.8, 0.05, 8, NONE, short, 64, generator(7, step))
        utility = 0.05 * generator(8, step).gumbel(size=4000) - np.abs(predicted - 0.8)
        for store, chosen in zip(means, (batch, np.argsort(-utility)[:8]), strict=True):
            store.append(float(predicted[chosen].mean()))
    mine, plain = map(np.array, means)
    assert abs(mine.mean() - plain.mean()) < 3 * np.sqrt((mine.var() + plain.var()) / 400)
    assert 0.85 < mine.std() / plain.std() < 1.15
