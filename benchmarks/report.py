"""Turn every committed benchmark result into the tables and figures of benchmarks/README.md.

    python -m benchmarks.report          # or: make bench-report

reads results/<device>/*.json as pytest-benchmark writes them. Of each benchmark's ``extra_info`` it uses

    contenders   name -> {p50_ms, ratio (to the base, absent where the base did not run), peak_mb (optional)},
                 and any other figure as "NAME" and its deviation as "NAME sd"
    base         the contender that ratios are taken to; without it the one whose ratio is exactly 1
    environment  what the figures were taken on; ``gpu`` in it marks a GPU
    all else     numbers and short strings: the columns that name the shape

so a new benchmark needs no line here. JSON that is no such file (runs keep theirs beside) is passed over; a
broken one is left out with a sentence that names it. Tables of signals and quality stand where the README
names them (`fill`). The same results always give the same text.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from saerl_fast.fileio import write_text

ROOT = Path(__file__).resolve().parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
FOLD = 24  # rows above which a table is folded away
NOT_MEASURED = "On a GPU: not measured yet (`bash benchmarks/gpu.sh`)."
NOT_SHAPE = ("contenders", "environment", "base")


class Row(NamedTuple):
    shape: dict[str, Any]
    contenders: dict[str, dict[str, float]]


class Table(NamedTuple):
    """The rows of one test function in one file that share shape columns and base."""

    device: str  # the folder under results/
    stem: str  # the file without .json
    test: str
    about: str  # first line of the benchmark's docstring
    base: str | None
    environments: list[dict[str, Any]]
    rows: list[Row]

    @property
    def on_gpu(self) -> bool:
        return any(environment.get("gpu") for environment in self.environments)

    @property
    def names(self) -> list[str]:
        found = dict.fromkeys(name for row in self.rows for name in row.contenders)
        first = [self.base] if self.base in found else []
        return [*first, *(name for name in found if name != self.base)]


def load(results: Path, pattern: str = "*/*.json") -> tuple[list[Table], list[str]]:
    """The tables of all files under ``results``, and one sentence for every file that is broken."""
    tables: list[Table] = []
    complaints = []
    for path in sorted(results.glob(pattern), key=lambda p: (p.stem, p.parent.name)):
        try:
            found = json.loads(path.read_text())
        except ValueError:
            complaints.append(f"{path} is not valid JSON; run its benchmark again or delete it.")
            continue
        if not isinstance(found, dict) or not isinstance(found.get("benchmarks"), list):
            continue
        try:
            tables += _tables(path, found["benchmarks"])
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            complaints.append(
                f"{path} does not hold what benchmarks/harness.py writes ({type(err).__name__}: {err}); "
                "run its benchmark again or delete it."
            )
    return tables, complaints


def _tables(path: Path, benchmarks: list[dict[str, Any]]) -> list[Table]:
    grouped: dict[tuple, Table] = {}
    for entry in benchmarks:
        info = entry["extra_info"]
        if "contenders" not in info:
            continue
        contenders = {
            name: {key: float(value) for key, value in row.items() if not isinstance(value, dict)}
            for name, row in info["contenders"].items()
            if "p50_ms" in row or _fail(f"{name} has no p50_ms")
        }
        shape = {
            key: value
            for key, value in info.items()
            if key not in NOT_SHAPE and isinstance(value, (int, float, str))
        }
        even = [name for name, row in contenders.items() if row.get("ratio") == 1.0]
        base = info.get("base") or ("linear" if "linear" in even else next(iter(even), None))
        test = entry["name"].partition("[")[0]
        key = (test, *shape)
        if key in grouped and base is not None and grouped[key].base not in (None, base):
            key = (*key, base)
        if key not in grouped:
            grouped[key] = Table(path.parent.name, path.stem, test, _about(entry), base, [], [])
        elif grouped[key].base is None:
            grouped[key] = grouped[key]._replace(base=base)
        grouped[key].rows.append(Row(shape, contenders))
        grouped[key].environments.append(dict(info.get("environment") or {}))
    return list(grouped.values())


def _fail(message: str) -> bool:
    raise ValueError(message)


def _about(entry: dict[str, Any]) -> str:
    source = ROOT.parent / str(entry.get("fullname", "")).partition("::")[0]
    if not source.is_file() or source.suffix != ".py":
        return ""
    return (ast.get_docstring(ast.parse(source.read_text())) or "").partition("\n")[0]


def environment_line(environments: Iterable[dict[str, Any]]) -> str:
    """Machine, versions and commits of a table in one line; several values of one key are all named."""
    values: dict[str, dict[str, None]] = {}
    loads = []
    for environment in environments:
        loads.append(environment.get("load"))
        for key, value in environment.items():
            if value is not None and key != "load":
                values.setdefault(key, {})[str(value)] = None
    machine = [" / ".join(values.pop(key)) for key in ("gpu", "cpu") if key in values]
    rest = [f"{key} {' / '.join(found)}" for key, found in values.items()]
    known = [load for load in loads if load is not None]
    if known:
        rest.append(f"load average up to {max(known):.1f}")
    return "; ".join([*machine, ", ".join(rest)] if rest else machine)


def number(value: float) -> str:
    """Three significant digits, and never fewer before the point."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _grid(header: list[str], lines: list[list[str]], left: int) -> list[str]:
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)]


