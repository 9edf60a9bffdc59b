"""The table and the figure of experiments/pitfalls.py, from its two CSV files."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation.studies import table_line
from runtime.pictures import blank_figure

RIGHT = "right"  # the name of the run without a bug
CURVES = (
    "score_mean",
    "kl_seq",
    "response_len",
    "entropy",
    "approx_kl",
    "clip_frac",
    "ratio_max",
    "value_loss",
    "explained_var",
    "grad_norm",
)
TAIL = 4  # steps at the end over which a curve is averaged
COLUMNS = {  # heading -> column of the table, its factor, and how it is written
    "mean score": ("score", 1, "{:+.2f}"),
    "score as reported": ("reported_score", 1, "{:+.2f}"),
    "KL, nats": ("kl", 1, "{:.2f}"),
    "KL as reported": ("reported_kl", 1, "{:.2f}"),
    "length": ("length", 1, "{:.1f}"),
    "second judge: positive, %": ("judge", 100, "{:.0f}"),
}
PANELS = {"score_mean": ("score", 1.1), "kl_seq": ("kl", 8.0)}  # curve -> what was measured, and where axes end


def markdown(table: pd.DataFrame, curves: pd.DataFrame, facts: dict[str, str | None]) -> str:
    """A row for each bug: means over seeds (lowest to highest); facts says which of the self-audit refuses it."""
    heads = ["bug", "self-audit", *COLUMNS, "more positive than base", "would the curves have told?"]
    lines = [table_line(*heads), table_line(*["---"] * len(heads))]
    first = table.iloc[0]
    base = {"score": first.base_score, "length": first.base_length, "judge": first.base_judge}
    cells = (_cell(pd.Series([k * base.get(name, np.nan)]), form) for name, k, form in COLUMNS.values())
    lines.append(table_line("base", "", *cells, "", ""))
    for name in _names(table):
        runs = table[table.bug == name]
        audit = "" if name == RIGHT else "refuses" if facts[name] else "passes"
        better = runs.verdict.str.startswith("The policy writes more positively").sum()
        told = "" if name == RIGHT else what_tells(name, table, curves)
        cells = (_cell(factor * runs[column], form) for column, factor, form in COLUMNS.values())
        lines.append(table_line(f"`{name}`", audit, *cells, f"{better} of {len(runs)}", told))
    return "\n".join(lines)


def what_tells(name: str, table: pd.DataFrame, curves: pd.DataFrame) -> str:
    """The warnings that runs with a bug printed, and the curves that stand out beside the right run; no if neither."""
    given = [str(words).split() for words in table[table.bug == name].warnings.fillna("")]
    warned, all_names = sum(map(bool, given)), ", ".join(sorted({word for words in given for word in words}))
    if warned == len(given):
        return f"yes, a warning: {all_names}"
    parts = [f"a warning in {warned} of {len(given)} runs: {all_names}"] if warned else []
    if outside := standing_out(name, curves):
        parts.append(f"beside a right run: {', '.join(outside)}")
    return "; ".join(parts) or "no"


def standing_out(name: str, curves: pd.DataFrame) -> list[str]:
    """The columns of metrics.csv that end outside the right runs' range in every run with a bug.

    Each is averaged over its last steps, and the range is widened by its own width on both sides. explained_var is
    left out: it means nothing once all scores are alike.
    """
    judged = [column for column in CURVES if column != "explained_var"]
    ends = curves.groupby(["bug", "seed"])[judged].apply(lambda run: run.tail(TAIL).mean())
    low, high = ends.loc[RIGHT].min(), ends.loc[RIGHT].max()
    width = high - low
    found = ends.loc[name]
    return [
        column
        for column in judged
        if (found[column] > high[column] + width[column]).all() or (found[column] < low[column] - width[column]).all()
    ]


def picture(table: pd.DataFrame, curves: pd.DataFrame, path: Path) -> None:
    """Draw score and KL of each bug as its runs reported them, over the right runs' band, and what was measured."""
    names = [name for name in _names(table) if name != RIGHT]
    across = 7
    down = -(-len(names) // across)
    figure = blank_figure(2.6 * across, 3.4 * down + 0.6)
    cells = np.atleast_2d(figure.subfigures(down, across, squeeze=False))
    for i, name in enumerate(names):
        axes = cells[i // across, i % across].subplots(2, 1, sharex=True)
        cells[i // across, i % across].suptitle(name, fontsize=11)
        for axis, column in zip(axes, PANELS, strict=True):
            _panel(axis, column, name, table, curves)
        if i % across:
            for axis in axes:
                axis.set_yticklabels([])
        else:
            axes[0].set_ylabel("score")
            axes[1].set_ylabel("KL, nats")
    handles, labels = cells[0, 0].axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=11)
    figure.savefig(path, dpi=100)


def _panel(axis: Any, column: str, name: str, table: pd.DataFrame, curves: pd.DataFrame) -> None:
    right = curves[curves.bug == RIGHT].groupby("step")[column]
    ours = curves[curves.bug == name].groupby("step")[column]
    steps, (measured, end) = sorted(curves.step.unique()), PANELS[column]
    axis.fill_between(steps, right.min(), right.max(), color="0.8", label="right runs, as they reported")
    axis.fill_between(steps, ours.min(), ours.max(), color="tab:red", alpha=0.25)
    axis.plot(ours.mean(), color="tab:red", label="runs with the bug, as they reported")
    for bug, colour, label in ((RIGHT, "0.4", "right runs, measured"), (name, "tab:blue", "with the bug, measured")):
        values = table[table.bug == bug][measured].clip(-0.95 * end, 0.95 * end)
        axis.plot([max(steps) + 1] * len(values), values, "o", color=colour, markersize=4, label=label)
    axis.set_ylim(-end, end)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set_xticks(steps[3::4])
    axis.tick_params(labelsize=8)


def _names(table: pd.DataFrame) -> list[str]:
    """The bugs of a table in its order, the right run first."""
    return sorted(table.bug.unique(), key=lambda name: name != RIGHT)


def _cell(values: pd.Series, form: str) -> str:
    if values.isna().any():
        return ""
    spread = "" if len(values) == 1 else f" ({form.format(values.min())} to {form.format(values.max())})"
    return form.format(values.mean()) + spread
