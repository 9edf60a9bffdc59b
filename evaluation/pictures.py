"""Pictures of evaluations: scores, curves, and score against KL, for the report, the page of runs and the tools.

Colours and texts are readable on white and on black.
"""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reward import score_title
from runtime.pictures import BLUE, GREY, ORANGE, blank_figure, line_style, point_style
from runtime.saved_run import SavedRun

POLICY, BEST = BLUE, ORANGE
Size = tuple[float, float]  # inches
EVALUATED = ("kl_seq_exact", "score_mean")  # columns of eval.csv: a run's own evaluations while training
CURVES = {  # column of metrics.csv -> title; the first one is that of the score
    "score_mean": "",
    "kl_seq_exact": "KL to base, nats per response",
    "entropy": "entropy, nats per token",
    "response_len": "response length, tokens",
    "explained_var": "value fit (explained variance, cut at −1)",
}


def read_columns(home: SavedRun | None, table: str, columns: Sequence[str]) -> pd.DataFrame | None:
    """Columns of one of a run's CSV files; None without a run, or where it lacks them or they are no numbers."""
    try:
        return None if home is None else pd.read_csv(home.folder / table, usecols=list(columns), dtype=float)
    except (OSError, ValueError):
        return None


# --- figures --------------------------------------------------------------------------------------------------------


def new_figure(panels: int, rows: int = 1, size: Size = (9, 3.6), share: bool = False) -> tuple[Any, list[Any]]:
    """A figure of size inches and its axes, row by row; those beyond `panels` are hidden."""
    figure = blank_figure(*size)
    axes = list(figure.subplots(rows, math.ceil(panels / rows), squeeze=False, sharex=share, sharey=share).flat)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.tick_params(colors=GREY)
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            text.set_color(GREY)
        for spine in axis.spines.values():
            spine.set_color(GREY)
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes[:panels]


def add_legends(figure: Any) -> None:
    """Add a legend to each panel in which there is something to tell apart."""
    for axis in figure.axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, labelcolor=GREY, fontsize=8)


