import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.run_all import heed_interrupts
from saerl_fast.errors import SaerlError
from saerl_fast.fileio import process_mark, write_json
from saerl_fast.records.lock import lock
from saerl_fast.records.log import MetricsLog
from saerl_fast.records.report import write_report
from saerl_fast.records.watch import watch


def rows(step: int) -> list[dict]:
    train = {"step": step, "kind": "train", "reward": step / 10, "time": {"generate": 1.0}}
    return [train, {"step": step, "kind": "eval", "accuracy": step / 20, "mode": "sample"}]


def write(folder: Path, first: int, last: int, resume: int | None) -> None:
    with MetricsLog(folder, resume, echo=lambda line: None) as log:
        for step in range(first, last + 1):
            for row in rows(step):
                log.log(row)


def test_a_growing_run_is_followed_to_its_end(tmp_path: Path) -> None:
    """Starts before the run does, sees it grow (with a torn line at one moment), ends with it."""
    run, said, sizes = tmp_path / "run", [], []

    def wait_for(done) -> None:
        deadline = time.time() + 60
        while not done() and time.time() < deadline:
            time.sleep(0.01)

    def train() -> None:
        try:
            wait_for(lambda: said)
            write(run, 1, 1, None)
            wait_for((run / "live.png").exists)
            whole = (run / "metrics.jsonl").read_bytes()
            (run / "metrics.jsonl").write_bytes(whole + b'{"step": 2, "ki')
            sizes.append((run / "live.png").stat().st_mtime_ns)
            write(run, 2, 5, 1)
            wait_for(lambda: any(line.startswith("step     5 eval") for line in said))
        finally:
            (run / "summary.json").write_text("{}")

    run.mkdir()  # what `saerl train` does first
    trainer = threading.Thread(target=train)
    trainer.start()
    figure = watch(run, said.append, every=0.02)
    trainer.join()
    assert said[0] == f"waiting for {run}/metrics.jsonl" and said[-1] == f"ended; {figure} holds the curves"
    assert said[1].startswith("step     1") and said[1].endswith("\u2581")
    assert said[-2].startswith("step     5 eval") and said[-2].endswith("\u2588")
    assert "\u2581\u2583" in said[-2]
    assert len(said) == len(set(said))  # nothing twice
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_mtime_ns > sizes[0]


@pytest.mark.parametrize("scored", [False, True])
def test_pilots_alone_are_named(tmp_path: Path, scored: bool) -> None:
    write(tmp_path / "pilot" / "vanilla.seed-9", 1, 2, None)
    (tmp_path / "compare.json").write_text(json.dumps({"arms": ["vanilla"], "seeds": [0], "pilots": [9]}))
    named, said = f"its pilots are in {tmp_path / 'pilot'}, a folder to report", list[str]()
    if scored:
        (tmp_path / "scores.json").write_text("{}")
        write_report(tmp_path, said.append)
        assert named in said[0] and named in (tmp_path / "report.md").read_text()
    else:
        with pytest.raises(SaerlError, match=f"has begun; {named}"):
            write_report(tmp_path)
    assert "vanilla" in write_report(tmp_path / "pilot")[0].read_text()


def test_a_comparison_ends_with_its_last_run(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(json.dumps({"arms": ["vanilla", "adaptive"], "seeds": [0]}))
    said: list[str] = []

    def add(name: str) -> None:
        write(tmp_path / name, 1, 2, None)
        write_json(tmp_path / name / "run.json", {"arm": name, "seed": 0})  # watch may read at any time
        write_json(tmp_path / name / "summary.json", {})

    add("vanilla")
    later = threading.Timer(0.3, add, ["adaptive"])
    later.start()
    watch(tmp_path, said.append, every=0.02)
    assert (tmp_path / "adaptive" / "summary.json").exists()
    assert said[0].startswith("step     2") and any(line.startswith("adaptive, seed 0: ") for line in said)


def test_a_figure_that_was_half_written_when_a_watch_was_killed_is_cleaned_up(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, None)
    (tmp_path / "summary.json").write_text("{}")
    machine, pid, started = process_mark().split("-")
    left = tmp_path / f".live.png.{machine}-{pid}-{int(started) + 1}.00000000.tmp"  # of a process before
    left.write_bytes(b"half")
    watch(tmp_path, print)
    assert not left.exists()


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaerlError, match="is a file"):
        watch(tmp_path / "file", print)
    with pytest.raises(SaerlError, match="--every 0"):
        watch(tmp_path, print, every=0)
    with pytest.raises(SaerlError, match="holds no run; pass the run_dir of one"):
        watch(tmp_path, print)  # somebody's folder: nothing will come


@pytest.mark.parametrize("look", [lambda root: watch(root, print), write_report], ids=["watch", "report"])
def test_a_folder_that_is_not_there_is_said_at_once(tmp_path: Path, look) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(SaerlError, match="minne is not a folder; did you mean .*mine\\?"):
        look(tmp_path / "minne")
    with pytest.raises(SaerlError, match="nowhere is not a folder; pass the run_dir"):
        look(tmp_path / "nowhere")
    with pytest.raises(SaerlError, match="run is not a folder; pass the run_dir"):
        look(tmp_path / "no" / "run")


