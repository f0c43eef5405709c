"""The evidence: lines and tables are those of the kept curves, and both READMEs say what they say."""

from __future__ import annotations

import json

import pytest

from benchmarks import evidence, evidence_runs
from benchmarks.evidence_tables import BEGIN, END, claim, tables, verdict
from saerl_fast.signals.bank import OF_ANSWER
from tests.test_report import record_run


def kept(name: str) -> list[dict]:
    return json.loads((evidence.OUT / name).read_text())


def test_the_summary_and_the_tables_come_from_the_curves():
    found, text = evidence.kept(), (evidence.ROOT / "benchmarks" / "README.md").read_text()
    arms, against = evidence.arm_lines(found, 3), evidence.differences(found, 3)
    assert arms == kept("summary.json") and against == kept("differences.json")
    default = [line for line in arms if (line["arm"], line["draw"]) == ("adaptive", evidence.FIRST)]
    assert len(default) == 6 and all(evidence.row(line) in text for line in default)
    section = BEGIN + text.partition(BEGIN)[2].partition(END)[0] + END
    assert section == tables(arms, against, [arm for arm in evidence.ARMS if arm != "vanilla"])


def test_all_lines_of_the_default_hold_when_corrected_for_being_six():
    found = evidence.kept()
    chances = []
    for pool, (_, targets) in evidence.POOLS.items():
        arms = dict(evidence.beside(found[pool]))[evidence.FIRST]
        chances += [evidence.paired(arms["vanilla"], arms["adaptive"], target, 3).p for target in targets]
    assert max(evidence.holm(chances)) < 0.05


def test_the_readme_says_the_figures_of_the_evidence():
    text = " ".join((evidence.ROOT / "README.md").read_text().split())
    lines = {
        (line["pool"], line["target"]): line
        for line in kept("summary.json")
        if (line["arm"], line["draw"]) == ("adaptive", evidence.FIRST)
    }
    for pool, targets in (("demo", (0.463, 0.511)), ("hard", (0.436, 0.476))):
        first, second = (lines[pool, target] for target in targets)
        low, high = first["low"], first["high"]
        assert f"{100 * first['saved']:.0f} %" in text and f"{100 * low:.0f} to {100 * high:.0f}" in text
        assert (
            f"{100 * second['saved']:.0f} % ({100 * second['low']:.0f} to {100 * second['high']:.0f})" in text
        )


def test_the_readme_says_what_an_oracle_saves():
    text = " ".join((evidence.ROOT / "README.md").read_text().split())
    lines = [line for line in kept("summary.json") if line["arm"] == "oracle"][1::2]  # the second targets
    shares = [f"{100 * line['saved']:.0f} %" for line in lines]
    assert f"saves {shares[0]}, {shares[1]} and {shares[2]} at the second targets" in text
    assert {line["pairs"] for line in lines} == {6}


def test_the_readme_says_what_the_sae_adds():
    text = " ".join((evidence.ROOT / "README.md").read_text().split())
    assert claim(kept("differences.json")) in text


def test_a_line_is_the_paired_comparison():
    steps = [0, 10, 20, 30]
    slow, fast = [0.4, 0.44, 0.48, 0.52], [0.4, 0.48, 0.56, 0.64]
    curves = {
        arm: {
            str(s): {
                "steps": steps,
                "accuracy": [a + s / 1000 for a in values],
                "used": 0.5,
                "used_early": 0.25,
                "rollouts": [each * step for step in steps],
            }
            for s in range(4)
        }
        for arm, values, each in (("vanilla", slow, 128), ("adaptive", fast, 128), ("dapo", fast, 256))
    }
    first, second = evidence.lines("demo", curves, 1)
    assert first["saved"] == pytest.approx(0.5, abs=1e-3) == second["saved"] and first["pairs"] == 4
    assert first["low"] <= first["saved"] <= first["high"] and "final_adaptive" not in first  # it was stopped
    drawn = {evidence.NO_SAE: {arm: curves.pop(arm) for arm in ("vanilla", "dapo")}, "third": curves}
    arm = evidence.arm_lines({"demo": drawn}, 1)
    assert [line["draw"] for line in arm] == ["third"] * 2 + [evidence.NO_SAE] * 2
    assert [line["arm"] for line in arm] == ["adaptive"] * 2 + ["dapo"] * 2 and arm[2]["p"] < 0.01
    assert arm[2]["rollouts_saved"] == pytest.approx(0, abs=2e-3) and "tokens_saved" not in arm[2]
    curves["none"] = drawn[evidence.NO_SAE]["vanilla"]
    drawn["second"] = {"tfidf": curves["none"]}  # which no default stands beside
    against = evidence.differences({"demo": drawn}, 1)
    assert [line["against"] for line in against] == ["none", "none"]
    assert verdict(against) == "Against no features: fewer steps: demo 0.463 (50%), demo 0.511 (50%)."


