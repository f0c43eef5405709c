"""Plans: the orders they promise, exact resumption, filters, files."""

import json

import numpy as np
import pytest
import torch

from saerl_fast.config import AdaptiveConfig, PlanConfig, QualityConfig
from saerl_fast.errors import SaerlError
from saerl_fast.plan import SCHEDULES, build_plan
from saerl_fast.plan.rivals import RIVALS
from saerl_fast.plan.static import STATIC
from saerl_fast.signals.scores import Scores
from saerl_kernels import CSR


def make_scores(n: int = 120, clusters: int = 4, seed: int = 0, **drop) -> Scores:
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, clusters, n).astype(np.int32)
    difficulty = rng.random(n).astype(np.float32)
    dense = rng.random((n, 40)) * (rng.random((n, 40)) < 0.3)
    dense[np.arange(n), cluster] = 2
    columns = {
        "prompt_id": [f"p{i}" for i in range(n)],
        "saerl_cluster": cluster,
        "saerl_difficulty": difficulty,
        "saerl_quality": rng.random(n).astype(np.float32),
    }
    columns = {name: column for name, column in columns.items() if name not in drop}
    return Scores(columns, {}, CSR.from_dense(torch.tensor(dense)))


def make_plan(schedule: str, n: int = 120, *, batch_size=10, total_steps=30, seed=3, scores=None, **cfg):
    scores = make_scores(n) if scores is None else scores
    cfg.setdefault("filter", False)
    config = PlanConfig(schedule=schedule, **cfg)
    return build_plan(scores, config, batch_size=batch_size, total_steps=total_steps, seed=seed), scores


def rates_of(ids: list[str]) -> list[float]:
    return [int(name[1:]) % 5 / 4 for name in ids]


def run(plan, steps: int) -> list[list[str]]:
    batches = []
    for _ in range(steps):
        batches.append(plan.next_batch())
        plan.observe(batches[-1], rates_of(batches[-1]))
    return batches


@pytest.mark.parametrize("rate", [2.0, -0.25, np.inf])
def test_what_is_no_pass_rate_is_refused(rate):
    scores = make_scores()
    scores.columns["saerl_pass_rate"] = np.r_[np.full(118, np.nan), 0.5, rate].astype(np.float32)
    with pytest.raises(
        SaerlError, match=f"saerl_pass_rate holds {rate:g}, which is no pass rate; give 0 to 1"
    ):
        make_plan("adaptive", scores=scores)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_seed_same_batches_other_seed_others(schedule):
    first, second = (run(make_plan(schedule)[0], 40) for _ in range(2))
    assert first == second
    assert run(make_plan(schedule, seed=4)[0], 40) != first


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cut", [1, 7, 12, 31])  # inside a pass, at its end, after total_steps
def test_resumes_exactly_even_mid_epoch(schedule, cut):
    plan = make_plan(schedule)[0]
    run(plan, cut)
    state = plan.state_dict()
    for value in state.values():
        assert isinstance(value, (int, float, str, torch.Tensor))
    kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    rest = run(plan, 15)
    metrics = plan.metrics()
    other = make_plan(schedule)[0]
    run(other, 3)  # a state loaded into a used plan replaces all of it
    other.load_state_dict(kept)
    assert run(other, 15) == rest
    assert other.metrics() == metrics


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_state_survives_json(schedule):
    plan = make_plan(schedule)[0]
    run(plan, 5)
    plain = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in plan.state_dict().items()}
    other = make_plan(schedule)[0]
    other.load_state_dict(json.loads(json.dumps(plain)))
    assert run(other, 8) == run(plan, 8)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n", [10, 11, 64])
def test_ids_are_distinct_within_a_batch(schedule, n):
    plan = make_plan(schedule, n, medium_keep=1.0)[0]
    for batch in run(plan, 35):
        assert len(batch) == len(set(batch)) == plan.batch_size


