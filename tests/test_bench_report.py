"""The report of benchmark results: what it shows, leaves out, and that the committed one is current."""

from __future__ import annotations

import json

import pytest

from benchmarks import report

LINEAR = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "ratio": 1.0, "peak_mb": 64.2}


def entry(contenders, name="test_op[a]", **info):
    return {"name": name, "fullname": "elsewhere.py::x", "extra_info": info | {"contenders": contenders}}


def write(tmp_path, *entries, device="cpu", name="op.json"):
    folder = tmp_path / device
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps({"benchmarks": list(entries)}))


def test_committed_readme_is_current():
    """`make bench-report` would change nothing."""
    tables, complaints = report.load(report.ROOT / "results")
    assert complaints == [] and tables
    readme = (report.ROOT / "README.md").read_text()
    assert report.fill(report.insert(readme, report.render(tables)), report.ROOT / "results") == readme
    assert readme.count("<!-- table ") == readme.count("<!-- end -->") > 1
    for table in (table for table in tables if report.is_product(table) or report.is_growth(table)):
        assert (report.ROOT / "figures" / report.figure_name(table)).is_file()


def test_columns_ratios_and_memory(tmp_path):
    """Every field but contenders, environment and base names the shape; the base is shown in milliseconds."""
    fast, slow = {"p50_ms": 0.5, "ratio": 0.25}, {"p50_ms": 300.0, "ratio": 150.0, "peak_mb": 7000.0}
    where = {"cpu": "Some CPU", "threads": 1, "triton": None, "load": 3.0}
    write(
        tmp_path,
        entry({"slow": slow, "linear": LINEAR, "fast": fast}, d_in=8, kind="max", environment=where),
        entry({"fast": {"p50_ms": 0.125}}, d_in=9, kind="sum", environment=where | {"load": 4.0}, odd=[1]),
    )
    (table,), complaints = report.load(tmp_path)
    assert complaints == [] and table.base == "linear" and not table.on_gpu
    lines = report.time_table(table)
    assert lines[0] == "| d_in | kind | linear (ms) | slow | fast |"
    assert lines[2] == "| 8 | max | 2.00 ms | 150.00 | **0.25** |"
    assert lines[3] == "| 9 | sum |  |  | 0.125 ms |"  # the base did not run there
    assert lines[4] == "| median |  |  | 150.00 | 0.25 |"
    assert report.memory_table(table)[2:] == ["| 8 | max | 64 | 7000 |  |"]
    assert report.environment_line(table.environments) == "Some CPU; threads 1, load average up to 4.0"
    text = report.render([table])
    assert "not measured yet" in text and text.count("### op") == 1


def test_tables_split_by_test_shape_and_base(tmp_path):
    other = {"p50_ms": 4.0, "ratio": 1.0}
    write(
        tmp_path,
        entry({"linear": LINEAR}, k=1),
        entry({"linear": LINEAR}, k=1, name="test_other[b]"),
        entry({"linear": LINEAR | {"ratio": 0.5}, "peer": other}, k=2, base="peer"),
        entry({"linear": LINEAR}, rows=1),
    )
    tables, _ = report.load(tmp_path)
    assert [(t.test, t.base, len(t.rows)) for t in tables] == [
        ("test_op", "linear", 1),
        ("test_other", "linear", 1),
        ("test_op", "peer", 1),
        ("test_op", "linear", 1),
    ]


def test_gpu_results(tmp_path):
    write(tmp_path, entry({"linear": LINEAR}, k=1, environment={"gpu": "Some GPU"}), device="some-gpu")
    write(tmp_path, entry({"linear": LINEAR}, k=1, environment={"cpu": "Some CPU"}))
    text = report.render(report.load(tmp_path)[0])
    assert "not measured yet" not in text
    assert text.index("some-gpu") < text.index("Some CPU")
    write(tmp_path, entry({"linear": LINEAR}, k=1), name="pool.json")
    text = report.render(report.load(tmp_path)[0])
    assert text.count("not measured yet") == 1 and text.index("### pool") < text.index("not measured yet")


def test_a_pool_that_grows_is_drawn(tmp_path):
    write(
        tmp_path,
        *(entry({"all": {"p50_ms": 1.0 * rows}, "one": {"p50_ms": 2.0}}, rows=rows) for rows in (1, 9, 99)),
    )
    (table,), _ = report.load(tmp_path)
    assert report.is_growth(table) and f"figures/{report.figure_name(table)}" in report.render([table])
    report.draw_growth(table, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert not report.is_growth(table._replace(rows=table.rows[:2]))


def test_long_tables_are_folded(tmp_path):
    write(tmp_path, *(entry({"linear": LINEAR}, k=k) for k in range(report.FOLD + 1)))
    assert "<details>" in report.render(report.load(tmp_path)[0])


@pytest.mark.parametrize(
    "text",
    ['{"benchmarks": [', '{"benchmarks": [3]}', '{"benchmarks": [{"name": "test_a"}]}'],
    ids=["cut off", "no object", "no extra_info"],
)
def test_a_broken_file_is_named_and_left_out(tmp_path, text):
    write(tmp_path, entry({"linear": LINEAR}, k=1))
    (tmp_path / "cpu" / "broken.json").write_text(text)
    tables, complaints = report.load(tmp_path)
    assert len(tables) == 1 and len(complaints) == 1
    assert "broken.json" in complaints[0] and complaints[0].endswith("run its benchmark again or delete it.")


def test_a_contender_without_time_is_broken(tmp_path):
    write(tmp_path, entry({"linear": {"ratio": 1.0}}, k=1))
    tables, complaints = report.load(tmp_path)
    assert tables == [] and "linear has no p50_ms" in complaints[0]


def test_other_json_is_passed_over(tmp_path):
    for name, value in {"a": [1, 2], "b": {"scores": 1}, "c": 3}.items():
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / f"{name}.json").write_text(json.dumps(value))
    write(tmp_path, {"name": "test_plain", "extra_info": {}})
    assert report.load(tmp_path) == ([], [])


def test_insert_needs_its_markers():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    section = report.render([])
    assert report.insert(text, section) == f"before\n{section}\nafter\n"
    assert report.insert(report.insert(text, section), section) == report.insert(text, section)
    with pytest.raises(ValueError, match="results:begin"):
        report.insert("nothing here", section)


def test_roofline(tmp_path):
    shape = {"d_in": 8, "d_sae": 64, "batch": 4}
    both, alone = {"linear": LINEAR, "peer": LINEAR}, {"peer": {"p50_ms": 1.0}}
    write(tmp_path, entry(both, **shape), entry(alone, **shape))
    (table,), _ = report.load(tmp_path)
    assert report.is_product(table)
    report.draw_roofline(table, tmp_path / "figures" / "a.png")
    assert (tmp_path / "figures" / "a.png").read_bytes()[:4] == b"\x89PNG"
