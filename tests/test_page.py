"""The page of a report: safe whatever its texts hold, whole without a network, and drawn by a browser."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saerl_fast.errors import SaerlError
from saerl_fast.fileio import cannot_write
from saerl_fast.records import charts, page, plots
from saerl_fast.records.report import write_report
from tests.test_report import record_run

pytest.importorskip("matplotlib")

OWNED = "document.title='owned'"
NASTY = [
    f"</script><script>{OWNED}</script>",
    f"<img src=x onerror={OWNED}>",
    "<a href='javascript:1'>link</a> %{x} &lt;b&gt; $x$",
    "\u2028\u202e\x1b[31m\x00 \ud800 " + "long " * 400,
    "",
]
CHARTS = ("map", "calibration")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def scored(folder, count=40, **changes):
    """A run with scores: a map, cards, carriers, kinds, labels; prompts as nasty as they come."""
    record_run(folder / "adaptive", "adaptive", 0, [0.2, 0.3])
    texts = [NASTY[i % len(NASTY)] for i in range(count)]
    shown = [{"id": text, "text": text} for text in texts[:3]]
    card = {"cluster": 1, "size": 20, "difficulty": 0.5, "pass_rate": None, "quality": 0.5, "prompts": shown}
    card["features"] = [{"feature": 7, "lift": 0.5, "prompts": shown}]
    carrier = {"feature": 9, "effect": -0.25, "prompts": shown}
    drawn = {
        "of": 1000,
        "method": "pca",
        "explained": [0.25, 0.125],
        "row": list(range(count)),
        "text": texts,
    }
    drawn |= {"x": [i * 0.5 for i in range(count)], "y": [i % 7 for i in range(count)]} | changes
    metadata = {"clusters": {"cards": [card]}, "map": drawn}
    metadata["difficulty"] = {"features": [carrier], "interval": 0.25, "spearman": 0.5}
    metadata["quality"] = {
        "features": [carrier | {"effect": 0.5}],
        "by_kind": {"<b>torn": 0.75, "whole": 0.5},
    }
    (folder / "scores.json").write_text(json.dumps({"metadata": metadata}))
    columns = {
        "prompt_id": [f"p{i}" for i in range(count)],
        "saerl_quality": [None if i % 2 else 0.5 for i in range(count)],
        "saerl_difficulty": [i / count for i in range(count)],
        "saerl_pass_rate": [1 - i / count if i % 2 else None for i in range(count)],
        "saerl_cluster": pa.array([i % 2 for i in range(count)], pa.int32()),
    }
    pq.write_table(pa.table(columns), folder / "scores.parquet")
    return folder


def test_everything_is_shown(tmp_path):
    names = {path.name for path in write_report(scored(tmp_path))}
    assert names >= {"map.png", "calibration.png", "quality_kinds.png", "signals.png"}
    text = (tmp_path / "report.md").read_text()
    for heading in ("Map of the prompts", "Clusters", "Features that carry the probes", "Quality by kind"):
        assert f"## {heading}\n" in text
    assert "A random sample of 40 of the 1,000 prompts" in text and "(38% of the variance)" in text
    assert "| difficulty | 9 | -0.2500 (easier) |" in text and "| quality | 9 | +0.5000 (better) |" in text
    assert text.index("## Result") < text.index("![learning_curves]") < text.index("## Map")


def test_texts_are_escaped_and_nothing_is_loaded(tmp_path):
    write_report(scored(tmp_path))
    found = (tmp_path / "report.html").read_text()
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "</script><script>" not in text and "<img src=x" not in text and "<a href" not in text, name
        assert "long " * 100 not in text and "\x1b" not in text and "\u202e" not in text, name
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', found)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe-inline'; script-src 'sha256-" in policy
    assert "://" not in re.sub(r"<script type=\"text/plain\".*?</script>", "", found)
    assert len(found) < 4_000_000


def test_reports_are_the_same_byte_for_byte(tmp_path):
    first = [path.read_bytes() for path in write_report(scored(tmp_path))]
    assert [path.read_bytes() for path in write_report(tmp_path)] == first


def test_scores_alone_have_a_report(tmp_path):
    shutil.rmtree(scored(tmp_path) / "adaptive")
    names = {path.name for path in write_report(tmp_path)}
    assert names >= {"map.png", "calibration.png"} and "learning_curves.png" not in names
    text = (tmp_path / "report.md").read_text()
    assert text.startswith(f"# {tmp_path.name}: scores\n") and "## Result" not in text


def test_points_of_the_calibration_say_their_prompts():
    said, seen = np.linspace(0, 1, 40), np.linspace(0.1, 0.9, 40)
    chart = charts.calibration_chart(said, seen, [NASTY[i % 5] for i in range(40)], 0.2)
    points, means = chart["data"]
    assert points["x"][3] == round(said[3], 4) and points["y"][3] == round(seen[3], 4)
    assert points["hovertext"][4] == "(empty)<br><i>expected 0.10, observed 0.18</i>"
    assert "<script" not in points["hovertext"][0] and "<img" not in points["hovertext"][1]
    assert len(means["x"]) == len(means["error_y"]["array"]) == 5
    assert means["y"][0] == pytest.approx(seen[:8].mean(), abs=1e-4)
    assert [(line["y0"], line["y1"]) for line in chart["layout"]["shapes"]] == [
        (0, 1),
        (-0.2, 0.8),
        (0.2, 1.2),
    ]
    many = np.linspace(0, 1, 5000)
    chart = charts.calibration_chart(many, many, ["x"] * 5000, None)
    assert len(chart["data"][0]["x"]) == plots.POINTS and len(chart["layout"]["shapes"]) == 1


def test_a_prompt_off_the_map_is_named_by_its_id(tmp_path):
    some = {"row": [0, 1], "x": [0.0, 1.0], "y": [0.0, 1.0], "text": ["one", "two"]}
    write_report(scored(tmp_path, **some))
    found = (tmp_path / "report.html").read_text()
    assert "80 % of the labels lie within the band" in found
    if page.packed_plotly()[0]:
        told = json.loads(re.search(r"id=charts>(.*?)</script>", found)[1])["calibration"]["data"][0][
            "hovertext"
        ]
        assert [text.partition("<")[0] for text in told[:2]] == ["two", "p3"]


def test_without_plotly_the_pictures_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "packed_plotly", lambda: ("", ""))
    write_report(scored(tmp_path))
    found = (tmp_path / "report.html").read_text()
    assert "script-src 'none'" in found and "<script" not in found and 'id="picture-map"' in found


@pytest.mark.parametrize(
    "change",
    [{"row": [99] * 40}, {"row": [-1] * 40}, {"x": [1.0]}, {"x": ["a"] * 40}, {"text": 3}, {"of": "many"}],
)
def test_a_damaged_map_is_a_sentence(tmp_path, change):
    with pytest.raises(SaerlError, match="map of prompts in scores.json is damaged .* `saerl score`"):
        write_report(scored(tmp_path, **change))


def test_a_wide_table_goes_on_below_in_a_terminal(monkeypatch):
    header = ["arm", "target", "steps saved against vanilla", "verdict", "note"]
    rows = [["adaptive", "0.400", "+31%", "fewer steps", "n" * 20], ["x", "0.500", "-", "no claim", "m"]]
    monkeypatch.setenv("COLUMNS", "46")
    shown = page.terminal(("Paired", header, rows, "")).splitlines()
    assert shown == [
        "",
        "Paired",
        "arm       target  steps    verdict",
        "                  saved",
        "                  against",
        "                  vanilla",
        "--------  ------  -------  -----------",
        "adaptive  0.400   +31%     fewer steps",
        "x         0.500   -        no claim",
        "",
        "arm       target  note",
        "--------  ------  --------------------",
        "adaptive  0.400   nnnnnnnnnnnnnnnnnnnn",
        "x         0.500   m",
    ]
    monkeypatch.setenv("COLUMNS", "5")  # every column is shown, however narrow
    assert page.terminal(("Paired", header, rows, "")).count("adaptive") == 3


def test_scores_without_a_map_have_the_rest(tmp_path):
    scored(tmp_path)
    record = json.loads((tmp_path / "scores.json").read_text())
    del record["metadata"]["map"]
    (tmp_path / "scores.json").write_text(json.dumps(record))
    names = {path.name for path in write_report(tmp_path)}
    assert "map.png" not in names and "calibration.png" in names
    columns = pq.read_table(tmp_path / "scores.parquet")
    pq.write_table(columns.drop_columns(["saerl_pass_rate"]), tmp_path / "scores.parquet")
    assert "calibration.png" not in {path.name for path in write_report(tmp_path)}
    assert "plotly" not in (tmp_path / "report.html").read_text()


def test_a_figure_that_cannot_be_written_is_no_damage_to_the_scores(tmp_path, monkeypatch):
    def no_files(columns, path):
        raise cannot_write(path, OSError(errno.EMFILE, "Too many open files"))

    monkeypatch.setattr(plots, "signals", no_files)
    with pytest.raises(SaerlError, match="^cannot write .*signals.png: Too many open files"):
        write_report(scored(tmp_path))


def test_a_browser_draws_the_page(tmp_path):
    """The map answers, its picture makes room, no prompt runs as a script, and nothing is missing."""
    pytest.importorskip("plotly", reason="the interactive map needs plotly")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser found ({', '.join(BROWSERS)})")
    write_report(scored(tmp_path))
    quiet = ["background-networking", "component-update", "sync"]
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
    command += [f"--disable-{what}" for what in quiet]
    command += [
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=30000",
        "--enable-logging=stderr",
    ]
    page = (tmp_path / "report.html").as_uri()
    done = subprocess.run([*command, page], capture_output=True, text=True, timeout=300)
    tree = done.stdout
    assert "<title>" in tree and OWNED not in re.search(r"<title>(.*?)</title>", tree)[1]
    places = {name: tree.find(f'<div class="chart js-plotly-plot" id="chart-{name}"') for name in CHARTS}
    assert 0 < places["map"] < places["calibration"], done.stderr[-2000:]
    parts = tree[places["map"] : places["calibration"]], tree[places["calibration"] :]
    for name, part, count in zip(CHARTS, parts, (40, 20 + 2), strict=True):  # labels, and means of two parts
        assert len(re.findall(r'<path class="point"', part)) == count, name
        assert re.search(rf'<img id="picture-{name}"[^>]* hidden', tree)
    assert not [line for line in done.stderr.splitlines() if "Content Security Policy" in line]
