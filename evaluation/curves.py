"""Pictures of score against KL: the best possible, and lines from base through policies (tools.interpolate)."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reward import score_title
from runtime.pictures import blank_figure, table_colour


def draw_best_possible(axis: Any, curve: dict[str, Any], best_of_n: list[dict[str, Any]], certain: float) -> None:
    """Draw the best possible score at each KL as an evaluation found it; beyond `certain` nats it is a lower bound."""
    kl, score = (np.array(curve[name]) for name in ("kl", "score_mean"))
    axis.plot(kl[kl <= certain], score[kl <= certain], color="black", label="best possible")
    axis.plot(kl, score, ":", color="black", label="at least possible")
    axis.plot([b["kl"] for b in best_of_n], [b["score_mean"] for b in best_of_n], ".", color="black", label="best of n")


def shares_picture(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """Draw each run's share of the best gain against KL, a panel for each table of tools.interpolate by its title."""
    rows = -(-len(tables) // 2)
    figure = blank_figure(13, 3.8 * rows)
    axes = list(figure.subplots(rows, min(2, len(tables)), sharex=True, sharey=True, squeeze=False).flat)
    runs = dict.fromkeys(run for table in tables.values() for run in table.run)
    colours = {run: table_colour(number) for number, run in enumerate(runs)}
    for axis, (title, table) in zip(axes, tables.items(), strict=False):
        for run, unordered in table.groupby("run", sort=False):
            points = unordered.sort_values("alpha")
            axis.plot(points.kl, 100 * points.optimal_share, ".-", color=colours[run], label=str(run))
        axis.set(title=title, xlabel="KL to base, nats per response", ylabel="% of the best gain")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    for axis in axes[len(tables) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=120)


def curve_picture(table: pd.DataFrame, summary: dict[str, Any], path: Path) -> None:
    """Draw score against KL along the lines from base through each policy, as tools.interpolate measures them.

    summary is that of one of the points, all of which share base's answers.
    """
    figure = blank_figure(8, 5)
    axis = figure.subplots()
    if "optimal_curve" in summary:
        draw_best_possible(axis, summary["optimal_curve"], summary["best_of_n"], summary["kl_certain"])
    base, one = summary["base"]["score_mean"], table.run.nunique() == 1
    for number, (run, unordered) in enumerate(table.groupby("run", sort=False)):
        colour, points = f"C{number % 10}", unordered.sort_values("alpha")
        name = "between base and policy, and beyond" if one else str(run)
        axis.plot(points.kl, points.score, color=colour, label=name)
        axis.plot([0, points.kl.iloc[0]], [base, points.score.iloc[0]], "--", color=colour, linewidth=1, alpha=0.6)
        bars = {
            f"{side}err": np.abs(points[[f"{name}_low", f"{name}_high"]].T.to_numpy() - points[name].to_numpy())
            for side, name in (("x", "kl"), ("y", "score"))
        }
        axis.errorbar(
            points.kl,
            points.score,
            **bars,
            fmt=".",
            color=colour,
            capsize=2,
            alpha=1 if one else 0.4,
            label="95 % intervals" if one else None,
        )
        policy = points[points.alpha == 1]
        axis.plot(policy.kl, policy.score, "o", color=colour, markersize=8, label="policy" if one else None)
        for alpha, kl, score in zip(points.alpha, points.kl, points.score, strict=True) if one else ():
            axis.annotate(f"{alpha:g}", (kl, score), xytext=(6, -12), textcoords="offset points", fontsize=8)
    axis.plot(0, base, "s", color="tab:gray", label="base", clip_on=False)
    title = "numbers are alpha" if one else "circles are the policies as trained"
    axis.set(
        xlabel="KL to base, nats per response",
        ylabel=f"mean {score_title(summary['label'])}",
        title=f"{summary['n']} held-out prompts; {title}",
    )
    axis.set_xlim(left=0, right=max(1.15 * table.kl_high.max(), 0.1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)
