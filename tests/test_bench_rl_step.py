"""The benchmark of a training step: its contenders step when told to; what is not equal is noticed."""

from __future__ import annotations

import multiprocessing
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest

from benchmarks import bench_rl_step as bench
from benchmarks import rl_contenders
from saerl_fast.rl.loss import policy_loss


@contextmanager
def in_thread(kind, job):
    """`bench.contender` without the minute that starting processes takes."""
    pipe, other = multiprocessing.Pipe()
    thread = threading.Thread(target=rl_contenders.work, args=(kind, job, other), daemon=True)
    thread.start()

    def say(order=()):
        pipe.send(list(order))
        return hear()

    def hear():
        assert pipe.poll(60), "no answer"
        report = pipe.recv()
        assert "error" not in report, report
        return report

    say.ready = hear()
    yield say
    if thread.is_alive():
        pipe.send(None)
        thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def job(tmp_path):
    sizes = {"prompts": 2, "group": 4, "new_tokens": 3, "limit": 64, "threads": 1}
    return bench.make_job(tmp_path, ends=False, reward="spread", **sizes)


def test_both_trainers_compute_the_same_and_generate_as_much(job):
    pytest.importorskip("trl")
    with in_thread("agreement", job) as call:
        assert call.ready["advantages"] < 1e-5 and call.ready["loss"] < 1e-5
        assert call.ready["gradients"] < 1e-3 < call.ready["scale"]
    with in_thread("trl", job) as theirs, in_thread("ours", job) as ours:
        reports = {"TRL": [theirs(), theirs()], "ours": [ours(), ours()]}
    table = bench.tabulate(reports, job, base="TRL")
    assert table["TRL"]["ratio"] == 1.0 and table["ours"]["ratio"] > 0
    assert {row["tokens_per_step"] for row in table.values()} == {2 * 4 * 3}
    assert table["ours"]["samples_per_s"] == pytest.approx(8 / (table["ours"]["p50_ms"] / 1e3))
    assert 0 < table["ours"]["phases"]["generate"] < sum(table["ours"]["phases"].values()) < 1.001


def test_a_wrong_loss_is_noticed(job, monkeypatch):
    pytest.importorskip("trl")

    def scaled(*args):
        loss, sums = policy_loss(*args)
        return 1.01 * loss, sums

    monkeypatch.setattr(rl_contenders, "policy_loss", scaled)
    with in_thread("agreement", job) as call:
        assert call.ready["gradients"] > 1e-3


def test_a_told_order_gives_the_same_training(job, tmp_path):
    with in_thread("prepare", job):
        pass
    with in_thread("ours", replace(job, signals=True)) as full, in_thread("ours", job) as plain:
        found = [full() for _ in range(2)]
        again = [plain(report["order"]) for report in found]
        shuffled = plain()
    assert [row["result"] for row in again] == [row["result"] for row in found]
    assert shuffled["order"] not in [row["order"] for row in found]
    assert found[0]["phases"]["encode"] > 0 == again[0]["phases"].get("encode", 0.0)
