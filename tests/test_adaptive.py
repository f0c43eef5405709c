"""The adaptive plan: its regressor, its choice of prompts, and a toy learner that it serves better."""

import numpy as np
import pytest
import torch
from scipy.stats import gumbel_r, kstest

from saerl_fast.config import AdaptiveConfig, PlanConfig
from saerl_fast.errors import SaerlError
from saerl_fast.plan import build, build_plan, choice, embedding, load_plan, save_plan, wide
from saerl_fast.plan.adaptive import AdaptivePlan
from saerl_fast.plan.rule import UNIFORM
from saerl_fast.records import packed
from saerl_fast.signals import bank, features
from saerl_fast.signals.scores import Scores
from saerl_kernels import CSR


def make_pool(n: int = 800, seed: int = 0) -> tuple[Scores, np.ndarray]:
    """Prompts whose hidden difficulty (log-odds) shows in which of 80 of their 120 features are active."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(0, 2, n)
    lean = rng.normal(0, 1, 120) * (np.arange(120) < 80)
    on = rng.random((n, 120)) < 1 / (1 + np.exp(2.0 - np.outer(hidden, lean)))
    dense = torch.tensor(on * rng.gamma(4.0, 0.25, (n, 120)), dtype=torch.float32)
    return Scores({"prompt_id": [str(i) for i in range(n)]}, {}, CSR.from_dense(dense)), hidden


def make_plan(scores: Scores, schedule: str = "adaptive", *, steps: int = 80, seed: int = 0, **adaptive):
    cfg = PlanConfig(
        schedule=schedule, filter=False, adaptive=AdaptiveConfig(**{"svd": 32, "cooldown": 5, **adaptive})
    )
    return build_plan(scores, cfg, batch_size=16, total_steps=steps, seed=seed)


def learn(plan, hidden: np.ndarray, seed: int, rollouts: int = 8) -> np.ndarray:
    """Distances of the batches' true pass rates from 1/2, [steps, batch]; the learner improves."""
    rng = np.random.default_rng(seed)
    skill, gaps = -0.5, []
    for _ in range(plan.total_steps):
        ids = plan.next_batch()
        true = 1 / (1 + np.exp(hidden[[int(name) for name in ids]] - skill))
        gaps.append(np.abs(true - 0.5))
        plan.observe(ids, rng.binomial(rollouts, true) / rollouts)
        skill += 0.02 * float((true * (1 - true)).mean()) * 4
    return np.array(gaps)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_batches_move_to_where_groups_carry_a_gradient(seed):
    scores, hidden = make_pool(seed=seed)
    adaptive = learn(make_plan(scores, seed=seed), hidden, seed)
    vanilla = learn(make_plan(scores, "vanilla", seed=seed), hidden, seed)
    late, late_vanilla = adaptive[20:].mean(), vanilla[20:].mean()
    # About 0.13 against 0.29; paired over steps the gain is some 29 standard errors.
    assert late < 0.6 * late_vanilla
    gain = vanilla[20:].mean(axis=1) - adaptive[20:].mean(axis=1)
    assert gain.mean() > 12 * gain.std(ddof=1) / np.sqrt(len(gain))


def test_features_that_say_nothing_bring_nothing_but_a_prompts_own_rollouts_do():
    scores, hidden = make_pool()
    noise = torch.rand(800, 120, generator=torch.Generator().manual_seed(1))
    blind = Scores(scores.columns, {}, CSR.from_dense(noise * (noise > 0.8)))
    vanilla = learn(make_plan(blind, "vanilla"), hidden, 0)[20:].mean()
    assert learn(make_plan(blind, fading=1e-3), hidden, 0)[20:].mean() > 0.85 * vanilla
    plan = make_plan(blind)
    assert learn(plan, hidden, 0)[20:].mean() < 0.75 * vanilla
    assert plan.metrics()["kappa"] <= 2  # nothing is held of such predictions


