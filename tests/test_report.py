import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saerl_fast.config import CompareConfig
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import process_mark
from saerl_fast.records.compared import find_targets
from saerl_fast.records.report import write_report
from saerl_fast.records.runs import load_runs

TIMES = {"generate": 0.5, "update": 0.4, "reward": 0.1, "capture": 0.01, "encode": 0.02, "plan": 0.01}


def record_run(folder, arm, seed, accuracy, every=10, time=TIMES, mode="prob"):
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
        {"step": every * i, "kind": "eval", "accuracy": a, "n": 32, "mode": mode}
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


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        ([0.3, 0.2], "vanilla gains nothing, .* raise train.steps"),
        ([0.3], "less than twice, .* train.eval.every"),
    ],
)
def test_why_there_is_no_comparison_is_said(tmp_path, curve, said):
    for arm in ("vanilla", "adaptive"):
        record_run(tmp_path / arm, arm, 0, curve)
    lines = []
    write_report(tmp_path, lines.append)
    assert re.search(said, lines[0]) and re.search(said, (tmp_path / "report.md").read_text())


@pytest.mark.parametrize(
    ("smooth", "said"), [(1, "not averaged"), (2, "not averaged"), (4, "averaged over 3 evaluations")]
)
def test_the_report_says_how_curves_are_smoothed(comparison, smooth, said):
    kept = json.loads((comparison / "compare.json").read_text())
    (comparison / "compare.json").write_text(json.dumps(kept | {"smooth": smooth}))
    write_report(comparison)
    assert f"curves are {said}" in (comparison / "report.md").read_text()


def test_one_seed_claims_nothing(tmp_path):
    record_run(tmp_path / "vanilla", "vanilla", 0, [0.2, 0.3, 0.4])
    record_run(tmp_path / "zadaptive", "zadaptive", 0, [0.2, 0.4, 0.5])
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "too few pairs" in text and "fewer steps" not in text


def test_single_run_folder(tmp_path):
    record_run(tmp_path / "adaptive", "adaptive", 3, [0.2, 0.3])
    assert (tmp_path / "adaptive" / "report.md") in write_report(tmp_path / "adaptive")


def write_scores(run_dir, auc):
    quality = {"auc": auc, "accuracy": 0.987}
    (run_dir / "scores.json").write_text(json.dumps({"metadata": {"quality": quality}}))
    (run_dir / "sae").mkdir(exist_ok=True)
    (run_dir / "sae" / "train.json").write_text(json.dumps({"fvu": 0.123}))
    columns = {"prompt_id": ["a", "b"], "saerl_quality": [0.1, 0.9], "saerl_difficulty": [0.2, 0.8]}
    pq.write_table(pa.table(columns | {"saerl_cluster": [0, 1]}), run_dir / "scores.parquet")


def test_single_run_folder_shows_the_scores_beside_it(tmp_path):
    record_run(tmp_path / "adaptive", "adaptive", 3, [0.2, 0.3])
    write_scores(tmp_path, 0.777)
    paths = write_report(tmp_path / "adaptive")
    text = (tmp_path / "adaptive" / "report.md").read_text()
    assert "0.777" in text and "0.123" in text
    assert tmp_path / "adaptive" / "signals.png" in paths
    write_scores(tmp_path / "adaptive", 0.555)
    write_report(tmp_path / "adaptive")
    text = (tmp_path / "adaptive" / "report.md").read_text()
    assert "0.555" in text and "0.777" not in text


def test_a_picture_that_cannot_be_written_is_no_damage_of_the_scores(tmp_path):
    write_scores(tmp_path, 0.777)
    (tmp_path / "signals.png").mkdir()
    with pytest.raises(SaerlError, match=f"^cannot write {tmp_path}/signals.png"):
        write_report(tmp_path)


def test_a_run_dir_shows_no_scores_of_the_folder_above(tmp_path):
    record_run(tmp_path / "run" / "adaptive", "adaptive", 3, [0.2, 0.3])
    write_scores(tmp_path, 0.777)
    paths = write_report(tmp_path / "run")
    assert "0.777" not in (tmp_path / "run" / "report.md").read_text()
    assert "signals.png" not in {path.name for path in paths}


def test_signals_say_what_is_out_of_fold(tmp_path):
    record_run(tmp_path / "adaptive", "adaptive", 0, [0.2, 0.3])
    write_scores(tmp_path, 0.777)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## Signals\n" in text and "| quality.accuracy | 0.987 |" in text
    assert "Out of fold" in text


