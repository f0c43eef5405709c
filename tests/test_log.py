from __future__ import annotations

import json
import logging
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import numpy as np
import pytest
import torch

from saerl_fast.errors import SaerlError
from saerl_fast.records.log import (
    JsonlLog,
    MetricsLog,
    damage,
    end_rows,
    format_row,
    keep_until,
    read_jsonl,
    read_metrics,
)


def write_steps(folder, steps, **options):
    with MetricsLog(folder, **options) as log:
        for step in steps:
            log.log({"step": step, "kind": "train", "reward": step / 10})


def test_every_row_is_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    log.log({"step": 1, "kind": "train", "loss": 0.5})
    assert read_metrics(tmp_path) == [{"step": 1, "kind": "train", "loss": 0.5}]
    log.log({"step": 1, "kind": "eval", "accuracy": 0.25})
    assert [row["kind"] for row in read_metrics(tmp_path / "metrics.jsonl")] == ["train", "eval"]
    log.close()


def test_tensors_and_non_finite_values_become_plain_json(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.log(
            {
                "step": np.int64(2),
                "kind": "train",
                "loss": torch.tensor(float("nan")),
                "reward": np.float32(0.5),
                "time": {"generate": torch.tensor(1.5), "plan": float("inf")},
                "ids": (1, np.array([2, 3])),
                "path": tmp_path,
            }
        )
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["step"] == 2 and row["loss"] is None and row["reward"] == 0.5
    assert row["time"] == {"generate": 1.5, "plan": None} and row["ids"] == [1, [2, 3]]
    assert row["path"] == str(tmp_path)


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    write_steps(tmp_path, range(1, 6))
    write_steps(tmp_path, [4], resume_step=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_resume_mends_a_torn_last_line(tmp_path):
    write_steps(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 3, "ki')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    write_steps(tmp_path, [3], resume_step=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_torn_line_inside_a_character_is_tolerated(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "text": "\xe2\x82')
    assert read_jsonl(path) == [{"step": 1}]


def test_damage_in_the_middle_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(SaerlError, match="metrics.jsonl line 2 is damaged"):
        read_metrics(path)


def test_a_line_separator_inside_a_string_is_no_line_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"step": 1, "text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    assert read_jsonl(path)[0]["text"] == "a\u2028b\x85c"


def test_a_fresh_log_keeps_the_old_one_aside(tmp_path):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [1])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl.previous")] == [1, 2]


def test_other_logs_share_the_cut(tmp_path):
    items = JsonlLog(tmp_path / "eval_items.jsonl")
    items.write({"step": step, "item": i} for step in (5, 10) for i in range(2))
    items.close()
    keep_until(tmp_path / "eval_items.jsonl", 5)
    assert read_jsonl(tmp_path / "eval_items.jsonl") == [{"step": 5, "item": 0}, {"step": 5, "item": 1}]


def test_missing_file_and_missing_keys_are_sentences(tmp_path):
    with pytest.raises(SaerlError, match="metrics.jsonl does not exist; make it with `saerl train`"):
        read_metrics(tmp_path)
    with MetricsLog(tmp_path) as log, pytest.raises(SaerlError, match="'kind'.*step, loss"):
        log.log({"step": 1, "loss": 2})
    assert read_metrics(tmp_path) == []


def test_an_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "plain").write_text("")
    with pytest.raises(SaerlError, match="cannot write .*metrics.jsonl: .*; choose another run_dir"):
        MetricsLog(tmp_path / "plain" / "run")


def test_console_line_goes_to_echo_or_to_logging(tmp_path, caplog):
    lines: list[str] = []
    row = {
        "step": 12,
        "kind": "train",
        "reward": 0.51234,
        "lr": 1e-6,
        "loss": None,
        "time": {"a": 1, "b": 0.25},
    }
    with MetricsLog(tmp_path / "a", echo=lines.append) as log:
        log.log(row)
    assert lines == ["step    12 train  reward 0.5123  lr 1e-06  1.2 s"] == [format_row(row)]
    with caplog.at_level(logging.INFO, logger="saerl_fast.records.log"), MetricsLog(tmp_path / "b") as log:
        log.log(row)
    assert caplog.messages == lines


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_is_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(SaerlError, match=f"train.trackers={name} needs its package; pip install {name}"):
        MetricsLog(tmp_path, trackers=[name])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("resume", [None, 4])
def test_hosted_trackers_get_every_number_under_its_kind(tmp_path, monkeypatch, name, resume):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((values, step))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append(options)
        return Run()

    module = type(sys)(name)
    module.init = init
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    with MetricsLog(tmp_path / "run", resume, trackers=[name]) as log:
        log.log({"step": 5, "kind": "train", "loss": 0.5, "kl": None, "time": {"eval": 2.0}, "mode": "x"})
    options, *rest = calls
    assert options["project"] == "mine" and options["name"] == ("run" if resume is None else "run-from-4")
    assert rest == [({"train/loss": 0.5, "train/time/eval": 2.0}, 5), "finish"]


def test_a_tracker_that_cannot_start_is_one_sentence(tmp_path, monkeypatch):
    def init(**options):
        raise RuntimeError("api_key not configured\nand more")

    module = type(sys)("wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(SaerlError, match=r"wandb cannot start \(api_key not configured\)"):
        MetricsLog(tmp_path, trackers=["wandb"])


@pytest.mark.parametrize("at", ["log", "finish"])
def test_a_tracker_that_fails_on_the_way_is_left_out(tmp_path, monkeypatch, caplog, at):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append(step)
            if at == "log" and step == 2:
                raise ConnectionError("the network is gone\nand more")

        def finish(self):
            if at == "finish":
                raise OSError("no space left on the device")

    module = type(sys)("wandb")
    module.init = lambda **options: Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    with MetricsLog(tmp_path, trackers=["wandb"]) as log:
        for step in (1, 2, 3):
            log.log(REAL | {"step": step})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert calls == ([1, 2] if at == "log" else [1, 2, 3])
    reason = "the network is gone" if at == "log" else "no space left on the device"
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"wandb takes no more rows ({reason}); metrics.jsonl has them all"]


def test_a_folder_that_tensorboard_cannot_write_is_one_sentence(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    (tmp_path / "tensorboard").write_text("a file in its way")
    with pytest.raises(SaerlError, match=r"tensorboard cannot start \(.*; take it out of train.trackers"):
        MetricsLog(tmp_path, trackers=["tensorboard"])


def test_tensorboard_gets_every_number_under_its_kind(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step=None):
            calls.append(("open", folder, purge_step))

        def add_scalar(self, *args):
            calls.append(args)

        def flush(self):
            pass

        def close(self):
            calls.append("close")

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with MetricsLog(tmp_path, resume_step=4, trackers=["tensorboard"]) as log:
        log.log({"step": 5, "kind": "train", "loss": 0.5, "time": {"eval": 2.0}, "mode": "greedy"})
    assert calls == [
        ("open", str(tmp_path / "tensorboard"), 5),
        ("train/loss", 0.5, 5),
        ("train/time/eval", 2.0, 5),
        "close",
    ]


REAL = {"step": 5, "kind": "train", "loss": 0.5, "kl": None, "time": {"eval": 2.0}, "mode": "x"}


def test_tensorboard_itself(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, trackers=["tensorboard"]) as log:
        for step in (5, 6):
            log.log(REAL | {"step": step})
    with MetricsLog(tmp_path, resume_step=5, trackers=["tensorboard"]) as log:
        log.log(REAL | {"step": 6, "loss": 0.25})  # in place of the one that the stopped run wrote
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert found.Tags()["scalars"] == ["train/loss", "train/time/eval"]
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(5, 0.5), (6, 0.25)]


def test_trackio_itself(tmp_path):
    """In a process of its own, which it sets up by the environment when it is imported."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    code = (
        "import sys; from tests.test_log import REAL, MetricsLog\n"
        "with MetricsLog(sys.argv[1] + '/run', trackers=['trackio']) as log: log.log(REAL)\n"
    )
    settings = {"TRACKIO_DIR": str(tmp_path / "store"), "TRACKIO_PROJECT": "mine", "HF_HUB_OFFLINE": "1"}
    paths = os.pathsep.join(["tests/..", "kernels/torch-ext", *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | settings | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with closing(sqlite3.connect(tmp_path / "store" / "mine.db")) as store:
        ((run, step, values),) = store.execute("select run_name, step, metrics from metrics").fetchall()
    assert (run, step, json.loads(values)) == ("run", 5, {"train/loss": 0.5, "train/time/eval": 2.0})


def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with MetricsLog(tmp_path / "run", trackers=["wandb"]) as log:
        log.log(REAL)
    (record,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    ends = time.monotonic() + 60  # its own process goes on writing for a moment
    while b"train/loss" not in record.read_bytes() and time.monotonic() < ends:
        time.sleep(0.1)
    data = record.read_bytes()
    assert all(text in data for text in (b"train/loss", b"0.5", b"train/time/eval", b"mine"))


def written(path, n=6):
    log = JsonlLog(path)
    log.write({"step": step, "kind": "train"} for step in range(1, n + 1))
    log.close()
    return log.digest()


def without(number):
    return lambda data: b"".join(line for i, line in enumerate(data.splitlines(True)) if i != number)


HARM = {
    "cut": (lambda data: data[: len(data) // 2 - 9], "rows.jsonl has 2 of the 6 rows that were written"),
    "emptied": (lambda data: b"", "rows.jsonl has 0 of the 6 rows that were written"),
    "a row gone": (without(2), "rows.jsonl has 5 of the 6 rows that were written"),
    "the last row gone": (without(5), "rows.jsonl has 5 of the 6 rows that were written"),
    "edited": (lambda data: data.replace(b'"step": 2', b'"step": 3'), "rows.jsonl was changed"),
    "longer": (lambda data: data.replace(b'"step": 2', b'"step":  2'), "rows.jsonl was changed"),
}


@pytest.mark.parametrize("name", HARM)
def test_a_log_is_compared_with_what_was_written(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    digest = written(path)
    assert damage(path, digest) == ""
    harm, says = HARM[name]
    whole = path.read_bytes()
    path.write_bytes(harm(whole))
    assert damage(path, digest).startswith(says)
    resumed = JsonlLog(path, 6, digest)
    resumed.close()
    assert resumed.damage.startswith(says)
    assert damage(path, resumed.digest()) == ""  # the next time it is as it was left
    path.write_bytes(whole + b'{"step": 7, "kind": "train"}\n{"st')
    assert damage(path, digest) == ""


def test_a_log_that_is_gone_is_said_and_one_that_never_had_a_row_is_not(tmp_path):
    digest = written(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").unlink()
    assert "rows.jsonl is missing, and the 6 rows" in JsonlLog(tmp_path / "rows.jsonl", 6, digest).damage
    assert JsonlLog(tmp_path / "none.jsonl", 6, written(tmp_path / "empty.jsonl", 0)).damage == ""


def test_resume_cuts_where_the_checkpoint_was_and_counts_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    digest, whole = written(path, 3), path.read_bytes()
    path.write_bytes(whole + b'{"step": 4, "kind": "train"}\n{"step": 5, "ki')
    log = JsonlLog(path, 3, digest)
    assert path.read_bytes() == whole and log.digest() == digest and log.damage == ""
    log.write([{"step": 4, "kind": "train"}])
    log.close()
    assert log.digest() == written(tmp_path / "other.jsonl", 4)


def test_damaged_lines_are_dropped_when_a_run_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    digest = written(path)
    path.write_bytes(
        path.read_bytes().replace(b'{"step": 3', b'{"step" 3').replace(b'{"step": 4', b"\xff" * 10)
    )
    log = JsonlLog(path, 6, digest)
    log.close()
    assert log.damage == "rows.jsonl has 4 of the 6 rows that were written (2 damaged lines were dropped)"
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 5, 6]


@pytest.mark.parametrize("long", [10, 3_000_000])
def test_the_ends_of_a_log_are_read_without_the_rest(tmp_path, long):
    path = tmp_path / "rows.jsonl"
    rows = [{"step": step, "i": i, "text": "x" * long} for step in (1, 2, 3) for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4')
    assert [(row["step"], row["i"]) for row in end_rows(path, last=True)] == [(3, 0), (3, 1)]
    assert [(row["step"], row["i"]) for row in end_rows(path, last=False)] == [(1, 0), (1, 1)]
    assert end_rows(tmp_path / "none", last=True) == []


def test_a_log_that_is_removed_is_noticed(tmp_path):
    log = JsonlLog(tmp_path / "log.jsonl")
    log.write([{"step": 1}])
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(SaerlError, match="log.jsonl was removed while it was being written"):
        log.write([{"step": 2}])


def test_a_resumed_log_leaves_a_copy_by_hard_link_alone(tmp_path):
    with closing(JsonlLog(tmp_path / "a.jsonl")) as log:
        log.write([{"step": step} for step in (1, 2)])
        written = log.digest()
        log.write([{"step": 3}])
    before = (tmp_path / "a.jsonl").read_bytes()
    os.link(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    with closing(JsonlLog(tmp_path / "b.jsonl", resume_step=2, written=written)) as log:
        log.write([{"step": 7}])
    assert (tmp_path / "a.jsonl").read_bytes() == before
    assert [row["step"] for row in read_jsonl(tmp_path / "b.jsonl")] == [1, 2, 7]