def test_predictions_are_the_discounted_ridge_regression():
    scores, _ = make_pool(60)
    plan = make_plan(scores, forgetting=0.9, ridge=0.7, svd=8)
    z = np.concatenate([plan.embedding.rows, np.ones((60, 1))], axis=1).astype(np.float64)
    rng = np.random.default_rng(0)
    gram, moment = 0.7 * np.eye(9), np.zeros(9)
    seen = [(rng.integers(0, 60, 5), rng.random(5)) for _ in range(12)]
    for age, (rows, rates) in zip(range(11, -1, -1), seen, strict=True):
        plan.observe([str(i) for i in rows], rates)
        gram += 0.9**age * z[rows].T @ z[rows]
        moment += 0.9**age * z[rows].T @ (rates - 0.5)
    expected = np.clip(z @ np.linalg.solve(gram, moment) + 0.5, 0, 1)
    np.testing.assert_allclose(plan.predicted(), expected, atol=1e-5)


def test_forgetting_follows_a_policy_that_improves():
    scores, _ = make_pool(60)
    errors = {}
    for forgetting in (0.9, 1.0):
        plan = make_plan(scores, forgetting=forgetting)
        for rate in [0.1] * 40 + [0.9] * 20:
            plan.observe(plan.next_batch(), [rate] * 16)
        errors[forgetting] = np.abs(plan.predicted() - 0.9).mean()
    assert errors[0.9] < 0.12 < 0.3 < errors[1.0]


def test_known_pass_rates_help_the_first_batches_unless_told_not_to():
    scores, hidden = make_pool()
    rates = 1 / (1 + np.exp(hidden + 0.5))
    labelled = np.where(np.arange(800) % 3 == 0, rates, np.nan).astype(np.float32)
    warm_scores = Scores({**scores.columns, "saerl_pass_rate": labelled}, {}, scores.features)
    warm = learn(make_plan(warm_scores), hidden, 0)[:5].mean()
    cold = learn(make_plan(warm_scores, use_labels=False), hidden, 0)[:5].mean()
    assert warm < 0.85 * cold
    assert (make_plan(scores).predicted() == 0.5).all()


def test_a_known_pass_rate_of_zero_counts():
    scores, _ = make_pool(60)
    rates = np.full(60, np.nan, dtype=np.float32)
    rates[:20] = 0.0
    plan = make_plan(Scores({**scores.columns, "saerl_pass_rate": rates}, {}, scores.features))
    assert plan.predicted()[:20].max() < 0.25


def test_prompts_wait_out_the_cooldown():
    scores, hidden = make_pool()
    plan = make_plan(scores, cooldown=7)
    assert plan.cooldown == 7
    batches = [set(plan.next_batch()) for _ in range(60)]
    for i, batch in enumerate(batches):
        for earlier in batches[max(0, i - 7) : i]:
            assert not batch & earlier
    repeated = make_plan(scores, cooldown=0, noise=0.0, uniform=0)
    assert repeated.next_batch() == repeated.next_batch()


def test_long_cooldowns_are_shortened_and_said():
    scores, _ = make_pool(100)
    plan = make_plan(scores, cooldown=60)
    assert plan.cooldown == 3 and any("cooldown shortened from 60 to 3" in note for note in plan.notes)


def test_no_cluster_fills_a_batch():
    scores, _ = make_pool()
    clusters = np.where(np.arange(800) < 500, 0, 1 + np.arange(800) % 7)
    scores = Scores({**scores.columns, "saerl_cluster": clusters.tolist()}, {}, scores.features)
    shares = {}
    for quota in (1.5, None):
        batch = make_plan(scores, quota=quota, uniform=0).next_batch()
        shares[quota] = np.bincount(clusters[[int(name) for name in batch]], minlength=8)
    assert shares[1.5].max() == 3 and shares[None][0] > 5


def test_the_control_of_the_quota_keeps_the_clusters_sizes_and_not_their_prompts():
    scores, _ = make_pool()
    clusters = np.where(np.arange(800) < 500, 0, 1 + np.arange(800) % 7)
    scores = Scores({**scores.columns, "saerl_cluster": clusters.tolist()}, {}, scores.features)
    plan, again = (make_plan(scores, uniform=0, shuffle_clusters=True) for _ in range(2))
    other = make_plan(scores, uniform=0, shuffle_clusters=True, seed=1)
    groups = plan._quota.groups
    np.testing.assert_array_equal(np.bincount(groups), np.bincount(clusters))
    assert (groups != clusters).mean() > 0.3 and (groups != other._quota.groups).any()
    batch = [int(name) for name in plan.next_batch()]
    assert np.bincount(groups[batch], minlength=8).max() == 3 < np.bincount(clusters[batch]).max()
    assert again.next_batch() == [str(row) for row in batch]
    again.load_state_dict(plan.state_dict())
    assert again.next_batch() == plan.next_batch()


