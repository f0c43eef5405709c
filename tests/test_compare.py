import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from saerl_fast.config import load_config, to_dict
from saerl_fast.errors import SaerlError
from saerl_fast.records import manifest
from saerl_fast.records.lock import lock
from saerl_fast.records.report import write_report
from saerl_fast.records.runs import open_run
from saerl_fast.stages import compare as module
from saerl_fast.stages.compare import compare, parse_arm
from saerl_fast.stages.console import Echo
from tests.test_lock import fork, status
from tests.test_report import record_run

POOL = Path(__file__).parents[1] / "examples" / "demo" / "pool.jsonl"


def test_an_arm_is_a_schedule_or_a_name_with_settings():
    assert parse_arm("global") == ("global", ["plan.schedule=global"])
    name, overrides = parse_arm("cold:plan.schedule=adaptive;plan.adaptive.use_labels=false")
    assert (name, overrides[0]) == ("cold", "plan.schedule=adaptive")
    assert parse_arm("sequence:train.loss.kind=gspo")[1] == ["train.loss.kind=gspo"]  # the config's schedule
    with pytest.raises(SaerlError, match="'x' lacks a value; .* e.g. mine:plan.filter=true;train.lr=1e-4$"):
        parse_arm("a:plan.schedule=mopps;x")
    with pytest.raises(SaerlError, match="e.g. mine:plan.schedule=mymod:reverse$"):
        parse_arm("mymod:reverse")
    assert parse_arm("rev:plan.schedule=mymod:reverse") == ("rev", ["plan.schedule=mymod:reverse"])
    assert parse_arm("vanilla:train.lr=1e-5")[1] == ["plan.schedule=vanilla", "train.lr=1e-5"]


@pytest.mark.parametrize(
    "text", ["a/b", "sae", "../x:plan.schedule=global", "x:data.limit=3", "x:seed=1", ""]
)
def test_bad_arms(text):
    with pytest.raises(SaerlError):
        parse_arm(text)


@pytest.mark.parametrize("asked", ["vanilla,{},mopps", '["vanilla", "{}", "mopps"]'])
def test_an_arm_may_hold_lists(asked):
    arm = "x:plan.adaptive.features=[sae,hidden];plan.filter=true"
    found = load_config(None, ["compare.arms=" + asked.format(arm)]).compare.arms
    assert found == ["vanilla", arm, "mopps"]
    mine = module.apply_overrides(load_config(None, []), parse_arm(found[1])[1])
    assert mine.plan.adaptive.features == ["sae", "hidden"]


def test_an_arm_that_is_a_function_is_told_to_take_a_name():
    with pytest.raises(SaerlError, match="e.g. mine:plan.schedule=mymod:reverse"):
        parse_arm("mymod:reverse")


def test_columns_that_the_pool_lacks_are_refused_before_anything_is_made(tmp_path):
    arm = "compare.arms=vanilla,cell:plan.adaptive.features=[columns];plan.adaptive.columns=[{}]"
    with pytest.raises(SaerlError, match=r"columns names 'levl', which the pool lacks.*did you mean level\?"):
        compare(settings(tmp_path, arm.format("task,levl")), Echo(quiet=True))
    assert not (tmp_path / "sae").exists()


