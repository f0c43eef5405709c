import json

import pytest

from saerl_fast.errors import SaerlError
from saerl_fast.records.rows import parse
from saerl_fast.records.runs import RunRecord, eval_modes, load_runs


def record_run(folder, arm, seed=0, rows=()):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"arm": arm, "seed": seed}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def names(root):
    return [(run.arm, run.seed) for run in load_runs(root)]


def test_phases_and_overhead_leave_the_evaluation_out():
    time = {"generate": 2.0, "update": 2.0, "capture": 0.1, "encode": 0.2, "plan": 0.1, "eval": 50.0}
    steps = [{"time": time, "rollouts": 8}, {"time": {"generate": 4.0}, "rollouts": 9}, {}]
    run = RunRecord("a", 0, None, {})
    run.add(
        parse(
            "\n".join(json.dumps({"step": i, "kind": "train", **row}) for i, row in enumerate(steps)).encode()
        )
    )
    phases = run.phase_seconds()
    assert phases["generate"] == 6.0 and phases["encode"] == 0.2 and phases["eval"] == 50.0
    assert run.overhead() == pytest.approx(0.4 / 8.0)
    assert run.rollouts() == 17


def test_no_overhead_without_times():
    assert RunRecord("a", 0, None, {}).overhead() is None


def test_rows_are_told_apart_and_the_mode_is_read(tmp_path):
    rows = [
        {"step": 0, "kind": "eval", "accuracy": 0.25, "mode": "greedy"},
        {"step": 1, "kind": "train"},
        {"step": 1, "kind": "eval", "accuracy": 0.5, "mode": "greedy"},
    ]
    record_run(tmp_path / "a", "a", 7, rows)
    record_run(tmp_path / "b", "b")
    run, empty = load_runs(tmp_path)
    assert (run.seed, run.eval_steps, run.accuracy, len(run.train)) == (7, [0, 1], [0.25, 0.5], 1)
    assert (run.eval_mode, empty.eval_mode) == ("greedy", None)
    assert eval_modes([run, empty]) == ["greedy"]


def test_vanilla_comes_first_without_a_comparison(tmp_path):
    for arm in ("adaptive", "vanilla", "zipped"):
        record_run(tmp_path / arm, arm)
    record_run(tmp_path / "more", "vanilla", 1)
    assert names(tmp_path) == [("vanilla", 0), ("vanilla", 1), ("adaptive", 0), ("zipped", 0)]


def test_a_comparison_sets_the_order_and_leaves_the_rest_out(tmp_path):
    for arm in ("adaptive", "vanilla", "static"):
        for seed in (0, 1):
            record_run(tmp_path / arm / f"seed-{seed}", arm, seed)
    (tmp_path / "compare.json").write_text(json.dumps({"arms": ["static:x=1", "adaptive"], "seeds": [1]}))
    assert names(tmp_path) == [("static", 1), ("adaptive", 1)]


@pytest.mark.parametrize("content", [b'{"arm": "va', b"[1]", b"\xff\xfe\x00"], ids=["torn", "list", "bytes"])
@pytest.mark.parametrize("name", ["a/run.json", "compare.json"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    record_run(tmp_path / "a", "a")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SaerlError) as caught:
        load_runs(tmp_path)
    assert str(tmp_path / name) in str(caught.value) and "damaged" in str(caught.value)


def test_no_runs(tmp_path):
    with pytest.raises(SaerlError, match="metrics.jsonl"):
        load_runs(tmp_path)
    with pytest.raises(SaerlError, match="not a folder"):
        load_runs(tmp_path / "missing")
