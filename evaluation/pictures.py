"""Pictures of evaluations: scores, curves, and score against KL, for the report, the page of runs and the tools.

Colours are readable on white and on black.
"""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reward import score_title
from runtime.pictures import blank_figure
from runtime.saved_run import SavedRun

GREY, BASE, POLICY, BEST = "#808890", "#8a94a0", "#3a86c8", "#e08a1e"
COLOURS = (POLICY, BEST, "#2a9d64", "#d0504a", "#9b6bd1", "#22a6b3", "#d565a8", "#9a8a28", "#7d868f", "#b0714a")
LINES = ("-", "--", ":")  # of the first ten runs, the next ten, and so on
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


def line_style(number: int) -> dict[str, Any]:
    """How the lines of one of several runs are drawn."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number // len(COLOURS) % len(LINES)]}


# --- panels ---------------------------------------------------------------------------------------------------------


def draw_scores(axis: Any, results: pd.DataFrame, label: str | None) -> None:
    """Draw histograms of the scores, policy over base."""
    scores = results[["policy_score", "base_score"]].to_numpy()
    low, high = (-1, 1) if label is not None else (scores.min(), scores.max())
    bins = np.linspace(low, high if high > low else low + 1, 41).tolist()
    axis.hist(results["base_score"], bins, color=BASE, alpha=0.6, label="base")
    axis.hist(results["policy_score"], bins, color=POLICY, alpha=0.6, label="policy")
    axis.set(xlabel="score" if label is None else "score, -1 to 1", ylabel="responses")


def draw_curve(axis: Any, metrics: pd.DataFrame, column: str, score: str, **style: Any) -> None:
    """Draw a column of metrics.csv over episodes, thin as measured, thick as a running mean; score is its title."""
    values = metrics.set_index("episodes")[column]
    if column == "explained_var":
        values = values.clip(lower=-1)
    axis.plot(values, **style, alpha=0.4, linewidth=0.8)
    axis.plot(values.ewm(span=max(2, len(values) // 10)).mean(), **style, linewidth=1.8)
    axis.set_title(CURVES[column] or score, fontsize=10)
    axis.set_xlabel("episodes")


def draw_frontier(axis: Any, summary: dict[str, Any], path: pd.DataFrame | None) -> None:
    """Draw the best possible score at each KL, the policy, and its path during training if it is known."""
    draw_best_possible(axis, summary)
    for best in summary["best_of_n"]:
        place = (best["kl"], best["score_mean"])
        axis.annotate(f"{best['n']}", place, xytext=(3, -11), textcoords="offset points", color=GREY, fontsize=8)
    if path is not None:
        axis.plot(path["kl_seq_exact"], path["score_mean"], ".-", color=POLICY, alpha=0.6, label="during training")
    draw_evaluation(axis, summary, color=POLICY, label="policy, with 95 % intervals")
    label_plane(axis, "score")


def label_plane(axis: Any, score: str) -> None:
    """Name the axes of a picture of score against KL."""
    axis.set(xlabel="KL to base, nats per response", ylabel=f"mean {score}")


def draw_best_possible(axis: Any, summary: dict[str, Any], farthest: float = math.inf) -> None:
    """Draw the best score at each KL that eval.py --frontier found, and best of n, up to a KL.

    Where few draws stand behind the curve it is dotted: more is possible there.
    """
    kl, score = (np.array(summary["optimal_curve"][name]) for name in ("kl", "score_mean"))
    certain, near = kl <= summary["kl_certain"], kl <= farthest
    axis.plot(kl[certain & near], score[certain & near], color=BEST, label="best possible")
    if not certain.all():
        axis.plot(kl[~certain & near], score[~certain & near], ":", color=BEST, label="possible, at least")
    best_of_n = [best for best in summary["best_of_n"] if best["kl"] <= farthest]
    kl_of_n, score_of_n = ([best[name] for best in best_of_n] for name in ("kl", "score_mean"))
    axis.plot(kl_of_n, score_of_n, "o-", color=GREY, markersize=4, linewidth=1, label="best of n")


def draw_evaluation(axis: Any, summary: dict[str, Any], **style: Any) -> None:
    """Draw one evaluation as a star with its 95 % intervals."""
    ours = summary["policy"]
    axis.errorbar(
        summary["kl_seq_exact"],
        ours["score_mean"],
        xerr=error_bars(summary["kl_seq_exact"], summary["kl_seq_exact_ci"]),
        yerr=error_bars(ours["score_mean"], ours["score_ci"]),
        **{"marker": "*", "markersize": 11, "capsize": 2, "linestyle": "", **style},
    )


def error_bars(values: Any, ends: Any) -> np.ndarray:
    """How far intervals (n, 2) reach below and above their values (n,): (2, n), as matplotlib takes it."""
    return np.abs(np.reshape(ends, (-1, 2)).T - np.asarray(values))


# --- pictures of tools.interpolate ----------------------------------------------------------------------------------


def curve_picture(table: pd.DataFrame, summary: dict[str, Any], path: Path) -> None:
    """Draw score against KL along the lines from base through each policy, as tools.interpolate measures them.

    summary is that of one of the points, all of which share base's responses.
    """
    figure, (axis,) = new_figure(1, size=(8, 5))
    if "optimal_curve" in summary:
        draw_best_possible(axis, summary)
    base, alone = summary["base"]["score_mean"], table.run.nunique() == 1
    for number, (run, unordered) in enumerate(table.groupby("run", sort=False)):
        points, style = unordered.sort_values("alpha"), line_style(number)
        axis.plot(points.kl, points.score, **style, label="between base and policy, and beyond" if alone else str(run))
        axis.plot([0, points.kl.iloc[0]], [base, points.score.iloc[0]], **style, linewidth=1, alpha=0.4)
        axis.errorbar(
            points.kl,
            points.score,
            xerr=error_bars(points.kl, points[["kl_low", "kl_high"]]),
            yerr=error_bars(points.score, points[["score_low", "score_high"]]),
            fmt=".",
            color=style["color"],
            capsize=2,
            alpha=1 if alone else 0.4,
        )
        policy = points[points.alpha == 1]
        axis.plot(policy.kl, policy.score, "o", color=style["color"], markersize=8, label="policy" if alone else None)
        if alone:
            for point in points.itertuples():
                place = (point.kl, point.score)
                axis.annotate(f"{point.alpha:g}", place, xytext=(6, -12), textcoords="offset points", fontsize=8)
    axis.plot(0, base, "s", color=GREY, label="base", clip_on=False)
    marks = "numbers are alpha" if alone else "circles are the policies as trained"
    axis.set_title(f"{summary['n']} held-out prompts, 95 % intervals; {marks}", fontsize=10)
    label_plane(axis, score_title(summary["label"]))
    axis.set_xlim(left=0, right=max(1.15 * table.kl_high.max(), 0.1))
    add_legends(figure)
    figure.savefig(path, dpi=120)


def shares_picture(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """Draw each run's share of the best gain against KL, a panel for each table of tools.interpolate by its title."""
    rows = math.ceil(len(tables) / 2)
    figure, axes = new_figure(len(tables), rows, (13, 3.8 * rows), share=True)
    runs = dict.fromkeys(run for table in tables.values() for run in table.run)
    styles = {run: line_style(number) for number, run in enumerate(runs)}
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        for run, unordered in table.groupby("run", sort=False):
            points = unordered.sort_values("alpha")
            axis.plot(points.kl, 100 * points.optimal_share, marker=".", **styles[run], label=str(run))
        axis.set(title=title, xlabel="KL to base, nats per response", ylabel="% of the best gain")
        axis.set_xlim(left=0)
    add_legends(figure)
    figure.savefig(path, dpi=120)
