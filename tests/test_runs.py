import gzip
import json
import os

import pytest

from saerl_fast.errors import SaerlError
from saerl_fast.records import runs as module
from saerl_fast.records.log import JsonlLog, write_logs
from saerl_fast.records.rows import parse
from saerl_fast.records.runs import RunRecord, eval_modes, load_runs, open_run


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


def timed(step, seconds):
    return {"step": step, "kind": "train", "reward": 0.5, "rollouts": 8, "time": {"generate": seconds}}


def runs_and_words(root):
    said = []
    return load_runs(root, said.append), said


@pytest.mark.parametrize("place", ["old/adaptive", "adaptive-copy", "a", "adaptive/copy", "z/y/x"])
@pytest.mark.parametrize("known_by", ["id", "rows"])
@pytest.mark.parametrize("rows", [3, 2, 4])
def test_a_copy_is_no_other_seed(tmp_path, place, known_by, rows):
    made = [timed(step, 0.1 * step) for step in range(1, 5)]
    record_run(tmp_path / "adaptive", "adaptive", 0, made[:3])
    record_run(tmp_path / place, "adaptive", 0, made[:rows])
    record_run(tmp_path / "adaptive.seed-1", "adaptive", 1, [timed(1, 0.7)])
    if known_by == "id":
        for folder in ("adaptive", place):
            config = {"arm": "adaptive" if folder == "adaptive" else "renamed", "seed": 0, "id": "abc"}
            (tmp_path / folder / "run.json").write_text(json.dumps(config))
    runs, said = runs_and_words(tmp_path)
    assert [(run.folder.name, run.seed) for run in runs] == [("adaptive", 0), ("adaptive.seed-1", 1)]
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path / place} is a copy of {tmp_path / 'adaptive'}, not another seed")


def test_different_runs_of_one_arm_and_seed_are_not_both_counted(tmp_path):
    record_run(tmp_path / "adaptive", "adaptive", 0, [timed(1, 0.1)])
    record_run(tmp_path / "old" / "adaptive", "adaptive", 0, [timed(1, 0.2)])
    runs, said = runs_and_words(tmp_path)
    assert [run.folder for run in runs] == [tmp_path / "adaptive"]
    assert "are different runs of arm adaptive, seed 0: only the first is counted" in said[0]
    record_run(tmp_path / "new" / "first", "vanilla", 0, [timed(1, 0.1)])
    record_run(tmp_path / "new" / "second", "vanilla", 0, [timed(1, 0.2)])
    with pytest.raises(
        SaerlError, match="first and .*second are different runs of arm vanilla, seed 0; move"
    ):
        load_runs(tmp_path)


def test_links_are_followed_and_never_counted_twice(tmp_path):
    record_run(tmp_path / "disk" / "moved", "vanilla", 0, [timed(1, 0.1)])
    root = tmp_path / "run"
    record_run(root / "adaptive", "adaptive", 0, [timed(1, 0.2)])
    (root / "vanilla").symlink_to(tmp_path / "disk" / "moved")
    (root / "aa-link").symlink_to(root / "adaptive")
    (root / "adaptive" / "circle").symlink_to(root)
    (root / "broken").symlink_to(root / "nowhere")
    runs, said = runs_and_words(root)
    assert [run.folder for run in runs] == [root / "vanilla", root / "adaptive"] and said == []


def recorded(folder, steps, evals=(), *, every=2, total=8, ended=True):
    rows = [timed(step, 0.1) for step in steps]
    rows += [{"step": step, "kind": "eval", "accuracy": 0.5} for step in evals]
    record_run(folder, "a", 0, sorted(rows, key=lambda row: row["step"]))
    config = {"train": {"steps": total, "eval": {"every": every}}}
    (folder / "run.json").write_text(json.dumps({"arm": "a", "seed": 0, "config": config}))
    if ended:
        (folder / "summary.json").write_text(json.dumps({"steps": total}))


