import json

import pytest

from saerl_fast.config import CompareConfig
from saerl_fast.errors import SaerlError
from saerl_fast.report import find_targets, write_report
from saerl_fast.runs import load_runs

TIMES = {"generate": 0.5, "update": 0.4, "reward": 0.1, "capture": 0.01, "encode": 0.02, "plan": 0.01}


def record_run(folder, arm, seed, accuracy, every=10, time=TIMES):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"arm": arm, "seed": seed}))
    rows = [
        {
            "step": s,
            "kind": "train",
            "pass_rate": 0.5,
            "groups": 8,
            "groups_used": 6,
            "rollouts": 64,
            "time": time,
        }
        for s in range(1, every * (len(accuracy) - 1) + 1)
    ]
    rows += [
        {"step": every * i, "kind": "eval", "accuracy": a, "n": 32, "mode": "prob"}
        for i, a in enumerate(accuracy)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def comparison(tmp_path):
    for seed in range(4):
        record_run(tmp_path / "vanilla" / f"seed-{seed}", "vanilla", seed, [0.2, 0.3, 0.4, 0.4 + seed / 100])
        record_run(tmp_path / "adaptive" / f"seed-{seed}", "adaptive", seed, [0.2, 0.39, 0.42, 0.45])
    settings = {"arms": ["vanilla", "adaptive"], "seeds": [0, 1, 2, 3], "smooth": 1}
    (tmp_path / "compare.json").write_text(json.dumps(settings))
    return tmp_path


def test_report_has_tables_and_pictures(comparison):
    lines = []
    paths = write_report(comparison, echo=lines.append)
    assert {path.name for path in paths} >= {"report.md", "report.html", "learning_curves.png", "phases.png"}
    assert all(path.stat().st_size > 500 for path in paths)
    text = (comparison / "report.md").read_text()
    assert "| adaptive | 4 | 0.200 ± 0.000 | 0.450 ± 0.000 |" in text
    assert "fewer steps" in text
    assert "4.0%" in text  # 0.04 s of this project's phases over 1.0 s of the others
    assert (comparison / "report.html").read_text().count("data:image/png;base64,") == len(paths) - 2
    assert "adaptive" in "\n".join(lines)


def test_first_arm_is_the_baseline_in_the_order_of_the_comparison(comparison):
    assert [run.arm for run in load_runs(comparison)][0] == "vanilla"


def test_targets_are_shares_of_the_first_arms_gain(tmp_path):
    record_run(tmp_path / "vanilla", "vanilla", 0, [0.2, 0.4])
    targets = find_targets(load_runs(tmp_path), CompareConfig(smooth=1, targets=[0.5]))
    assert list(targets.values()) == pytest.approx([0.3])


def test_registered_targets_win(tmp_path):
    record_run(tmp_path / "vanilla", "vanilla", 0, [0.2, 0.4])
    targets = find_targets(load_runs(tmp_path), CompareConfig(target_values=[0.37]))
    assert list(targets.values()) == [0.37]


def test_no_gain_no_target(tmp_path):
    record_run(tmp_path / "vanilla", "vanilla", 0, [0.4, 0.3])
    assert find_targets(load_runs(tmp_path), CompareConfig()) == {}


def test_one_seed_claims_nothing(tmp_path):
    record_run(tmp_path / "vanilla", "vanilla", 0, [0.2, 0.3, 0.4])
    record_run(tmp_path / "zadaptive", "zadaptive", 0, [0.2, 0.4, 0.5])
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "too few pairs" in text and "fewer steps" not in text


def test_single_run_folder(tmp_path):
    record_run(tmp_path / "adaptive", "adaptive", 3, [0.2, 0.3])
    assert (tmp_path / "adaptive" / "report.md") in write_report(tmp_path / "adaptive")


def test_a_torn_last_line_is_no_obstacle(tmp_path):
    record_run(tmp_path / "a", "a", 0, [0.2, 0.3])
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "kind": "tra')
    assert len(load_runs(tmp_path)[0].train) == 10


@pytest.mark.parametrize("make", [lambda p: p / "missing", lambda p: p], ids=["missing", "empty"])
def test_nothing_to_report(tmp_path, make):
    with pytest.raises(SaerlError, match="saerl"):
        write_report(make(tmp_path))


def test_label_rollouts_are_counted_in_steps(comparison):
    record = {"metadata": {"difficulty_labels": {"rollouts": 640.0, "seconds": 2.0}}}
    (comparison / "scores.json").write_text(json.dumps(record))
    write_report(comparison)
    assert (
        "took 640 rollouts before training, as many as 10.0 steps" in (comparison / "report.md").read_text()
    )
