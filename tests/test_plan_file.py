"""Plan files: what is in them, that they give the same plan back, and that damage is noticed."""

import json

import numpy as np
import pytest
import torch

from saerl_fast.config import AdaptiveConfig, PlanConfig
from saerl_fast.errors import SaerlError, Unreadable
from saerl_fast.plan import SCHEDULES, build_plan, load_plan, save_plan
from saerl_fast.plan import file as module
from saerl_fast.plan.file import _content_hash
from saerl_fast.plan.static import STATIC
from saerl_fast.signals.scores import Scores
from saerl_kernels import CSR


def make_scores(n: int = 60) -> Scores:
    rng = np.random.default_rng(0)
    columns = {
        "prompt_id": [f"p{i}" for i in range(n)],
        "saerl_cluster": rng.integers(0, 3, n).astype(np.int32),
        "saerl_difficulty": np.where(rng.random(n) < 0.9, rng.random(n), np.nan).astype(np.float32),
        "saerl_quality": np.where(rng.random(n) < 0.8, rng.random(n), np.nan).astype(np.float32),
        "saerl_pass_rate": np.where(rng.random(n) < 0.3, rng.random(n), np.nan).astype(np.float32),
    }
    dense = rng.random((n, 30)) * (rng.random((n, 30)) < 0.4)
    return Scores(columns, {}, CSR.from_dense(torch.tensor(dense)))


def make_plan(schedule: str, **adaptive):
    config = PlanConfig(schedule=schedule, filter=True, adaptive=AdaptiveConfig(svd=8, **adaptive))
    return build_plan(make_scores(), config, batch_size=6, total_steps=9, seed=5)


def run(plan, steps: int) -> list[list[str]]:
    batches = []
    for _ in range(steps):
        batches.append(plan.next_batch())
        plan.observe(batches[-1], [int(name[1:]) % 5 / 4 for name in batches[-1]])
    return batches


@pytest.mark.parametrize("most", [module.COLUMNAR, 50])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_loaded_plan_is_the_same_plan(tmp_path, monkeypatch, schedule, most):
    monkeypatch.setattr(module, "COLUMNAR", most)
    plan = make_plan(schedule)
    body = json.loads(save_plan(plan, tmp_path / "plan.json").read_text())
    assert body["version"] == (1 if most > 50 else 2)
    if most == 50:
        assert (body["prompts"], body["dropped"]) == (len(plan.prompt_ids), len(plan.dropped))
        assert body["batches"] == (9 if schedule in STATIC else None)
    loaded = load_plan(tmp_path / "plan.json")
    assert list(loaded.prompt_ids) == plan.prompt_ids and loaded.dropped == plan.dropped
    for found, wanted in ((loaded.table, plan.table), (loaded.dropped_table, plan.dropped_table)):
        assert found.keys() == wanted.keys()
        for name, column in wanted.items():
            np.testing.assert_array_equal(found[name], column)  # unknown ones (NaN) too
    assert np.isnan(loaded.table["quality"]).any()
    assert loaded.notes == plan.notes and loaded.cfg == plan.cfg and loaded.seed == plan.seed
    assert run(loaded, 14) == run(plan, 14)  # goes on alike after total_steps
    again = load_plan(tmp_path / "plan.json")
    again.load_state_dict(plan.state_dict())
    assert run(again, 3) == run(plan, 3)
    assert (tmp_path / "plan.safetensors").exists() == (schedule == "adaptive" or most == 50)


def test_saving_does_not_depend_on_the_place(tmp_path):
    plan = make_plan("global")
    first = save_plan(plan, tmp_path / "a.json").read_text()
    run(plan, 4)
    assert save_plan(plan, tmp_path / "b.json").read_text() == first


def test_the_file_can_be_inspected(tmp_path):
    plan = make_plan("literal")
    body = json.loads(save_plan(plan, tmp_path / "plan.json").read_text())
    assert body["batches"] == run(plan, 9)
    assert body["schedule"] == "literal" and body["config"]["mix"] == plan.cfg.mix
    ids = {record["id"] for record in body["prompts"]} | {record["id"] for record in body["dropped"]}
    assert ids == set(make_scores().prompt_ids)
    assert all(record["reason"].startswith("quality 0.") for record in body["dropped"])
    assert {"cluster", "difficulty", "quality", "pass_rate"} < set(body["prompts"][0])