def test_columns_of_the_pool_can_predict():
    """A column per level of difficulty does as well as it can: rows of one cell share their prediction."""
    scores, hidden = make_pool()
    level = np.digitize(hidden, [-2, -1, 0, 1, 2])
    task = np.arange(800) % 2
    columns = {**scores.columns, "level": level.tolist(), "task": [f"t{t}" for t in task]}
    scores = Scores(columns, {}, scores.features)
    plan = make_plan(scores, features=["columns"], columns=["level", "task"], refresh_features=False)
    blind = make_plan(scores, features=["none"], refresh_features=False)
    cell = level * 2 + task
    assert learn(plan, hidden, 0)[20:].mean() < 0.75 * learn(blind, hidden, 0)[20:].mean()
    found = plan.predicted()
    for one in range(12):
        assert np.ptp(found[cell == one]) < 1e-4
    assert len(np.unique(found.round(4))) > 6


def test_columns_that_are_not_there_or_say_too_much_are_refused(monkeypatch):
    scores, _ = make_pool(60)
    with pytest.raises(SaerlError, match="columns names 'level', which the pool lacks; .*prompt_id"):
        make_plan(scores, features=["columns"], columns=["level"])
    monkeypatch.setattr(bank, "MOST_CELLS", 59)
    with pytest.raises(SaerlError, match="tells 60 kinds of prompts apart, more than 59; name columns with"):
        make_plan(scores, features=["columns"], columns=["prompt_id"])


def test_a_choice_that_is_no_better_gives_way_to_uniform_batches(monkeypatch):
    """A reward by which just the prompts of doubt carry no gradient."""
    scores, hidden = make_pool()
    plan = make_plan(scores)
    for _ in range(40):
        ids = plan.next_batch()
        drawn = [plan._pending[int(name)][1] == UNIFORM for name in ids]
        plan.observe(ids, [0.5 if uniform else 1.0 for uniform in drawn])
    metrics = plan.metrics()
    assert metrics["uniform"] >= 14 and metrics["informative_uniform"] > 0.9 > metrics["informative_chosen"]
    for many in (10_000, 100):
        monkeypatch.setattr(choice, "MANY", many)
        for share in (0, 1):
            assert len(set(make_plan(scores, uniform=share).next_batch())) == 16


def test_late_and_unknown_pass_rates_are_taken_and_only_drawn_ones_are_compared():
    plan = make_plan(make_pool()[0])
    first, second = plan.next_batch(), plan.next_batch()
    plan.observe(second, [0.5] * 16)
    plan.observe(first, [0.5] * 16)
    other = sorted({str(i) for i in range(800)} - {*first, *second})[:5]
    plan.observe(other, [1.0] * 5)
    assert plan.rule.groups[:, 0].sum() == pytest.approx(16 * 0.97**2 + 16 * 0.97)
    assert set(plan.rule.known()) == {int(name) for name in (*first, *second, *other)}


def test_refreshed_features_replace_the_stored_ones_only_on_request():
    scores, _ = make_pool(100)
    swapped = scores.features.select_rows([50])
    for refresh in (False, True):
        plan = make_plan(scores, refresh_features=refresh)
        for _ in range(5):
            plan.observe(["3"], [0.0], swapped)
            plan.observe(["60"], [1.0])
        same = plan.predicted()[3] == pytest.approx(float(plan.predicted()[50]), abs=1e-4)
        assert same == refresh
    with pytest.raises(SaerlError, match="1 feature rows for 2"):
        plan.observe(["3", "4"], [0.0, 1.0], swapped)
    with pytest.raises(SaerlError, match="7 columns"):
        plan.observe(["3"], [0.0], CSR.from_dense(torch.ones(1, 7)))


def test_metrics_describe_the_last_batch():
    scores, _ = make_pool(100)
    plan = make_plan(scores)
    plan.observe(plan.next_batch(), [0.25] * 16)
    metrics = plan.metrics()
    assert metrics["observed"] == 0.25 and metrics["error"] == pytest.approx(0.25)
    assert metrics["predicted"] == 0.5 and metrics["eligible"] == 100.0