def test_probes_stand_beside_what_is_cheaper(tmp_path):
    record_run(tmp_path / "adaptive", "adaptive", 0, [0.2, 0.3])
    write_scores(tmp_path, 0.777)
    difficulty = {"spearman": 0.212, "note": "length alone predicts better", "baselines": {"length": 0.263}}
    quality = {"auc": 0.9, "spearman": None, "baselines": {"length": 0.5, "tfidf": 0.75}}
    record = {"metadata": {"difficulty": difficulty, "quality": quality}}
    (tmp_path / "scores.json").write_text(json.dumps(record))
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| features | difficulty (spearman) | quality (auc) |" in text
    for row in ("| as set | 0.212 | 0.9 |", "| length alone | 0.263 | 0.5 |", "| tfidf alone | - | 0.75 |"):
        assert row in text
    assert "noise. Length alone predicts better" in text and "baselines" not in text
    assert "<td>length alone</td><td>0.263</td>" in (tmp_path / "report.html").read_text()


def test_clusters_have_cards(tmp_path):
    record_run(tmp_path / "adaptive", "adaptive", 0, [0.2, 0.3])
    write_scores(tmp_path, 0.777)
    some = [{"id": "p1", "text": "two <b>triangles</b> " + "x" * 200}]
    card = {"cluster": 3, "size": 12, "difficulty": 0.25, "quality": None, "pass_rate": 0.5, "prompts": some}
    card["features"] = [{"feature": 77, "lift": 0.31, "prompts": some}]
    (tmp_path / "scores.json").write_text(json.dumps({"metadata": {"clusters": {"cards": [card]}}}))
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Clusters</h2>" in page and "<h3>3 <span>12 prompts</span></h3>" in page
    shares = (
        '<dd><meter value="0.25"></meter>0.25</dd>',
        '<dd><meter value="0.50"></meter>0.50</dd>',
        "<dd>-</dd>",
    )
    assert all(share in page for share in shares)
    assert "77 (+0.31): two &lt;b&gt;triangles" in page and "x" * 100 not in page
    (tmp_path / "scores.json").write_text(json.dumps({"metadata": {"clusters": {"cards": [{"size": 1}]}}}))
    with pytest.raises(SaerlError, match="cluster cards in scores.json are damaged .* with `saerl score`"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("mode", "head", "note"),
    [
        ("prob", "P(reference answer) before", "teacher-forced probability"),
        ("sample", "accuracy before", "avg@k"),
        ("greedy", "accuracy before", "greedy completion"),
    ],
)
def test_the_note_says_what_accuracy_is(tmp_path, mode, head, note):
    record_run(tmp_path / "vanilla", "vanilla", 0, [0.2, 0.3], mode=mode)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert f"| {head} |" in text and note in text
    assert ("teacher-forced" in text) == (mode == "prob")


def test_modes_are_not_to_be_compared(tmp_path):
    record_run(tmp_path / "vanilla", "vanilla", 0, [0.2, 0.3], mode="prob")
    record_run(tmp_path / "static", "static", 0, [0.2, 0.3], mode="sample")
    write_report(tmp_path)
    assert "different modes (prob, sample)" in (tmp_path / "report.md").read_text()


def test_a_run_that_never_arrives_rules_out_the_verdict(comparison):
    record_run(comparison / "vanilla" / "seed-4", "vanilla", 4, [0.2, 0.3, 0.4, 0.4])
    record_run(comparison / "adaptive" / "seed-4", "adaptive", 4, [0.2, 0.2, 0.2, 0.2])
    settings = {"arms": ["vanilla", "adaptive"], "seeds": [0, 1, 2, 3, 4], "smooth": 1}
    (comparison / "compare.json").write_text(json.dumps(settings))
    write_report(comparison)
    text = (comparison / "report.md").read_text()
    assert "| 4 (+1) | - | no claim (1 pair censored) |" in text and "fewer steps |" not in text


def test_no_pair_arrives(tmp_path):
    record_run(tmp_path / "vanilla", "vanilla", 0, [0.2, 0.4])
    record_run(tmp_path / "static", "static", 0, [0.2, 0.2])
    record_run(tmp_path / "other", "other", 1, [0.2, 0.4])
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "no claim (1 pair censored)" in text and "no claim (no paired seed)" in text


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


NASTY = "<script>alert(1)</script> | `x` *y* \n# no heading"


