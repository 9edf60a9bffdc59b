"""The pictures of studies, pitfalls and methods, from their tables of runs and of training steps."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation.pictures import draw_best_possible
from runtime.pictures import BLUE, VERMILLION, blank_figure, line_style, point_style

ACROSS = 7  # bugs in a row
PANELS = {"score_mean": ("score", 1.1), "kl_seq": ("kl", 8.0)}  # column of the steps -> of the runs, and where axes end


def draw_seeds(axis: Any, by_step: Any, color: str, alpha: float = 0.2, smooth: int = 1, **style: str) -> None:
    """Draw what the seeds have at each step, their mean over a band from lowest to highest.

    by_step is a column grouped by step; each line is a running mean over `smooth` steps.
    """
    mean, low, high = (by_step.agg(name).rolling(smooth, 1).mean() for name in ("mean", "min", "max"))
    axis.plot(mean, color=color, **style)
    axis.fill_between(mean.index, low, high, color=color, alpha=alpha)


# --- studies --------------------------------------------------------------------------------------------------------


def draw_study(runs: pd.DataFrame, steps: pd.DataFrame | None, path: Path) -> None:
    """Draw all runs: in one plane of score and KL where they share a unit, else in a panel for each setting."""
    if not len(runs):
        return
    one_unit = "base_score" not in runs or runs.base_score.max() - runs.base_score.min() < 0.1
    figure = plane(runs, steps) if one_unit or steps is None else panels(runs, steps)
    figure.savefig(path, dpi=120)


def plane(runs: pd.DataFrame, steps: pd.DataFrame | None) -> Any:
    """Score against KL for every run, with the best possible where it is known; and the score during training."""
    figure = blank_figure(13, 5.8)
    after, during = figure.subplots(1, 2, sharey=True)
    settings = runs.setting.unique()
    numbers = {setting: number for number, setting in enumerate(settings)}
    for setting, number in numbers.items():
        seeds = runs[runs.setting == setting]
        after.plot(seeds.kl, seeds.score, linestyle="", **point_style(number))
        after.plot([], [], label=str(setting), **line_style(number) | point_style(number))
    with_best = runs[runs.optimal_curve.notna() & (runs.optimal_curve != "null")]
    if len(with_best):
        one = with_best.iloc[0]
        best = {name: json.loads(one[name]) for name in ("optimal_curve", "best_of_n")}
        draw_best_possible(after, {**best, "kl_certain": one.get("kl_certain", np.inf)})
    after.set(xlabel="KL to base, nats per response", ylabel="mean score", title="held-out prompts, after training")
    after.set_xlim(left=0, right=max(1.15 * runs.kl.max(), 0.1))
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    if steps is not None:
        for setting, seeds in steps.groupby("setting", sort=False):
            alpha = 0.2 if seeds.seed.nunique() > 1 else 0
            style = line_style(numbers.setdefault(setting, len(numbers)))
            draw_seeds(during, seeds.groupby("episodes").score_mean, alpha=alpha, smooth=5, **style)
        during.set_xscale("log")
    title = "while training: running mean of 5 steps, lowest to highest seed"
    during.set(xlabel="episodes", title=title)
    for axis in (after, during):
        axis.grid(alpha=0.3)
    return figure


def panels(runs: pd.DataFrame, steps: pd.DataFrame) -> Any:
    """A panel for each setting, in its own units: the score while training, and base and policy on held-out prompts."""
    settings = list(runs.setting.unique())
    rows = -(-len(settings) // 3)
    figure = blank_figure(13, 3.4 * rows)
    axes = list(figure.subplots(rows, 3, squeeze=False).flat)
    for setting, axis in zip(settings, axes, strict=False):
        seeds = runs[runs.setting == setting]
        by_step = steps[steps.setting == setting].groupby("episodes").score_mean
        draw_seeds(axis, by_step, BLUE, label="batches while training")
        axis.axhline(seeds.base_score.mean(), color="black", linestyle=":", label="base, held-out prompts")
        ends = [by_step.mean().index.max() * 1.04] * len(seeds)
        axis.plot(ends, seeds.score, "D", color=VERMILLION, label="policy, held-out prompts, each seed")
        figures = f"win-rate {seeds.win_rate.mean():.0%}, KL {seeds.kl.mean():.1f} nats"
        axis.set_title(f"{setting.removeprefix('rm_name=')}\n{figures}", fontsize=10)
        axis.set_xlabel("episodes")
        axis.grid(alpha=0.3)
    for axis in axes[len(settings) :]:
        axis.set_visible(False)
    figure.supylabel("score, in the reward's own unit", fontsize=10)
    draw_legend(figure, axes[0], 3, 9)
    return figure


def draw_legend(figure: Any, axis: Any, columns: int, size: int) -> None:
    """Draw one legend below the figure, with the labels of one of its axes."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=size)