def test_a_step_multiplies_the_rows_of_its_batch_alone(monkeypatch):
    """The embedding is made once, and one small system solved a step: what makes a step cheap."""
    plan, rows, solved = make_plan(make_pool(400)[0], svd=48), [], []

    def refuse(*_, **__):
        raise AssertionError("features were embedded during the run")

    for name in ("embed", "svd_reduce", "weighted"):
        monkeypatch.setattr(embedding, name, refuse)
    add, solve = plan.rule.add, np.linalg.solve
    monkeypatch.setattr(plan.rule, "add", lambda z, rates: rows.append(z.shape) or add(z, rates))
    monkeypatch.setattr(np.linalg, "solve", lambda a, b: solved.append(a.shape) or solve(a, b))
    for _ in range(5):
        plan.observe(plan.next_batch(), np.linspace(0, 1, 16))
    assert rows == [(16, 49)] * 5 and solved == [(49, 49)] * 5


def test_exploration_is_drawn_anew_every_step():
    plan = make_plan(make_pool(64)[0], svd=4, cooldown=0, noise=0.1)
    assert len({tuple(sorted(plan.next_batch())) for _ in range(4)}) > 1  # nothing was learnt in between


def test_exploration_is_as_wide_as_its_setting_and_none_at_zero():
    scores, _ = make_pool(200)
    widths = {}
    for noise in (0.0, 0.02, 1.0):
        plan = make_plan(scores, cooldown=0, noise=noise, uniform=0, fading=1e-9)
        for rate, name in ((1.0, "3"), (0.0, "60"), (0.0, "3")):
            plan.observe([name], [rate])
            plan.next_batch()
        value = plan.rule.worth(np.arange(200), plan._z, plan.step)
        chosen = [int(name) for _ in range(6) for name in plan.next_batch()]
        widths[noise] = float(value[chosen].mean())
        if noise == 0:
            assert set(chosen) == set(np.argsort(-value, kind="stable")[:16])
    assert widths[0.0] > widths[0.02] > widths[1.0]


def test_a_state_is_restored_into_a_plan_that_has_moved_on():
    found, _ = make_pool(64)
    sizes = {"svd": 4, "cooldown": 0, "refresh_features": True}
    plan = make_plan(found, **sizes)
    start, before = plan.state_dict(), plan.predicted()
    plan.observe(["3"], [1.0], found.features.select_rows([50]))
    plan.load_state_dict(start)
    plan.observe(["9"], [1.0])
    again = make_plan(found, **sizes)
    again.observe(["9"], [1.0])
    assert (before == 0.5).all() and np.array_equal(plan.predicted(), again.predicted())
    assert "refreshed" not in plan.state_dict()


def test_a_large_pool_is_trained_on_alike_and_resumes_to_the_same_batches(monkeypatch, tmp_path):
    """Through a plan file, with refreshed features, from any point: its index need not be saved."""
    monkeypatch.setattr(packed, "LARGE", 300)
    monkeypatch.setattr(wide, "MOST", 200)
    monkeypatch.setattr(wide, "SHORT", 50)
    found, hidden = make_pool(800)
    plain_gap = learn(make_plan(found, "vanilla"), hidden, 0)[20:].mean()
    plan = make_plan(found, refresh_features=True)
    assert any("800 prompts are more than 300" in note for note in plan.notes)
    assert learn(plan, hidden, 0)[20:].mean() < 0.6 * plain_gap

    plan = make_plan(found, refresh_features=True)
    start = plan.embedding.rows.copy()
    states, batches = [], []
    for step in range(12):
        states.append(plan.state_dict())
        batches.append(plan.next_batch())
        fresh = found.features.select_rows([(int(name) + step) % 800 for name in batches[-1]])
        plan.observe(batches[-1], [int(name) % 5 / 4 for name in batches[-1]], fresh)
    assert len(states[-1]["seen"]) == 5 * 16 == len(set(sum(batches[6:11], [])))
    save_plan(plan, tmp_path / "plan.json")  # its start, though features were refreshed
    for at in (0, 5, 11):
        again = load_plan(tmp_path / "plan.json")
        np.testing.assert_array_equal(again.embedding.rows, start)
        np.testing.assert_array_equal(again.embedding.components, plan.embedding.components)
        assert again.embedding.components.T.flags.c_contiguous  # else every step would copy them
        again.load_state_dict(plan.state_dict())
        again.load_state_dict(states[at])
        for step in range(at, 12):
            assert again.next_batch() == batches[step]
            fresh = found.features.select_rows([(int(name) + step) % 800 for name in batches[step]])
            again.observe(batches[step], [int(name) % 5 / 4 for name in batches[step]], fresh)
        np.testing.assert_array_equal(again.predicted(), plan.predicted())