@pytest.fixture
def told(tmp_path):
    """A run with all that it writes beside its metrics."""
    from saerl_fast.config import apply_overrides, load_config, to_dict

    config = apply_overrides(load_config(), ["train.lr=0.5", "data.template={prompt} <b>"])
    record_run(tmp_path / "adaptive", "adaptive", 3, [0.2, 0.3], mode="sample")
    made = {
        "saerl": "0.1",
        "torch": "2.13.0",
        "python": "3.11.7",
        "device": "cpu",
        "date": "2026-01-02",
        "git": None,
    }
    record = {"arm": "adaptive", "seed": 3, "config": to_dict(config), "made": made}
    record["resumed"] = [made | {"torch": "2.14.0", "date": "2026-01-03"}]
    (tmp_path / "adaptive" / "run.json").write_text(json.dumps(record))
    rollouts = [
        {"step": s, "prompt_id": "p", "prompt": f"asked {s}", "answer": "7", "rewards": [0.0, 1.0, 0.5],
         "completions": [NASTY, f"best {s}", "middle"]}
        for s in (1, 2)
    ]  # fmt: skip
    items = [
        {"step": step, "prompt_id": name, "score": score, "completion": f"said {name} {step}"}
        for step, scores in ((0, (0.0, 0.5)), (10, (1.0, 0.5)))
        for name, score in zip(("a", "b"), scores, strict=True)
    ]
    prompts = [{"prompt_id": name, "prompt": f"held out {name}", "answer": name} for name in ("a", "b")]
    for name, rows in (("rollouts", rollouts), ("eval_items", items), ("eval_prompts", prompts)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "adaptive" / f"{name}.jsonl").write_text(text)
    return tmp_path / "adaptive"


def test_a_report_opens_with_results_and_names_versions_and_settings(told):
    write_report(told)
    text = (told / "report.md").read_text()
    assert text.index("## Result") < text.index("| train.lr | 0.5 |") < text.index("| torch | 2.13.0 |")
    assert "| torch when resumed | 2.14.0 |" in text and "python when resumed" not in text
    assert "| git |" not in text and "| train.steps |" not in text  # unknown; as it is by default


def test_a_report_shows_what_was_written(told):
    write_report(told)
    text = (told / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| adaptive | 2 | asked 2 | 7 |")]
    assert [row.split(" | ")[-2] for row in rows][0] == "best 2" and len(rows) == 2  # the best and the worst
    assert "asked 1" not in text and "middle" not in text
    held = text[text.index("## Held-out items") :]
    assert "| adaptive | held out a | a | said a 10 | 0 | 1 |" in held
    assert held.index("held out a") < held.index("held out b")  # it changed most


def test_what_a_model_wrote_is_text_in_the_report(told):
    write_report(told)
    for name in ("report.md", "report.html"):
        text = (told / name).read_text()
        assert "<script>" not in text and "&lt;script&gt;" in text and "{prompt} <b>" not in text, name
    row = next(line for line in (told / "report.md").read_text().splitlines() if "script" in line)
    assert "\\|" in row and "\\`x\\`" in row and "<br># no heading" in row


def test_older_records_and_damaged_texts(told):
    for name in ("rollouts.jsonl", "eval_items.jsonl", "eval_prompts.jsonl"):
        (told / name).write_text("")
    (told / "run.json").write_text(json.dumps({"arm": "adaptive", "seed": 3}))
    write_report(told)
    text = (told / "report.md").read_text()
    assert not any(f"## {name}" in text for name in ("Made with", "Settings", "Sample", "Held-out"))


def test_settings_that_arms_do_not_share_stand_side_by_side(tmp_path):
    from saerl_fast.config import apply_overrides, load_config, to_dict

    for arm, loss in (("vanilla", "dapo"), ("other", "gspo")):
        record_run(tmp_path / arm, arm, 0, [0.2, 0.3])
        tree = to_dict(apply_overrides(load_config(), [f"train.loss.kind={loss}", "train.lr=2"]))
        (tmp_path / arm / "run.json").write_text(json.dumps({"arm": arm, "seed": 0, "config": tree}))
    (tmp_path / "compare.json").write_text(json.dumps({"arms": ["vanilla", "other"], "notes": ["mind this"]}))
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| setting | vanilla | other |" in text and "| train.loss.kind | dapo | gspo |" in text
    assert "| train.lr | 2 |  |" in text and "| mind this |" in text


def test_which_model_the_figures_are_of(tmp_path):
    record_run(tmp_path / "a", "a", 1, [0.2, 0.3])
    merged = {"saved_as": "float32", "rounded_to": "bfloat16", "change_kept": 0.25, "accuracy": 0.21}
    (tmp_path / "a" / "summary.json").write_text(json.dumps({"accuracy": 0.3, "merged": merged}))
    lines = []
    write_report(tmp_path / "a", echo=lines.append)
    text = (tmp_path / "a" / "report.md").read_text()
    assert "| a | 1 | 0.3 | 0.21 (bfloat16) | 25% | float32 |" in text
    assert "What the figures are of" in "\n".join(lines)


def test_the_sae_is_told_of_without_its_folder(tmp_path):
    """So that a report can be made again from files that are small enough to keep."""
    record_run(tmp_path / "adaptive", "adaptive", 3, [0.2, 0.3])
    (tmp_path / "scores.json").write_text(json.dumps({"metadata": {"sae": {"fvu": 0.321, "note": None}}}))
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## SAE training" in text and "| fvu | 0.321 |" in text and "None" not in text
    assert "The SAE took" not in text
    figures = {"fvu": 0.3, "seconds": 20.0, "seconds_capture": 5.2, "seconds_ce": None}
    (tmp_path / "scores.json").write_text(json.dumps({"metadata": {"sae": figures}}))
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "The SAE took 25 s, once for all runs: as long as 24.2 of their steps." in text  # of 1.04 s


def test_holes_are_marked_in_the_tables_and_the_curves(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    record_run(tmp_path / "a", "a", 0, [0.2, 0.3, 0.4])
    record_run(tmp_path / "a.seed-1", "a", 1, [0.2, 0.3, 0.4])
    kept = [
        line
        for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines(True)
        if json.loads(line)["step"] not in range(5, 12)
    ]
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(kept))
    tree = {"train": {"steps": 20, "eval": {"every": 10}}}
    (tmp_path / "a" / "run.json").write_text(json.dumps({"arm": "a", "seed": 0, "config": tree}))
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (figures.append(self), path.touch()))
    said = []
    write_report(tmp_path, said.append)
    assert said[0].endswith("a: metrics.jsonl lacks the training steps 5 to 11")
    assert said[1].endswith("a: metrics.jsonl lacks the evaluations of the steps 10")
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "lacks the training steps 5 to 11" in text and "2 (1 with lost rows)" in text, name
    assert np.isnan(figures[0].axes[0].lines[0].get_ydata()).tolist() == [False, True, False]
    write_report(tmp_path / "a")
    rates = figures[-2].axes[0].lines[0].get_ydata()
    assert np.flatnonzero(np.isnan(rates)).tolist() == list(range(4, 11))


