"""Figures from recorded runs: matplotlib only, drawn from JSON and Parquet alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saerl_fast.errors import printable
from saerl_fast.fileio import atomic_path
from saerl_fast.records.runs import SAERL_PHASES, RunRecord, eval_modes
from saerl_fast.records.scored import Points

MODE_LABELS = {
    "sample": "held-out accuracy (avg@k)",
    "greedy": "held-out accuracy (greedy)",
    "prob": "P(reference answer), held out",
}
POINTS = 2000  # of a curve, at most
SHADES = (  # of clusters, after matplotlib's tab20
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22"),
    *("#17becf", "#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#c7c7c7"),
    *("#dbdb8d", "#9edae5"),
)
PALETTE = ("#4a5568", "#d1495b", "#00798c", "#edae49", "#66a182", "#8d6a9f", "#2e4057", "#b56576")


def load() -> Any:
    """matplotlib's pyplot, drawing into files; a MPLBACKEND that it does not know would end its import."""
    if "matplotlib" not in sys.modules:
        os.environ.pop("MPLBACKEND", None)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _figure(
    path: Path, size: tuple[float, float], draw: Callable[[Any, Any], None], columns: int = 1
) -> Path:
    plt = load()
    style: Any = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    }
    style |= {"font.size": 10, "axes.axisbelow": True, "text.parse_math": False}  # an arm may hold a $
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained")
        draw(figure, axes)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png")
        plt.close(figure)
    return path


def _cut(name: str) -> str:
    """``name`` as a label: printable, and of a length that leaves room for the figure."""
    name = printable(name).replace("\n", " ")
    return name if len(name) <= 40 else f"{name[:24]}...{name[-13:]}"


def colours(runs: list[RunRecord]) -> dict[str, str]:
    """One colour an arm, the same in every figure."""
    arms = list(dict.fromkeys(run.arm for run in runs))
    return {arm: PALETTE[i % len(PALETTE)] for i, arm in enumerate(arms)}


def accuracy_label(runs: list[RunRecord]) -> str:
    """What the evaluations measured, for an axis; runs of several modes share no scale."""
    modes = eval_modes(runs)
    if len(modes) > 1:
        return f"held-out figure (modes: {', '.join(modes)})"
    return MODE_LABELS.get(modes[0], "held-out accuracy") if modes else "held-out accuracy"


def learning_curves(runs: list[RunRecord], targets: dict[str, float], path: Path) -> Path:
    """Held-out accuracy against steps and against rollouts; thin lines are seeds, thick ones their mean."""
    colour = colours(runs)

    def draw(figure: Any, axes: Any) -> None:
        for arm, shade in colour.items():
            mine = [run for run in runs if run.arm == arm and run.eval_steps]
            for run in mine:
                steps, values = _curve(run)
                axes[0].plot(steps, values, color=shade, lw=0.8, alpha=0.4 if len(mine) > 1 else 0)
                at = run.spent("rollouts", steps)
                axes[1].plot(at, values, color=shade, lw=1.6, alpha=0.9 if len(mine) == 1 else 0.5)
            if mine:  # up to where the first of them ends
                curves = [dict(zip(*_curve(run), strict=True)) for run in mine]
                shared = sorted(set(curves[0]).intersection(*curves))
                mean = [np.mean([curve[step] for curve in curves]) for step in shared]
                label = _cut(arm) if len(mine) == 1 else f"{_cut(arm)} (mean of {len(mine)})"
                axes[0].plot(shared, mean, color=shade, lw=2.2, label=label)
        for name, value in targets.items():
            axes[0].axhline(value, color="#999999", lw=0.8, ls="--")
            axes[0].annotate(_cut(name), (0, value), fontsize=8, color="#777777", va="bottom")
        axes[0].set(xlabel="GRPO steps", ylabel=accuracy_label(runs))
        axes[1].set(xlabel="rollouts spent")
        if axes[0].get_legend_handles_labels()[0]:
            axes[0].legend(frameon=False)

    return _figure(path, (10, 3.8), draw, columns=2)


