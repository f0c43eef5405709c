import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from saerl_fast.records import plots
from saerl_fast.records.rows import parse
from saerl_fast.records.runs import RunRecord

TIMES = {"generate": 0.5, "update": 0.5, "encode": 0.25, "eval": 9.0}
COLUMNS = {
    "prompt_id": list("abcdef"),
    "kind": ["x", "y", "z", "x", "y", "z"],
    "saerl_quality": [0.1, 0.2, 0.3, 0.7, None, 0.9],
    "saerl_difficulty": [0.1, 0.5, 0.5, 0.6, 0.7, 0.9],
    "saerl_cluster": [0, 1, 1, 1, 2, 2],
}


def make_run(arm, seed=0, mode="prob", scale=1.0, lift=0.0):
    time = {name: scale * seconds for name, seconds in TIMES.items()}
    figures = {"kind": "train", "pass_rate": 0.5, "groups": 8, "groups_used": 6, "rollouts": 64, "time": time}
    rows = [{"step": s, **figures} for s in range(1, 11)]
    rows += [{"step": s, "kind": "eval", "accuracy": s / 20 + lift, "mode": mode} for s in (0, 5, 10)]
    run = RunRecord(arm, seed, None, {})
    run.add(parse("\n".join(map(json.dumps, rows)).encode()))
    return run


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, still open to inspection."""
    figures = []
    save = Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def legend(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()] if axis.get_legend() else []


@pytest.mark.parametrize(
    ("low", "width", "bottom"), [(-25.0, pytest.approx(0.1), -2.0), (-1.2, pytest.approx(0.1), -1.31)]
)
def test_one_pool_and_a_wide_interval_leave_the_law_readable(tmp_path, drawn, low, width, bottom):
    points = {"a": [plots.Saving(0.24, -1.0, low, 0.8)], "b": [plots.Saving(0.24, 0.1, -0.1, 0.3)]}
    plots.law(points, "vanilla", tmp_path / "law.png")
    left, right = drawn[0].axes[0].get_xlim()
    assert right - left == width and left < 0.236 < 0.244 < right
    assert drawn[0].axes[0].get_ylim()[0] == pytest.approx(bottom, abs=0.02)


@pytest.mark.parametrize(
    ("draw", "size"),
    [
        (lambda runs, path: plots.learning_curves(runs, {"half": 0.25}, path), (1300, 494)),
        (plots.phases, (1040, 338)),
        (plots.batches, (1300, 442)),
        (lambda runs, path: plots.signals(COLUMNS, path), (1430, 416)),
    ],
    ids=["curves", "phases", "batches", "signals"],
)
def test_figures_are_pngs_of_the_size_asked_for(tmp_path, draw, size):
    runs = [make_run("vanilla", 0), make_run("vanilla", 1), make_run("adaptive", 0)]
    path = draw(runs, tmp_path / "figure.png")
    assert png_size(path) == pytest.approx(size, abs=1)
    assert path.stat().st_size > 5000
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.parametrize(
    ("modes", "label"),
    [
        (["prob", "prob"], "P(reference answer), held out"),
        (["sample"], "held-out accuracy (avg@k)"),
        (["greedy"], "held-out accuracy (greedy)"),
        ([None], "held-out accuracy"),
        (["sample", "prob"], "held-out figure (modes: prob, sample)"),
    ],
)
def test_the_axis_says_what_was_measured(tmp_path, drawn, modes, label):
    runs = [make_run("a", seed, mode) for seed, mode in enumerate(modes)]
    plots.learning_curves(runs, {}, tmp_path / "figure.png")
    assert drawn[0].axes[0].get_ylabel() == label


def test_curves_are_means_over_seeds_and_count_rollouts(tmp_path, drawn):
    low, high = make_run("a", 0), make_run("a", 1, lift=0.2)
    plots.learning_curves([low, high], {}, tmp_path / "figure.png")
    mean = next(line for line in drawn[0].axes[0].lines if line.get_label() == "a (mean of 2)")
    np.testing.assert_allclose(mean.get_ydata(), [0.1, 0.35, 0.6])
    np.testing.assert_allclose(drawn[0].axes[1].lines[0].get_xdata(), [0, 320, 640])


def test_the_mean_ends_with_the_first_run_that_ends(tmp_path, drawn):
    long, short = make_run("a", 0), make_run("a", 1, lift=0.2)
    del short.eval_steps[-1], short.accuracy[-1]
    plots.learning_curves([long, short], {}, tmp_path / "figure.png")
    mean = next(line for line in drawn[0].axes[0].lines if line.get_label() == "a (mean of 2)")
    np.testing.assert_allclose(mean.get_ydata(), [0.1, 0.35])


def test_an_arm_that_has_only_its_first_evaluation_is_drawn_beside_one_that_trains(tmp_path):
    begun = RunRecord("adaptive", 0, None, {})
    begun.add(parse(json.dumps({"step": 0, "kind": "eval", "accuracy": 0.1}).encode()))
    for draw in (plots.batches, plots.live):
        draw([make_run("vanilla"), begun], tmp_path / "figure.png")
    plots.learning_curves([make_run("vanilla"), begun], {}, tmp_path / "figure.png")
    assert png_size(tmp_path / "figure.png")


def test_phases_are_seconds_per_step_without_evaluation(tmp_path, drawn):
    runs = [make_run("vanilla", 0, scale=1.0), make_run("vanilla", 1, scale=3.0), make_run("adaptive")]
    plots.phases(runs, tmp_path / "figure.png")
    axis = drawn[0].axes[0]
    bars = {bar.get_label(): [patch.get_width() for patch in bar] for bar in axis.containers}
    assert list(bars) == ["generate", "update", "encode"]  # this project's own phases last
    assert bars["generate"] == pytest.approx([1.0, 0.5])
    assert bars["encode"] == pytest.approx([0.5, 0.25])
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["vanilla", "adaptive"]


def test_colours_follow_the_order_of_the_arms():
    shades = plots.colours([make_run("vanilla"), make_run("adaptive"), make_run("vanilla", 1)])
    assert list(shades) == ["vanilla", "adaptive"]
    assert list(shades.values()) == list(plots.PALETTE[:2])


def test_signals_split_by_quality_label(tmp_path, drawn):
    labels = [1, 0, 0, None, None, None]
    plots.signals(COLUMNS | {"quality_label": labels}, tmp_path / "figure.png")
    quality, difficulty, clusters = drawn[0].axes
    assert legend(quality) == ["labelled good", "labelled bad", "unlabelled"]
    heights = [sum(patch.get_height() for patch in group) for group in difficulty.containers]
    assert heights == [1, 2, 3]
    assert sum(patch.get_height() for group in quality.containers for patch in group) == 5  # one is null
    assert [patch.get_height() for patch in clusters.patches] == [3, 2, 1]


@pytest.mark.parametrize("extra", [{}, {"quality_label": [None] * 6}], ids=["absent", "empty"])
def test_signals_without_labels_are_not_split(tmp_path, drawn, extra):
    plots.signals(COLUMNS | extra, tmp_path / "figure.png")
    assert legend(drawn[0].axes[0]) == []
    assert sum(patch.get_height() for patch in drawn[0].axes[1].patches) == 6


def test_signals_that_are_unknown_throughout_leave_an_empty_histogram(tmp_path, drawn):
    plots.signals(COLUMNS | {"saerl_quality": [None] * 6}, tmp_path / "figure.png")
    quality, difficulty, _ = drawn[0].axes
    assert sum(patch.get_height() for patch in quality.patches) == 0
    assert sum(patch.get_height() for patch in difficulty.patches) == 6


def test_labels_that_are_scores_make_one_group():
    groups = plots.label_groups([0.3, None, 0.8, float("nan")])
    assert {name: list(mask) for name, mask in groups.items()} == {
        "labelled": [True, False, True, False],
        "unlabelled": [False, True, False, True],
    }
    assert plots.label_groups(["good", "bad"]) == {}
    assert list(plots.label_groups([1, 1])) == ["labelled good"]


def test_a_backend_that_is_unknown_does_not_keep_files_from_being_drawn():
    code = "from saerl_fast.records import plots; print(plots.load().get_backend())"
    environment = os.environ | {"MPLBACKEND": "nonsense"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.lower() == "agg\n", done.stderr