def test_warnings_of_training_have_a_table(tmp_path):
    record_run(tmp_path / "a", "a", 0, [0.2, 0.3])
    found = {"first": 3, "times": 1, "steps": 4}
    (tmp_path / "a" / "summary.json").write_text(json.dumps({"steps": 10, "warnings": {"no signal": found}}))
    write_report(tmp_path)
    assert "| a | 0 | no signal | 3 | 1 | 4 |" in (tmp_path / "report.md").read_text()
    assert "<td>no signal</td><td>3</td>" in (tmp_path / "report.html").read_text()


def test_a_run_whose_metrics_are_gone_is_said(tmp_path):
    record_run(tmp_path / "a", "a", 0, [0.2, 0.3])
    record_run(tmp_path / "b", "b", 0, [0.2, 0.3])
    (tmp_path / "b" / "summary.json").write_text(json.dumps({"steps": 10}))
    (tmp_path / "b" / "metrics.jsonl").unlink()
    write_report(tmp_path)
    assert "b: metrics.jsonl lacks the training steps 1 to 10" in (tmp_path / "report.md").read_text()


def test_what_a_killed_report_left_goes_with_the_next_one(comparison):
    machine = process_mark().split("-")[0]
    (comparison / "plots").mkdir(exist_ok=True)
    dead = [comparison / name for name in ("", "plots")]
    dead = [folder / f".report.md.{machine}-{2**22}-5.0123abcd.tmp" for folder in dead]
    alive = comparison / f".report.md.{process_mark()}.0123abcd.tmp"
    for file in (*dead, alive):
        file.touch()
    write_report(comparison)
    assert alive.exists() and not any(file.exists() for file in dead)


def test_the_committed_reports_are_drawn_again_byte_for_byte(tmp_path):
    demo = Path(__file__).parents[1] / "benchmarks" / "results" / "demo"
    shutil.copytree(demo, tmp_path / "demo")
    reports = [path.relative_to(demo) for path in sorted(demo.rglob("report.md"))]
    assert len(reports) == 3  # of each pool and of both
    for name in reports:
        (tmp_path / "demo" / name).unlink()
        write_report((tmp_path / "demo" / name).parent)
        assert (tmp_path / "demo" / name).read_bytes() == (demo / name).read_bytes()
