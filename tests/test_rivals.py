"""Published orders to compare with: each does what its formula says."""

import numpy as np
import pytest
import torch

from saerl_fast.config import PlanConfig
from saerl_fast.errors import SaerlError
from saerl_fast.plan.build import build_plan
from saerl_fast.plan.rivals import EASY, HARD, RIVALS
from saerl_fast.signals.scores import Scores


def make(schedule: str, n: int = 200, batch: int = 8, group: int = 8, seed: int = 1):
    scores = Scores({"prompt_id": [f"p{i}" for i in range(n)]})
    sizes = {"batch_size": batch, "total_steps": 50, "group_size": group}
    return build_plan(scores, PlanConfig(schedule=schedule), seed=seed, **sizes)


def rows(batch: list[str]) -> np.ndarray:
    return np.array([int(name[1:]) for name in batch])


def test_mopps_updates_the_prompts_of_the_batch_alone():
    plan, a, b = make("mopps"), np.ones(200), np.ones(200)
    rng = np.random.default_rng(0)
    for _ in range(6):
        batch = plan.next_batch()
        passed = rng.integers(0, 9, 8)
        for row, s in zip(rows(batch), passed, strict=True):
            a[row] = 0.5 * a[row] + 0.5 * 1 + s
            b[row] = 0.5 * b[row] + 0.5 * 1 + 8 - s
        plan.observe(batch, passed / 8)
    np.testing.assert_allclose(plan.a, a)
    np.testing.assert_allclose(plan.b, b)


def test_bots_lets_every_prompt_fade_to_its_prior():
    plan, a, b = make("bots"), np.ones(200), np.ones(200)
    rng = np.random.default_rng(0)
    for _ in range(6):
        batch = plan.next_batch()
        passed = rng.integers(0, 9, 8)
        s, f = np.zeros(200), np.zeros(200)
        s[rows(batch)], f[rows(batch)] = passed, 8 - passed
        a, b = (1 - 0.1) * a + 0.1 + s, (1 - 0.1) * b + 0.1 + f
        plan.observe(batch, passed / 8)
    np.testing.assert_allclose(plan.a, a)
    np.testing.assert_allclose(plan.b, b)


@pytest.mark.parametrize("schedule", ["mopps", "bots"])
def test_a_batch_is_of_the_draws_nearest_to_one_half(schedule):
    plan = make(schedule)
    plan.a[:], plan.b[:] = 1000.0, 1.0  # nearly certain to pass
    known = np.arange(0, 200, 2)
    plan.a[known], plan.b[known] = 500.0, 500.0
    assert set(rows(plan.next_batch())) <= set(known.tolist())


def test_mopps_chooses_among_candidates_of_passes_over_the_pool():
    plan = make("mopps", n=1000, batch=4)
    offered = [plan._candidates() for _ in range(15)]
    assert all(len(rows) == 64 for rows in offered)
    assert len(np.unique(np.concatenate(offered))) == 960  # one pass: no row twice


def test_greso_skips_by_the_length_of_the_run_without_a_gradient():
    plan = make("greso", n=4000, batch=50)
    plan.without[:2000] = (2, HARD)
    plan.tried[:] = (0.9, 0.5)
    taken = np.concatenate([rows(plan.next_batch()) for _ in range(30)])
    assert (taken < 2000).mean() == pytest.approx(0.25 / 1.25, abs=0.04)  # kept with 0.5 ** 2
    assert len(np.unique(taken)) == len(taken)  # in the same pass


def test_greso_counts_groups_without_a_gradient_and_moves_its_chances():
    plan = make("greso")
    rates = {**dict.fromkeys(["p0", "p1"], 1.0), **dict.fromkeys(["p2", "p3"], 0.0), "p4": 0.5}
    plan.observe(list(rates), list(rates.values()))
    plan.observe(["p2", "p0"], [0.0, 0.25])
    assert plan.without[:6].tolist() == [[0, 0], [1, EASY], [2, HARD], [1, HARD], [0, 0], [0, 0]]
    # Two of five passed and two failed, more than their shares; then none of two, and one of two.
    np.testing.assert_allclose(plan.tried, [0.5 - 0.01 + 0.01, 0.5 - 0.01 - 0.01])


def test_greso_fills_a_batch_when_all_are_skipped():
    plan = make("greso", n=20, batch=8)
    plan.without[:] = (400, HARD)
    batch = plan.next_batch()
    assert len(set(batch)) == 8


@pytest.mark.parametrize("schedule", RIVALS)
def test_a_state_of_another_shape_is_refused(schedule):
    state = make(schedule).state_dict()
    name = RIVALS[schedule].arrays[0]
    with pytest.raises(SaerlError, match="resume"):
        make(schedule).load_state_dict(state | {name: torch.zeros(3)})
    with pytest.raises(SaerlError, match="resume"):
        make(schedule).load_state_dict({key: value for key, value in state.items() if key != name})


def test_they_learn_on_a_pool_whose_pass_rates_stay():
    truth = np.where(np.arange(200) < 40, 0.5, 0.0)
    for schedule in RIVALS:
        plan, rng, found = make(schedule), np.random.default_rng(2), []
        for step in range(150):
            if plan.asks and step > 10:
                plan.know(truth)
            batch = plan.next_batch()
            passed = rng.binomial(8, truth[rows(batch)])
            found.append(((passed > 0) & (passed < 8)).mean())
            plan.observe(batch, passed / 8)
        assert np.mean(found[-30:]) > np.mean(found[:10]) + 0.1


def test_an_oracle_takes_what_most_likely_carries_a_gradient():
    plan = make("oracle")
    assert "an oracle is for measuring" in " ".join(plan.notes)
    rates = np.full(200, 0.999)
    rates[50:74] = np.linspace(0.3, 0.7, 24)
    plan.know(rates)
    taken = np.concatenate([rows(plan.next_batch()) for _ in range(3)])
    assert sorted(taken.tolist()) == list(range(50, 74))  # each once: the cooldown
    assert plan.metrics()["worth"] > 0.9
    twin = make("oracle")
    twin.load_state_dict(plan.state_dict())
    assert [twin.next_batch() for _ in range(3)] == [plan.next_batch() for _ in range(3)]
    for wrong in (rates[:-1], rates + 1, np.full(200, np.nan)):
        with pytest.raises(SaerlError, match="must be told one pass rate"):
            plan.know(wrong)
