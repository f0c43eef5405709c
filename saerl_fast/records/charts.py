"""Charts that a reader can ask, as data and layout for plotly.js; texts are escaped: it reads markup."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from saerl_fast.records.plots import PALETTE, POINTS, SHADES, binned
from saerl_fast.records.scored import Points

FONT = {"family": "system-ui, sans-serif", "size": 13, "color": "#1a202c"}
TITLES = {"cluster": "cluster", "difficulty": "difficulty", "quality": "quality", "pass_rate": "pass rate"}


def map_chart(points: Points) -> dict[str, Any]:
    """The map: each point says its prompt and signals; buttons colour it by any signal that is known."""
    known = {name: values for name, values in points.signals.items() if np.isfinite(values).any()}
    shades = [SHADES[c % len(SHADES)] for c in known["cluster"].astype(int).tolist()]
    buttons = []
    for name, values in known.items():
        colours = shades if name == "cluster" else _numbers(values)
        marker: dict[str, Any] = {"marker.color": [colours], "marker.showscale": [name != "cluster"]}
        marker["marker.colorbar.title.text"] = [TITLES[name]]
        buttons.append({"label": TITLES[name], "method": "restyle", "args": [marker]})
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": points.x.tolist(),
        "y": points.y.tolist(),
        "hoverinfo": "text",
        "hovertext": [_hover(text, known, i) for i, text in enumerate(points.texts)],
        "marker": {
            "color": shades,
            "size": 7,
            "opacity": 0.75,
            "colorscale": "Viridis",
            "showscale": False,
            "colorbar": {"thickness": 12, "outlinewidth": 0, "title": {"text": ""}},
            "line": {"width": 0},
        },
    }
    axis = {"showticklabels": False, "showgrid": False, "zeroline": False}
    layout = {
        "height": 560,
        "margin": {"l": 10, "r": 10, "t": 50, "b": 10},
        "font": FONT,
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "bgcolor": "white", "font": FONT},
        "xaxis": axis,
        "yaxis": axis,
        "plot_bgcolor": "#f7fafc",
        "annotations": [_number(c, at) for c, at in points.centres().items()],
        "updatemenus": [
            {
                "type": "buttons",
                "direction": "right",
                "buttons": buttons,
                **{"x": 0, "xanchor": "left", "y": 1.01, "yanchor": "bottom"},
                **{"showactive": True, "bgcolor": "white", "bordercolor": "#e2e8f0"},
            }
        ],
    }
    return {"data": [trace], "layout": layout}


def calibration_chart(
    said: np.ndarray, seen: np.ndarray, names: Sequence[str], interval: float | None
) -> dict[str, Any]:
    """Pass rates expected and observed, [n] each: each point says its prompt, one of ``names``."""
    some = np.sort(np.random.default_rng(0).permutation(len(said))[:POINTS]).tolist()
    told = [f"{_lines(names[i])}<br><i>expected {said[i]:.2f}, observed {seen[i]:.2f}</i>" for i in some]
    point = {"color": PALETTE[2], "size": 7, "opacity": 0.45, "line": {"width": 0}}
    both: dict[str, Any] = {"type": "scatter", "mode": "markers"}
    points = {**both, "name": "a prompt with a label", "marker": point}
    points |= {"x": _numbers(said[some]), "y": _numbers(seen[some]), "hoverinfo": "text", "hovertext": told}
    middle, height, error = binned(said, seen)
    means = {**both, "name": "their means, ± standard error"}
    means |= {"x": _numbers(middle), "y": _numbers(height), "marker": {"color": PALETTE[1], "size": 9}}
    means |= {"error_y": {"type": "data", "array": _numbers(error)}, "hoverinfo": "x+y"}
    around = [] if interval is None else [-interval, interval]
    axis = {"range": [-0.03, 1.03], "zeroline": False, "gridcolor": "#edf2f7"}
    layout = {
        "height": 490,
        "margin": {"l": 60, "r": 10, "t": 30, "b": 80},
        "legend": {"orientation": "h", "x": 0, "y": -0.16},  # the buttons are at the top
        "font": FONT,
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "bgcolor": "white", "font": FONT},
        "xaxis": axis | {"title": {"text": "pass rate expected"}},
        "yaxis": axis | {"title": {"text": "pass rate observed"}},
        "plot_bgcolor": "white",
        "shapes": [_line(0.0, "dash"), *(_line(shift, "dot") for shift in around)],
    }
    return {"data": [points, means], "layout": layout}


def _line(shift: float, dash: str) -> dict[str, Any]:
    ends = {"x0": 0, "x1": 1, "y0": shift, "y1": 1 + shift}
    return {"type": "line", "layer": "below", **ends, "line": {"color": "#999999", "width": 1, "dash": dash}}


def _numbers(values: np.ndarray) -> list[float | None]:
    return [round(float(v), 4) if np.isfinite(v) else None for v in values]


def _hover(text: str, known: dict[str, np.ndarray], i: int) -> str:
    said = [f"cluster {known['cluster'][i]:.0f}"]
    said += [
        f"{TITLES[name]} {values[i]:.2f}"
        for name, values in known.items()
        if name != "cluster" and np.isfinite(values[i])
    ]
    return f"{_lines(text)}<br><i>{', '.join(said)}</i>"


def _lines(text: str) -> str:
    lines = textwrap.wrap(" ".join(text.split()), 60) or ["(empty)"]
    return "<br>".join(html.escape(line, quote=False) for line in lines)


def _number(cluster: int, at: tuple[float, float]) -> dict[str, Any]:
    shade = SHADES[cluster % len(SHADES)]
    where = {"x": at[0], "y": at[1], "text": str(cluster), "showarrow": False}
    box = {"bgcolor": "rgba(255,255,255,0.85)", "bordercolor": shade, "borderpad": 2, "borderwidth": 1}
    return {**where, **box, "font": {"size": 11, "color": "#1a202c"}}
