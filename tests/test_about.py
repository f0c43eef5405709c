import json
import re
import subprocess

import torch

from saerl_fast.stages.about import about, runs_of


def test_what_a_record_says_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = about("cpu")
    assert made["torch"] == torch.__version__ and made["device"] == "cpu" and made["git"] is None
    assert {"saerl", "python", "transformers", "numpy", "date", "system", "threads"} <= made.keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", made["date"])


def test_the_commit_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "x")
        monkeypatch.setenv(f"{name}_EMAIL", "x")
    (tmp_path / "file").write_text("one")
    for command in ("init -q", "add file", "commit -q -m one"):
        subprocess.run(["git", *command.split()], check=True)
    commit = about("cpu")["git"]
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "file").write_text("two")
    assert about("cpu")["git"] == commit + "+"


def test_a_run_that_is_resumed_keeps_its_beginning(tmp_path):
    one, two, three = ({"torch": name} for name in "123")
    for made, expected in [(one, []), (two, [two]), (three, [two, three])]:
        record = runs_of(tmp_path, made, [0.5] if made == one else [0.6])
        assert record["made"] == one and record.get("resumed", []) == expected
        assert record["target_values"] == [0.5]  # what was registered
        (tmp_path / "run.json").write_text(json.dumps(record))
