import json
from pathlib import Path

import pytest

from saerl_fast.config import load_config
from saerl_fast.errors import SaerlError
from saerl_fast.stages import compare as module
from saerl_fast.stages.compare import compare, parse_arm
from saerl_fast.stages.console import Echo

POOL = Path(__file__).parents[1] / "examples" / "demo" / "pool.jsonl"


def test_an_arm_is_a_schedule_or_a_name_with_settings():
    assert parse_arm("global") == ("global", ["plan.schedule=global"])
    name, overrides = parse_arm("cold:plan.schedule=adaptive;plan.adaptive.use_labels=false")
    assert (name, overrides[0]) == ("cold", "plan.schedule=adaptive")
    assert parse_arm("sequence:train.loss.kind=gspo")[1] == ["train.loss.kind=gspo"]  # the config's schedule
    assert parse_arm("rev:plan.schedule=mymod:reverse") == ("rev", ["plan.schedule=mymod:reverse"])
    assert parse_arm("vanilla:train.lr=1e-5")[1] == ["plan.schedule=vanilla", "train.lr=1e-5"]


@pytest.mark.parametrize(
    "text", ["a/b", "sae", "../x:plan.schedule=global", "x:data.limit=3", "x:seed=1", ""]
)
def test_bad_arms(text):
    with pytest.raises(SaerlError):
        parse_arm(text)


def test_an_arm_that_is_a_function_is_told_to_take_a_name():
    with pytest.raises(SaerlError, match="e.g. mine:plan.schedule=mymod:reverse"):
        parse_arm("mymod:reverse")


@pytest.fixture
def recorded(monkeypatch):
    """Replace training by a record of what would run."""
    calls = []

    def fake(config, echo, *, out, arm, resume):
        calls.append((arm, config.plan.schedule, config.train.seed, out.name, resume))
        out.mkdir(parents=True, exist_ok=True)
        mark = module.fingerprint(config, module.RUN_SECTIONS)
        described = {"arm": arm, "seed": config.train.seed, "fingerprint": mark}
        (out / "run.json").write_text(json.dumps(described))
        rows = [{"step": s, "kind": "eval", "accuracy": 0.1 * s} for s in range(3)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if arm != "global":
            (out / "summary.json").write_text("{}")

    monkeypatch.setattr(module, "train_stage", fake)
    return calls


def settings(tmp_path, *more):
    return load_config(None, [f"run_dir={tmp_path}", f"data.train={POOL}", *more])


def test_arms_times_seeds_then_only_what_is_missing(tmp_path, recorded):
    config = settings(tmp_path, "compare.arms=vanilla,global", "compare.seeds=4,7")
    compare(config, Echo(quiet=True))
    assert recorded == [
        ("vanilla", "vanilla", 4, "vanilla", False),
        ("global", "global", 4, "global", False),
        ("vanilla", "vanilla", 7, "vanilla.seed-7", False),
        ("global", "global", 7, "global.seed-7", False),
    ]
    assert "| vanilla | 2 |" in (tmp_path / "report.md").read_text()
    recorded.clear()
    compare(config, Echo(quiet=True))  # vanilla has finished; global was cut off and is resumed
    assert [(arm, resume) for arm, *_, resume in recorded] == [("global", True), ("global", True)]


def test_a_run_with_other_settings_is_not_touched(tmp_path, recorded):
    compare(settings(tmp_path, "compare.arms=vanilla"), Echo(quiet=True))
    before = (tmp_path / "vanilla" / "metrics.jsonl").read_text()
    with pytest.raises(SaerlError, match="other settings"):
        compare(settings(tmp_path, "compare.arms=vanilla", "train.lr=0.5"), Echo(quiet=True))
    assert (tmp_path / "vanilla" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("bad", ["compare.arms=vanilla,vanilla", "compare.seeds=1,1", "compare.arms=zigzag"])
def test_wrong_lists_stop_before_anything_runs(tmp_path, recorded, bad):
    with pytest.raises(SaerlError):
        compare(settings(tmp_path / "r", bad), Echo(quiet=True))
    assert recorded == []
