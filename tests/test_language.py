"""The comparison on a language model: in pieces, resumed, and how many pairs a claim takes."""

import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from benchmarks import language
from saerl_fast.config import load_config

ROOT = Path(__file__).parents[1]
SMALL = """
    data.train=examples/demo/pool.jsonl data.limit=48 data.eval_limit=8 data.prefill= sae.d_sae=64 sae.k=4
    sae.steps=5 sae.batch_size=64 sae.max_tokens=400 score.batch_tokens=2048 difficulty.n_labels=4
    diversity.n_clusters=2 train.steps=4 train.reward=exact train.save_every=1 train.eval.every=2
    train.rollout.prompts_per_step=4 train.rollout.group_size=2 train.rollout.max_new_tokens=4
    compare.arms=vanilla,adaptive compare.seeds=0 compare.pools= compare.until=false compare.target_values=
""".split()  # noqa: SIM905 - read as it would be typed


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("pass", 0),
        ("raise SystemExit(2)", 2),
        ("import time; time.sleep(60)", None),  # ended by SIGINT
        ("import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(1); time.sleep(60)", None),
    ],
)
def test_a_piece_ends_in_time(program, code):
    done = ("pass", "raise SystemExit(2)")
    assert language.piece([sys.executable, "-c", program], 40.0 if program in done else 3.0, 2.0) == code


def test_the_rehearsal_is_interrupted_and_goes_on(tmp_path, monkeypatch):
    """The GPU's settings on the demo's model: stopped in the first run, and ended by the same call."""
    metrics = tmp_path / "runs" / "vanilla" / "metrics.jsonl"

    class Clock(subprocess.Popen):
        """Time is over when the first step has been taken."""

        told = False

        def wait(self, timeout=None):
            while timeout is not None and self.poll() is None:
                begun = metrics.is_file() and '"train"' in metrics.read_text()
                if begun and not self.told and not (tmp_path / "report.md").exists():
                    self.told = True
                    raise subprocess.TimeoutExpired(self.args, timeout)
                with suppress(subprocess.TimeoutExpired):
                    super().wait(0.02)
            return super().wait()

    monkeypatch.setattr(language.subprocess, "Popen", Clock)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels' / 'torch-ext'}")
    call = [
        "--model",
        "examples/demo/model",
        "--config",
        str(ROOT / "examples/demo.yaml"),
        "--out",
        str(tmp_path),
    ]
    call += ["--size", "gpu", "--seconds", "300", *SMALL]
    assert language.main(call) == 3
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert curves.keys() == {"vanilla"} and not curves["vanilla"]["0"]["ended"]
    assert list((tmp_path / "runs/vanilla/checkpoints").iterdir())
    (tmp_path / "report.md").touch()  # the clock stands still
    assert language.main(call) == 0
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert {arm: runs["0"]["steps"] for arm, runs in curves.items()} == {
        "vanilla": [0, 2, 4],
        "adaptive": [0, 2, 4],
    }
    assert "| adaptive | 1 |" in (tmp_path / "report.md").read_text()
    assert not list((tmp_path / "runs").glob("*/checkpoints")) and (tmp_path / "runs/sae").is_dir()


def test_the_launcher_hands_on_what_it_is_given(tmp_path):
    command = ["bash", str(ROOT / "benchmarks/gpu.sh")]
    for given, said in (
        (["training", "--model", "a b"], "-m benchmarks.language --size gpu --seconds 480 --model a b"),
        (["--out", "there"], "-m benchmarks.gpu --out there"),
    ):
        env = {**os.environ, "PYTHON": "echo"}
        done = subprocess.run([*command, *given], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.strip() == said


def test_the_settings_of_each_size_are_settings():
    for settings in language.SIZES.values():
        config = load_config(ROOT / "examples" / "language.yaml", settings)
        assert config.train.reward == ["reasoning-gym"] and config.compare.seeds == [0, 1, 2, 3]


def test_pairs_are_counted_by_the_test_that_is_made():
    """Simulated: so many pairs find a saving of a fifth in four of five comparisons, one fewer in less."""
    pairs, rng = language.pairs_needed(0.15, math.log(0.8)), np.random.default_rng(0)
    drawn = rng.normal(math.log(0.8), 0.15, size=(20_000, pairs))
    found, fewer = (np.mean(ttest_1samp(part, 0, axis=1).pvalue < 0.05) for part in (drawn, drawn[:, 1:]))
    assert found >= 0.79 and fewer < found
    assert language.pairs_needed(0.15, math.log(0.9)) > pairs > language.pairs_needed(0.15, math.log(0.7))


def test_the_readme_says_how_many_pairs_a_claim_takes():
    assert language.power_table() in (ROOT / "benchmarks" / "README.md").read_text()


def test_the_table_of_runs():
    """Three pairs of one arm, by hand; one pair and a run that has not ended claim nothing."""

    def run(*accuracy, ended=True):
        return {"steps": [0, 1, 2], "accuracy": accuracy, "used": 0.5, "tokens": [0, 4, 9], "ended": ended}

    vanilla = {str(seed): run(0.1, 0.2, 0.3) for seed in range(4)}
    some = {"0": run(0.1, 0.3, 0.3), "1": run(0.1, 0.3, 0.4), "2": run(0.1, 0.3, 0.5)}
    other = {"0": run(0.1, 0.5, 0.5), "1": run(0.9, 0.9, 0.9, ended=False)}
    table = language.told({"other": other, "some": some, "vanilla": vanilla}).splitlines()
    # .05, .1 and .15 more: t = .1 / (.05 / sqrt(3)) = 3.46 with two degrees of freedom
    assert table[2:] == [
        "| vanilla | 4 | 0.100 | 0.200 | 0.300 | 0.250 | 50% | 9 |  |  |  |",
        "| other | 1 | 0.100 | 0.500 | 0.500 | 0.500 | 50% | 9 | +0.250 |  |  |",
        "| some | 3 | 0.100 | 0.300 | 0.400 | 0.350 | 50% | 9 | +0.100 ± 0.124 | 0.074 | 5 |",
    ]


def test_the_readme_has_the_table_of_the_runs():
    results = ROOT / "benchmarks" / "results"
    curves = json.loads((results / "language-smollm2.json").read_text())
    assert language.told(curves) in (results.parent / "README.md").read_text()
