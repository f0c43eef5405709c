"""Comparisons on several pools: what is run, what is refused, and the report of all."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from saerl_fast.config import load_config
from saerl_fast.errors import SaerlError
from saerl_fast.records.lock import lock
from saerl_fast.records.report import write_report
from saerl_fast.records.watch import watch
from saerl_fast.stages import compare as module
from saerl_fast.stages.arms import parse_pool
from saerl_fast.stages.compare import compare
from saerl_fast.stages.console import Echo
from tests.test_compare import recorded  # noqa: F401 a fixture
from tests.test_report import record_run

EXAMPLES = Path(__file__).parents[1] / "examples"
ONE = ["compare.seeds=0", "compare.pools=", "compare.until=false"]  # no pools but those of a test


def settings(root, *more):
    return load_config(EXAMPLES / "demo.yaml", [f"run_dir={root}", *ONE, *more])


def two(tmp_path, more=""):
    for name in ("a", "b"):
        rows = [{"prompt": f"{name} {i} + 1 =", "answer": str(i + 1), "prompt_id": str(i)} for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"compare.pools=a={tmp_path / 'a.jsonl'},b={tmp_path / 'b.jsonl'}{more}"


def test_each_pool_is_compared_in_a_folder_of_its_own(tmp_path, recorded, monkeypatch):  # noqa: F811
    made, fake = [], module.train_stage

    def train(config, echo, **options):
        found = Path(config.data.train).stem, config.compare.target_values, config.sae.k
        made.append((*found, options["out"].relative_to(tmp_path).as_posix()))
        fake(config, echo, **options)

    monkeypatch.setattr(module, "train_stage", train)
    own = ";compare.target_values=[0.15];sae.k=4"
    config = settings(tmp_path / "r", two(tmp_path, own), "compare.arms=vanilla,adaptive")
    compare(config, Echo(quiet=True))
    assert made == [
        ("a", [0.463, 0.511], 16, "r/a/vanilla"),
        ("a", [0.463, 0.511], 16, "r/a/adaptive"),
        ("b", [0.15], 4, "r/b/vanilla"),
        ("b", [0.15], 4, "r/b/adaptive"),
    ]
    text = (tmp_path / "r" / "report.md").read_text()
    assert "| b | adaptive | 0.150 | +0% | too few pairs | 1 (+0) |" in text and "pool a: no seed" in text
    assert all((tmp_path / "r" / name / "report.md").is_file() for name in "ab")
    compare(config, Echo(quiet=True))  # all of it is there
    assert len(made) == 4
    with pytest.raises(SaerlError, match="holds a comparison with compare.pools; choose another run_dir"):
        compare(settings(tmp_path / "r"), Echo(quiet=True))
    with pytest.raises(SaerlError, match="holds a comparison without compare.pools"):
        compare(settings(tmp_path / "r" / "a", two(tmp_path)), Echo(quiet=True))


@pytest.mark.parametrize(
    ("pools", "said"),
    [
        ("hard", "'hard' names no source; write NAME=SOURCE"),
        ("gym=reasoning-gym:gcd,lcm", "'lcm' names no source.*in a list of quoted pools"),
        ("a={a},a={a}", "must not name anything twice"),
        ("a={a},a={a};data.limit=9", "compare.pools='a,a' must name different pools"),
        ("a={a},b=nowhere.jsonl", "pool b: .*nowhere.jsonl"),
        ("a={a},b={a}", "pool b: it has the rows and settings of pool a, and would count twice"),
        ("a={a},c={a};compare.target_values=[0.3]", "pool c: it has the rows and settings of pool a"),
        ("a={a},b={a};train.lr=1", "pool b sets 'train.lr=1'; a pool may set data"),
        ("a={a},b={a};data.limit", "pool b: 'data.limit' lacks a value"),
        ("a={a},b={a};data.limt=3", "pool b: unknown config key data.limt; did you mean data.limit"),
        ("../a={a}", "pool name '../a' must be letters"),
        ("a={a},b={a};compare.target_values=[2]", "pool b: compare.target_values holds 2"),
        ("a={a};sae.path=/nowhere/sae", "pool a: .*/nowhere/sae"),
    ],
)
def test_pools_that_cannot_be_are_refused_before_anything_runs(tmp_path, recorded, pools, said):  # noqa: F811
    two(tmp_path)
    with pytest.raises(SaerlError, match=said):
        given = "compare.pools=" + pools.format(a=tmp_path / "a.jsonl")
        compare(settings(tmp_path / "r", given, "compare.arms=vanilla,adaptive"), Echo(quiet=True))
    assert recorded == [] and not (tmp_path / "r").exists()


def test_a_pool_ends_early_by_targets_of_its_own(tmp_path, recorded):  # noqa: F811
    more = ("compare.until=true", "compare.target_values=", "compare.arms=vanilla")
    with pytest.raises(SaerlError, match="pool a: compare.until needs targets"):
        compare(settings(tmp_path / "r", two(tmp_path), *more), Echo(quiet=True))


def test_with_every_run_elsewhere_and_none_begun_there_is_no_report_yet(tmp_path, recorded):  # noqa: F811
    config = settings(tmp_path / "r", two(tmp_path), "compare.arms=vanilla")
    first, second = (lock(tmp_path / "r" / name / "vanilla") for name in "ab")
    with first, second, ThreadPoolExecutor(1) as other:
        assert other.submit(compare, config, Echo(quiet=True)).result() == []
    assert not recorded and len(compare(config, Echo(quiet=True))) >= 2


def test_a_source_may_hold_an_equals_sign_and_a_function():
    assert parse_pool("hard=mine.py:pool@x=3; data.size=9") == (
        "hard",
        ["data.train=mine.py:pool@x=3", "data.size=9"],
    )
    config = load_config(None, ["compare.pools=['gym=reasoning-gym:gcd,lcm', 'b=b.jsonl']"])
    assert [parse_pool(text)[1] for text in config.compare.pools] == [
        ["data.train=reasoning-gym:gcd,lcm"],
        ["data.train=b.jsonl"],
    ]


@pytest.fixture
def runs(tmp_path):
    """Three pools of four seeds: adaptive is twice as fast, a little slower by chance, and stuck."""
    for pool, gain in (("hard", 0.2), ("easy", 0.1), ("flat", 0.0)):
        for seed in range(4):
            slow = [0.2 + gain * i / 4 for i in range(5)]
            fast = [0.2 + gain * min(i / 2 * (1 + seed / 3), 1) for i in range(5)]
            if pool == "easy":
                fast = [0.2, *(a + (-1) ** seed / 200 for a in slow[1:])]
            record_run(tmp_path / pool / f"vanilla.{seed}", "vanilla", seed, slow)
            record_run(tmp_path / pool / f"adaptive.{seed}", "adaptive", seed, fast)
        own = {"arms": ["vanilla", "adaptive"], "seeds": [0, 1, 2, 3], "smooth": 1}
        (tmp_path / pool / "compare.json").write_text(json.dumps(own))
    (tmp_path / "compare.json").write_text(json.dumps({"pools": ["hard", "easy", "flat", "late"]}))
    return tmp_path


def test_one_report_of_all_pools(runs):
    lines = []
    paths = write_report(runs, echo=lines.append)
    assert [path.name for path in paths] == ["report.md", "report.html", "law.png"]
    text = (runs / "report.md").read_text()
    found = [
        line.split(" | ") for line in text.splitlines() if line.startswith(("| hard", "| easy", "| flat"))
    ]
    compared = [row for row in found if len(row) == 10]
    assert [(row[0][2:], row[7]) for row in compared] == [
        ("hard", "fewer steps"), ("hard", "fewer steps"), ("easy", "no claim"), ("easy", "no claim"),
        ("flat", "no target"),
    ]  # fmt: skip
    assert all(row[8] == "75%" for row in compared)  # of vanilla's groups
    told = " ".join(lines)
    assert "adaptive against vanilla: fewer steps on hard (60% of vanilla's gain by 66%" in told
    assert "pool flat: vanilla gains nothing" in told and "pool late has no run yet" in told
    assert "](law.png)" in text


def test_the_correction_is_over_the_lines_of_all_pools(runs):
    def chances():
        write_report(runs)
        rows = (line.split(" | ") for line in (runs / "report.md").read_text().splitlines())
        return [float(row[6]) for row in rows if len(row) == 10 and row[0] == "| hard"]

    together = chances()
    (runs / "compare.json").write_text(json.dumps({"pools": ["hard"]}))
    alone = chances()  # two lines in place of four
    assert together == pytest.approx([2 * alone[0], 2 * alone[1]], abs=2e-3) and alone[0] > 0


def test_a_comparison_on_pools_is_watched_pool_by_pool(runs):
    with pytest.raises(SaerlError, match="hard, easy, flat, late; watch one of them, as .*hard"):
        watch(runs, lambda line: None)


def test_without_any_run_there_is_no_report(tmp_path):
    (tmp_path / "compare.json").write_text('{"pools": ["a"]}')
    with pytest.raises(SaerlError, match="have no run yet"):
        write_report(tmp_path)


def test_the_demos_generator_is_a_source_of_pools():
    from saerl_fast.session import load_pools

    hard = load_config(EXAMPLES / "demo.yaml", [f"data.train={EXAMPLES / 'demo_pool.py'}:pool@0.75"])
    plain = load_config(EXAMPLES / "demo.yaml", [f"data.train={EXAMPLES / 'demo_pool.py'}:pool"])
    shipped = load_config(EXAMPLES / "demo.yaml", [])
    rows = {
        name: load_pools(config)[0] for name, config in (("hard", hard), ("plain", plain), ("ours", shipped))
    }
    assert rows["plain"].columns["prompt"] == rows["ours"].columns["prompt"]
    assert sum(level == 5 for level in rows["hard"].columns["level"]) > 1200
