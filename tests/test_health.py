"""Warnings of training: each rule begins once, is counted, ends, and survives a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from saerl_fast.config import load_config
from saerl_fast.errors import SaerlError
from saerl_fast.records.log import read_metrics
from saerl_fast.rl.health import Health
from tests.training import dying_reward, run, small, timeless

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
GOOD = {
    "kind": "train", "reward": 0.4, "loss": 0.01, "entropy": 0.8, "clipped": 0.0, "kl": 0.0, "mismatch": 1e-6,
    "grad_norm": 1.5, "groups": 16, "groups_used": 12, "length": 20.0, "finished": 0.9,
}  # fmt: skip
NO_UPDATE = {"groups_used": 0, "loss": None, "grad_norm": None, "entropy": None, "mismatch": None}
BAD = {
    "no signal": NO_UPDATE,
    "updates skipped": {"grad_norm": math.nan, "loss": math.nan},
    "no gradient": {"grad_norm": 0.0},
    "gradient explodes": {"grad_norm": 151.0},
    "entropy collapses": {"entropy": 0.039},
    "entropy explodes": {"entropy": 2.5},
    "completions collapse": {"length": 1.0},
    "completions cut off": {"finished": 0.05},
    "far from the reference": {"kl": 1.5},
    "mostly clipped": {"clipped": 0.6},
    "mismatch": {"mismatch": 0.2},
    "sampling exhausted": {"groups_used": 3, "draws": 3},
    "features are zero": {},
}
FINE = [
    {"entropy": 0.05, "length": 2.5, "finished": 0.2, "grad_norm": 149.0},
    {"entropy": 2.3, "kl": 0.9, "clipped": 0.4, "mismatch": 9e-4, "groups_used": 1},
]


def health(state=None, beta=0.1, prompts=16, **change) -> Health:
    cfg = load_config().train
    cfg.steps, cfg.dynamic_sampling, cfg.loss.beta, cfg.rollout.prompts_per_step = 100, 2, beta, prompts
    for name, value in change.items():
        setattr(cfg, name, value)
    return Health(cfg, 1e-3, state)


def go(watch: Health, rows, first: int = 1, blind: bool = False) -> list[tuple[int, str]]:
    """(step, warning) of each that began."""
    return [
        (step, name)
        for step, row in enumerate(rows, first)
        for name in watch.see({**GOOD, **row, "step": step}, blind=blind)
    ]


@pytest.mark.parametrize("name", BAD)
def test_a_rule_warns_once_after_its_steps_and_again_when_it_began_anew(name: str) -> None:
    watch = health(beta=0.0) if name == "no signal" else health()
    begins = 1 if name in ("updates skipped", "mismatch") else 5
    said = []

    def steps(rows, first, bad):
        said.extend(go(watch, rows, first, blind=bad and name == "features are zero"))

    steps([{}] * 3, 1, False)
    steps([BAD[name]] * 4, 4, True)
    steps([{}], 8, False)  # one good step: a warning that stands stays, a count begins again
    steps([BAD[name]] * 8, 9, True)
    steps([{}] * 5, 17, False)
    steps([BAD[name]] * 5, 22, True)
    first = 4 if begins == 1 else 13
    again = 22 if begins == 1 else 26
    assert said == [(first, name), (again, name)]
    assert watch.warnings == {
        name: {"first": first, "times": 2, "steps": 4 + 8 + 5 if begins == 1 else 4 + 1}
    }


@pytest.mark.parametrize("row", FINE)
def test_what_is_within_bounds_is_not_warned_of(row) -> None:
    assert go(health(), [{}, *[row] * 20]) == []


def test_a_row_names_what_holds_and_a_healthy_row_stays_as_it_is() -> None:
    watch, rows = (
        health(),
        [{**GOOD, "step": i, **(BAD["entropy explodes"] if i > 1 else {})} for i in range(1, 9)],
    )
    for row in rows:
        watch.see(row)
    assert [row.get("alarms") for row in rows] == [None] * 5 + [["entropy explodes"]] * 3
    assert [row.get("begun") for row in rows] == [None] * 5 + [["entropy explodes"]] + [None] * 2


def test_a_short_run_that_is_wrong_from_end_to_end_is_warned_of() -> None:
    assert go(health(steps=2, beta=0.0, prompts=2), [NO_UPDATE] * 2) == [(2, "no signal")]
    few = go(health(beta=0.0, prompts=1), [NO_UPDATE] * 30)
    assert few == [(20, "no signal")]  # single prompts are often too easy or too hard


@pytest.mark.parametrize(
    ("length", "finished", "why"),
    [
        (1.0, 1.0, "every completion ends at once"),
        (0.0, 1.0, "every completion ends at once"),  # an engine that does not count the end
        (6.0, 0.0, "no completion ended"),
        (6.0, 1.0, "the mean reward is"),
    ],
)
def test_why_there_is_no_signal(length: float, finished: float, why: str) -> None:
    watch = health(steps=2, beta=0.0, prompts=2)
    rows = [{**GOOD, **NO_UPDATE, "length": length, "finished": finished, "step": i} for i in (1, 2)]
    assert f"({why}" in [watch.see(row) for row in rows][1]["no signal"]


def test_warnings_can_be_switched_off() -> None:
    row = {**GOOD, **BAD["mismatch"], "step": 1}
    assert health(warn_after=0).see(row) == {} and "alarms" not in row


@pytest.mark.parametrize(
    ("n", "accuracies", "said"),
    [
        (240, [0.355, 0.3, 0.0], [2]),  # 3 errors are 0.093
        (240, [0.355, 0.28, 0.28], [2]),  # more than 2 errors, twice
        (240, [0.355, 0.28, 0.34, 0.28], []),
        (8, [0.355, 0.0, 0.0], [2]),
        (3, [0.17, 0.0, 0.1], []),
        (64, [1.0, 0.98, 0.7], [2]),
        (64, [0.5, 0.0, 0.5, 0.0], [1, 3]),
        (64, [0.4, math.nan], [1]),
        (64, [-3.0, -3.2, -6.0], [2]),
        (64, [0.0, 0.0, 0.3], []),
    ],
)
def test_an_accuracy_surely_below_the_start(n: int, accuracies, said) -> None:
    watch = health()
    rows = [{"kind": "eval", "step": i, "accuracy": a, "n": n} for i, a in enumerate(accuracies)]
    assert [row["step"] for row in rows if watch.see(row)] == said


@pytest.mark.parametrize("cut", range(1, 12))
def test_the_state_survives_a_checkpoint(cut: int) -> None:
    rows = [{}, *[BAD["entropy collapses"]] * 3, {}, *[BAD["entropy collapses"] | BAD["mismatch"]] * 7]
    whole, part = health(), health()
    first = go(whole, rows)
    said = go(part, rows[:cut])
    resumed = health(json.loads(json.dumps(part.state)))
    assert said + go(resumed, rows[cut:], cut + 1) == first and resumed.state == whole.state


def test_no_false_alarm_on_the_committed_runs() -> None:
    files = sorted(RESULTS.rglob("metrics.jsonl"))
    assert len(files) >= 25
    for file in files:
        settings = json.loads((file.parent / "run.json").read_text())["config"]["train"]
        prompts = settings["rollout"]["prompts_per_step"]
        watch = health(steps=settings["steps"], dynamic_sampling=0, beta=0.0, prompts=prompts)
        for row in read_metrics(file):
            assert row["kind"] not in ("train", "eval") or watch.see(row) == {}, file


def constant(prompts, completions, **columns):
    return [0.0] * len(completions)


def test_a_run_without_signal_says_so_once(tmp_path: Path, caplog) -> None:
    _, _, summary = run(tmp_path, small(), reward=constant)
    assert summary["warnings"]["no signal"] == {"first": 5, "times": 1, "steps": 2}
    assert json.loads((tmp_path / "summary.json").read_text())["warnings"] == summary["warnings"]
    said = [r.message for r in caplog.records if "no signal: " in r.message]
    assert len(said) == 1 and said[0].startswith("step 5: no signal: no group has two different rewards")
    rows = {row["step"]: row for row in read_metrics(tmp_path) if row["kind"] == "train"}
    assert "no signal" in rows[5]["begun"] and "no signal" in rows[6]["alarms"] and "alarms" not in rows[4]


def test_a_model_destroyed_by_its_learning_rate_is_said(tmp_path: Path, caplog) -> None:
    _, _, summary = run(tmp_path, small(warmup_steps=0, lr=1e3))
    assert summary["warnings"] and all(name in caplog.text for name in summary["warnings"])


def test_a_healthy_run_warns_of_nothing(tmp_path: Path) -> None:
    _, _, summary = run(tmp_path, small())
    assert summary["warnings"] == {} and summary["mismatch_steps"] == 0
    assert all("alarms" not in row for row in read_metrics(tmp_path))


def test_warnings_resume_bit_for_bit(tmp_path: Path) -> None:
    cfg = small(warn_after=2, save_every=1)
    _, _, whole = run(tmp_path / "one", cfg, reward=constant)
    with pytest.raises(SaerlError, match="Die"):
        run(tmp_path / "two", cfg, reward=dying_reward(6, constant))
    _, _, again = run(tmp_path / "two", cfg, reward=constant, resume=True)
    assert again["warnings"] == whole["warnings"] and "no signal" in whole["warnings"]
    assert timeless(tmp_path / "one" / "metrics.jsonl") == timeless(tmp_path / "two" / "metrics.jsonl")
