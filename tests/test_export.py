"""`saerl export`: what each consumer reads, in plan order, with a card that datasets understands."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from saerl_fast.cli import main
from saerl_fast.errors import SaerlError
from saerl_fast.integrations.export import export
from saerl_fast.integrations.verl import compute_score
from saerl_fast.plan import load_plan, save_plan
from saerl_fast.records import manifest
from saerl_fast.signals.scores import Scores
from tests.faults.hooks import killed_at
from tests.test_integrations import IDS, N, make_plan, make_pool

datasets = pytest.importorskip("datasets")


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """A run folder with scores and, after ``plan(schedule)``, a plan."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "run"
    quality = np.where(np.arange(N) % 5 == 0, np.nan, 0.5).astype(np.float32)
    columns = {"saerl_cluster": np.arange(N, dtype=np.int32) % 3, "saerl_quality": quality}
    about = {"difficulty": {"spearman": 0.4321}, "quality": {"auc": None}}
    Scores(make_pool().columns | columns, about).save(folder)
    return folder, lambda schedule: save_plan(make_plan(schedule), folder / "plan.json")


def order(schedule: str) -> list[str]:
    plan = make_plan(schedule)
    return [name for _ in range(plan.total_steps) for name in plan.next_batch()]


def test_parquet_holds_the_pool_its_scores_and_the_plan(scored, tmp_path):
    run, plan = scored
    assert main(["export", str(run), str(tmp_path / "bare")]) == 0  # a plan may be missing
    names = ["README.md", "manifest.json", "prompts.parquet"]
    assert sorted(path.name for path in (tmp_path / "bare").glob("[!.]*")) == names
    plan("global")
    out = str(tmp_path / "out")
    assert main(["export", str(run), out, "--to", "parquet"]) == 0
    rows = datasets.load_dataset(out, split="train")  # the default of the card
    assert rows["prompt_id"][:] == IDS and rows["saerl_cluster"][:] == [i % 3 for i in range(N)]
    assert rows["saerl_quality"][:6] == [None, 0.5, 0.5, 0.5, 0.5, None]
    planned = datasets.load_dataset(out, "plan", split="train")
    assert planned["prompt_id"][:] == order("global")
    assert planned["saerl_step"][:] == [i // 4 for i in range(24)]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Held-out spearman of the predicted difficulty: 0.432." in card and "auc" not in card
    assert "| saerl_cluster | cluster" in card and "saerl_difficulty" not in card


@pytest.mark.parametrize("schedule", ["literal", "adaptive"])
def test_trl_gets_the_planned_prompts_and_the_plan(scored, tmp_path, schedule):
    run, plan = scored
    plan(schedule)
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--to", "trl"]) == 0
    rows = datasets.load_dataset(str(out), split="train")
    found = load_plan(out / "plan.json")
    assert found.schedule == schedule
    if schedule == "adaptive":
        assert rows["prompt_id"][:] == list(found.prompt_ids) and "saerl_step" not in rows.column_names
        assert "in no order" in (out / "README.md").read_text()
    else:
        assert rows["prompt_id"][:] == order(schedule)
        assert rows["prompt"][0] == make_pool().column("prompt")[IDS.index(rows["prompt_id"][0])]


def test_verl_gets_its_own_schema(scored, tmp_path):
    run, plan = scored
    plan("global")
    out = str(tmp_path / "out")
    assert main(["export", str(run), out, "--to", "verl", "--reward", "numeric"]) == 0
    rows = datasets.load_dataset(out, split="train")
    assert [info["prompt_id"] for info in rows["extra_info"]] == order("global")
    one = rows[0]
    told = (one["reward_model"]["ground_truth"], one["extra_info"])
    assert compute_score(one["data_source"], "it is 7", *told) == 1.0


def test_what_cannot_be_exported_is_one_sentence(scored, tmp_path, capsys):
    run, plan = scored

    def said(*words: str) -> str:
        assert main(["export", *words]) == 2
        return capsys.readouterr().err

    out = str(tmp_path / "out")
    assert "choose one of parquet, trl, verl" in said(str(run), out, "--to", "skyrl")
    assert "plan.json does not exist; make it with `saerl plan`" in said(str(run), out, "--to", "trl")
    assert "make it with `saerl score`" in said(str(tmp_path / "none"), out)
    assert "--to trl takes no reward" in said(str(run), out, "--to", "trl", "--reward", "exact")
    plan("adaptive")
    assert "chooses by pass rates, which a file cannot" in said(str(run), out, "--to", "verl")
    assert not (tmp_path / "out").exists()
    assert "exists and is not an empty folder" in said(str(run), str(run))


@pytest.mark.parametrize("to", ["parquet", "trl", "verl"])
def test_an_export_that_was_killed_is_made_again(scored, tmp_path, to):
    run, plan = scored
    plan("global")
    whole = tmp_path / "whole"
    export(run, whole, to, reward=["exact"])
    wanted = sorted(path.name for path in whole.iterdir())
    for operation in range(1, 60, 2):
        out, child = tmp_path / f"out{operation}", os.fork()
        if not child:
            killed_at(out, operation)()
            export(run, out, to, reward=["exact"])
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        export(run, out, to, reward=["exact"])
        times = [path.stat().st_mtime_ns for path in export(run, out, to, reward=["exact"])]
        assert times == [path.stat().st_mtime_ns for path in export(run, out, to, reward=["exact"])]
        with pytest.raises(SaerlError, match="holds an export of something else"):
            export(run, out, "verl" if to == "trl" else "trl", reward=["exact"])
        assert sorted(path.name for path in out.iterdir() if path.name != ".saerl.lock") == wanted
        assert not manifest.look(out, "export").fault
        if not killed:
            break
    assert operation > 10 and not killed


def test_an_export_beside_other_files_is_refused(scored, tmp_path):
    run, plan = scored
    plan("global")
    out = tmp_path / "out"
    export(run, out, "trl", reward=["exact"])
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SaerlError, match="not an empty folder"):
        export(run, out, "trl", reward=["exact"])
    (out / "notes.txt").unlink()
    plan("medium")  # whose order is another
    with pytest.raises(SaerlError, match="holds an export of something else"):
        export(run, out, "trl", reward=["exact"])


def test_an_export_that_fails_leaves_nothing(scored, tmp_path, monkeypatch):
    run, plan = scored
    plan("global")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saerl_fast.integrations.export._card", full)
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_a_plan_of_other_scores_is_refused(scored, tmp_path, capsys):
    run, plan = scored
    plan("global")
    made = manifest.look(run, "scores").entry["files"]["scores.parquet"]["sha256"]
    for inputs, code in (({"scores.parquet": made}, 0), ({"scores.parquet": "0" * 64}, 2)):
        manifest.record(run, "plan", ["plan.json"], {"inputs": inputs})
        assert main(["export", str(run), str(tmp_path / str(code))]) == code
    assert "was made from other scores than those beside it; make it again with `saerl plan`" in (
        capsys.readouterr().err
    )
    assert main(["export", str(run), str(tmp_path / "named"), "--plan", str(run / "plan.json")]) == 0


def test_scores_that_change_while_they_are_read(scored, tmp_path, monkeypatch, capsys):
    import pyarrow.parquet as pq

    run, _ = scored
    read = pq.read_table

    def late(*args, **options):
        Scores(make_pool().columns, {"other": 1}).save(run)
        return read(*args, **options)

    monkeypatch.setattr(pq, "read_table", late)
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "were made again while they were read" in capsys.readouterr().err