@pytest.fixture
def recorded(monkeypatch):
    """Replace training by a record of what would run."""
    calls = []

    def fake(config, echo, *, out, arm, resume, redo, session, enough):
        calls.append((arm, config.plan.schedule, config.train.seed, out.name, resume))
        out.mkdir(parents=True, exist_ok=True)
        mark = module.fingerprint(config, module.run_sections(config))
        described = {"arm": arm, "seed": config.train.seed, "fingerprint": mark}
        described["target_values"] = config.compare.target_values
        with manifest.publish(out, "run", {"fingerprint": mark, "config": to_dict(config)}) as new:
            new("run.json").write_text(json.dumps(described))
        rows = [{"step": s, "kind": "eval", "accuracy": 0.1 * s} for s in range(3)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if arm != "global":
            (out / "summary.json").write_text("{}")
            manifest.record(out, "result", ["summary.json", "metrics.jsonl"])

    monkeypatch.setattr(module, "train_stage", fake)
    monkeypatch.setattr(module, "_check_plans", lambda arms, echo: None)
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


def test_runs_stay_in_their_folders_when_seeds_are_put_before_them(tmp_path, recorded):
    arms = "compare.arms=vanilla,adaptive"
    compare(settings(tmp_path, arms, "compare.seeds=4,7"), Echo(quiet=True))
    recorded.clear()
    compare(settings(tmp_path, arms, "compare.seeds=9,7,4"), Echo(quiet=True))
    assert [(arm, seed, name) for arm, _, seed, name, _ in recorded] == [
        ("vanilla", 9, "vanilla.seed-9"),
        ("adaptive", 9, "adaptive.seed-9"),
    ]
    assert "| vanilla | 3 |" in (tmp_path / "report.md").read_text()
    recorded.clear()
    compare(settings(tmp_path, arms, "compare.seeds=7"), Echo(quiet=True), redo=True)  # nothing to redo
    assert not recorded and "| vanilla | 1 |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("train.seed=5", "but compare.seeds gives each arm the same seeds"),
        ("train.eval.every=0", "but all arms are evaluated alike"),
        ("train.eval={mode: prob}", "but all arms are evaluated alike"),
    ],
)
def test_an_arm_does_not_set_what_pairs_have_in_common(arm, said):
    with pytest.raises(SaerlError, match=said):
        parse_arm(f"x:{arm}")


def test_an_arm_with_another_reward_is_not_measured_by_it(tmp_path, recorded, capsys):
    rewards = "compare.arms=vanilla,x:plan.schedule=vanilla;train.reward=numeric"
    with pytest.raises(SaerlError, match=r"x would be evaluated by train.reward \(numeric, vanilla: exact\)"):
        compare(settings(tmp_path / "r", rewards), Echo(quiet=True))
    assert not recorded and not (tmp_path / "r").exists()
    compare(settings(tmp_path / "r", rewards, "train.eval.mode=prob"), Echo(quiet=True))
    assert len(recorded) == 2 and "evaluated with" not in capsys.readouterr().out
    short = "compare.arms=vanilla,x:plan.schedule=vanilla;train.rollout.max_new_tokens=3"
    compare(settings(tmp_path / "s", short), Echo(quiet=True))
    said = "x is evaluated with train.rollout.max_new_tokens (3, vanilla: 64), as it is trained."
    assert said in capsys.readouterr().out and said in (tmp_path / "s" / "report.md").read_text()


def test_targets_without_evaluations_on_the_way_are_refused(tmp_path, recorded):
    with pytest.raises(SaerlError, match="target_values are measured by .*; set train.eval.every"):
        compare(settings(tmp_path, "compare.target_values=0.3", "train.eval.every=0"), Echo(quiet=True))
    assert not recorded


def test_targets_given_after_the_runs_are_not_called_registered(tmp_path, recorded, capsys):
    given = ["compare.arms=vanilla,adaptive", "compare.target_values=[0.15,0.1]"]
    compare(settings(tmp_path / "a", *given), Echo(quiet=True))
    compare(settings(tmp_path / "a", *given[:1], "compare.target_values=[0.1,0.15]"), Echo(quiet=True))
    assert "were registered before the run" in (tmp_path / "a" / "report.md").read_text()
    compare(settings(tmp_path / "b", given[0]), Echo(quiet=True))
    capsys.readouterr()
    compare(settings(tmp_path / "b", *given), Echo(quiet=True))
    told = (tmp_path / "b" / "report.md").read_text()
    assert "registered before" not in told and "Targets were given after the start of some runs" in told
    assert "2 of 2 runs were begun without compare.target_values as they are now" in capsys.readouterr().out


def test_targets_that_end_a_run_are_known_beforehand(tmp_path):
    with pytest.raises(SaerlError, match="set compare.target_values"):
        settings(tmp_path, "compare.until=true")
    config = settings(tmp_path, "compare.until=true", "compare.target_values=[0.3,0.39]")
    rise = [(10 * i, 0.1 * i) for i in range(8)]
    enough = partial(module._enough, config, config.compare.target_values)
    assert [enough(rise[:count]) for count in range(8)] == [False] * 6 + [True] * 2
    assert not enough([(0, 0.9)])  # a step is taken at least