def time_table(table: Table) -> list[str]:
    """Base in milliseconds, all others as ratios to it; milliseconds too where the base did not run."""
    keys = list(table.rows[0].shape)
    lines = []
    for row in table.rows:
        others = {n: c["ratio"] for n, c in row.contenders.items() if "ratio" in c and n != table.base}
        best = min(others.values(), default=None)
        cells = [str(row.shape[key]) for key in keys]
        for name in table.names:
            found = row.contenders.get(name)
            if found is None:
                cells.append("")
            elif name in others:
                text = f"{others[name]:.2f}"
                cells.append(f"**{text}**" if others[name] == best else text)
            else:
                cells.append(f"{number(found['p50_ms'])} ms")
        lines.append(cells)
    if (
        len(lines) > 1
        and keys
        and any("ratio" in found for row in table.rows for found in row.contenders.values())
    ):
        middle = ["median", *[""] * (len(keys) - 1)]
        for name in table.names:
            ratios = [row.contenders.get(name, {}).get("ratio") for row in table.rows]
            known = [ratio for ratio in ratios if ratio is not None]
            middle.append(f"{statistics.median(known):.2f}" if known and name != table.base else "")
        lines.append(middle)
    header = [*keys, *(f"{name} (ms)" if name == table.base else name for name in table.names)]
    return _grid(header, lines, len(keys))


def memory_table(table: Table) -> list[str]:
    """Peak memory in MB, or nothing where none was taken."""
    measured = [row for row in table.rows if any("peak_mb" in found for found in row.contenders.values())]
    if not measured:
        return []
    keys = list(table.rows[0].shape)
    lines = []
    for row in measured:
        peaks = [row.contenders.get(name, {}).get("peak_mb") for name in table.names]
        cells = ["" if peak is None else "<1" if peak < 1 else f"{peak:.0f}" for peak in peaks]
        lines.append([str(row.shape[key]) for key in keys] + cells)
    return _grid([*keys, *table.names], lines, len(keys))


def figure_table(table: Table) -> list[str]:
    """What was measured beside time and memory, a row for each contender; nothing where nothing was."""
    found = dict.fromkeys(key for row in table.rows for found in row.contenders.values() for key in found)
    names = [name for name in found if f"{name} sd" in found]
    if not names:
        return []
    lines = []
    for row in table.rows:
        for contender in table.names:
            figures = row.contenders.get(contender)
            if figures is not None:
                shown = [*map(str, row.shape.values()), contender]
                known = [(figures.get(name), figures.get(f"{name} sd")) for name in names]
                lines.append(
                    [*shown, *("" if None in pair else "{:.4f} ± {:.4f}".format(*pair) for pair in known)]
                )
    return _grid([*table.rows[0].shape, "", *names], lines, len(table.rows[0].shape) + 1)


def _folded(lines: list[str], title: str) -> list[str]:
    if len(lines) <= FOLD + 3:
        return lines
    return [f"<details><summary>{title}</summary>", "", *lines, "", "</details>"]


def is_product(table: Table) -> bool:
    """Can this table be drawn against the matrix product's arithmetic? Then its base is that product."""
    return {"d_in", "d_sae", "batch"} <= set(table.rows[0].shape) and table.base == "linear"


def is_growth(table: Table) -> bool:
    """Are the rows of the table one pool that grows? Then milliseconds are drawn over its rows."""
    return (
        "rows" in table.rows[0].shape
        and len({row.shape["rows"] for row in table.rows}) == len(table.rows) > 2
    )


def figure_name(table: Table) -> str:
    return f"{table.test[5:]}-{table.device}.png"