@pytest.mark.parametrize("name", ["counts", "seen", "pending"])
@pytest.mark.parametrize("row", [-1, 800])
def test_a_state_of_prompts_that_are_not_there_is_refused(name, row):
    plan = make_plan(make_pool(800)[0])
    batch = plan.next_batch()
    plan.observe(batch[:8], [0.5] * 8)
    state = plan.state_dict()
    state[name] = state[name].clone()
    state[name][-1, 0] = row
    with pytest.raises(SaerlError, match=f"holds {name} of prompts that this plan lacks"):
        plan.load_state_dict(state)


@pytest.mark.parametrize("large", [300, 1000])
def test_features_are_held_once(monkeypatch, large):
    monkeypatch.setattr(packed, "LARGE", large)
    plan = make_plan(make_pool(800)[0])
    assert hasattr(plan, "_z") == (large == 1000)
    assert large == 300 or np.shares_memory(plan._z, plan.embedding.rows)


def test_components_of_a_large_pool_are_those_of_a_sample(monkeypatch):
    """Every row lies where ``project`` puts it, and next to nothing of the variance is lost."""
    X = make_pool(900)[0].features
    rows = np.setdiff1d(np.arange(900), np.arange(5, 900, 7))
    whole = embedding.embed(X, rows, AdaptiveConfig(svd=8), seed=0)
    monkeypatch.setattr(embedding, "SAMPLE", 400)
    monkeypatch.setattr(features, "BLOCK", 100)
    sampled = embedding.embed(X, rows, AdaptiveConfig(svd=8), seed=0)
    expected = sampled.project(X.select_rows(torch.from_numpy(rows)))
    np.testing.assert_allclose(sampled.rows, expected, atol=1e-5)
    for found in (whole, sampled):
        assert np.square(found.rows).sum(axis=1).mean() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(found.rows.mean(axis=0), 0, atol=1e-5)
    kept = [np.square(found.rows / found.scale).sum() for found in (whole, sampled)]
    assert 0.9 < kept[1] / kept[0] < 1.01 and np.abs(sampled.idf - whole.idf).max() < 0.5
    assert not make_plan(make_pool(900)[0]).notes[1:]
    monkeypatch.setattr(build, "SAMPLE", 400)
    assert any("of a sample of 400 of 900 prompts" in note for note in make_plan(make_pool(900)[0]).notes)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_plan_whose_prompts_have_the_same_features_says_so(caplog, value):
    ids = [str(i) for i in range(100)]
    same = Scores({"prompt_id": ids}, {}, CSR.from_dense(torch.full((100, 5), value)))
    assert any("all prompts have the same features" in note for note in make_plan(same).notes)
    assert caplog.text.count("the plan cannot tell them apart") == 1


@pytest.mark.parametrize("clusters", [None, 5])
@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_many_prompts_are_chosen_from_alike_whether_all_are_looked_at_or_few(monkeypatch, noise, clusters):
    rng = np.random.default_rng(8)
    rows = (rng.normal(size=(3000, 6)) / 6**0.5).astype(np.float32)
    skill = rng.normal(size=6) * 3
    table = {} if clusters is None else {"cluster": rng.integers(0, clusters, 3000).astype(np.int32)}
    settled = []
    foremost = choice.Noise.foremost

    def made(fully: bool, everywhere: bool = False):
        def look(*args):
            found, utility, others = foremost(*args)
            if not fully:
                settled.append(len(found))
            return found, utility, np.inf if fully else others

        if everywhere:
            monkeypatch.setattr(choice.Prior, "within", lambda *_: np.inf)
        monkeypatch.setattr(choice, "MANY", 100)
        monkeypatch.setattr(choice.Noise, "foremost", look)
        nothing = np.zeros((6, 0), dtype=np.float32)
        cfg = PlanConfig(adaptive=AdaptiveConfig(noise=noise, cooldown=20, uniform=0))
        dense = embedding.Embedding(rows.copy(), nothing[0], nothing, np.zeros(6, dtype=np.float32), 1.0)
        sizes = {"batch_size": 16, "total_steps": 60, "seed": 4, "table": table}
        plan = AdaptivePlan([f"p{i}" for i in range(3000)], cfg, embedding=dense, **sizes)
        drawn, batches = np.random.default_rng(9), []
        for _ in range(60):
            batches.append(plan.next_batch())
            at = [int(name[1:]) for name in batches[-1]]
            plan.observe(batches[-1], drawn.binomial(8, 1 / (1 + np.exp(-(rows[at] @ skill - 1)))) / 8)
        return batches

    assert made(fully=False) == made(fully=True) == made(fully=True, everywhere=True)
    assert len(settled) == 60 and np.median(settled) < 1500