def test_pilots_fix_the_targets_of_other_seeds(tmp_path, recorded):
    root = tmp_path / "r"
    asked = ["compare.arms=vanilla,adaptive", "compare.seeds=4,7", "compare.smooth=1"]
    config = settings(root, *asked, "compare.pilots=11,12", "compare.until=true")
    compare(config, Echo(quiet=True))
    assert [(arm, seed, name) for arm, _, seed, name, _ in recorded] == [
        ("vanilla-pilot", 11, "vanilla.seed-11"),
        ("vanilla-pilot", 12, "vanilla.seed-12"),
        ("vanilla", 4, "vanilla"),
        ("adaptive", 4, "adaptive"),
        ("vanilla", 7, "vanilla.seed-7"),
        ("adaptive", 7, "adaptive.seed-7"),
    ]
    assert (root / "pilot" / "vanilla.seed-12" / "metrics.jsonl").is_file()
    kept = json.loads((root / "compare.json").read_text())
    assert kept["target_values"] == [0.12, 0.16] and kept["pilots"] == [11, 12]  # of a gain of .2 from 0
    text = (root / "report.md").read_text()
    assert "| vanilla | 2 |" in text and "Targets come from 2 runs of the first arm with other seeds" in text
    assert "pilot" not in text.replace("compare.pilots", "")
    recorded.clear()
    compare(config, Echo(quiet=True))  # all of it is there, and so are the targets
    assert not recorded and json.loads((root / "compare.json").read_text()) == kept
    given = settings(tmp_path / "b", *asked, "compare.pilots=11", "compare.target_values=[0.1]")
    compare(given, Echo(quiet=True))
    assert not (tmp_path / "b" / "pilot").exists() and len(recorded) == 4
    told = (tmp_path / "b" / "report.md").read_text()
    assert "so compare.pilots are not run" in told and "were registered before the run" in told
    with pytest.raises(SaerlError, match="compare.pilots and compare.seeds both have 4"):
        compare(settings(root, *asked, "compare.pilots=4,5"), Echo(quiet=True))


def test_a_damaged_run_json_is_mended_by_the_comparison(tmp_path, recorded):
    """Of a pilot as of a run, which goes on without a step; what names the command is right."""
    config = settings(tmp_path, "compare.arms=vanilla", "compare.seeds=4,7", "compare.pilots=11")
    compare(config, Echo(quiet=True))
    recorded.clear()
    for out in (tmp_path / "pilot" / "vanilla.seed-11", tmp_path / "vanilla.seed-7"):
        (out / "run.json").write_text("[]")
        with pytest.raises(SaerlError, match=r"run.json is damaged.*`saerl compare` and the settings"):
            open_run(out)
        compare(config, Echo(quiet=True))
        assert open_run(out).seed in (11, 7)
    assert [(arm, seed, resume) for arm, _, seed, _, resume in recorded] == [
        ("vanilla-pilot", 11, True),
        ("vanilla", 7, True),
    ]


def test_a_run_ended_early_is_not_reopened_for_lost_rows(tmp_path, recorded):
    config = settings(tmp_path, "compare.arms=vanilla", "compare.target_values=[0.15]", "compare.until=true")
    compare(config, Echo(quiet=True))
    out, curve = tmp_path / "vanilla", [[0, 0.0], [1, 0.1], [2, 0.2], [3, 0.3]]
    (out / "summary.json").write_text(json.dumps({"steps": 3, "curve": curve}))
    rows = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(rows[:-1]))
    manifest.record(out, "result", ["summary.json"])  # as the trainer does
    assert not module._short(config, out, [0.15]) and module._short(config, out, [0.25])
    recorded.clear()
    compare(config, Echo(quiet=True))
    assert not recorded