WHOLE = ([1, 2, 3, 4, 5, 6, 7, 8], [0, 2, 4, 6, 8])
HOLES = [
    (WHOLE, {}, []),
    (([1, 2, 3], [0, 2]), {"ended": False}, []),
    (([1, 2], [0]), {"ended": False}, []),  # the evaluation of step 2 is under way
    (([1, 2, 7, 8], WHOLE[1]), {}, ["lacks the training steps 3 to 6"]),
    (([2, 3, 5, 8], WHOLE[1]), {"ended": False}, ["lacks the training steps 1, 4, 6 to 7"]),
    (([1, 2, 3], [0, 2]), {}, ["lacks the training steps 4 to 8"]),
    (([1, 2, 2, 3], [0, 2]), {"ended": False}, ["has 1 training steps more than once"]),
    ((WHOLE[0], [0, 2, 8]), {}, ["lacks the evaluations of the steps 4, 6"]),
    ((WHOLE[0], [0, 2, 4, 6]), {}, ["lacks the evaluations of the steps 8"]),
    ((WHOLE[0], [*WHOLE[1], 4]), {}, ["has evaluations more than once"]),
    ((WHOLE[0], [8]), {"every": 0}, []),
]


@pytest.mark.parametrize(("rows", "options", "says"), HOLES)
def test_what_is_missing_is_said(tmp_path, rows, options, says):
    recorded(tmp_path / "a", *rows, **options)
    _, said = runs_and_words(tmp_path)
    assert said == [f"{tmp_path / 'a'}: metrics.jsonl {line}" for line in says]