def test_an_arm_that_was_stopped_early_was_past_the_last_target():
    for pool, draws in evidence.kept().items():
        every = [(draw, arm, seed) for draw, arms in draws.items() for arm in arms for seed in arms[arm]]
        for draw, arm, seed in every:
            run = draws[draw][arm][seed]
            hit = evidence.steps_to_target(run["steps"], run["accuracy"], evidence.POOLS[pool][1][-1], 3)
            whole = run["steps"][-1] == evidence.STEPS
            assert whole or hit <= run["steps"][-2], f"{pool} {draw} {arm} {seed}"


def test_arms_are_packed_a_line_a_run(tmp_path):
    run = {"steps": [0, 80], "accuracy": [0.1, 0.2], "used": 0.5}
    evidence_runs.pack({"easy": {"first": {"mopps": {"1": run, "2": run}}}}, tmp_path)
    evidence_runs.pack({"easy": {"first": {"none": {"1": run}, "mopps": {"3": run}}}}, tmp_path)
    text = (tmp_path / "easy.json").read_text()  # what was not run again stays
    assert list(json.loads(text)["first"]["mopps"]) == ["1", "2", "3"] and text.count(json.dumps(run)) == 4


def test_an_arm_that_reads_no_scores_is_of_no_draw(tmp_path):
    for arm in ("vanilla", "literal_prompt", "speed"):
        record_run(tmp_path / "demo" / f"{arm}.seed-7", arm, 7, [0.2, 0.3])
        (tmp_path / "demo" / f"{arm}.seed-7" / "summary.json").write_text("{}")
    found = evidence_runs.collect(tmp_path, "third")["demo"]
    assert {draw: [*arms] for draw, arms in found.items()} == {
        evidence.NO_SAE: ["vanilla", "speed"],
        "third": ["literal_prompt"],
    }


def test_difficulty_of_the_prompt_alone_has_scores_of_its_own(tmp_path):
    both = (evidence_runs.configured("demo", arm, 7, tmp_path) for arm in ("literal", "literal_prompt"))
    answer, prompt = both
    assert answer.difficulty.features is None and not set(prompt.difficulty.features) & set(OF_ANSWER)
    assert answer.run_dir != prompt.run_dir and prompt.sae.path == f"{answer.run_dir}/sae"
    assert prompt.plan.schedule == answer.plan.schedule == "literal"


def test_pools_differ_in_what_is_beyond_the_model(tmp_path):
    hardness = {}
    for pool in evidence.POOLS:
        config = evidence_runs.configured(pool, "hidden", 200, tmp_path)
        rows = [json.loads(line) for line in (tmp_path / f"{pool}.jsonl").read_text().splitlines()]
        hardness[pool] = sum(row["level"] == 5 for row in rows)
        assert config.train.seed == 200 and config.plan.adaptive.features == ["hidden"]
    assert hardness["easy"] < hardness["demo"] < hardness["hard"]
    shipped = (evidence.ROOT / "examples" / "demo" / "pool.jsonl").read_text()
    assert [json.loads(line) for line in shipped.splitlines()] == [
        json.loads(line) for line in (tmp_path / "demo.jsonl").read_text().splitlines()
    ]
