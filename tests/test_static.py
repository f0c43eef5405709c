"""One pass of each static order, every row once, whatever the sizes of the clusters; orders from outside."""

import sys

import numpy as np
import pytest

from saerl_fast.config import SCHEDULES, PlanConfig
from saerl_fast.errors import SaerlError
from saerl_fast.plan import build_plan, load_plan, save_plan
from saerl_fast.plan import static as orders
from saerl_fast.plan.rivals import RIVALS
from saerl_fast.signals.scores import Scores


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


@pytest.mark.parametrize("order", [orders.shuffled, orders.literal, orders.easy_to_hard])
def test_ties_are_broken_by_the_generator(order):
    common = ({"difficulty": np.zeros(40), "cluster": np.zeros(40, dtype=int)}, PlanConfig(mix=0.0, window=4))
    first, again, other = (
        order(np.arange(40), 8, np.random.default_rng(seed), *common) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_inside_a_window_the_easiest_row_may_come_in_any_batch():
    table = {"difficulty": np.arange(32.0), "cluster": np.zeros(32, int)}
    cfg, found = PlanConfig(mix=0.0, window=4), set()
    for seed in range(12):
        batches = orders.easy_to_hard(np.arange(32), 8, np.random.default_rng(seed), table, cfg)
        found.add(int(np.argwhere(batches == 0)[0, 0]))
    assert len(found) > 2


def test_a_cluster_of_one_batch_comes_in_the_middle_of_a_large_one():
    cluster = np.repeat([0, 1], [48, 8])
    table = {"difficulty": np.zeros(56), "cluster": cluster}
    for seed in range(4):
        batches = orders.literal(np.arange(56), 8, np.random.default_rng(seed), table, PlanConfig(mix=0.0))
        assert cluster[batches].mean(axis=1).tolist() == [0, 0, 0, 1, 0, 0, 0]


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


# --- a schedule from outside -----------------------------------------------------------------------

CODE = """
import numpy as np
from saerl_fast.plan.static import Schedule

def reverse(rows, batch_size, rng, table, cfg):
    rows = rows[np.argsort(-table["difficulty"][rows], kind="stable")].reshape(-1, batch_size)
    return rows[:, rng.permutation(batch_size)]

hard_to_easy = Schedule(reverse, needs=("difficulty",), spans=True)
odd = Schedule(reverse, needs=("colour",))
hard_half = Schedule(reverse, keep=lambda difficulty, rows, share: rows[difficulty[rows] > share])
shapes = lambda rows, batch_size, rng, table, cfg: rows
twice = lambda rows, batch_size, rng, table, cfg: np.full((len(rows) // batch_size, batch_size), rows[0])
floats = lambda rows, batch_size, rng, table, cfg: rows.reshape(-1, batch_size) * 1.0
ragged = lambda rows, batch_size, rng, table, cfg: [[1, 2], [3]]
nothing = lambda rows, batch_size, rng, table, cfg: None
lists = lambda rows, batch_size, rng, table, cfg: rows.reshape(-1, batch_size).tolist()
unknown = lambda rows, batch_size, rng, table, cfg: table["colour"]
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "saerl_orders.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("saerl_orders", None)


def scores(n: int = 30) -> Scores:
    difficulty = np.random.default_rng(0).permutation(n).astype(np.float32) / n
    return Scores({"prompt_id": [f"p{i}" for i in range(n)], "saerl_difficulty": difficulty})


def plan_of(name: str, **cfg):
    config = PlanConfig(schedule=f"saerl_orders:{name}", **cfg)
    return build_plan(scores(), config, batch_size=5, total_steps=8, seed=3)


def run(plan, steps: int) -> list[list[str]]:
    return [plan.next_batch() for _ in range(steps)]


def test_the_table_and_the_config_name_the_same_schedules():
    assert (*orders.STATIC, *RIVALS, "adaptive") == SCHEDULES


def test_a_schedule_from_outside_orders_the_prompts(mine):
    plan = plan_of("hard_to_easy")
    assert plan.schedule == "saerl_orders:hard_to_easy"
    hardness = scores().column("saerl_difficulty")
    means = [np.mean([hardness[int(name[1:])] for name in batch]) for batch in run(plan, 6)]
    assert means == sorted(means, reverse=True)
    assert any("the last pass is 2 batches long" in note for note in plan.notes)
    assert run(plan_of("hard_to_easy"), 14) == run(plan_of("hard_to_easy"), 14)
    assert run(plan_of("reverse"), 6) == run(plan_of("hard_to_easy"), 6), "a function alone will do"
    assert sorted(sum(run(plan_of("lists"), 6), [])) == sorted(scores().prompt_ids)


def test_its_file_needs_no_function_and_resumes(mine):
    plan = plan_of("hard_to_easy")
    path = save_plan(plan, mine / "plan.json")
    want = run(plan, 12)
    (mine / "saerl_orders.py").unlink()
    sys.modules.pop("saerl_orders")
    loaded = load_plan(path)
    assert loaded.schedule == plan.schedule and loaded.notes == plan.notes
    assert run(loaded, 8) == want[:8]
    resumed = load_plan(path)
    resumed.load_state_dict(loaded.state_dict() | {"step": 5})
    assert run(resumed, 3) == want[5:8]
    with pytest.raises(SaerlError, match="plan.schedule=saerl_orders:hard_to_easy: importing"):
        resumed.next_batch()  # beyond what the file holds
    (mine / "saerl_orders.py").write_text(CODE)
    again = load_plan(path)
    again.load_state_dict(loaded.state_dict())
    assert run(again, 4) == want[8:12]


def test_it_may_choose_which_rows_take_part(mine):
    plan = plan_of("hard_half", medium_keep=0.5)
    assert len(plan.prompt_ids) == 14 and len(plan.dropped) == 16
    assert all("was not kept" in reason for reason in plan.dropped.values())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("shapes", "returned int64 [30]; return the rows as integers [6, 5]"),
        ("floats", "returned float64 [6, 5]"),
        ("ragged", "returned float64 [0]"),
        ("nothing", "returned NoneType"),
        ("twice", "must return each of the given rows once"),
        ("unknown", "raised KeyError: 'colour' ("),
        ("odd", "needs 'colour', which no score is; use difficulty, cluster, quality, pass_rate"),
        ("gone", "has no function 'gone'"),
    ],
)
def test_a_wrong_schedule_is_one_sentence(mine, name, said):
    with pytest.raises(SaerlError) as caught:
        plan_of(name)
    assert said in str(caught.value) and f"saerl_orders:{name}" in str(caught.value)


def test_a_missing_signal_is_named(mine):
    config, few = PlanConfig(schedule="saerl_orders:hard_to_easy"), Scores({"prompt_id": ["a", "b"]})
    with pytest.raises(SaerlError, match="needs difficulty scores"):
        build_plan(few, config, batch_size=1, total_steps=1, seed=0)