def test_rows_lost_from_a_pilot_do_not_move_the_targets(tmp_path, recorded):
    config = settings(tmp_path, "compare.arms=vanilla", "compare.pilots=11")
    compare(config, Echo(quiet=True))
    kept = (tmp_path / "compare.json").read_text()
    rows = tmp_path / "pilot" / "vanilla.seed-11" / "metrics.jsonl"
    manifest.forget(rows.parent, "result")  # its hash would tell, too
    text = rows.read_text()
    rows.write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(
        SaerlError, match="vanilla.seed-11: .* remove that folder, and the pilot is run again"
    ):
        module._targets([("vanilla-pilot", config, rows.parent)], config)
    assert (tmp_path / "compare.json").read_text() == kept


@pytest.mark.parametrize(
    ("end", "targets"),
    [(0.4, [0.28, 0.34]), (0.1021, [0.10126, 0.10168]), (0.1 + 1e-9, [0.1000000006, 0.1000000008])],
)
def test_targets_are_told_as_finely_as_the_gain_asks(tmp_path, end, targets):
    runs = []
    for seed in (1, 2):
        out = tmp_path / f"vanilla.seed-{seed}"
        record_run(out, "vanilla", seed, [0.1, end])
        runs.append(("vanilla-pilot", settings(tmp_path), out))
    assert module._targets(runs, settings(tmp_path, "compare.smooth=1")) == pytest.approx(targets, abs=1e-12)


def test_a_damaged_record_of_the_comparison_is_written_anew(tmp_path, recorded):
    config = settings(tmp_path, "compare.arms=vanilla")
    compare(config, Echo(quiet=True))
    kept = (tmp_path / "compare.json").read_text()
    for damage in (kept[:20], "", '{"pools": 3}', "[]"):
        (tmp_path / "compare.json").write_text(damage)
        compare(config, Echo(quiet=True))
        assert (tmp_path / "compare.json").read_text() == kept
    assert len(recorded) == 1


def test_a_changed_record_of_the_comparison_is_refused(tmp_path, recorded):
    """One flipped bit would have made another report in silence; another target after the runs as well."""
    config = settings(tmp_path, "compare.arms=vanilla")
    compare(config, Echo(quiet=True))
    file = tmp_path / "compare.json"
    kept = file.read_text()
    for old, new in (('"smooth": 3', '"smooth": 7'), ("0.8", "0.9"), ('"smooth"', '"smoot,"')):
        assert old in kept
        file.write_text(kept.replace(old, new, 1))
        with pytest.raises(
            SaerlError, match=r"compare.json is not as it was written; run `saerl compare` again"
        ):
            write_report(tmp_path)
    compare(config, Echo(quiet=True))
    assert file.read_text() == kept and len(recorded) == 1
    file.write_text(json.dumps({k: v for k, v in json.loads(kept).items() if k != "sha256"}))
    write_report(tmp_path)  # as written before there was a hash


def test_pilots_hold_off_another_comparison(tmp_path, recorded):
    config = settings(tmp_path, "compare.arms=vanilla", "compare.pilots=11")
    compare(config, Echo(quiet=True))
    with lock(tmp_path / "pilot" / "vanilla.seed-11"), ThreadPoolExecutor(1) as pool:
        other = settings(tmp_path, "compare.arms=vanilla,global", "compare.pilots=11")
        with pytest.raises(SaerlError, match="of another comparison"):
            pool.submit(compare, other, Echo(quiet=True)).result()


def test_an_oracle_without_answers_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(30)))
    given = ["compare.arms=vanilla,oracle", f"data.train={tmp_path / 'p.jsonl'}", "data.answer_column=null"]
    reward = ["train.reward=examples.own_reward:close_enough", "train.eval.mode=sample", "data.eval_size=4"]
    with pytest.raises(SaerlError, match="plan.schedule=oracle"):
        compare(load_config(None, [f"run_dir={tmp_path / 'r'}", *given, *reward]), Echo(quiet=True))
    assert not (tmp_path / "r").exists()


def test_pilots_that_gain_nothing_end_in_a_sentence(tmp_path, recorded, monkeypatch):
    monkeypatch.setattr(module, "find_targets", lambda runs, settings: {})
    with pytest.raises(SaerlError, match="the pilots gain nothing"):
        compare(settings(tmp_path, "compare.arms=vanilla", "compare.pilots=11"), Echo(quiet=True))
    assert [seed for _, _, seed, *_ in recorded] == [11]