def as_image(figure: Any, what: str) -> str:
    """A figure, with its legends, as an image within a page."""
    add_legends(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", transparent=True)
    encoded = base64.b64encode(drawn.getvalue()).decode()
    return f'<img alt="{what}" src="data:image/svg+xml;base64,{encoded}">'


# --- panels ---------------------------------------------------------------------------------------------------------


def draw_curve(axis: Any, metrics: pd.DataFrame, column: str, score: str, **style: Any) -> None:
    """Draw a column of metrics.csv over episodes, thin as measured, thick as a running mean; score is its title."""
    values = curve(metrics, column)
    axis.plot(values, **style, alpha=0.4, linewidth=0.8)
    axis.plot(running_mean(values), **style, linewidth=1.8)
    name_curve(axis, column, score)


def draw_seeds(axis: Any, runs: Sequence[pd.DataFrame], column: str, score: str, **style: Any) -> None:
    """Draw a column of several runs of one setting: their mean over a band from the lowest to the highest."""
    means = pd.concat([running_mean(curve(metrics, column)) for metrics in runs])
    by_episodes = means.groupby(level=0)
    axis.plot(by_episodes.mean(), **style, linewidth=1.8)
    low, high = by_episodes.min(), by_episodes.max()
    axis.fill_between(low.index, low, high, color=style["color"], alpha=0.2, linewidth=0)
    name_curve(axis, column, score)


def curve(metrics: pd.DataFrame, column: str) -> pd.Series:
    """A column of metrics.csv over episodes; the value fit, which can fall without bound, is cut at -1."""
    values = metrics.set_index("episodes")[column]
    return values.clip(lower=-1) if column == "explained_var" else values


def running_mean(values: pd.Series) -> pd.Series:
    """The mean of about the last tenth."""
    return values.ewm(span=max(2, len(values) // 10)).mean()


def name_curve(axis: Any, column: str, score: str) -> None:
    """Write what a panel shows."""
    axis.set_title(CURVES[column] or score, fontsize=10)
    axis.set_xlabel("episodes")


def label_plane(axis: Any, score: str) -> None:
    """Name the axes of a picture of score against KL."""
    axis.set(xlabel="KL to base, nats per response", ylabel=f"mean {score}")


def draw_best_possible(axis: Any, summary: dict[str, Any], farthest: float = math.inf) -> None:
    """Draw the best score at each KL that eval.py --frontier found, and best of n, up to a KL.

    Where few draws stand behind the curve it is dotted: more is possible there.
    """
    curve = pd.DataFrame(summary["optimal_curve"]).query("kl <= @farthest")
    best_of_n = pd.DataFrame(summary["best_of_n"]).query("kl <= @farthest")
    certain = curve[curve.kl <= summary["kl_certain"]]
    uncertain = curve[len(certain) :]
    axis.plot(certain.kl, certain.score_mean, color=BEST, label="best possible")
    if len(uncertain):
        joined = pd.concat([certain[-1:], uncertain])  # no gap between the two lines
        axis.plot(joined.kl, joined.score_mean, ":", color=BEST, label="possible, at least")
    if len(best_of_n) == 1:  # base, at 0 nats
        return
    label = f"best of {', '.join(map(str, best_of_n.n))}"  # numbers beside the points would hide policies
    axis.plot(best_of_n.kl, best_of_n.score_mean, "o-", color=GREY, markersize=4, linewidth=1, label=label)


def draw_points(axis: Any, points: pd.DataFrame, **style: Any) -> None:
    """Draw evaluations, a row of place_of each, with their 95 % intervals."""
    kl_bars, score_bars = (
        np.abs(points[[f"{name}_low", f"{name}_high"]].T.to_numpy() - points[name].to_numpy())
        for name in ("kl", "score")
    )
    axis.errorbar(points.kl, points.score, xerr=kl_bars, yerr=score_bars, linestyle="", capsize=2, **style)


def place_of(summary: dict[str, Any]) -> dict[str, float]:
    """Where an evaluation is in the plane, with the ends of its intervals."""
    ours = summary["policy"]
    kl_low, kl_high = summary["kl_seq_exact_ci"]
    score_low, score_high = ours["score_ci"]
    return {
        "kl": summary["kl_seq_exact"],
        "kl_low": kl_low,
        "kl_high": kl_high,
        "score": ours["score_mean"],
        "score_low": score_low,
        "score_high": score_high,
    }


def annotate(axis: Any, numbers: Iterable[float], xs: Iterable[float], ys: Iterable[float]) -> None:
    """Write a number beside each point."""
    for number, x, y in zip(numbers, xs, ys, strict=True):
        axis.annotate(f"{number:g}", (x, y), xytext=(4, -11), textcoords="offset points", color=GREY, fontsize=8)


# --- pictures of tools.interpolate ----------------------------------------------------------------------------------


def curve_picture(table: pd.DataFrame, summary: dict[str, Any], path: Path) -> None:
    """Draw score against KL along the lines from base through each policy, as tools.interpolate measures them.

    summary is that of one of the points, all of which share base's responses.
    """
    figure, (axis,) = new_figure(1, size=(8, 5))
    if "optimal_curve" in summary:
        draw_best_possible(axis, summary)
    base = summary["base"]["score_mean"]
    alone = table.run.nunique() == 1
    for number, (run, unordered) in enumerate(table.groupby("run", sort=False)):
        points, style, mark = unordered.sort_values("alpha"), line_style(number), point_style(number)
        name = "from base to policy and beyond, with alpha" if alone else str(run)
        axis.plot([0, *points.kl], [base, *points.score], **style, label=name)
        draw_points(axis, points, color=style["color"], marker=".", alpha=1 if alone else 0.4)
        trained = points[points.alpha == 1]
        axis.plot(trained.kl, trained.score, linestyle="", markersize=8, **mark)
        if alone:
            annotate(axis, points.alpha, points.kl, points.score)
    axis.plot(0, base, "s", color=GREY, label="base", clip_on=False)
    axis.set_title(
        f"{summary['n']} held-out prompts, 95 % intervals; large marks are the policies as trained", fontsize=10
    )
    label_plane(axis, score_title(summary["label"]))
    axis.set_xlim(left=0, right=max(1.15 * table.kl_high.max(), 0.1))
    add_legends(figure)
    figure.savefig(path, dpi=120)


def shares_picture(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """Draw each run's share of the best gain against KL, a panel for each table of tools.interpolate by its title."""
    rows = math.ceil(len(tables) / 2)
    width = 13 if len(tables) > 1 else 7.5
    figure, axes = new_figure(len(tables), rows, (width, 3.8 * rows), share=True)
    runs = dict.fromkeys(run for table in tables.values() for run in table.run)
    styles = {run: line_style(number) | point_style(number) for number, run in enumerate(runs)}
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        for run, unordered in table.groupby("run", sort=False):
            points = unordered.sort_values("alpha")
            axis.plot(points.kl, 100 * points.optimal_share, **styles[run], label=str(run))
        axis.set(title=title, xlabel="KL to base, nats per response", ylabel="% of the best gain")
    axes[0].set_xlim(left=0)  # of all panels, when all lines are there: it is no longer fitted to what is drawn later
    add_legends(figure)
    figure.savefig(path, dpi=120)