def live(runs: list[RunRecord], path: Path) -> Path:
    """What there is so far of each run: held-out accuracy, and the reward of the batches."""
    colour = colours(runs)

    def draw(figure: Any, axes: Any) -> None:
        for run in runs:
            label = f"{_cut(run.arm)}, seed {run.seed}"
            axes[0].plot(*_curve(run), color=colour[run.arm], marker=".", label=label)
            axes[1].plot(*course([run], "reward"), color=colour[run.arm], lw=1)
        axes[0].set(xlabel="GRPO steps", ylabel=accuracy_label(runs))
        axes[1].set(xlabel="GRPO steps", ylabel="mean reward of the batch")
        if not any(run.eval_steps for run in runs):
            _nothing(axes[0], "no evaluation yet")
        if not any(np.isfinite(run.train["reward"]).any() for run in runs):
            _nothing(axes[1], "no step yet")
        axes[0].legend(frameon=False, fontsize=8)

    return _figure(path, (10, 3.8), draw, columns=2)


def _nothing(axis: Any, why: str) -> None:
    axis.set(xticks=[], yticks=[])
    axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center", color="#777777")


def phases(runs: list[RunRecord], path: Path) -> Path:
    """Mean seconds of a step by phase; what this project adds is drawn last, in red."""
    colour = {
        name: shade for name, shade in zip(SAERL_PHASES, ("#d1495b", "#e07a5f", "#f2a490"), strict=True)
    }

    def draw(figure: Any, axis: Any) -> None:
        arms = list(dict.fromkeys(run.arm for run in runs))
        seconds = {arm: [run.phase_seconds() for run in runs if run.arm == arm and run.train] for arm in arms}
        steps = {arm: sum(len(run.train) for run in runs if run.arm == arm) for arm in arms}
        names = sorted({name for arm in arms for one in seconds[arm] for name in one if name != "eval"})
        names = [n for n in names if n not in SAERL_PHASES] + [n for n in SAERL_PHASES if n in names]
        left = np.zeros(len(arms))
        greys = iter(np.linspace(0.35, 0.85, max(len(names), 1)))
        for name in names:
            width = np.array([sum(s.get(name, 0) for s in seconds[a]) / max(steps[a], 1) for a in arms])
            shade = colour.get(name, str(next(greys)))
            axis.barh(range(len(arms)), width, left=left, label=_cut(name), color=shade)
            left += width
        axis.set_yticks(range(len(arms)), [_cut(arm) for arm in arms])
        axis.invert_yaxis()
        axis.set(xlabel="seconds per step (without evaluation)")
        axis.legend(frameon=False, ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.35))

    return _figure(path, (8, 1.6 + 0.5 * len({run.arm for run in runs})), draw)


def batches(runs: list[RunRecord], path: Path) -> Path:
    """What each step trained on: pass rate, and the share of groups with a gradient; each arm's means."""
    colour = colours(runs)

    def draw(figure: Any, axes: Any) -> None:
        for arm, shade in colour.items():
            mine = [run for run in runs if run.arm == arm]
            for axis, name in zip(axes, ("pass_rate", "used"), strict=True):
                axis.plot(*_smooth(*course(mine, name)), color=shade, label=_cut(arm))
        axes[0].axhline(0.5, color="#999999", lw=0.8, ls="--")
        axes[0].set(xlabel="GRPO steps", ylabel="pass rate of the batch", ylim=(0, 1))
        axes[1].set(xlabel="GRPO steps", ylabel="groups with mixed rewards", ylim=(0, 1))
        axes[0].legend(frameon=False)

    return _figure(path, (10, 3.4), draw, columns=2)