# --- pitfalls -------------------------------------------------------------------------------------------------------


def draw_pitfalls(runs: pd.DataFrame, steps: pd.DataFrame, bugs: Sequence[str], right: str, path: Path) -> None:
    """Draw score and KL of each bug as its runs reported them, over the right runs' band, and what was measured."""
    rows = -(-len(bugs) // ACROSS)
    figure = blank_figure(2.6 * ACROSS, 3.4 * rows + 0.6)
    cells = figure.subfigures(rows, ACROSS, squeeze=False).flat
    for number, (bug, cell) in enumerate(zip(bugs, cells, strict=False)):
        cell.suptitle(bug, fontsize=11)
        axes = cell.subplots(2, 1, sharex=True)
        for axis, column in zip(axes, PANELS, strict=True):
            draw_bug(axis, column, bug, right, runs, steps)
        if number % ACROSS == 0:
            axes[0].set_ylabel("score")
            axes[1].set_ylabel("KL, nats")
        else:
            for axis in axes:
                axis.set_yticklabels([])
    draw_legend(figure, figure.axes[0], 4, 11)
    figure.savefig(path, dpi=100)


def draw_bug(axis: Any, column: str, bug: str, right: str, runs: pd.DataFrame, steps: pd.DataFrame) -> None:
    """Draw a column of metrics.csv of the runs with a bug and of the right runs, and what was measured afterwards."""
    by_step = {name: steps[steps.setting == name].groupby("step")[column] for name in (right, bug)}
    numbers = sorted(steps.step.unique())
    low, high = by_step[right].min(), by_step[right].max()
    axis.fill_between(low.index, low, high, color="0.8", label="right runs, as they reported")
    draw_seeds(axis, by_step[bug], VERMILLION, alpha=0.25, label="runs with the bug, as they reported")
    measured, end = PANELS[column]
    for name, marker, colour, label in (
        (right, "o", "0.4", "right runs, measured"),
        (bug, "D", BLUE, "with the bug, measured"),
    ):
        values = runs[runs.setting == name][measured].clip(-0.95 * end, 0.95 * end)
        axis.plot([max(numbers) + 1] * len(values), values, marker, color=colour, markersize=4, label=label)
    axis.set_ylim(-end, end)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set_xticks(numbers[3::4])
    axis.tick_params(labelsize=8)


# --- methods --------------------------------------------------------------------------------------------------------


def draw_methods(runs: pd.DataFrame, path: Path) -> None:
    """Draw score against KL of each method: its line from base through its policies, and each policy as trained."""
    if not len(runs):
        return
    figure = blank_figure(11, 6.5)
    axis = figure.subplots()
    with_best = runs[runs.optimal_curve.notna() & (runs.optimal_curve != "null")]
    base = runs.base_score.mean()
    end = min(8.0, max(4.5, 1.15 * runs.kl.max()))
    if len(with_best):
        one = with_best.iloc[0]
        best = {name: json.loads(one[name]) for name in ("optimal_curve", "best_of_n")}
        draw_best_possible(axis, {**best, "kl_certain": one.get("kl_certain", np.inf)}, end)
        base = best["best_of_n"][0]["score_mean"]  # the mean of many responses: what a share's gain is counted from
    settings = runs.groupby("method").setting.nunique()
    for number, ((method, setting), seeds) in enumerate(runs.groupby(["method", "setting"], sort=False)):
        curves = pd.concat(pd.DataFrame(json.loads(curve)) for curve in seeds.curve)
        mean = curves.groupby("alpha")[["kl", "score"]].mean()
        style, mark = line_style(number), point_style(number)
        axis.plot([0, *mean.kl], [base, *mean.score], **style, linewidth=1.2)
        axis.plot(seeds.kl, seeds.score, linestyle="", markersize=7, **mark)
        name = str(method) if settings[method] == 1 else " ".join(str(setting).split()[:2])  # with its step size
        axis.plot([], [], label=name, **style | mark)
    axis.plot(0, base, "s", color="black", label="base", clip_on=False)
    axis.set(xlabel="KL to base, nats per response", ylabel="mean score", xlim=(0, end))
    axis.set_title("lines: mean over seeds of the weights between base and policy, and beyond; marks: each policy")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9)
    figure.savefig(path, dpi=110)