def render(tables: list[Table]) -> str:
    """The generated part of the README, markers included."""
    lines = [
        BEGIN,
        "",
        "Written by `make bench-report` from `results/<device>/*.json`. The base is in milliseconds, every",
        "other contender as the ratio of its time to the base's (median over rounds); the lowest is bold.",
        "The JSON files also hold the 20th and 80th percentiles.",
    ]
    if not any(table.on_gpu for table in tables):
        lines += ["", NOT_MEASURED]
    for stem in dict.fromkeys(table.stem for table in tables):
        mine = sorted((t for t in tables if t.stem == stem), key=lambda t: (not t.on_gpu, t.device))
        lines += ["", f"### {stem}"]
        if mine[0].about:
            lines += ["", mine[0].about]
        for place, table in enumerate(mine):
            title = f"{table.device}, {table.test[5:]}"
            lines += ["", f"**{title}** ([JSON](results/{table.device}/{table.stem}.json))"]
            if place == 0 or table.environments != mine[place - 1].environments:
                lines += ["", environment_line(table.environments)]
            lines += ["", *_folded(time_table(table), f"{len(table.rows)} shapes, time")]
            memory = memory_table(table)
            if memory:
                lines += ["", "Peak memory beyond the inputs, MB:", "", *_folded(memory, "peak memory")]
            if figures := figure_table(table):
                lines += ["", "Other figures, mean and deviation:", "", *_folded(figures, "other figures")]
            if is_product(table) or is_growth(table):
                what = "Achieved TFLOP/s" if is_product(table) else "Milliseconds"
                lines += ["", f"![{what}, {title}](figures/{figure_name(table)})"]
        if any(t.on_gpu for t in tables) and not any(t.on_gpu for t in mine):
            lines += ["", NOT_MEASURED]
    return "\n".join([*lines, "", END])


def insert(text: str, section: str) -> str:
    """``text`` with ``section``, whose first and last line are markers, in place of what is between them."""
    first, *_, last = section.splitlines()
    head, begin, rest = text.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"benchmarks/README.md needs the lines {first} and {last}, in this order")
    return head + section + tail


def fill(text: str, results: Path) -> str:
    """``text`` with the table of results/NAME.json between ``<!-- table NAME -->`` and ``<!-- end -->``."""
    from benchmarks import bench_quality, bench_signals, wrong_answers

    makers: dict[str, Any] = {"spearman": bench_signals, "wrong answers of": wrong_answers}

    def table(found: re.Match[str]) -> str:
        result = json.loads((results / f"{found[1]}.json").read_text())
        of = next((maker for key, maker in makers.items() if key in result), bench_quality)
        return f"<!-- table {found[1]} -->\n\n{of.markdown(result)}\n\n<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def draw_roofline(table: Table, path: Path) -> None:
    """Achieved TFLOP/s (2 d_in d_sae batch over the time) against d_in; the bare product is the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    widths = sorted({row.shape["d_in"] for row in table.rows})
    names = table.names
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for place, name in enumerate(names):
        shift = 0.7 * ((place + 0.5) / len(names) - 0.5)
        at, achieved = [], []
        for row in table.rows:
            if name in row.contenders:
                work = 2e-9 * row.shape["d_in"] * row.shape["d_sae"] * row.shape["batch"]
                at.append(widths.index(row.shape["d_in"]))
                achieved.append(work / row.contenders[name]["p50_ms"])
        label = f"{name} (bare product)" if name == table.base else name
        colour = "#222222" if name == table.base else f"C{place}"
        axes.scatter([x + shift for x in at], achieved, s=14, color=colour, label=label, zorder=3)
        if name == table.base:
            for x in sorted(set(at)):
                ceiling = max(y for there, y in zip(at, achieved, strict=True) if there == x)
                axes.hlines(ceiling, x - 0.4, x + 0.4, color="#222222", lw=1.2)
    axes.set_xticks(range(len(widths)), [str(width) for width in widths])
    axes.set(
        xlabel="d_in",
        ylabel="TFLOP/s of the product",
        title=f"{table.test[5:]} on {table.device}",
    )
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def draw_growth(table: Table, path: Path) -> None:
    """Milliseconds against rows, both logarithmic: a line of slope 1 grows with the pool."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for place, name in enumerate(table.names):
        points = sorted(
            (row.shape["rows"], row.contenders[name]["p50_ms"])
            for row in table.rows
            if name in row.contenders
        )
        axes.loglog(*zip(*points, strict=True), "o-", ms=4, color=f"C{place}", label=name)
    axes.set(xlabel="rows of the pool", ylabel="ms", title=f"{table.test[5:]} on {table.device}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    tables, complaints = load(ROOT / "results")
    for complaint in complaints:
        sys.stderr.write(complaint + "\n")
    readme = ROOT / "README.md"
    write_text(readme, fill(insert(readme.read_text(), render(tables)), ROOT / "results"))
    for table in tables:
        if is_product(table):
            draw_roofline(table, ROOT / "figures" / figure_name(table))
        elif is_growth(table):
            draw_growth(table, ROOT / "figures" / figure_name(table))
    print(f"{readme}: {len(tables)} tables")


if __name__ == "__main__":
    main()
