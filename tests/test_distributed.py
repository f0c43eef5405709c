"""Data parallel training: two processes give what one gives, end together, and can take turns with one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.records.log import read_jsonl, read_metrics
from saerl_fast.rl import distributed
from saerl_fast.rl.checkpoint import load_latest
from tests.ranks import ROOT, run_ranks
from tests.two_processes import failing, screened_run, whole_run


def together(folder: Path) -> list[dict]:
    run_ranks([sys.executable, "-m", "tests.two_processes", str(folder)], 2, 240)
    return [json.loads((folder / f"found-{i}.json").read_text()) for i in range(2)]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, list[dict]]:
    """Runs of one process, and what two made beside them."""
    folder = tmp_path_factory.mktemp("runs")
    threads = torch.get_num_threads()
    whole_run(folder / "alone")
    whole_run(folder / "kl-alone", beta=0.1)
    screened_run(folder / "screened-alone")
    shutil.copytree(folder / "alone", folder / "alone-then-together")
    next((folder / "alone-then-together" / "checkpoints").glob("step-000004-*")).unlink()
    found = together(folder)
    torch.set_num_threads(threads)
    return folder, found


def assert_alike(one: Path, two: Path) -> None:
    """The same rollouts, items and counts; sums of floats up to their order."""
    for name in ("rollouts.jsonl", "eval_items.jsonl"):
        assert read_jsonl(one / name) == read_jsonl(two / name), name
    for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"time", "plan"}:
            same = a[key] == b[key] or a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-6)
            assert same, (a["step"], key, a[key], b[key])
        assert a.get("plan", {}) == pytest.approx(b.get("plan", {}), rel=1e-4)
    first, second = (load_latest(folder) for folder in (one, two))
    assert first is not None and second is not None and first.step == second.step
    for name, tensor in first.model.items():
        # Adam's first step is lr * sign(gradient): where that is nearly 0 its sign is noise
        assert ((tensor - second.model[name]).abs() < 1e-5).float().mean() > 0.98, name


def test_primitives(both) -> None:
    _, (first, second) = both
    assert first["blocks"] == [[0, 2], [0, 0], [0, 0]] and second["blocks"] == [[2, 5], [0, 1], [0, 0]]
    for found in (first, second):
        assert found["shared"] == [0, 10]
        assert found["sums"] == [[3.0] * 3, [[2.0] * 2] * 2]
        assert found["gradients"] == [[2.0, 2.0], [1.0, 1.0], None]


def test_parting_leaves_no_thread_that_could_abort_the_end(both) -> None:
    assert [found["threads"] for found in both[1]] == [[], []]


def test_two_processes_give_the_run_of_one(both) -> None:
    folder, found = both
    assert_alike(folder / "alone", folder / "together")
    assert all(f["same"] and f["plans"][0] == f["plans"][1] for f in found)
    rows = [row for row in read_metrics(folder / "together") if row["kind"] == "train"]
    assert any(0 < row["groups_used"] < 4 for row in rows)  # some process had less than the other
    assert len(read_jsonl(folder / "together" / "rollouts.jsonl")) == 3 * len(rows)
    assert (folder / "together" / "model" / "config.json").is_file()


def test_the_kl_term_and_dynamic_sampling_too(both) -> None:
    folder, _ = both
    assert_alike(folder / "kl-alone", folder / "kl")
    assert max(row.get("draws", 0) for row in read_metrics(folder / "kl")) == 2


def test_groups_in_two_stages_too(both) -> None:
    folder, _ = both
    assert_alike(folder / "screened-alone", folder / "screened")
    rows = [row for row in read_metrics(folder / "screened") if row["kind"] == "train"]
    assert any(row["rollouts"] < 4 * row["groups"] for row in rows)  # some ended after the first stage


def test_one_process_and_two_take_turns(both) -> None:
    folder, found = both
    assert_alike(folder / "alone", folder / "alone-then-together")
    stopped = folder / "together-then-alone"
    assert load_latest(stopped).step == 4 and not (stopped / "summary.json").exists()
    threads = torch.get_num_threads()
    whole_run(stopped, resume=True)
    torch.set_num_threads(threads)
    assert_alike(folder / "alone", stopped)


def test_an_error_or_an_interrupt_in_one_process_ends_both(both) -> None:
    folder, found = both
    for each in found:
        kind, sentence = each["failed"]
        assert kind == "SharedError" and "raised RuntimeError: no more" in sentence
        assert each["interrupted"] == [2, signal.SIGTERM]  # in both
    assert load_latest(folder / "interrupted").step == 1
    assert [each["told"] for each in found] == [
        ["SaerlError", "the disk is full"],
        ["SharedError", "the disk is full"],
    ]


def test_a_single_process_needs_no_group(monkeypatch) -> None:
    distributed.start()
    assert (distributed.size(), distributed.rank()) == (1, 0) and distributed.shard(7) == slice(0, 7)
    assert distributed.gather(lambda: "x") == ["x"]
    tensor = torch.ones(2)
    distributed.all_reduce([tensor]), distributed.broadcast([tensor]), distributed.shutdown()
    assert tensor.tolist() == [1, 1]
    with pytest.raises(SaerlError, match="raised RuntimeError") as caught:
        distributed.gather(lambda: (_ for _ in ()).throw(SaerlError("raised RuntimeError")))
    assert not isinstance(caught.value, distributed.SharedError)
    assert failing(1, 0)(["2"], ["a"]) == [1.0]


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = ["--config", "examples/demo.yaml", "threads=1", "data.limit=24", "data.eval_limit=4"]
    settings += ["train.warmup.steps=0", "train.rollout.prompts_per_step=4", "train.rollout.group_size=2"]
    return subprocess.run(
        [*command, "-m", "saerl_fast.cli", *arguments, *settings],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels/torch-ext'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_torchrun_trains_and_refuses_what_one_process_should_make(tmp_path: Path) -> None:
    done = torchrun("train", "--schedule", "vanilla", f"run_dir={tmp_path}", "train.steps=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step     1/1 train") == 1 and (tmp_path / "vanilla" / "report.md").is_file()
    refused = torchrun("train", "--schedule", "adaptive", f"run_dir={tmp_path}", "train.steps=1")
    assert refused.returncode != 0 and not (tmp_path / "adaptive").exists()
    assert refused.stderr.count("saerl: ") == 1 and "make it with `saerl score`" in refused.stderr
    assert "exitcode  : 2" in refused.stderr