def _curve(run: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """Steps and accuracies of the evaluations, unknown where some were lost; of many, means of neighbours."""
    lost = run.evals_lost()
    steps = np.append(np.array(run.eval_steps, np.float64), lost)
    values = np.append(run.accuracy, np.full(len(lost), np.nan))
    order = np.argsort(steps, kind="stable")
    starts = np.arange(0, len(steps), -(-len(steps) // POINTS) or 1)
    if len(starts) == len(steps):
        return steps[order], values[order]
    counts = np.diff(np.append(starts, len(steps)))
    means = (np.add.reduceat(column[order], starts) / counts for column in (steps, values))
    return next(means), next(means)


def course(runs: list[RunRecord], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and means of a column of the training rows of ``runs``, unknown where no row is, so that no line
    crosses a gap. Of many steps, `POINTS` stretches of equal length."""
    last = max((int(run.train["step"].max(initial=0)) for run in runs), default=0)
    width = max(1, -(-last // POINTS))
    size = max(1, -(-last // width))  # one unknown point where no row is yet
    sums, counts = np.zeros(size), np.zeros(size)
    for run in runs:
        values = run.train[name]
        known = np.isfinite(values) & (run.train["step"] > 0)
        at = (run.train["step"][known].astype(np.int64) - 1) // width
        sums += np.bincount(at, values[known], size)
        counts += np.bincount(at, minlength=size)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return np.arange(size) * width + (width + 1) / 2, means


def _smooth(steps: np.ndarray, values: np.ndarray, width: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Running mean over up to ``width`` neighbours, fewer at the ends; what is unknown stays so."""
    known, window = np.isfinite(values), np.ones(width)
    middle = slice(width // 2, width // 2 + len(values))
    sums, counts = (np.convolve(x, window)[middle] for x in (np.where(known, values, 0.0), known))
    return steps, np.where(known, sums / np.maximum(counts, 1), np.nan)


def signals(columns: dict[str, list[Any]], path: Path) -> Path:
    """Histograms of quality and difficulty, and cluster sizes.

    ``columns`` are those of scores.parquet. The histograms are split by the pool's optional column
    ``quality_label`` (see `label_groups`) where it holds labels, and not at all otherwise.
    """
    split = label_groups(columns.get("quality_label")) or {"all": np.ones(len(columns["prompt_id"]), bool)}
    names = list(split)

    def draw(figure: Any, axes: Any) -> None:
        for axis, key in ((axes[0], "saerl_quality"), (axes[1], "saerl_difficulty")):
            values = np.asarray(columns[key], dtype=np.float64)
            groups = [values[mask & np.isfinite(values)] for mask in split.values()]
            shades = [PALETTE[i % len(PALETTE)] for i in range(len(names))]
            if any(map(len, groups)):
                axis.hist(groups, bins=25, stacked=True, label=names, color=shades)
            else:
                _nothing(axis, "no labels: not scored")
            axis.set(xlabel=key.removeprefix("saerl_"), ylabel="prompts")
        if axes[0].get_legend_handles_labels()[0] and len(names) > 1:
            axes[0].legend(frameon=False, fontsize=8)
        sizes = np.bincount(np.asarray(columns["saerl_cluster"], dtype=np.int64))
        axes[2].bar(np.arange(len(sizes)), np.sort(sizes)[::-1], color=PALETTE[2])
        axes[2].set(xlabel="clusters, by size", ylabel="prompts")

    return _figure(path, (11, 3.2), draw, columns=3)


def prompt_map(points: Points, path: Path) -> Path:
    """Prompts where scoring has put them: by cluster, and by difficulty where it is known."""

    def draw(figure: Any, axes: Any) -> None:
        x, y, clusters = points.x, points.y, points.signals["cluster"].astype(int)
        axes[0].scatter(x, y, s=9, c=[SHADES[c % len(SHADES)] for c in clusters], alpha=0.7, lw=0)
        for c, at in points.centres().items():
            box = {"boxstyle": "circle,pad=0.2", "fc": "white", "ec": SHADES[c % len(SHADES)], "alpha": 0.85}
            axes[0].annotate(str(c), at, fontsize=8, ha="center", va="center", bbox=box)
        hard = points.signals["difficulty"]
        if np.isfinite(hard).any():
            drawn = axes[1].scatter(x, y, s=9, c=hard, cmap="viridis", alpha=0.8, lw=0)
            figure.colorbar(drawn, ax=axes[1], label="difficulty", fraction=0.05)
        else:
            _nothing(axes[1], "no labels: difficulty is not known")
        for axis, title in zip(axes, ("by cluster", "by difficulty"), strict=True):
            axis.set(xticks=[], yticks=[], title=title)
            axis.spines[:].set_visible(False)

    return _figure(path, (11, 4.8), draw, columns=2)


def calibration(said: np.ndarray, seen: np.ndarray, interval: float | None, path: Path) -> Path:
    """Pass rates that the probe expected, of fits that had not seen the label, against those observed."""

    def draw(figure: Any, axis: Any) -> None:
        axis.plot([0, 1], [0, 1], color="#999999", lw=1, ls="--")
        if interval is not None:
            line = np.array([0.0, 1.0])
            band = axis.fill_between(
                line, line - interval, line + interval, color=PALETTE[2], alpha=0.08, lw=0
            )
            band.set_label("80 % of the labels")
        axis.scatter(said, seen, s=12, color=PALETTE[2], alpha=0.35, lw=0, label="a prompt with a label")
        axis.errorbar(
            *binned(said, seen), fmt="o", color=PALETTE[1], lw=1.2, label="their means, ± standard error"
        )
        axis.set(
            xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="pass rate expected", ylabel="pass rate observed"
        )
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return _figure(path, (7.4, 4.0), draw)


def binned(said: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of both, and the second's standard error, of up to eight equal parts in the order of ``said``."""
    parts = np.array_split(np.argsort(said, kind="stable"), max(min(len(said) // 8, 8), 1))
    x, y = (np.array([values[part].mean() for part in parts]) for values in (said, seen))
    return x, y, np.array([seen[part].std() / np.sqrt(len(part)) for part in parts])


def kinds(found: dict[str, float], path: Path) -> Path:
    """How well the quality probe tells each kind of bad row from good ones."""

    def draw(figure: Any, axis: Any) -> None:
        names = sorted(found, key=lambda name: found[name])
        axis.barh(range(len(names)), [found[name] for name in names], color=PALETTE[2], height=0.6)
        for place, name in enumerate(names):
            axis.annotate(f" {found[name]:.2f}", (found[name], place), va="center", fontsize=9)
        axis.axvline(0.5, color=PALETTE[1], lw=1, ls="--")
        axis.set_yticks(range(len(names)), [_cut(name) for name in names])
        axis.set(xlim=(0, 1.08), xlabel="AUC against good rows (0.5: by chance)")

    return _figure(path, (7.4, 1.4 + 0.4 * len(found)), draw)


class Saving(NamedTuple):
    """Steps saved with an interval, where so large a share of the first arm's groups carries a gradient."""

    share: float
    saved: float
    low: float
    high: float


def law(series: Mapping[str, Sequence[Saving]], base: str, path: Path) -> Path:
    """Steps saved against the share of the first arm's groups that carry a gradient, a colour an arm.

    An interval that would take all the height runs out of the figure below.
    """

    def draw(figure: Any, axis: Any) -> None:
        for i, (name, points) in enumerate(series.items()):
            x, y, low, high = np.array(points).T
            aside = 0.008 * (i - (len(series) - 1) / 2)  # of points that would hide each other
            shade = PALETTE[(i + 1) % len(PALETTE)]
            bars = {"yerr": [y - low, high - y], "fmt": "o", "ms": 4, "capsize": 2}
            axis.errorbar(x + aside, y, **bars, color=shade, label=_cut(name))
        axis.axhline(0, color="#999999", lw=0.8)
        left, right = axis.get_xlim()
        aside = max(0.0, 0.1 - (right - left)) / 2  # or ticks of one pool all read the same
        lowest = min(point.saved for points in series.values() for point in points)
        axis.set_xlim(left - aside, right + aside)
        axis.set_ylim(bottom=max(axis.get_ylim()[0], min(lowest, 0.0) - 1.0))
        axis.set(xlabel=f"groups with a gradient, {_cut(base)}", ylabel=f"steps saved against {_cut(base)}")
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.legend(frameon=False, fontsize=8)

    return _figure(path, (7, 4), draw)


def label_groups(labels: list[Any] | None) -> dict[str, np.ndarray]:
    """Masks [n] of the rows labelled good (1), labelled bad (0) and unlabelled (null); empty ones left out.

    Labels that are scores, not 0 or 1, make one group "labelled". {} when there is nothing to split by: no
    column, no label in it, or labels that are no numbers.
    """
    try:
        values = np.asarray(labels if labels is not None else [], dtype=np.float64)
    except (TypeError, ValueError):
        return {}
    known = np.isfinite(values)
    if not known.any():
        return {}
    if np.isin(values[known], (0, 1)).all():
        groups = {"labelled good": values == 1, "labelled bad": values == 0, "unlabelled": ~known}
    else:
        groups = {"labelled": known, "unlabelled": ~known}
    return {name: mask for name, mask in groups.items() if mask.any()}
