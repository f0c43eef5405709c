"""The whole job through the command line, in miniature, on the shipped demo model."""

import json
import os
import shlex
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from saerl_fast import cli
from saerl_fast.records.lock import NAME, lock
from saerl_fast.rl.trainer import Run
from tests.test_lock import fork, status

ROOT = Path(__file__).parents[1]
SMALL = """
    threads=1 data.limit=96 data.eval_limit=12 sae.steps=30 sae.d_sae=256 sae.k=8 sae.max_tokens=3000
    difficulty.n_labels=32 difficulty.rollouts=2 diversity.n_clusters=4 diversity.null_rounds=1
    plan.adaptive.svd=8 train.steps=2 train.rollout.prompts_per_step=4 train.rollout.group_size=4
    train.eval.every=1 train.save_every=1 train.warmup.steps=0 compare.arms=vanilla,adaptive compare.seeds=0
    compare.pools= compare.until=false
""".split()  # noqa: SIM905 - read as it would be typed


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def saerl(command, run_dir, *settings):
    head = command.split()
    return cli.main(
        [*head, "--quiet", "--config", "examples/demo.yaml", *SMALL, f"run_dir={run_dir}", *settings]
    )


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A run folder with SAE and scores."""
    folder = tmp_path_factory.mktemp("run") / "demo"
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        assert saerl("sae train", folder) == 0
        assert saerl("score", folder) == 0
    finally:
        os.chdir(here)
    return folder


def copy_of(folder, target):
    import shutil

    shutil.copytree(folder, target)
    return target


def test_the_whole_job(scored, tmp_path, capsys):
    folder = copy_of(scored, tmp_path / "demo")
    assert saerl("plan", folder) == 0
    assert saerl("compare", folder) == 0
    wanted = [
        "scores.parquet",
        "scores.json",
        "features.safetensors",
        "plan.json",
        "report.md",
        "report.html",
    ]
    wanted += ["vanilla/metrics.jsonl", "adaptive/metrics.jsonl", "learning_curves.png", "signals.png"]
    assert [name for name in wanted if not (folder / name).is_file()] == []
    table = pq.read_table(folder / "scores.parquet")
    types = {
        name: str(table.schema.field(name).type) for name in table.column_names if name.startswith("saerl_")
    }
    assert types["saerl_cluster"] == "int32"
    assert types["saerl_difficulty"] == types["saerl_quality"] == "float"
    rows = [json.loads(line) for line in (folder / "adaptive" / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == [1, 2]
    assert {"generate", "capture", "encode", "plan", "reward", "update"} <= set(train[0]["time"])
    assert train[0]["rollouts"] == 16
    assert "adaptive" in capsys.readouterr().out
    assert saerl("compare", folder) == 0  # finished runs are kept, not repeated
    again = [json.loads(line) for line in (folder / "adaptive" / "metrics.jsonl").read_text().splitlines()]
    assert again == rows


def test_train_alone_makes_what_is_missing(tmp_path):
    assert saerl("train", tmp_path / "r", "train.steps=1", "difficulty.n_labels=8") == 0
    for name in ("sae/cfg.json", "labels.json", "scores.parquet", "adaptive/report.md", "adaptive/plan.json"):
        assert (tmp_path / "r" / name).is_file(), name


def test_vanilla_needs_no_sae(tmp_path):
    assert saerl("train", tmp_path / "r", "plan.schedule=vanilla", "train.steps=1") == 0
    assert not (tmp_path / "r" / "sae").exists()
    assert (tmp_path / "r" / "vanilla" / "metrics.jsonl").is_file()


def test_no_steps_leave_the_warm_up(tmp_path):
    settings = ["plan.schedule=vanilla", "train.steps=0", "train.warmup.steps=1"]
    assert saerl("train", tmp_path, *settings) == 0
    rows = [json.loads(line) for line in (tmp_path / "vanilla" / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["warmup", "eval"]


@pytest.mark.parametrize("schedule", ["literal", "global", "medium", "adaptive"])
def test_every_schedule_trains_and_resumes(scored, tmp_path, schedule):
    folder = copy_of(scored, tmp_path / "demo")
    assert saerl("train", folder, f"plan.schedule={schedule}", "train.steps=1") == 0
    before = (folder / schedule / "metrics.jsonl").read_text()
    assert saerl("train", folder, f"plan.schedule={schedule}", "train.steps=1") == 2  # would overwrite
    assert (folder / schedule / "metrics.jsonl").read_text() == before


def test_interrupted_labels_end_the_same(scored, tmp_path, monkeypatch):
    whole = json.loads((scored / "labels.json").read_text())["rates"]
    folder = copy_of(scored, tmp_path / "demo")
    record = json.loads((folder / "labels.json").read_text())
    record["rates"] = dict(list(record["rates"].items())[:8])  # as if stopped after some chunks
    (folder / "labels.json").write_text(json.dumps(record))
    assert saerl("score", folder) == 0
    assert json.loads((folder / "labels.json").read_text())["rates"] == whole


def test_changed_prompts_do_not_meet_old_scores(tmp_path, capsys):
    rows = [json.loads(line) for line in (ROOT / "examples/demo/pool.jsonl").read_text().splitlines()[:40]]
    plain = [{key: row[key] for key in ("prompt", "answer")} for row in rows]
    pool, settings = tmp_path / "pool.jsonl", ["data.id_column=", f"data.train={tmp_path / 'pool.jsonl'}"]
    write_pool(pool, plain)
    assert saerl("train", tmp_path / "r", *settings, "train.steps=1") == 0
    write_pool(pool, plain[::-1])  # same numbers for other prompts
    assert saerl("train", tmp_path / "r", *settings, "train.steps=1", "--overwrite") == 2
    one_sentence(capsys, "was made with other settings")


def test_a_reward_of_another_kind_needs_other_labels(scored, tmp_path, capsys):
    folder = copy_of(scored, tmp_path / "demo")
    assert saerl("train", folder, "train.reward=numeric") == 2
    one_sentence(capsys, "scores.parquet was made with other settings (train.reward was")


@pytest.mark.parametrize("command", ["score", "plan", "train", "compare"])
def test_a_reward_that_cannot_work_is_found_before_the_model_is_loaded(
    command, tmp_path, capsys, monkeypatch
):
    def load(*args, **options):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr("saerl_fast.session.load_model", load)
    (tmp_path / "bad.py").write_text("def score(completions, **columns):\n    return columns['solution']\n")
    assert saerl(command, tmp_path / "r", f"train.reward={tmp_path}/bad.py:score") == 2
    one_sentence(capsys, "raised KeyError: 'solution' for completion 0")
    assert saerl(command, tmp_path / "r", f"train.reward=exact,{tmp_path}/bad.py:score") == 2
    one_sentence(capsys, "bad.py line 2")
    assert saerl(command, tmp_path / "r", "train.reward_weights=1,2") == 2
    one_sentence(capsys, "2 numbers for 1 rewards")


def test_folders_that_are_no_runs_stay(scored, tmp_path, capsys):
    folder = copy_of(scored, tmp_path / "demo")
    (folder / "adaptive").mkdir()
    (folder / "adaptive" / "notes.txt").write_text("mine")
    assert saerl("compare", folder) == 2
    one_sentence(capsys, "no run of saerl")
    assert saerl("train", folder, "--overwrite") == 2
    assert (folder / "adaptive" / "notes.txt").read_text() == "mine"


def test_resume_refuses_other_settings_and_touches_nothing(scored, tmp_path, capsys):
    folder = copy_of(scored, tmp_path / "demo")
    assert saerl("train", folder) == 0
    kept = {name: (folder / "adaptive" / name).read_bytes() for name in ("run.json", "plan.json")}
    for setting in ("train.seed=5", "train.lr=9", "plan.adaptive.noise=0.7", "train.steps=1"):
        assert saerl("train", folder, "--resume", setting) == 2
        one_sentence(capsys, "was started with" if setting != "train.steps=1" else "train.steps=1 is less")
    assert kept == {name: (folder / "adaptive" / name).read_bytes() for name in kept}
    assert saerl("train", folder, "--resume", "train.steps=3") == 0
    rows = (folder / "adaptive" / "metrics.jsonl").read_text().splitlines()
    assert [row["step"] for row in map(json.loads, rows) if row["kind"] == "train"] == [1, 2, 3]


def test_a_run_of_train_is_kept_by_compare(scored, tmp_path):
    folder = copy_of(scored, tmp_path / "demo")
    assert saerl("train", folder) == 0
    before = (folder / "adaptive" / "metrics.jsonl").read_text()
    (folder / "sae" / "cfg.json").write_text("{}")  # which no run that is left to do needs
    assert saerl("compare", folder) == 0
    assert (folder / "adaptive" / "metrics.jsonl").read_text() == before


def test_a_plan_file_is_followed(scored, tmp_path, capsys):
    folder = copy_of(scored, tmp_path / "demo")
    assert saerl("plan", folder, "plan.schedule=global") == 0
    plan = json.loads((folder / "plan.json").read_text())
    command = [
        "train",
        "--quiet",
        "--config",
        "examples/demo.yaml",
        "--plan",
        f"{folder / 'plan.json'}",
        *SMALL,
    ]
    assert cli.main([*command, f"run_dir={folder}"]) == 0
    assert json.loads((folder / "global" / "run.json").read_text())["arm"] == "global"
    assert json.loads((folder / "global" / "plan.json").read_text())["sha256"] == plan["sha256"]
    assert cli.main([*command, f"run_dir={folder}", "--overwrite", "train.rollout.prompts_per_step=8"]) == 2
    one_sentence(capsys, "batches of 4 prompts")


def write_pool(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one_sentence(capsys, said):
    error = capsys.readouterr().err
    assert said in error, error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("saerl: ")]) == 1


def test_other_settings_are_not_mixed(scored, tmp_path, capsys):
    folder = copy_of(scored, tmp_path / "demo")
    before = (folder / "scores.parquet").read_bytes()
    assert saerl("train", folder, "diversity.n_clusters=5") == 2
    one_sentence(capsys, "was made with other settings")
    assert (folder / "scores.parquet").read_bytes() == before


def test_the_setting_that_differs_is_named(scored, tmp_path, capsys):
    folder = copy_of(scored, tmp_path / "demo")
    assert saerl("train", folder, "score.reduce=max") == 2
    one_sentence(capsys, "(score.reduce was mean)")
    assert saerl("score", folder, "sae.k=4") == 2
    one_sentence(capsys, "(sae.k was 8)")
    assert saerl("train", folder, "train.rollout.temperature=0.5") == 2
    one_sentence(capsys, "(train.rollout.temperature was 1.0)")
    assert saerl("train", folder, "train.steps=1") == 0
    assert saerl("train", folder, "train.steps=1", "train.lr=0.01", "--resume") == 2
    one_sentence(capsys, "(train.lr was 0.0005)")
    assert saerl("compare", folder, "train.steps=1", "train.lr=0.01") == 2
    one_sentence(capsys, "(train.lr was 0.0005)")


def test_filter_and_group_size_need_no_new_scores(scored, tmp_path):
    settings = ["data.limit=1000", f"sae.path={scored / 'sae'}"]
    assert saerl("score", tmp_path, *settings) == 0
    dropped = []
    for threshold in (0.3, 0.6):
        settings += [f"quality.threshold={threshold}", "train.rollout.group_size=2"]
        assert saerl("plan", tmp_path, *settings) == 0
        found = json.loads((tmp_path / "plan.json").read_text())["dropped"]
        dropped.append({row["id"] for row in found})
    assert dropped[0] < dropped[1]


def test_what_cannot_work_stops_before_a_run_is_replaced(scored, tmp_path, capsys, monkeypatch):
    folder = copy_of(scored, tmp_path / "demo")
    assert saerl("train", folder, "train.steps=1") == 0
    for package in ("peft", "vllm", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    for setting, said in [
        ("train.lora.rank=2", "needs peft; run `pip install peft`"),
        ("train.rollout.engine=vllm", "needs vllm"),
        ("train.trackers=tensorboard", "train.trackers=tensorboard needs tensorboard"),
        ("train.loss.kind=ppo", "choose one of"),
    ]:
        assert saerl("train", folder, "--overwrite", setting) == 2
        one_sentence(capsys, said)
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    assert saerl("train", folder, "--overwrite", "train.lora.rank=2", "train.lora.targets=nope") == 2
    one_sentence(capsys, "'nope' names no module")
    assert (folder / "adaptive" / "summary.json").is_file()


def test_empty_pool(tmp_path, capsys):
    pool = write_pool(tmp_path / "empty.jsonl", [])
    assert saerl("score", tmp_path / "r", f"data.train={pool}") == 2
    one_sentence(capsys, "empty.jsonl")


def test_one_row_pool_scores_and_trains(tmp_path):
    pool = write_pool(tmp_path / "one.jsonl", [{"prompt": "2+3=", "answer": "5"}])
    assert saerl("train", tmp_path / "r", f"data.train={pool}", "data.id_column=", "train.steps=1") == 0
    rows = (tmp_path / "r" / "adaptive" / "metrics.jsonl").read_text()
    assert '"kind": "train"' in rows


def test_all_filtered_pool(scored, tmp_path, capsys):
    folder = tmp_path / "r"
    settings = ["quality.threshold=1", "data.limit=300", f"sae.path={scored / 'sae'}"]
    assert saerl("score", folder, *settings) == 0
    before = (folder / "scores.parquet").read_bytes()
    assert saerl("train", folder, *settings, "plan.filter=true") == 2
    one_sentence(capsys, "plan.filter=false")
    assert (folder / "scores.parquet").read_bytes() == before


@pytest.mark.parametrize("command", ["score", "train"])
def test_a_cluster_backend_that_is_not_here_is_refused_before_anything_is_made(
    command, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert saerl(command, tmp_path / "r", "diversity.backend=cuml") == 2
    one_sentence(capsys, "diversity.backend=cuml cannot be used: no CUDA device")
    assert not (tmp_path / "r").exists()


def test_sae_of_another_width(scored, tmp_path, capsys):
    from saerl_fast.sae.files import save_sae
    from saerl_fast.sae.model import SAE, SAESpec

    generator = torch.Generator().manual_seed(0)
    encoder = torch.randn(24, 32, generator=generator)
    sae = SAE(encoder, torch.zeros(32), encoder.T.clone(), torch.zeros(24), cfg=SAESpec(k=4))
    save_sae(sae, tmp_path / "sae")
    assert saerl("score", tmp_path / "r", f"sae.path={tmp_path / 'sae'}") == 2
    one_sentence(capsys, "24")


def test_nan_activations(tmp_path, capsys):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(ROOT / "examples" / "demo" / "model", model)
    weights = load_file(model / "model.safetensors")
    name = next(key for key in weights if "layers.0" in key and "mlp" in key)
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert saerl("sae train", tmp_path / "r", f"model.path={model}") == 2
    one_sentence(capsys, "NaN or infinite")


def test_unwritable_output(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert saerl("sae train", blocked / "r") == 2
    one_sentence(capsys, "run_dir")


JOB = """
from saerl_fast import Schedule