@pytest.mark.parametrize("held", [[], ["sae/cfg.json"], ["labels.json"], ["compare.json", "sae/cfg.json"]])
def test_a_run_that_has_not_begun_is_waited_for(tmp_path: Path, held) -> None:
    for name in held:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")

    class Waited(Exception):
        pass

    def echo(line: str) -> None:
        assert line.startswith("waiting for")
        raise Waited

    with pytest.raises(Waited):
        watch(tmp_path, echo, every=0.01)


def test_steps_are_counted_against_the_total(tmp_path: Path) -> None:
    write(tmp_path / "run", 1, 2, None)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": {"train": {"steps": 7}}}))
    (tmp_path / "run" / "summary.json").write_text("{}")
    said: list[str] = []
    watch(tmp_path / "run", said.append, every=0.01)
    assert said[0].startswith("step     2/7 eval")


def test_ctrl_c_ends_the_command_quietly(tmp_path: Path) -> None:
    write(tmp_path / "run", 1, 2, None)
    command = [sys.executable, "-m", "saerl_fast.cli", "watch", str(tmp_path / "run"), "--every", "0.1"]
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "kernels" / "torch-ext")])
    process = subprocess.Popen(
        command,
        cwd=root,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    deadline = time.time() + 60
    while not (tmp_path / "run" / "live.png").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and err == "" and out.startswith("step     2 eval")


def test_warnings_stand_behind_the_row_and_holes_are_said_once(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run", echo=lambda line: None) as log:
        for step in (1, 2, 6):
            log.log(rows(step)[0] | ({"alarms": ["no signal"], "begun": ["no signal"]} if step == 6 else {}))
    (tmp_path / "run" / "summary.json").write_text("{}")
    said: list[str] = []
    watch(tmp_path / "run", said.append, every=0.01)
    assert said[0].startswith("step     6 train") and said[0].endswith("  ! no signal: 1 steps")
    assert said[1] == f"{tmp_path / 'run'}: metrics.jsonl lacks the training steps 3 to 5" and len(said) == 3


def test_a_copy_does_not_end_a_comparison(tmp_path: Path, monkeypatch) -> None:
    from saerl_fast.records import watch as module

    (tmp_path / "compare.json").write_text(json.dumps({"arms": ["vanilla", "adaptive"], "seeds": [0]}))
    for name in ("vanilla", "old/vanilla"):
        write(tmp_path / name, 1, 2, None)
        (tmp_path / name / "run.json").write_text(json.dumps({"arm": "vanilla", "seed": 0, "id": "x"}))
        (tmp_path / name / "summary.json").write_text("{}")
    looks: list[float] = []

    def add(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            write(tmp_path / "adaptive", 1, 2, None)
            (tmp_path / "adaptive" / "run.json").write_text(json.dumps({"arm": "adaptive", "seed": 0}))
            (tmp_path / "adaptive" / "summary.json").write_text("{}")

    monkeypatch.setattr(module.time, "sleep", add)
    said: list[str] = []
    watch(tmp_path, said.append, every=0.01)
    assert len(looks) == 2 and sum("is a copy of" in line for line in said) == 1


def test_a_run_that_loads_its_model_is_waited_for(tmp_path, monkeypatch):
    def wait(seconds):
        raise KeyboardInterrupt

    said: list[str] = []
    with lock(tmp_path / "arm"), pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(time, "sleep", wait)
        watch(tmp_path, said.append)
    assert said == [f"waiting for {tmp_path}/metrics.jsonl"]


@pytest.mark.parametrize("what", [".", "adaptive"])
def test_what_is_removed_is_not_waited_for(tmp_path: Path, what: str) -> None:
    root = tmp_path / "run"
    write(root / "adaptive", 1, 2, None)
    said: list[str] = []

    def echo(line: str) -> None:
        said.append(line)
        shutil.rmtree(root / what)

    with pytest.raises(SaerlError, match=f"{root if what == '.' else root / what} was removed"):
        watch(root, echo, every=0.01)
    assert len(said) == 1


@pytest.mark.parametrize("content", [b"", b'{"step": 1, "kind": "tra\n'])
def test_a_run_that_ended_without_a_readable_row_does_not_keep_a_comparison_open(tmp_path, content) -> None:
    (tmp_path / "compare.json").write_text(json.dumps({"arms": ["vanilla", "adaptive"], "seeds": [0]}))
    for name in ("vanilla", "adaptive"):
        write(tmp_path / name, 1, 2, None)
        (tmp_path / name / "run.json").write_text(json.dumps({"arm": name, "seed": 0}))
        (tmp_path / name / "summary.json").write_text("{}")
    (tmp_path / "vanilla" / "metrics.jsonl").write_bytes(content)
    said: list[str] = []
    figure = watch(tmp_path, said.append, every=0.01)
    assert f"{tmp_path / 'vanilla'}: it has ended, and metrics.jsonl holds no step" in said
    assert said[-1] == f"ended; {figure} holds the curves"
    (tmp_path / "adaptive" / "metrics.jsonl").write_bytes(content)
    figure.unlink()
    (tmp_path / ".live.png.0123456789abcdef.tmp").touch()  # of one that was killed
    watch(tmp_path, said.append, every=0.01)
    assert said[-1] == "ended; there is no curve" and not list(tmp_path.glob("*.tmp"))