def test_each_seed_may_have_an_sae_of_its_own(tmp_path, recorded, monkeypatch):
    made, fake = [], module.train_stage

    def train(config, echo, **options):
        made.append((config.sae.seed, str(config.run_dir), options["out"].name))
        fake(config, echo, **options)

    monkeypatch.setattr(module, "train_stage", train)
    config = settings(tmp_path, "compare.arms=adaptive", "compare.seeds=4,7,9", "sae.seed=5")
    config.compare.vary_sae = True
    compare(config, Echo(quiet=True))
    assert made == [
        (5, str(tmp_path), "adaptive"),
        (6, str(tmp_path / "draws" / "seed-7"), "adaptive.seed-7"),
        (7, str(tmp_path / "draws" / "seed-9"), "adaptive.seed-9"),
    ]
    assert "| adaptive | 3 |" in (tmp_path / "report.md").read_text()
    made.clear()
    compare(config, Echo(quiet=True))
    assert made == []
    with pytest.raises(SaerlError, match="compare.vary_sae trains SAEs"):
        settings(tmp_path, "compare.vary_sae=true", "sae.path=somewhere")


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


def test_what_an_arm_does_not_name_is_said(tmp_path, recorded, capsys):
    """Order and loss at once: the paired verdict would be about neither."""
    arms = "compare.arms=vanilla,gspo:train.loss.kind=gspo,filtered:plan.schedule=vanilla;plan.filter=true"
    config = settings(tmp_path, arms, "data.id_column=prompt_id")
    compare(config, Echo(quiet=True))
    said = capsys.readouterr().out
    assert (
        "gspo differs from vanilla in more than it names: plan.schedule (adaptive, vanilla: vanilla)" in said
    )
    assert "an arm with plan.schedule=vanilla;plan.filter=false differs in the rest alone" in said
    assert "filtered differs" not in said
    (note,) = json.loads((tmp_path / "compare.json").read_text())["notes"]
    assert note in said and "gspo differs from vanilla" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("arms", "more"),
    [
        ("dapo:train.loss.kind=dapo,gspo:train.loss.kind=gspo", {}),
        ("vanilla:train.lr=1e-3,adaptive", {"train.lr", "plan.filter"}),
        ("vanilla,bare:plan.schedule=adaptive;plan.filter=false", {}),
        ("vanilla,adaptive", {"plan.filter"}),
        ("a:train.lr=1,b:train.lr=2;train.steps=3", {}),
    ],
)
def test_settings_that_are_not_named(tmp_path, arms, more):
    config = settings(tmp_path, "data.id_column=prompt_id")
    (_, first), (_, second) = (parse_arm(text) for text in arms.split(","))
    base, arm = (module.apply_overrides(config, one) for one in (first, second))
    assert set(module.confounded(base, arm, second)) == set(more)