@pytest.mark.parametrize("schedule", ["vanilla", "literal", "global", "medium"])
def test_passes_visit_all_rows_evenly(schedule):
    plan = make_plan(schedule, 57, total_steps=200, medium_keep=1.0)[0]
    counts = dict.fromkeys(plan.prompt_ids, 0)
    for step, batch in enumerate(run(plan, 60)):
        for name in batch:
            counts[name] += 1
        # Visits differ by one between passes, by two while a pass is under way.
        assert max(counts.values()) - min(counts.values()) <= (1 if (step + 1) % 5 == 0 else 2)


def test_every_epoch_has_a_fresh_order():
    batches = run(make_plan("vanilla")[0], 24)
    first, second = sum(batches[:12], []), sum(batches[12:], [])
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n", [1, 3])
def test_small_pools_repeat_and_say_so(schedule, n):
    plan = make_plan(schedule, n, batch_size=4)[0]
    for batch in run(plan, 5):
        assert len(batch) == 4 and set(batch) == set(plan.prompt_ids)
    assert any("repeat" in note for note in plan.notes)


def test_literal_batches_are_coherent_and_easy_to_hard_inside_each_cluster():
    plan, scores = make_plan("literal", 400, total_steps=40, mix=0.0)
    cluster = dict(zip(scores.prompt_ids, scores.columns["saerl_cluster"], strict=True))
    difficulty = dict(zip(scores.prompt_ids, scores.columns["saerl_difficulty"], strict=True))
    coherent, switches, last = 0, 0, None
    hardest = dict.fromkeys(range(4), -1.0)
    for batch in run(plan, 40):
        clusters = {cluster[name] for name in batch}
        if len(clusters) > 1:  # a batch of what the clusters leave over
            continue
        name = clusters.pop()
        levels = [difficulty[i] for i in batch]
        assert min(levels) >= hardest[name]  # the cluster's batches get harder over the pass
        hardest[name] = max(levels)
        coherent += 1
        switches += name != last
        last = name
    assert coherent >= 36 and switches >= 0.9 * coherent


def test_literal_mix_exchanges_that_share_with_the_neighbours():
    pure = make_plan("literal", 400, total_steps=40, mix=0.0)[0]
    mixed = make_plan("literal", 400, total_steps=40, mix=0.4)[0]
    before = [set(pure.next_batch()) for _ in range(40)]
    after = [set(mixed.next_batch()) for _ in range(40)]
    for i in range(1, 39):
        assert len(after[i] - before[i]) == 4
        assert after[i] <= before[i - 1] | before[i] | before[i + 1]


def test_global_is_easy_to_hard_with_balanced_clusters():
    plan, scores = make_plan("global", 400, total_steps=40, mix=0.0, window=4)
    cluster = dict(zip(scores.prompt_ids, scores.columns["saerl_cluster"], strict=True))
    difficulty = dict(zip(scores.prompt_ids, scores.columns["saerl_difficulty"], strict=True))
    batches = run(plan, 40)
    windows = [sum(batches[i : i + 4], []) for i in range(0, 40, 4)]
    for easy, hard in zip(windows, windows[1:], strict=False):
        assert max(difficulty[i] for i in easy) <= min(difficulty[i] for i in hard)
    for start, window in zip(range(0, 40, 4), windows, strict=True):
        for name in range(4):
            share = sum(cluster[i] == name for i in window) / 4
            for batch in batches[start : start + 4]:
                assert abs(sum(cluster[i] == name for i in batch) - share) < 1


def test_global_mix_draws_that_share_from_anywhere():
    plan, scores = make_plan("global", 400, total_steps=40, mix=0.5)
    rank = np.argsort(np.argsort(scores.columns["saerl_difficulty"]))
    place = dict(zip(scores.prompt_ids, rank, strict=True))
    first = [place[i] for batch in run(plan, 8) for i in batch]  # the first fifth of the run
    assert 0.25 < np.mean(np.array(first) >= 120) < 0.45  # half of the rows, seven tenths of the ranks
    assert np.mean(np.array(first) < 80) > 0.45


def test_a_run_shorter_than_a_pass_still_spans_easy_to_hard():
    plan, scores = make_plan("global", 400, total_steps=10, mix=0.0)
    difficulty = dict(zip(scores.prompt_ids, scores.columns["saerl_difficulty"], strict=True))
    means = [np.mean([difficulty[i] for i in batch]) for batch in run(plan, 10)]
    assert means[0] < 0.25 and means[-1] > 0.75
    assert any("sample" in note for note in plan.notes)


