"""The benchmark runner: failures and time limits of one part leave the others, and what was measured."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import harness, run_all

WRITES = """
import json, sys
entry = {"name": "test_a[1]", "fullname": "a", "stats": {}, "extra_info": {"k": 1, "contenders": {}}}
found = {"benchmarks": [entry], "datetime": "now", "version": "5", "machine_info": 1}
json.dump(found, open(sys.argv[1], "w"))
"""
INTERRUPTED = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n" + "".join(
    f"    {line}\n" for line in WRITES.strip().splitlines()
)


def part(name, code, tmp_path, output=True):
    command = [sys.executable, "-c", code, "{output}"]
    return run_all.Part(name, command, 1.0, tmp_path / f"{name}.json" if output else None)


def test_a_failure_stops_nothing(tmp_path):
    (tmp_path / "silent.json").write_text("old")
    found = [
        part("broken", "raise SystemExit(3)", tmp_path, output=False),
        part("partial", WRITES + "raise SystemExit(1)", tmp_path),
        part("silent", "", tmp_path),
        part("good", WRITES, tmp_path),
    ]
    failures = run_all.run(found, None)
    assert failures == ["broken: exit status 3", "partial: exit status 1", "silent: wrote no result"]
    assert (tmp_path / "silent.json").read_text() == "old"  # a run without results replaces none
    for name in ("partial", "good"):
        written = json.loads((tmp_path / f"{name}.json").read_text())
        assert set(written) == {"benchmarks", "datetime", "version"}
        assert written["benchmarks"][0]["extra_info"]["k"] == 1


def test_a_part_over_its_time_writes_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "GRACE", 5.0)
    failures = run_all.run([part("slow", INTERRUPTED, tmp_path)], 9.0)
    assert len(failures) == 1 and failures[0].startswith("slow: stopped after 4 s")
    assert (tmp_path / "slow.json").is_file()


def test_parts(tmp_path):
    names = [found.name for found in run_all.parts(tmp_path)]
    assert names[0] == "encode" and {"pool", "decode", "kmeans"} < set(names)


def test_exit_status(monkeypatch, tmp_path):
    monkeypatch.setenv("SAERL_BENCH_GRID", "tiny")
    for failures in ([], ["encode: exit status 1"]):
        monkeypatch.setattr(run_all, "run", lambda found, seconds, failures=failures: failures)
        assert run_all.main(["--results", str(tmp_path)]) == bool(failures)
    with pytest.raises(SystemExit):
        run_all.main(["--only", "nothing"])


def test_a_missing_command_costs_no_measurement(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert harness.environment(torch.device("cpu"))["commit"] == ""


def test_peak_memory():
    device = torch.device("cpu")
    peak = harness.peak_memory(lambda: torch.ones(16 << 18), device)
    if peak is None:
        pytest.skip("this system does not tell")
    assert 15 < peak < 24
    assert harness.peak_memory(lambda: None, device) < 4


def test_rounds_end_with_the_seconds(monkeypatch):
    calls = []
    monkeypatch.setenv("SAERL_BENCH_SHAPE_SECONDS", "0")
    call = {"linear": lambda: calls.append(0)}
    harness.measure(call, torch.device("cpu"), 50, base="linear", memory=False)
    assert len(calls) == 1 + harness.LEAST_ROUNDS
    monkeypatch.setenv("SAERL_BENCH_SHAPE_SECONDS", "60")
    harness.measure(call, torch.device("cpu"), 50, base="linear", memory=False)
    assert len(calls) == 1 + harness.LEAST_ROUNDS + 51