@pytest.mark.parametrize("more", [{}, {"quality_label": None}, {"quality_label": 1}])
def test_without_quality_labels_no_arm_filters(tmp_path, more):
    plain = tmp_path / "pool.jsonl"
    rows = [{"prompt": f"{i}+1=", "answer": f"{i + 1}", **more} for i in range(20)]
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(None, [f"data.train={plain}", "data.eval_size=2", "plan.schedule=adaptive"])
    vanilla = module.apply_overrides(config, ["plan.schedule=vanilla"])
    assert module.confounded(vanilla, config, ["plan.schedule=adaptive"]) == {}
    asked = module.apply_overrides(config, ["plan.filter=true"])
    with pytest.raises(SaerlError, match="plan.filter=true needs quality scores, but .*; name a column"):
        module.check_functions(asked)


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("hot:train.reward=numerci", "did you mean numeric"),
        ("hot:train.loss.kind=nowhere:fn", "nowhere"),
        ("hot:plan.schedule=global", "difficulty.n_labels=0 finds out none"),
        ("hot:plan.schedule=medium", "difficulty.n_labels=0 finds out none"),
        ("hot:train.trackers=wandb", "needs wandb"),
    ],
)
def test_an_arm_that_cannot_run_is_refused_before_the_first_trains(
    tmp_path, recorded, arm, said, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = settings(tmp_path, f"compare.arms=vanilla,{arm}", "difficulty.n_labels=0")
    with pytest.raises(SaerlError, match=said):
        compare(config, Echo(quiet=True))
    assert recorded == [] and not (tmp_path / "compare.json").exists()


def test_redo_trains_again_what_has_changed_and_keeps_the_rest(tmp_path, recorded):
    compare(settings(tmp_path, "compare.arms=vanilla,bare:plan.schedule=adaptive"), Echo(quiet=True))
    recorded.clear()
    changed = settings(tmp_path, "compare.arms=vanilla,bare:plan.schedule=adaptive", "sae.k=4")
    compare(changed, Echo(quiet=True), redo=True)
    assert [arm for arm, *_ in recorded] == ["bare"]  # vanilla reads no SAE


def test_what_other_settings_made_matters_to_the_arms_that_still_run(tmp_path, recorded, monkeypatch):
    """An adaptive run that has ended holds nothing up, whatever lies beside it now."""
    checked = []
    config = settings(tmp_path, "compare.arms=vanilla,bare:plan.schedule=adaptive")
    compare(config, Echo(quiet=True))
    monkeypatch.setattr(module, "_check_plans", lambda arms, echo: checked.append(arms))
    (tmp_path / "vanilla" / "summary.json").unlink()
    manifest.forget(tmp_path / "vanilla", "result")
    for redo in (False, True):
        compare(config, Echo(quiet=True), redo=redo)
        manifest.forget(tmp_path / "vanilla", "result")
    assert [[mine.plan.schedule for mine in arms] for arms in checked] == [["vanilla"], ["vanilla"]]


def test_several_processes_share_the_runs(tmp_path, recorded, monkeypatch):
    """Each run is made once, and the report that is written last has them all."""
    fake = module.train_stage

    def slow(config, echo, *, out, **options):
        with (tmp_path.parent / f"{tmp_path.name}-calls").open("a") as calls:
            calls.write(f"{out.name}\n")
        time.sleep(0.03)
        fake(config, echo, out=out, **options)

    def report(root, echo):
        found = sorted(path.parent.name for path in root.glob("*/summary.json"))
        (root / "report.md").write_text("\n".join(found))
        return []

    monkeypatch.setattr(module, "train_stage", slow)
    monkeypatch.setattr(module, "write_report", report)
    config = settings(tmp_path, "compare.arms=vanilla,literal,medium", "compare.seeds=0,1")
    children = [fork(lambda: compare(config, Echo(quiet=True))) for _ in range(3)]
    assert [status(child) for child in children] == [0, 0, 0]
    calls = (tmp_path.parent / f"{tmp_path.name}-calls").read_text().split()
    assert len(calls) == 6 and sorted(calls) == (tmp_path / "report.md").read_text().split()
    assert not list(tmp_path.rglob(".*"))


def test_runs_that_another_process_makes_are_named(tmp_path, recorded, monkeypatch, capsys):
    monkeypatch.setattr(module, "write_report", lambda root, echo: [])
    config = settings(tmp_path, "compare.arms=vanilla,literal", "compare.seeds=0")
    with lock(tmp_path / "vanilla"), ThreadPoolExecutor(1) as other:
        other.submit(compare, config, Echo(quiet=True)).result()
        assert [call[0] for call in recorded] == ["literal"]
        said = capsys.readouterr().out
        assert f"{tmp_path / 'vanilla'} is written by" in said and f"process {os.getpid()}" in said
        config.compare.arms = ["vanilla", "medium"]
        with pytest.raises(SaerlError, match="of another comparison"):
            other.submit(compare, config, Echo(quiet=True)).result()
    compare(config, Echo(quiet=True))
    assert [call[0] for call in recorded] == ["literal", "vanilla", "medium"]


def test_with_every_run_elsewhere_and_none_begun_there_is_no_report_yet(tmp_path, recorded, capsys):
    config = settings(tmp_path, "compare.arms=vanilla", "compare.seeds=0")
    with lock(tmp_path / "vanilla"), ThreadPoolExecutor(1) as other:
        assert other.submit(compare, config, Echo(quiet=True)).result() == []
    assert not recorded and "it writes the report of all runs" in capsys.readouterr().out