@pytest.mark.parametrize("schedule", ["vanilla", "literal", "global", "medium"])
def test_a_run_shorter_than_a_pass_takes_rows_from_everywhere(schedule):
    plan, _ = make_plan(schedule, 400, total_steps=6, medium_keep=1.0)
    rows = [int(name[1:]) for batch in run(plan, 6) for name in batch]
    assert len(set(rows)) == 60 and 120 < np.mean(rows) < 280 and max(rows) > 300


def test_medium_keeps_the_middle_and_says_why_the_rest_is_dropped():
    plan, scores = make_plan("medium", 100, medium_keep=0.6)
    order = np.argsort(scores.columns["saerl_difficulty"])
    assert set(plan.prompt_ids) == {f"p{i}" for i in order[20:80]}
    assert set(plan.dropped) == {f"p{i}" for i in np.r_[order[:20], order[80:]]}
    assert all("difficulty" in reason for reason in plan.dropped.values())


def test_filter_by_threshold_and_by_exact_share():
    scores = make_scores(100)
    quality = np.asarray(scores.columns["saerl_quality"])
    kwargs = {"batch_size": 5, "total_steps": 4, "seed": 0}
    plan = build_plan(scores, PlanConfig(schedule="global"), **kwargs)
    assert set(plan.dropped) == {f"p{i}" for i in np.flatnonzero(quality < 0.5)}
    scores.metadata["quality"] = {"threshold": 0.1, "filter_ratio": None}
    plan = build_plan(scores, PlanConfig(schedule="global"), **kwargs)
    assert set(plan.dropped) == {f"p{i}" for i in np.flatnonzero(quality < 0.1)}
    ratio = QualityConfig(filter_ratio=0.37)
    plan = build_plan(scores, PlanConfig(schedule="global"), quality=ratio, **kwargs)
    assert set(plan.dropped) == {f"p{i}" for i in np.argsort(quality)[:37]}
    odd = QualityConfig(filter_ratio=0.29)  # 0.29 * 100 is a little below 29 in floats
    assert len(build_plan(scores, PlanConfig(schedule="global"), quality=odd, **kwargs).dropped) == 29
    assert not build_plan(scores, PlanConfig(schedule="vanilla"), **kwargs).dropped
    assert build_plan(scores, PlanConfig(schedule="vanilla", filter=True), **kwargs).dropped


def test_copies_are_dropped_by_setting_and_named():
    scores = make_scores(6)
    scores.columns["saerl_copy_of"] = np.array([-1, 0, -1, 2, -1, 2], dtype=np.int32)
    scores.columns["prompt"] = ["a b", "A  b", "c 1", "c 2", "d", "c 3"]
    counts = {}
    for how in ("no", "equal", "near"):
        plan, _ = make_plan("vanilla", batch_size=2, scores=scores, drop_copies=how)
        counts[how] = dict(plan.dropped)
    assert counts["no"] == {} and counts["equal"] == {"p1": "a copy of prompt p0"}
    assert counts["near"] == {f"p{i}": f"a copy of prompt p{of}" for i, of in ((1, 0), (3, 2), (5, 2))}
    scores.columns["saerl_copy_of"][1] = 9
    with pytest.raises(SaerlError, match="saerl_copy_of is damaged; run `saerl score` again"):
        make_plan("vanilla", scores=scores, drop_copies="near")
    with pytest.raises(SaerlError, match="which prompts repeat others; run `saerl score` again"):
        make_plan("vanilla", scores=make_scores(6), drop_copies="near")


def unsure(quality: list[float], difficulty: list[float]) -> Scores:
    """Scores of which some are unknown (NaN)."""
    scores = make_scores(len(quality), clusters=2)
    scores.columns["saerl_quality"] = np.array(quality, dtype=np.float32)
    scores.columns["saerl_difficulty"] = np.array(difficulty, dtype=np.float32)
    return scores