def test_refreshed_features_survive_the_file_and_the_state(tmp_path):
    scores = make_scores()
    plan = make_plan("adaptive", refresh_features=True)
    save_plan(plan, tmp_path / "plan.json")
    row = {name: i for i, name in enumerate(scores.prompt_ids)}

    def drive(plan, steps):
        batches = []
        for _ in range(steps):
            batch = plan.next_batch()
            fresh = scores.features.select_rows([(row[name] + 7) % 60 for name in batch])
            plan.observe(batch, [0.5] * len(batch), fresh)
            batches.append(batch)
        return batches

    plain = run(make_plan("adaptive"), 6)
    loaded = load_plan(tmp_path / "plan.json")
    assert drive(loaded, 3) == drive(plan, 3)
    resumed = load_plan(tmp_path / "plan.json")
    resumed.load_state_dict(loaded.state_dict())
    rest = drive(plan, 3)
    assert drive(resumed, 3) == rest != plain[3:]
    np.testing.assert_array_equal(resumed.predicted(), plan.predicted())


def damage(text: str, how: str) -> str:
    body = json.loads(text)
    if how == "cut":
        return text[: len(text) // 2]
    if how == "value":
        body["prompts"][0]["difficulty"] = 0.123
    elif how == "order":
        body["batches"] = body["batches"][::-1]
    elif how == "version":
        body["version"] = 99
    elif how == "format":
        body = {"batches": []}
    return json.dumps(body)


def test_columns_of_another_length_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COLUMNAR", 50)
    path = save_plan(make_plan("global"), tmp_path / "plan.json")
    body = json.loads(path.read_text())
    body["prompts"] -= 1
    body["sha256"] = _content_hash(body)
    path.write_text(json.dumps(body))
    with pytest.raises(SaerlError, match="do not hold its"):
        load_plan(path)


@pytest.mark.parametrize(
    "how, words",
    [
        ("cut", "not valid"),
        ("value", "sha256"),
        ("order", "sha256"),
        ("version", "99"),
        ("format", "not a plan"),
    ],
)
def test_damaged_files_are_refused(tmp_path, how, words):
    path = save_plan(make_plan("global"), tmp_path / "plan.json")
    path.write_text(damage(path.read_text(), how))
    with pytest.raises(SaerlError, match=words):
        load_plan(path)


def test_missing_and_damaged_tensors_are_refused(tmp_path):
    with pytest.raises(SaerlError, match="saerl plan"):
        load_plan(tmp_path / "plan.json")
    path = save_plan(make_plan("adaptive"), tmp_path / "plan.json")
    tensors = tmp_path / "plan.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(SaerlError, match="does not match the hash"):
        load_plan(path)
    tensors.unlink()
    with pytest.raises(SaerlError, match="missing"):
        load_plan(path)


@pytest.mark.parametrize(
    "schedule",
    [
        "../../x",
        "",
        "/x",
        "..",
        ".",
        "a/b",
        "a\\b",
        "a\0b",
        "x\n",
        "x" * 300,
        "~",
        None,
        3,
        ["x"],
        "a:..b",
    ],
)
def test_a_schedule_that_is_a_path_is_refused(tmp_path, schedule):
    path = save_plan(make_plan("global"), tmp_path / "plan.json")
    body = json.loads(path.read_text()) | {"schedule": schedule}
    path.write_text(json.dumps(body | {"sha256": _content_hash(body)}))
    with pytest.raises(SaerlError, match="schedule"):
        load_plan(path)


@pytest.mark.parametrize("name", ["../plan.safetensors", "/etc/passwd", "", "a\0b", None, 3])
def test_tensors_are_beside_the_plan(tmp_path, name):
    path = save_plan(make_plan("adaptive"), tmp_path / "plan.json")
    body = json.loads(path.read_text())
    body["tensors"]["file"] = name
    path.write_text(json.dumps(body | {"sha256": _content_hash(body)}))
    with pytest.raises(SaerlError, match="names no file beside it|file is .*, not text"):
        load_plan(path)


def test_tensors_that_cannot_be_read_are_no_reason_to_plan_again(tmp_path, monkeypatch):
    path = save_plan(make_plan("adaptive"), tmp_path / "plan.json")

    def read(file, again):
        raise Unreadable(f"cannot read {file}: too many open files")

    monkeypatch.setattr(module, "read_tensors", read)
    with pytest.raises(SaerlError, match="^cannot read .*plan.safetensors: too many open files$"):
        load_plan(path)


def test_missing_tensors_are_a_whole_sentence_under_a_long_path(tmp_path):
    path = save_plan(make_plan("adaptive"), tmp_path / ("x" * 150) / "plan.json")
    path.with_name(json.loads(path.read_text())["tensors"]["file"]).unlink()
    with pytest.raises(SaerlError) as caught:
        load_plan(path)
    assert str(caught.value).count("make it again") == 1 and str(caught.value).endswith("`saerl plan`")
    assert f"belongs beside {path}" in str(caught.value)
