"""Many evaluations in one table and one picture: settings times seeds, as experiments.study keeps them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reward import score_title
from runtime.pictures import blank_figure, table_colour

SHOWN = {  # column of the table -> its name, its factor, and how it is written
    "positive": ("positive, %", 100, "{:.1f}"),
    "base_score": ("base's mean score", 1, "{:+.2f}"),
    "score": ("mean score", 1, "{:+.2f}"),
    "win_rate": ("win-rate, %", 100, "{:.1f}"),
    "kl": ("KL, nats", 1, "{:.2f}"),
    "optimal_share": ("of the best gain, %", 100, "{:.0f}"),
    "judge_positive": ("second judge: positive, %", 100, "{:.1f}"),
    "length_ratio": ("length / base's", 1, "{:.2f}"),
}


def markdown(table: pd.DataFrame) -> str:
    """A row for each base and setting: means over seeds (lowest to highest), or one run's figures [95 % interval].

    Where scores are no label's probability each setting has units of its own, and its base's mean stands beside it.
    """
    known = table.dropna(subset="score") if "score" in table else table[:0]
    own_units = is_any_unit(known)
    shown = [column for column in SHOWN if own_units or column != "base_score"]
    if own_units:
        shown = [column for column in shown if column in known and known[column].notna().any()]
    lines = [table_line("setting", "seeds", "episodes", *(SHOWN[column][0] for column in shown), "sd of score")]
    lines.append(table_line(*["---"] * (4 + len(shown))))
    bases = known.filter(regex="^base_").drop_duplicates().rename(columns=lambda name: name.removeprefix("base_"))
    for i in range(0 if own_units else len(bases)):
        lines.append(table_line("base", "", "", *(_cell(bases[i : i + 1], column) for column in shown), ""))
    for name, runs in known.groupby("setting", sort=False):
        episodes = [f"{n:,.0f}" for n in runs.get("episodes", pd.Series(dtype=float)).dropna().unique()]
        spread = "" if len(runs) == 1 else f"{runs.score.std():.3g}" if own_units else f"{runs.score.std():.3f}"
        cells = (_cell(runs, column) for column in shown)
        lines.append(table_line(f"`{name}`", str(len(runs)), ", ".join(episodes), *cells, spread))
    return "\n".join(lines)


def is_any_unit(runs: pd.DataFrame) -> bool:
    """Whether scores are no label's probability, so that nothing is positive or not."""
    return "positive" not in runs or bool(runs.positive.isna().any())


def table_line(*cells: str) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def _cell(runs: pd.DataFrame, column: str) -> str:
    if column not in runs or runs[column].isna().all():
        return ""
    _, factor, form = SHOWN[column]
    if column in ("score", "base_score") and is_any_unit(runs):
        form = "{:+.4g}"
    values = factor * runs[column]
    if column == "base_score" and values.nunique() == 1:  # all seeds are compared with the same answers of base
        return form.format(values.iloc[0])
    if len(runs) > 1:
        ends = f" ({form.format(values.min())} to {form.format(values.max())})"
    else:
        known = json.loads(str(runs.get(f"{column}_ci", pd.Series("null")).fillna("null").iloc[0]))
        ends = f" [{', '.join(form.format(factor * x) for x in known)}]" if known else ""
    return form.format(values.mean()) + ends


def picture(table: pd.DataFrame, steps: pd.DataFrame | None, path: Path) -> None:
    """Draw all runs: in one plane of score and KL where they share a unit, else in a panel for each setting."""
    done = table.dropna(subset="score") if "score" in table else table[:0]
    if not len(done):
        return
    one_unit = done.base_score.max() - done.base_score.min() < 0.1 if "base_score" in done else True
    figure = plane(done, steps) if one_unit or steps is None else panels(done, steps)
    figure.savefig(path, dpi=120)


def panels(done: pd.DataFrame, steps: pd.DataFrame) -> Any:
    """A panel for each setting, in its own units: the score while training, and base and policy on held-out prompts."""
    names = list(done.setting.unique())
    rows = -(-len(names) // 3)
    figure = blank_figure(13, 3.4 * rows)
    axes = figure.subplots(rows, 3, squeeze=False).flat
    for name, axis in zip(names, axes, strict=False):
        runs = done[done.setting == name]
        by_step = steps[steps.setting == name].groupby("episodes").score_mean
        axis.plot(by_step.mean(), color="tab:blue", label="batches while training")
        axis.fill_between(by_step.min().index, by_step.min(), by_step.max(), color="tab:blue", alpha=0.2)
        axis.axhline(runs.base_score.mean(), color="black", linestyle=":", label="base, held-out prompts")
        end = by_step.mean().index.max() * 1.04
        axis.plot([end] * len(runs), runs.score, "o", color="tab:orange", label="policy, held-out prompts, each seed")
        figures = f"win-rate {runs.win_rate.mean():.0%}, KL {runs.kl.mean():.1f} nats"
        axis.set_title(f"{name.removeprefix('rm_name=')}\n{figures}", fontsize=10)
        axis.set_xlabel("episodes")
        axis.grid(alpha=0.3)
    for axis in axes:  # what is left of the last row
        axis.set_visible(False)
    figure.supylabel("score, in the reward's own unit", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def plane(done: pd.DataFrame, steps: pd.DataFrame | None) -> Any:
    """Score against KL for every run, with the best possible where it is known, and during training."""
    figure = blank_figure(13, 5.8)
    axes = figure.subplots(1, 2, sharey=True)
    axis, while_training = axes
    colours = {setting: table_colour(number) for number, setting in enumerate(done.setting.unique())}
    for setting, runs in done.groupby("setting", sort=False):
        axis.plot(runs.kl, runs.score, "o", color=colours[setting], label=str(setting))
    known = done[done.optimal_curve.notna() & (done.optimal_curve != "null")]
    if len(known):
        curve, best = (json.loads(known[name].iloc[0]) for name in ("optimal_curve", "best_of_n"))
        best_possible(axis, curve, best, known.kl_certain.iloc[0] if "kl_certain" in known else np.inf)
    axis.set(xlabel="KL to base, nats per response", ylabel="mean score", title="held-out prompts, after training")
    axis.set_xlim(left=0, right=max(1.15 * done.kl.max(), 0.1))
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    if steps is not None:
        for setting, runs in steps.groupby("setting", sort=False):
            by_step = runs.groupby("episodes").score_mean
            smooth = {name: by_step.agg(name).rolling(5, 1).mean() for name in ("mean", "min", "max")}
            while_training.plot(smooth["mean"], color=colours.get(setting))
            if runs.seed.nunique() > 1:
                ends = smooth["mean"].index, smooth["min"], smooth["max"]
                while_training.fill_between(*ends, color=colours.get(setting), alpha=0.2)
        while_training.set_xscale("log")
    title = "batches while training (running mean of 5 steps; band: lowest to highest seed)"
    while_training.set(xlabel="episodes", title=title)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure


def best_possible(axis: Any, curve: dict[str, Any], best_of_n: list[dict[str, Any]], certain: float) -> None:
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
        best_possible(axis, summary["optimal_curve"], summary["best_of_n"], summary["kl_certain"])
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
