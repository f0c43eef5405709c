"""A report as Markdown, as lines for a terminal, and as one page of HTML that needs nothing from elsewhere.

Where plotly is installed, its library goes into the page, packed, if there is a chart to draw with it; the
picture that it replaces stays for browsers that cannot. Texts may hold anything: they are escaped, and the
page's own policy lets the browser run no script but these two and load nothing.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
import shutil
import textwrap
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from saerl_fast.errors import printable
from saerl_fast.records.plots import SHADES
from saerl_fast.records.samples import Table

PLAIN = re.compile(r"[\w.,:;%+\-()\[\]±/ =>'@]*")  # what a table of figures holds: written as it is
FOLDED = {"Made with", "Settings", "Signals", "SAE training", "Milliseconds per step, by phase"}
FOLDED |= {"Sample completions", "Held-out items", "Warnings of training"}
STYLE = """
:root{--ink:#1a202c;--soft:#5a6678;--line:#e2e8f0;--pale:#f7fafc;--mark:#00798c}
*{box-sizing:border-box}
body{font:15px/1.55 system-ui,sans-serif;color:var(--ink)}
body{max-width:1120px;margin:0 auto;padding:2rem 1.2rem 4rem}
h1{font-size:1.7rem;margin:0 0 1.2rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.4rem 0 .6rem}
table{border-collapse:collapse;font-size:14px}
th{background:var(--pale);font-weight:600}
th,td{padding:.35rem .8rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
td{white-space:pre-wrap;overflow-wrap:break-word;max-width:32rem;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
p,figcaption,.soft{color:var(--soft);font-size:14px;margin:.5rem 0;max-width:56rem}
figure{margin:.6rem 0}
img{max-width:100%;height:auto}
details{border-top:1px solid var(--line)}
summary{cursor:pointer;padding:.6rem 0}
summary h2{display:inline;font-size:1rem;margin:0}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(250px,1fr));gap:.9rem}
.card{border:1px solid var(--line);border-top:4px solid var(--shade);border-radius:8px;padding:.7rem .9rem}
.card h3{margin:0 0 .3rem;font-size:1rem}
.card h3 span{color:var(--soft);font-weight:400}
.card dl{display:grid;grid-template-columns:auto 1fr;gap:.1rem .7rem;margin:.3rem 0;font-size:13px}
.card dt{color:var(--soft)}
.card dd{margin:0;font-variant-numeric:tabular-nums}
.card meter{width:5.5rem;height:.75rem;margin-right:.5rem;vertical-align:-1px}
meter::-webkit-meter-optimum-value{background:var(--mark)}
meter::-moz-meter-bar{background:var(--mark)}
.card h4{margin:.6rem 0 .1rem;font-size:12px;color:var(--soft);font-weight:600}
.card ul{margin:0;padding:0;list-style:none;font-size:13px}
.card li{padding:.12rem 0;border-bottom:1px dotted var(--line);overflow-wrap:anywhere}
.chart{width:100%}
[hidden]{display:none}
"""
START = """
(async () => {
  const read = name => document.getElementById(name).textContent;
  const packed = Uint8Array.from(atob(read("plotly")), one => one.charCodeAt(0));
  const whole = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(whole).text();
  document.head.append(script);
  const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
  for (const [name, chart] of Object.entries(JSON.parse(read("charts")))) {
    const place = document.getElementById("chart-" + name);
    place.hidden = false;
    const settings = {responsive: true, displaylogo: false, modeBarButtons: buttons};
    await Plotly.newPlot(place, chart.data, chart.layout, settings);
    document.getElementById("picture-" + name).hidden = true;
  }
})();
"""


class Picture(NamedTuple):
    """A figure in a PNG file, what stands under it, and, where there is one, a chart for plotly."""

    file: Path
    caption: str
    title: str = ""
    chart: dict[str, Any] | None = None


Part = Table | Picture


def markdown(title: str, parts: Sequence[Part]) -> str:
    lines = [f"# {_cell(title)}", ""]
    for part in parts:
        if isinstance(part, Picture):
            lines += [f"## {part.title}\n"] if part.title else []
            lines += [f"![{part.file.stem}]({part.file.name})\n\n*{_cell(part.caption)}*\n"]
            continue
        name, header, rows, note = part
        body = ["| " + " | ".join(map(_cell, row)) + " |" for row in [header, *rows]]
        lines += [f"## {name}", "", body[0], "|" + "---|" * len(header), *body[1:]]
        lines += ["", _cell(note), ""] if note else [""]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """``text`` as one line that a table may hold: no markup, no HTML, no column ends."""
    lines = html.escape(text, quote=False).replace("\\", "\\\\").splitlines() or [""]
    if PLAIN.fullmatch(text) and "](" not in text:  # no link
        return text
    return re.sub(r"([|`*_\[\]$])", r"\\\1", "<br>".join(lines))


def shown(table: Table) -> Table:
    """``table`` without characters that a terminal would obey."""
    name, header, rows, note = table
    return name, [*map(printable, header)], [[*map(printable, row)] for row in rows], printable(note)


def terminal(table: Table) -> str:
    """The table for a terminal, columns padded and headers on several lines.

    What is wider than the terminal (than 100 where there is none) goes on below, after the columns that name
    a row: the first one, or all up to the target.
    """
    name, header, rows, _ = table
    header, *rows = [[" ".join(cell.splitlines()) for cell in row] for row in [header, *rows]]
    widths = [
        max(map(len, [*cells, *top.split()]), default=0) for top, *cells in zip(header, *rows, strict=True)
    ]
    keys = [*range(header.index("target") + 1 if "target" in header else min(1, len(header) - 1))]
    room = shutil.get_terminal_size((100, 24)).columns - sum(widths[i] + 2 for i in keys)
    lines, at = ["", name], len(keys)
    while at < len(header):
        found, left = [at], room - widths[at]
        while found[-1] + 1 < len(header) and (left := left - 2 - widths[found[-1] + 1]) >= 0:
            found.append(found[-1] + 1)
        at = found[-1] + 1
        wide = [(i, widths[i]) for i in (*keys, *found)]
        tops = zip_longest(*(textwrap.wrap(header[i], max(width, 1)) for i, width in wide), fillvalue="")
        whole = [*tops, ["-" * width for _, width in wide], *([row[i] for i, _ in wide] for row in rows)]
        lines += [
            "  ".join(cell.ljust(width) for cell, (_, width) in zip(row, wide, strict=True)).rstrip()
            for row in whole
        ] + [""]
    return "\n".join(lines[:-1])


def page(title: str, parts: Sequence[Part]) -> str:
    """One file of HTML. What is long and seldom read is folded away."""
    charts = {p.file.stem: p.chart for p in parts if isinstance(p, Picture) and p.chart is not None}
    library, packed = packed_plotly() if charts else ("", "")
    scripts = [START, library] if library else []
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{found}'" for found in hashes) or "'none'"
    policy = f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {allowed}"
    lines = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name=viewport content="width=device-width,initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>",
    ]
    for part in parts:
        lines += _figure(part) if isinstance(part, Picture) else _table(part)
    if library:
        lines.append(f'<script type="text/plain" id=plotly>{packed}</script>')
        lines.append(f'<script type="application/json" id=charts>{_json(charts)}</script>')
        lines.append(f"<script>{START}</script>")
    return "\n".join(lines) + "</html>\n"


@cache
def packed_plotly() -> tuple[str, str]:
    """The library that plotly's Python package brings along, and the same packed; empty without it."""
    try:
        library = (files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    except (ImportError, OSError):
        return "", ""
    return library.decode(), base64.b64encode(gzip.compress(library, 9, mtime=0)).decode()


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever its texts hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _figure(picture: Picture) -> list[str]:
    name = picture.file.stem
    data = base64.b64encode(picture.file.read_bytes()).decode()
    return [
        f"<h2>{html.escape(picture.title)}</h2>" if picture.title else "",
        f'<figure><img id="picture-{name}" alt="{name}" src="data:image/png;base64,{data}">',
        f'<div class=chart id="chart-{name}" hidden></div>' if picture.chart is not None else "",
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>",
    ]


def _table(table: Table) -> list[str]:
    name, header, rows, note = table
    if name == "Clusters":
        body = f"<div class=cards>{''.join(_card(header, row) for row in rows)}</div>"
    else:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
        found = "".join(f"<tr>{row}</tr>" for row in cells).replace(" ± ", "&nbsp;±&nbsp;")
        body = f"<div class=scroll><table><tr>{head}</tr>{found}</table></div>"
    body += f"<p>{html.escape(note)}</p>" if note else ""
    title = f"<h2>{html.escape(name)}</h2>"
    return [f"<details><summary>{title}</summary>{body}</details>" if name in FOLDED else f"{title}{body}"]


def _card(header: list[str], row: list[str]) -> str:
    """A cluster: its figures, drawn where they are shares, then lists of features and of prompts."""
    shade = SHADES[int(row[0]) % len(SHADES)]
    figures = ""
    for name, value in zip(header[2:-2], row[2:-2], strict=True):
        drawn = f'<meter value="{html.escape(value)}"></meter>' if value != "-" else ""
        figures += f"<dt>{html.escape(name)}</dt><dd>{drawn}{html.escape(value)}</dd>"
    lists = ""
    for name, text in zip(header[-2:], row[-2:], strict=True):
        found = "".join(f"<li>{html.escape(line)}</li>" for line in text.splitlines())
        lists += f"<h4>{html.escape(name)}</h4><ul>{found}</ul>"
    size = f"<span>{html.escape(row[1])} {html.escape(header[1])}</span>"
    return (
        f'<article class=card style="--shade:{shade}"><h3>{html.escape(row[0])} {size}</h3>'
        f"<dl>{figures}</dl>{lists}</article>"
    )