def test_unknown_quality_stays_and_the_threshold_itself_passes():
    scores = unsure([np.nan, 0.1, 0.5, 0.9] * 4, [0.5] * 16)
    kwargs = {"batch_size": 2, "total_steps": 2, "seed": 0}
    for rule in (QualityConfig(filter_ratio=0.25), QualityConfig(threshold=0.5)):
        plan = build_plan(scores, PlanConfig("vanilla", filter=True), quality=rule, **kwargs)
        assert set(plan.dropped) == {"p1", "p5", "p9", "p13"}
        assert np.isnan(plan.table["quality"]).sum() == 4 and np.isfinite(plan.dropped_table["quality"]).all()
    # a share above what is known takes the known ones first
    rule = QualityConfig(filter_ratio=0.8125)
    plan = build_plan(scores, PlanConfig("vanilla", filter=True), quality=rule, **kwargs)
    assert set(plan.prompt_ids) <= {"p0", "p4", "p8", "p12"} and len(plan.prompt_ids) == 3


@pytest.mark.parametrize("rule", [QualityConfig(), QualityConfig(filter_ratio=0.25)])
def test_a_quality_that_is_the_same_everywhere_filters_nothing(rule):
    scores = unsure([0.45] * 16, [0.5] * 16)  # what a probe no better than chance says
    kwargs = {"batch_size": 2, "total_steps": 2, "seed": 0, "quality": rule}
    plan = build_plan(scores, PlanConfig("global"), **kwargs)
    assert not plan.dropped and "no better than chance: nothing was filtered" in " ".join(plan.notes)
    with pytest.raises(SaerlError, match="label more prompts, or set plan.filter=false"):
        build_plan(scores, PlanConfig("global", filter=True), **kwargs)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_unknown_scores_leave_no_trace_in_the_figures(schedule):
    scores = unsure([np.nan, 0.9] * 10, [np.nan, 0.1, 0.2, 0.9] * 5)
    plan, _ = make_plan(schedule, scores=scores, filter=True, batch_size=4, total_steps=8, medium_keep=1.0)
    for batch in run(plan, 8):
        assert len(set(batch)) == 4
        assert np.isfinite(list(plan.metrics().values())).all()
        if "quality" in plan.metrics():
            assert not any(int(name[1:]) % 2 == 0 for name in batch)


def test_unknown_difficulty_goes_to_the_middle():
    scores = unsure([0.9] * 5, [0.0, 0.2, np.nan, 0.9, 1.0])
    plan, _ = make_plan("global", scores=scores, mix=0.0, window=1, batch_size=1, total_steps=5, seed=0)
    assert [plan.next_batch()[0] for _ in range(5)] == ["p0", "p1", "p2", "p3", "p4"]
    kept, _ = make_plan("medium", scores=scores, batch_size=1, medium_keep=0.2)
    assert kept.prompt_ids == ["p2"]


def test_vanilla_needs_nothing_but_ids():
    scores = Scores({"prompt_id": ["a", "b", "c"]})
    plan = build_plan(scores, PlanConfig(schedule="vanilla"), batch_size=2, total_steps=3, seed=0)
    assert set(plan.next_batch()) < {"a", "b", "c"}


