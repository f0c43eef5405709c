"""Arms compared in steps, rollouts, tokens and seconds, at equal budgets, and with their one-off costs."""

import json

import pytest

from saerl_fast.config import CompareConfig
from saerl_fast.records.compared import budget_table, costs_table, find_targets, ledger_table, paired_table
from saerl_fast.records.runs import load_runs

TARGETS = {"0.400": 0.4}
SETTINGS = CompareConfig(smooth=1)
SCORES = {
    "difficulty_labels": {"rollouts": 160, "tokens": 320, "seconds": 1.0},
    "seconds": {"features": 2.0, "clusters": 1.0},
}
SAE = {"seconds_capture": 4.0, "seconds": 12.0, "seconds_ce": 1.0}


def record(folder, arm, seed, accuracy, rollouts=16, tokens=40, seconds=0.5):
    folder.mkdir(parents=True)
    config = {"plan": {"schedule": arm, "filter": None}, "train": {"steps": 10 * (len(accuracy) - 1)}}
    (folder / "run.json").write_text(json.dumps({"arm": arm, "seed": seed, "config": config}))
    spent = {"rollouts": rollouts, "tokens": tokens, "groups": 2, "groups_used": 1, "pass_rate": 0.5}
    rows = [
        {"step": s, "kind": "train", **spent, "time": {"update": seconds, "eval": 9.0}}
        for s in range(1, 10 * (len(accuracy) - 1) + 1)
    ]
    rows += [{"step": 10 * i, "kind": "eval", "accuracy": a} for i, a in enumerate(accuracy)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def runs(tmp_path):
    """Vanilla needs 20 steps to .4; mopps 10, each with twice the rollouts and the same tokens."""
    for seed in range(4):
        more = seed / 1000
        record(tmp_path / f"v{seed}", "vanilla", seed, [0.2, 0.3, 0.4 + more, 0.5])
        record(tmp_path / f"m{seed}", "mopps", seed, [0.2, 0.4, 0.5 + more, 0.6], rollouts=32)
    return load_runs(tmp_path)


def test_costs_are_counted_in_their_own_units(runs):
    (row,) = costs_table(runs, TARGETS, SETTINGS)[2]
    assert row[:2] == ["mopps", "0.400"]
    assert [cell.split()[0] for cell in row[2:]] == ["-1%", "+50%", "+50%"]  # rollouts, tokens, seconds


def test_the_same_budget_is_the_least_that_a_run_ended_with(runs):
    name, header, rows, _ = budget_table(runs, SETTINGS)
    assert header[1:] == ["after 30 steps", "after 480 rollouts", "after 1,200 tokens", "mean over 30 steps"]
    vanilla, mopps = rows
    assert vanilla[:4] == ["vanilla", "0.500", "0.500", "0.500"]
    # 480 rollouts are 15 steps of mopps.
    assert mopps[1].startswith("0.600 (+0.100 ±") and mopps[2].startswith("0.451 (-0.049 ±")
    assert budget_table([run for run in runs if run.arm == "vanilla"], SETTINGS)[2] == []


def test_a_run_that_ended_sooner_is_compared_over_the_steps_that_all_took(tmp_path):
    record(tmp_path / "v", "vanilla", 0, [0.2, 0.3, 0.4, 0.5])
    record(tmp_path / "m", "mopps", 0, [0.2, 0.4])
    _, header, rows, _ = budget_table(load_runs(tmp_path), SETTINGS)
    assert header[-1] == "mean over 10 steps"
    assert [row[-1] for row in rows] == ["0.250", "0.300 (+0.050)"]  # .35 over its 30 steps


def test_every_target_has_a_name_of_its_own(runs):
    given = CompareConfig(target_values=[0.4, 0.3300001, 0.3300002])
    assert find_targets(runs, given) == {"0.400": 0.4, "0.3300001": 0.3300001, "0.3300002": 0.3300002}
    assert len(find_targets(runs, CompareConfig(targets=[0.6, 0.60000001, 0.55]))) == 3


def test_the_start_is_no_part_of_where_a_run_ends(tmp_path):
    record(tmp_path / "v", "vanilla", 0, [0.2, 0.3, 0.5])
    found = find_targets(load_runs(tmp_path), CompareConfig(targets=[0.5], smooth=3))
    assert found == {"50% of vanilla's gain": pytest.approx(0.3)}  # half of .4 - .2


def test_verdicts_are_holms_over_the_lines_of_the_table(runs, monkeypatch):
    lines = paired_table(runs, TARGETS, SETTINGS)[2]
    assert lines[0][-1] == "fewer steps" and float(lines[0][-2]) < 0.05
    from saerl_fast.records import compared

    monkeypatch.setattr(compared, "holm", lambda found: [0.2 for _ in found])
    assert paired_table(runs, TARGETS, SETTINGS)[2][0][-2:] == ["0.200", "no claim"]


def test_lines_whose_runs_miss_the_target_count_in_the_correction(runs):
    alone = float(paired_table(runs, TARGETS, SETTINGS)[2][0][-2])
    both = [row[-2:] for row in paired_table(runs, TARGETS | {"0.900": 0.9}, SETTINGS)[2]]
    assert both[1] == ["-", "no claim (4 pairs censored)"]
    assert float(both[0][0]) == pytest.approx(2 * alone, abs=0.001)


def test_a_line_without_any_pair_says_why(tmp_path):
    for seed in range(11):
        record(tmp_path / f"v{seed}", "vanilla", seed, [0.2, 0.3])
        record(tmp_path / f"m{seed}", "mopps", seed, [0.2, 0.25])
    runs = load_runs(tmp_path)
    found = [paired_table(runs, {"x": target}, SETTINGS)[2][0][-1] for target in (0.1, 0.9)]
    assert found == ["no claim (11 pairs at step 0)", "no claim (11 pairs censored)"]


def test_the_ledger_shares_one_off_costs_among_uses(runs):
    rows = {row[0]: row[1:] for row in ledger_table(runs, TARGETS, SETTINGS, SCORES, SAE)[2]}
    assert rows["SAE"] == ["-", "-", "17"] and rows["scoring"] == ["-", "-", "3"]
    assert rows["together, once"] == ["160", "320", "21"]
    gross = [float(cell.strip("%")) for cell in rows["mopps, saved to 0.400, gross"]]
    one = [float(cell.strip("%")) for cell in rows["mopps, net, 1 run"]]
    ten = [float(cell.strip("%")) for cell in rows["mopps, net, 10 runs"]]
    # Vanilla spends some 320 rollouts, 800 tokens and 10 s.
    assert one[0] == pytest.approx(gross[0] - 50, abs=1.1) and ten[0] == pytest.approx(gross[0] - 5, abs=1.1)
    assert one[1] == pytest.approx(gross[1] - 40, abs=1.1) and one[2] < -100 < ten[2]
    assert ledger_table(runs, TARGETS, SETTINGS, {}, {})[2] == []


def test_a_damaged_record_of_costs_counts_as_none(runs):
    rows = ledger_table(runs, TARGETS, SETTINGS, {"seconds": "x", "difficulty_labels": {"tokens": "y"}}, SAE)[
        2
    ]
    assert [row[0] for row in rows][:2] == ["SAE", "together, once"]