def rf(tokens):
    return -tokens.advantages * tokens.logprobs

def backwards(rows, batch_size, rng, table, cfg):
    return rows[::-1].reshape(-1, batch_size)

plain = Schedule(backwards, filtered=False)  # needs no scores, so no SAE

def rows(role, size, seed, argument):
    first = 0 if role == "train" else 50
    return [{"prompt": f"{argument} {first + i} + 1 =", "answer": first + i + 1} for i in range(size)]
"""


def test_functions_from_outside_make_a_run(tmp_path, capsys, monkeypatch):
    """Loss, schedule and prompts of one module: the run goes on, is compared, and knows an edited file."""
    job = tmp_path / "saerl_job.py"
    job.write_text(JOB)
    monkeypatch.syspath_prepend(tmp_path)
    functions = ["data.train=saerl_job:rows@add", "data.eval=saerl_job:rows@plus", "data.id_column="]
    functions += ["data.size=20", "data.eval_size=6"]
    functions += ["plan.schedule=saerl_job:plain", "train.loss.kind=saerl_job:rf"]
    assert saerl("train", tmp_path / "r", "train.steps=1", *functions) == 0
    out = tmp_path / "r" / "saerl_job-plain"
    assert json.loads((out / "plan.json").read_text())["schedule"] == "saerl_job:plain"
    assert not (tmp_path / "r" / "sae").exists()
    assert saerl("train", tmp_path / "r", "--resume", *functions) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    plan = out / "plan.json"
    assert saerl("train", tmp_path / "r", "--overwrite", f"--plan={plan}", *functions[:5]) == 0
    job.write_text(JOB + "# edited\n")
    capsys.readouterr()
    assert saerl("train", tmp_path / "q", "train.steps=1", *functions) == 2
    one_sentence(capsys, "was changed after this process had read it; start the command again")
    sys.modules.pop("saerl_job")  # as a new process has it
    assert saerl("train", tmp_path / "r", "--resume", f"--plan={plan}", *functions[:5]) == 0  # none counts
    assert saerl("train", tmp_path / "q", "train.steps=1", *functions) == 0
    job.write_text(JOB)
    sys.modules.pop("saerl_job")
    assert saerl("train", tmp_path / "q", "--resume", *functions) == 2
    one_sentence(capsys, "by name the same, but other prompts, functions or model files")
    arms = "compare.arms=vanilla,mine:plan.schedule=saerl_job:plain;train.loss.kind=saerl_job:rf"
    assert saerl("compare", tmp_path / "c", *functions[:5], arms, "train.steps=1") == 0
    assert (tmp_path / "c" / "mine" / "summary.json").is_file()
    wrong = "compare.arms=vanilla,mine:train.loss.kind=saerl_job:gone"
    assert saerl("compare", tmp_path / "d", *functions[:5], wrong, "train.steps=1") == 2
    one_sentence(capsys, "train.loss.kind=saerl_job:gone: saerl_job has no function 'gone'; it has")
    assert not (tmp_path / "d" / "vanilla").exists(), "said before the first arm runs"
    sys.modules.pop("saerl_job")


def test_an_unknown_backend_stops_before_anything_is_loaded(tmp_path, capsys):
    assert saerl("score", tmp_path / "r", "score.backend=cudda") == 2
    one_sentence(capsys, "score.backend='cudda' is unknown; choose one of auto, triton")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("difficulty.label_column=nowhere", "has no column 'nowhere'"),
        ("quality.label_column=prompt_id", "quality.label_column names a column that holds 'demo-"),
        ("plan.schedule=json:JSONDecoder", "must take (rows, batch_size, rng, table, cfg)"),
        ("train.loss.kind=json:JSONDecoder", "must take (tokens)"),
        ("train.reward=saerl_nowhere:f", "No module named 'saerl_nowhere'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, capsys, setting, said):
    assert saerl("train", tmp_path / "run", setting) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1, told
    assert not list(tmp_path.iterdir())


def state(folder):
    """When each output was written."""
    names = ("sae/train.json", "labels.json", "scores.parquet", "adaptive/metrics.jsonl")
    return {name: (folder / name).stat().st_mtime_ns if (folder / name).exists() else None for name in names}


def test_one_command_changes_one_setting(scored, tmp_path, capsys):
    folder = copy_of(scored, tmp_path / "demo")
    assert saerl("train", folder) == 0

    def redo(*settings):
        """What was made again, and what was said, not quietly."""
        before = state(folder)
        capsys.readouterr()
        head = ["train", "--redo", "--config", "examples/demo.yaml", *SMALL, f"run_dir={folder}"]
        assert cli.main([*head, *settings]) == 0
        after = state(folder)
        return {name for name in after if after[name] != before[name]}, capsys.readouterr().out

    made, said = redo()
    assert made == set() and "adaptive is kept, for nothing that it depends on has changed" in said
    made, said = redo("train.lr=0.01")
    assert made == {"adaptive/metrics.jsonl"} and "scores.parquet is kept" in said
    assert "adaptive is made again (train.lr was 0.0005)" in said
    made, said = redo("train.lr=0.01", "diversity.n_clusters=3")
    assert made == {"adaptive/metrics.jsonl", "scores.parquet"} and "sae is kept" in said
    assert (
        "scores.parquet is made again: it was made with other settings (diversity.n_clusters was 4)" in said
    )
    made, said = redo("train.lr=0.01", "diversity.n_clusters=3", "sae.k=4")
    assert made == {"adaptive/metrics.jsonl", "scores.parquet", "sae/train.json"}
    assert (
        "sae is made again: it was made with other settings (sae.k was 8); the one before is sae.previous"
        in said
    )
    assert "labels.json is kept" in said and (folder / "sae.previous" / "train.json").is_file()
    made, said = redo("train.lr=0.01", "diversity.n_clusters=3", "sae.k=4", "train.steps=3")
    assert made == {"adaptive/metrics.jsonl"} and "goes on from where it stopped" in said
    rows = [json.loads(line) for line in (folder / "adaptive" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3]
    assert json.loads((folder / "adaptive" / "run.json").read_text())["resumed"]
    made, said = redo("train.lr=0.01", "diversity.n_clusters=3", "sae.k=4", "train.steps=2")
    assert made == {"adaptive/metrics.jsonl"} and "is made again (train.steps was 3)" in said


def test_redo_of_what_is_the_same_loads_no_model(scored, tmp_path, monkeypatch):
    folder = copy_of(scored, tmp_path / "demo")
    before = state(folder)
    monkeypatch.setattr("saerl_fast.session.load_model", lambda *_: pytest.fail("loads the model"))
    assert saerl("sae train", folder, "--redo") == 0
    assert saerl("score", folder, "--redo") == 0
    assert saerl("plan", folder, "--redo") == 0
    assert state(folder) == before


@pytest.mark.parametrize("command", ["score", "plan", "train", "compare"])
def test_other_settings_are_refused_before_the_model_is_loaded(
    scored, tmp_path, capsys, monkeypatch, command
):
    folder = copy_of(scored, tmp_path / "demo")
    monkeypatch.setattr("saerl_fast.session.load_model", lambda *_: pytest.fail("loads the model"))
    assert saerl(command, folder, "sae.k=4") == 2
    one_sentence(capsys, "sae was made with other settings (sae.k was 8); add --redo")


@pytest.mark.parametrize("command", ["score", "train", "compare"])
def test_an_sae_of_another_width_is_refused_before_the_model_is_loaded(
    tmp_path, capsys, monkeypatch, command
):
    from saerl_fast.sae.files import save_sae
    from saerl_fast.sae.model import SAE, SAESpec

    encoder = torch.randn(24, 32)
    sae = SAE(encoder, torch.zeros(32), encoder.T.clone(), torch.zeros(24), cfg=SAESpec(k=4))
    save_sae(sae, tmp_path / "sae")
    monkeypatch.setattr("saerl_fast.session.load_model", lambda *_: pytest.fail("loads the model"))
    assert saerl(command, tmp_path / "r", f"sae.path={tmp_path / 'sae'}") == 2
    one_sentence(capsys, "of width 24 but the hidden size of model examples/demo/model is 128")
    assert saerl(command, tmp_path / "r", f"sae.path={tmp_path / 'nowhere'}") == 2
    one_sentence(capsys, "nowhere")


def test_an_sae_of_another_width_is_refused_before_labels(scored, tmp_path, capsys, monkeypatch):
    """Also where the configuration does not tell the width, as that of a GGUF file."""
    from saerl_fast.sae.files import save_sae
    from saerl_fast.sae.model import SAE, SAESpec

    encoder = torch.randn(24, 32)
    sae = SAE(encoder, torch.zeros(32), encoder.T.clone(), torch.zeros(24), cfg=SAESpec(k=4))
    save_sae(sae, tmp_path / "sae")
    monkeypatch.setattr("saerl_fast.models.load.named_width", lambda *_: None)
    labels = "saerl_fast.stages.pipeline.difficulty_labels"
    monkeypatch.setattr(labels, lambda *_, **__: pytest.fail("rolls out labels"))
    assert saerl("score", tmp_path / "r", f"sae.path={tmp_path / 'sae'}") == 2
    one_sentence(capsys, "width 24")


def test_plans_of_all_arms_are_laid_out_before_the_first_trains(scored, tmp_path, capsys):
    folder = copy_of(scored, tmp_path / "demo")
    arms = (
        "compare.arms=vanilla,filtered:plan.schedule=vanilla;plan.filter=true"  # too few labels for a filter
    )
    assert saerl("compare", folder, arms) == 2
    one_sentence(capsys, "plan.filter=true needs quality scores")
    arms = "compare.arms=vanilla,lora:plan.schedule=vanilla;train.lora.rank=2;train.lora.targets=nope"
    assert saerl("compare", folder, arms) == 2
    one_sentence(capsys, "'nope' names no module")
    assert not (folder / "vanilla").exists()


def test_a_batch_larger_than_the_pool_is_said(tmp_path, capsys):
    head = ["plan", "--config", "examples/demo.yaml", *SMALL, f"run_dir={tmp_path}", "plan.schedule=vanilla"]
    assert cli.main([*head, "train.rollout.prompts_per_step=500"]) == 0
    assert (
        "train.rollout.prompts_per_step=500 is more than that; a batch repeats prompts"
        in capsys.readouterr().out
    )


def test_the_record_of_a_run_says_with_what_it_was_made(scored, tmp_path):
    folder = copy_of(scored, tmp_path / "demo")
    assert saerl("train", folder, "train.steps=1") == 0
    record = json.loads((folder / "adaptive" / "run.json").read_text())
    assert record["made"]["torch"] == torch.__version__ and record["made"]["device"] == "cpu"
    prompts = [
        json.loads(line) for line in (folder / "adaptive" / "eval_prompts.jsonl").read_text().splitlines()
    ]
    items = [json.loads(line) for line in (folder / "adaptive" / "eval_items.jsonl").read_text().splitlines()]
    assert {row["prompt_id"] for row in prompts} == {row["prompt_id"] for row in items}
    report = (folder / "adaptive" / "report.md").read_text()
    assert "| torch |" in report and "## Held-out items" in report


def test_the_demo_runs_from_anywhere(tmp_path, capsys, monkeypatch):
    assert (
        cli.demo_config(cli.parser().parse_args(["demo"])).model.path == "examples/demo/model"
    )  # as demo.yaml
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--quiet", *SMALL, "sae.steps=5"]) == 0
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
    assert (tmp_path / "runs" / "demo" / "plan.json").is_file()


def test_what_is_left_of_a_killed_run_is_taken_and_a_signal_saves(tmp_path, monkeypatch, capsys):
    """The folder of the arm is a link to another disk throughout."""
    monkeypatch.setattr("saerl_fast.records.report.write_report", lambda *_, **__: [])
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "vanilla").symlink_to(disk)
    vanilla = ["plan.schedule=vanilla", "train.save_every=100"]

    def kill(number):
        def step(self, at, real=Run.step):
            real(self, at)
            if at == 1:
                os.kill(os.getpid(), number)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "step", step)
            return saerl("train", tmp_path / "r", *vanilla)

    with monkeypatch.context() as patch:  # SIGKILL while the first file is being written

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        patch.setattr(os, "replace", die)
        child = fork(lambda: saerl("train", tmp_path / "r", *vanilla))
        assert status(child) == -signal.SIGKILL
    assert {path.name[:10] for path in disk.iterdir()} == {".run.json.", ".manifest.", NAME[:10]}
    shutil.copy(next(disk.glob(".run.json.*")), tmp_path / "r")  # as of a stage before it
    capsys.readouterr()
    assert kill(signal.SIGTERM) == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert "step 1) kept; to go on: `saerl train" in said
    command = shlex.split(said.rpartition("`saerl ")[2].rstrip("`\n"))
    assert cli.main(command) == 0
    assert not [path for top in (disk, tmp_path / "r") for path in top.rglob(".*")]
    rows = [json.loads(line) for line in (disk / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    again = json.loads((disk / "run.json").read_text())
    assert "resumed" in again
    assert saerl("train", tmp_path / "r", *vanilla, "--overwrite") == 0
    assert "resumed" not in json.loads((disk / "run.json").read_text())
    assert saerl("train", tmp_path / "r", *vanilla, "--redo", "train.seed=3") == 0
    assert json.loads((disk / "run.json").read_text())["seed"] == 3
    assert (tmp_path / "r" / "vanilla").is_symlink()


def test_what_was_kept_for_complete_scores_goes(scored, tmp_path):
    folder = copy_of(scored, tmp_path / "demo")
    mark = json.loads((folder / "manifest.json").read_text())["artefacts"]["scores"][0]["fingerprint"]
    kept = [folder / f"features.partial-{mark}-1", folder / "features.partial-of-other-settings"]
    for path in kept:
        path.mkdir()
    assert saerl("plan", folder) == 0
    assert [path.exists() for path in kept] == [False, True]


def test_one_command_at_a_time(scored, tmp_path, capsys):
    """Writers are refused in a sentence; readers are not."""
    folder = copy_of(scored, tmp_path / "demo")
    before = state(folder)
    with lock(folder), ThreadPoolExecutor(1) as other:
        for command in ("sae train", "score", "plan"):
            assert other.submit(saerl, command, folder).result() == 2
            one_sentence(capsys, f"{folder} is written by")
        assert other.submit(cli.main, ["sae", "info", str(folder / "sae")]).result() == 0
    with lock(folder / "adaptive"), ThreadPoolExecutor(1) as other:
        for flag in ("--overwrite", "--resume", "--redo"):
            assert other.submit(saerl, "train", folder, flag).result() == 2
            one_sentence(capsys, f"{folder / 'adaptive'} is written by")
    assert state(folder) == before


def test_the_bank_is_made_shard_by_shard_and_read_by_plans(tmp_path, capsys):
    folder = tmp_path / "r"
    settings = ["score.features=sae,hidden,answer_logprob,sae_max", "difficulty.n_labels=0", "score.shard=40"]
    kinds = "plan.adaptive.features=answer_logprob,hidden"
    assert saerl("score", folder, *settings) == 0
    assert saerl("plan", folder, *settings, kinds) == 0
    made = json.loads((folder / "manifest.json").read_text())["artefacts"]
    bank = {"bank.hidden.npy", "bank.answer_logprob.npy", "bank.sae_max.safetensors"}
    assert bank == {name for name in made["scores"][0]["files"] if name.startswith("bank.")}
    assert {"bank.hidden.npy", "bank.answer_logprob.npy"} <= made["plan"][0]["inputs"].keys()
    whole = np.load(folder / "bank.hidden.npy")
    other = ["score.shard=4096", f"sae.path={folder / 'sae'}"]
    assert saerl("score", tmp_path / "s", *settings, *other) == 0
    np.testing.assert_allclose(np.load(tmp_path / "s" / "bank.hidden.npy"), whole, rtol=1e-3, atol=1e-3)
    assert saerl("score", folder, "difficulty.n_labels=0", "--redo") == 0
    assert not (folder / "bank.sae_max.safetensors").exists() and (folder / "bank.hidden.npy").is_file()
    capsys.readouterr()
    assert saerl("score", folder, "difficulty.features=text,scalars") == 2
    one_sentence(capsys, "add it to score.features")


def test_labels_may_be_spread_and_come_after_the_warm_up(scored, tmp_path, monkeypatch):
    from saerl_fast.rl import generate
    from saerl_fast.stages import labels

    made, used = [], []
    warm, sample = labels._warmed, generate.generate

    def warmed(config, echo, session):
        made.append((session.model, warm(config, echo, session)))
        return made[-1][1]

    monkeypatch.setattr(labels, "_warmed", warmed)
    monkeypatch.setattr(generate, "generate", lambda *a, **k: used.append(a[0]) or sample(*a, **k))
    folder = copy_of(scored, tmp_path / "demo")
    plain = json.loads((folder / "labels.json").read_text())["rates"]
    few = ["difficulty.n_labels=16", "difficulty.choose=spread"]
    assert saerl("score", folder, *few, "--redo") == 0
    chosen = json.loads((folder / "labels.json").read_text())["rates"]
    assert len(chosen) == 16 and chosen.keys() != set(list(plain)[:16]) and not made
    warm_up = ["train.warmup.steps=2", "train.warmup.lr=0.01"]
    assert saerl("score", folder, *few, *warm_up) == 0
    ((base, after),) = made
    assert used[-1] is after and not torch.equal(base.lm_head.weight, after.lm_head.weight)
    assert json.loads((folder / "labels.json").read_text())["rates"].keys() == chosen.keys()
    assert saerl("score", folder, *few, *warm_up, "difficulty.after_warmup=false", "--redo") == 0
    assert len(made) == 1 and json.loads((folder / "labels.json").read_text())["rates"] == chosen


def test_a_comparison_with_an_sae_for_each_seed(tmp_path):
    settings = ("compare.arms=adaptive", "compare.seeds=0,1", "compare.vary_sae=true", "train.steps=1")
    assert saerl("compare", tmp_path / "r", *settings) == 0
    first, second = (
        load_file(folder / "sae" / "sae_weights.safetensors")["W_dec"]
        for folder in (tmp_path / "r", tmp_path / "r" / "draws" / "seed-1")
    )
    assert first.shape == second.shape and not torch.equal(first, second)
    assert "| adaptive | 2 |" in (tmp_path / "r" / "report.md").read_text()
    assert saerl("compare", tmp_path / "r", *settings) == 0  # all of it is kept


def test_a_comparison_ends_runs_that_are_past_their_targets_and_goes_on_when_asked(tmp_path):
    asked = ("compare.arms=vanilla", "compare.smooth=1", "compare.target_values=[0.0001]", "train.steps=3")
    folder = tmp_path / "r" / "vanilla"
    assert saerl("compare", tmp_path / "r", *asked, "compare.until=true") == 0
    assert json.loads((folder / "summary.json").read_text())["steps"] == 1
    assert "1 runs were ended past the last target" in (tmp_path / "r" / "report.md").read_text()
    first = (folder / "metrics.jsonl").read_bytes()
    assert saerl("compare", tmp_path / "r", *asked, "compare.until=true") == 0
    assert (folder / "metrics.jsonl").read_bytes() == first
    assert saerl("compare", tmp_path / "r", *asked) == 0  # all steps now
    assert json.loads((folder / "summary.json").read_text())["steps"] == 3
    assert "were ended" not in (tmp_path / "r" / "report.md").read_text()
    assert saerl("compare", tmp_path / "whole", *asked) == 0

    def accuracies(root):
        rows = map(json.loads, (root / "vanilla" / "metrics.jsonl").read_text().splitlines())
        return [(row["step"], row["accuracy"]) for row in rows if row["kind"] == "eval"]

    assert accuracies(tmp_path / "r") == accuracies(tmp_path / "whole")