def test_noise_drawn_where_it_matters_is_that_of_all():
    """Of rows, known or not, it has one law, whichever way it is drawn."""
    known, share, drawn = np.arange(50, 150), 0.05, []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        some = choice.Noise.draw(300, share, 0.5, known, rng)
        every = some.of(np.arange(300), rng.random(300))
        assert (every >= some.cut).nonzero()[0].tolist() == some.loud.tolist()
        rows, utility, most = some.foremost(
            lambda rows: np.where((rows >= 50) & (rows < 150), 1, 0.5), 0.5, known[:9]
        )
        worth = np.where((np.arange(300) >= 50) & (np.arange(300) < 150), 1, 0.5)
        np.testing.assert_array_equal(utility, (every + worth)[rows])
        assert np.delete(every + worth, np.concatenate([rows, known[:9]])).max() <= most
        drawn.append(every)
    for rows in (slice(0, 50), slice(50, 150)):
        assert kstest(np.array(drawn)[:, rows].ravel(), gumbel_r(scale=0.5).cdf).pvalue > 0.01


@pytest.mark.parametrize("kappa", [0.5, 8.0, 128.0])
def test_prompts_past_a_distance_are_worth_less(kappa):
    prior, distance = choice.Prior(kappa, 8), np.linspace(0, 0.5, 4001)
    for least in (-np.inf, 0.0, 1e-9, *np.random.default_rng(0).random(50), 1.0, np.inf):
        worth = prior(distance[distance > prior.within(least)])
        assert (worth < least).all()
    assert prior.within(-np.inf) > 0.5 and prior.within(np.inf) == 0


def test_batches_of_most_of_a_large_pool():
    rng = np.random.default_rng(3)
    plan = AdaptivePlan(
        [str(i) for i in range(choice.MANY + 10)],
        PlanConfig(),
        embedding=embedding.Embedding(
            rng.normal(size=(choice.MANY + 10, 3)).astype(np.float32),
            *[np.zeros(3, dtype=np.float32)] * 3,
            1.0,
        ),
        batch_size=6000,
        total_steps=5,
        seed=0,
    )
    first, second = set(plan.next_batch()), set(plan.next_batch())
    assert len(first) == len(second) == 6000 and not first & second


class Counted(np.random.Generator):
    calls = 0

    def integers(self, *args, **kwargs):
        self.calls += 1
        return super().integers(*args, **kwargs)


@pytest.mark.parametrize(
    ("n_rows", "size", "chosen", "waiting"),
    [
        (2000, 1000, 0, 1000),
        (2000, 1, 1999, 0),
        (500, 500, 0, 0),
        (2000, 8, 120, 700),
        (3, 0, 1, 1),
        (1, 1, 0, 0),
    ],
)
def test_uniform_rows_are_those_drawn_one_by_one_in_few_draws(n_rows, size, chosen, waiting):
    """Also where few are left, of which single draws would take thousands."""
    taken = np.random.default_rng(0).permutation(n_rows)[: chosen + waiting]
    chosen, waiting = taken[:chosen], np.sort(taken[chosen:])
    rng, single, rows = Counted(np.random.PCG64(5)), np.random.Generator(np.random.PCG64(5)), []
    while len(rows) < size:
        row = int(single.integers(n_rows))
        rows += [row] if row not in rows and row not in taken else []
    found = choice.uniformly(n_rows, size, chosen, waiting, rng)
    assert found.tolist() == rows and found.dtype == np.int64
    assert rng.calls <= 20