@pytest.mark.parametrize("harm", ["cut", "gone", "edited", "logs damaged", "damage"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl", "eval_items.jsonl"])
def test_logs_are_compared_with_what_was_written(tmp_path, name, harm):
    folder = tmp_path / "a"
    recorded(folder, *WHOLE)
    for other in ("rollouts.jsonl", "eval_items.jsonl"):
        (folder / other).write_text('{"step": 1}\n{"step": 2}\n')
    logs = {}
    for file in ("metrics.jsonl", "rollouts.jsonl", "eval_items.jsonl"):
        log = JsonlLog(folder / file, 10**6)
        logs[file] = log.digest()
        log.close()
    write_logs(folder, logs, {"damage": ["one (step 2)"]} if harm == "damage" else {})
    data = (folder / name).read_bytes()
    if harm == "cut":
        (folder / name).write_bytes(data[: data.rfind(b"\n", 0, -1) + 1])
    elif harm == "gone":
        (folder / name).unlink()
    elif harm == "edited":
        (folder / name).write_bytes(data.replace(b'"step": 1', b'"step": 9', 1))
    elif harm == "logs damaged":
        (folder / "logs.json").write_text('{"logs": {"metrics.jsonl": 3}}' if "m" in name else "[")
    _, said = runs_and_words(tmp_path)
    word = {"cut": f"{name} has ", "gone": f"{name} is missing", "edited": f"{name} was changed",
            "logs damaged": "logs.json is damaged", "damage": "one (step 2)"}[harm]  # fmt: skip
    assert said and said[0].startswith(f"{folder}: {word}")


def test_new_rows_are_read_once_and_a_file_that_was_cut_is_read_anew(tmp_path, monkeypatch):
    record_run(tmp_path / "a", "a", 0, [timed(step, step) for step in range(1, 4)])
    seen = []
    real = module.blocks

    def spy(path, start, **options):
        for block, lines in real(path, start, **options):
            seen.append(len(lines))
            yield block, lines

    monkeypatch.setattr(module, "blocks", spy)
    run = open_run(tmp_path / "a")
    assert run.read() and len(run.train) == 3
    file = tmp_path / "a" / "metrics.jsonl"
    assert not run.read()
    extra = json.dumps(timed(4, 4.0)) + "\n"
    with file.open("a") as out:
        out.write(extra[:20])
    assert not run.read()
    with file.open("a") as out:
        out.write(extra[20:])
    assert run.read() and run.train["step"].tolist() == [1, 2, 3, 4] and run.last == timed(4, 4.0)
    assert sum(seen) == file.stat().st_size
    lines = file.read_text().splitlines(True)
    file.write_text(
        "".join(lines[:2]) + json.dumps(timed(3, 33.0)) + "\n" + json.dumps(timed(4, 44.0)) + "\n"
    )
    assert (
        run.read()
        and run.train["step"].tolist() == [1, 2, 3, 4]
        and run.phase_seconds() == {"generate": 80.0}
    )


def test_warnings_are_counted_from_the_rows(tmp_path):
    rows = [timed(step, 0.1) | ({"alarms": ["no signal"]} if step > 2 else {}) for step in range(1, 6)]
    rows[2]["begun"] = ["no signal"]
    record_run(tmp_path / "a", "a", 0, rows)
    assert load_runs(tmp_path)[0].alarms == {"no signal": {"first": 3, "times": 1, "steps": 3}}


@pytest.mark.parametrize(
    ("name", "content"),
    [("compare.json", {"arms": 3}), ("compare.json", {"arms": [3]}), ("a/run.json", {"arm": 3}),
     ("a/run.json", {"seed": "x"}), ("a/run.json", {"arm": ["a"]})],
)  # fmt: skip
def test_records_of_another_shape_are_one_sentence(tmp_path, name, content):
    record_run(tmp_path / "a", "a")
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(SaerlError, match=f"{name} is damaged"):
        load_runs(tmp_path)


def test_a_damaged_last_line_does_not_hide_the_run(tmp_path):
    record_run(tmp_path / "a", "a", rows=[timed(1, 1.0), timed(2, 1.0)])
    with open(tmp_path / "a" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "kind\n{"ste\n')
    runs, said = runs_and_words(tmp_path)
    assert runs[0].last["step"] == 2
    assert any("metrics.jsonl has 2 damaged lines" in line for line in said)


def test_runs_that_the_comparison_does_not_name_are_said(tmp_path):
    for arm in ("vanilla", "renamed"):
        record_run(tmp_path / arm, arm, rows=[timed(1, 1.0)])
    (tmp_path / "compare.json").write_text(json.dumps({"arms": ["vanilla", "adaptive"], "seeds": [0]}))
    runs, said = runs_and_words(tmp_path)
    assert [run.arm for run in runs] == ["vanilla"]
    assert any("renamed (arm renamed, seed 0) is not of the comparison" in line for line in said)


@pytest.mark.parametrize("total", [8, 10**12])
def test_a_row_of_an_absurd_step_costs_no_memory(tmp_path, total):
    recorded(tmp_path / "a", [1, 2, 2**61], total=total)
    (tmp_path / "a" / "summary.json").write_text(json.dumps({"steps": 10**30}))
    run = open_run(tmp_path / "a")
    run.read(whole=True)
    assert any("lacks the training steps" in line for line in run.holes())


def test_a_run_of_the_comparison_that_is_not_there_is_said(tmp_path):
    record_run(tmp_path / "a.seed-0", "a", 0, [{"step": 1, "kind": "train"}])
    (tmp_path / "compare.json").write_text(json.dumps({"arms": ["a", "b:train.lr=1"], "seeds": [0]}))
    said = []
    load_runs(tmp_path, said.append)
    assert said == [f"arm b, seed 0 of the comparison has no run in {tmp_path}"]


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    record_run(tmp_path / "a", "a")
    record_run(tmp_path / "b", "b")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SaerlError, match="cannot read .*b: Permission denied; make it readable"):
        load_runs(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (gzip.compress, "is compressed"),
        (lambda rows: rows.replace(b"\n", b"\r"), "ends its lines with CR alone"),
        (lambda rows: rows.decode().encode("utf-16"), "is no text of UTF-8"),
    ],
)
def test_what_another_program_made_of_the_rows_is_named(tmp_path, change, said):
    record_run(tmp_path / "a", "a", 0, [{"step": step, "kind": "train"} for step in (1, 2)])
    file = tmp_path / "a" / "metrics.jsonl"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(SaerlError, match=f"metrics.jsonl {said}, so another program wrote it"):
        load_runs(tmp_path)


def test_line_ends_of_windows_do_no_harm(tmp_path):
    record_run(tmp_path / "a", "a", 0, [{"step": step, "kind": "train"} for step in (1, 2)])
    file = tmp_path / "a" / "metrics.jsonl"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert len(load_runs(tmp_path)[0].train) == 2