@pytest.mark.parametrize(
    "change, cfg, words",
    [
        ({}, {"schedule": "global", "quality": QualityConfig(threshold=1.0)}, "quality.threshold=1"),
        ({}, {"schedule": "medium", "quality": QualityConfig(filter_ratio=0.99)}, "quality.filter_ratio"),
        ({"saerl_difficulty": 1}, {"schedule": "global"}, "needs difficulty scores"),
        ({"saerl_cluster": 1}, {"schedule": "literal"}, "needs clusters"),
        ({"saerl_quality": 1}, {"schedule": "vanilla", "filter": True}, "plan.filter=false"),
        ({"features": 1}, {"schedule": "adaptive"}, "needs the prompts' SAE features"),
        ({}, {"schedule": "vanilla", "batch_size": 0}, "batch_size"),
        ({}, {"schedule": "vanilla", "seed": -1}, "seed must not be negative"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(change, cfg, words):
    scores = make_scores(20, **change)
    if "features" in change:
        scores.features = None
    extra = {k: cfg.pop(k) for k in ("quality", "batch_size", "seed") if k in cfg}
    kwargs = {"batch_size": 4, "total_steps": 3, "seed": 0, **extra}
    with pytest.raises(SaerlError, match=words) as err:
        build_plan(scores, PlanConfig(**cfg), **kwargs)
    assert "\n" not in str(err.value)


def test_every_schedule_of_the_config_has_a_plan():
    assert set(SCHEDULES) == {*STATIC, *RIVALS, "adaptive"}


def test_empty_pool_and_missing_quality_note():
    with pytest.raises(SaerlError, match="no prompts"):
        build_plan(Scores({"prompt_id": []}), PlanConfig("vanilla"), batch_size=1, total_steps=1, seed=0)
    scores = make_scores(20, saerl_quality=1)
    plan = build_plan(scores, PlanConfig("global"), batch_size=4, total_steps=3, seed=0)
    assert any("no quality scores" in note for note in plan.notes) and not plan.dropped


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "ids, rates, words",
    [
        (["p1", "nobody"], [0, 1], "'nobody'"),
        (["p1"], [0, 1], "one pass rate"),
        (["p1"], [1.5], "1.5"),
    ],
)
def test_observe_refuses_what_it_cannot_use(schedule, ids, rates, words):
    with pytest.raises(SaerlError, match=words):
        make_plan(schedule, medium_keep=1.0)[0].observe(ids, rates)


def test_state_of_another_plan_is_refused():
    state = make_plan("vanilla")[0].state_dict()
    with pytest.raises(SaerlError, match="schedule"):
        make_plan("global")[0].load_state_dict(state)
    with pytest.raises(SaerlError, match="seed"):
        make_plan("vanilla", seed=9)[0].load_state_dict(state)


def test_only_an_adaptive_plan_that_refreshes_wants_features():
    kept = AdaptiveConfig(refresh_features=False)
    assert not any(make_plan(schedule, adaptive=kept)[0].wants_features for schedule in SCHEDULES)
    refresh = AdaptiveConfig(refresh_features=True)
    wanting = [s for s in SCHEDULES if make_plan(s, adaptive=refresh)[0].wants_features]
    assert wanting == ["adaptive"]


@pytest.mark.parametrize("kinds", [["hidden"], ["sae", "tfidf", "hidden"], ["random"], ["length"]])
def test_any_kind_of_features_makes_an_adaptive_order(kinds, tmp_path):
    from saerl_fast.plan import load_plan, save_plan

    scores = make_scores()
    scores.columns["prompt"] = [f"take {i} times {i % 7}" + "." * (i % 5) for i in range(120)]
    scores.kept = {"hidden": np.random.default_rng(5).normal(size=(120, 6)).astype(np.float32) + 40}
    plan, _ = make_plan("adaptive", scores=scores, adaptive=AdaptiveConfig(svd=8, features=kinds))
    rows = plan.embedding.rows
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-4)
    assert np.square(rows).sum(1).mean() == pytest.approx(1, abs=1e-3) and rows.shape[1] <= 8
    assert not plan.wants_features and any("is refreshed" in note for note in plan.notes)
    again = load_plan(save_plan(plan, tmp_path / "plan.json"))
    assert run(plan, 4) == run(again, 4)


def test_without_features_every_prediction_is_one_and_the_rule_is_the_same():
    plan, _ = make_plan("adaptive", adaptive=AdaptiveConfig(features=["none"]))
    before = run(plan, 6)
    assert not plan.embedding.rows.any() and not any("train the SAE" in note for note in plan.notes)
    assert np.ptp(plan.predicted()) == 0 and abs(plan.predicted()[0] - 0.5) < 0.2
    seen = [int(name[1:]) for batch in before for name in batch]
    fresh = next(row for row in range(120) if row not in seen)
    both = np.array([seen[0], fresh])
    one, other = plan.rule.worth(both, plan._with_bias(both), plan.step)
    assert one != other  # a prompt's own rollouts tell it from the others


def test_features_that_the_scores_do_not_keep_are_named():
    with pytest.raises(SaerlError, match="plan.adaptive.features names scalars.*score.features"):
        make_plan("adaptive", adaptive=AdaptiveConfig(features=["scalars"]))
