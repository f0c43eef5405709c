"""`saerl export`: what each consumer reads, in plan order, with a card that datasets understands."""

from __future__ import annotations

import numpy as np
import pytest

from saerl_fast.cli import main
from saerl_fast.integrations.verl import compute_score
from saerl_fast.plan import load_plan, save_plan
from saerl_fast.signals.scores import Scores
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
    assert sorted(path.name for path in (tmp_path / "bare").glob("[!.]*")) == ["README.md", "prompts.parquet"]
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
