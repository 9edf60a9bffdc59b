"""Pictures of a run."""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from reward import PART, score_title
from runtime.files import read_table, rename
from runtime.pictures import BLUE, blank_figure, line_style

PARTS = "parts of the score"
VALUE_FIT = "critic: the reward still to come"
ERROR_STD = "error_std"  # of what the critic expects; computed here
WORDS = {
    "kl_seq": "sampled tokens",
    "kl_seq_exact": "exact",
    "return_std": "its standard deviation",
    ERROR_STD: "that of the critic's error",
}
HELD_OUT: dict[str, Any] = {"color": "black", "marker": "D", "markersize": 5, "linestyle": ""}


def panels(label: str | None, parts: list[str]) -> dict[str, list[str]]:
    """Title and columns of each panel; label is the one whose probability is scored, None where scores are any.

    parts are the columns of the parts of a score, if it has any.
    """
    if label is None:
        scores = {score_title(label): ["score_mean"], "reward: score less the price of KL": ["reward_mean"]}
    else:
        scores = {f"{score_title(label)} (score −1 … 1)": ["score_mean"], f"{label} responses": ["positive_rate"]}
    if parts:
        scores |= {PARTS: parts}
    return {
        **scores,
        "KL to the reference, nats per response": ["kl_seq", "kl_seq_exact"],
        "entropy, nats per token": ["entropy"],
        VALUE_FIT: ["return_std", ERROR_STD],
        "response length, tokens": ["response_len"],
    }


def plot_curves(metrics_csv: Path, picture: Path, label: str | None) -> None:
    """Draw the columns of metrics.csv over steps, and the averages over held-out prompts of eval.csv beside it."""
    names = read_table(metrics_csv, "step").columns
    columns_of = panels(label, [name for name in names if name.startswith(PART) and name != "reward_mean"])
    drawn = [column for columns in columns_of.values() for column in columns if column != ERROR_STD]
    drawn.remove("return_std")  # which runs of older versions lack
    table = read_table(metrics_csv, "step", *drawn, "explained_var").set_index("step")
    if "return_std" not in table:
        table["return_std"] = math.nan
    # explained_var = 1 - (error_std / return_std)^2, which falls without bound once all rewards are nearly alike
    table[ERROR_STD] = table["return_std"] * (1 - table["explained_var"]).pow(0.5)
    figure = blank_figure(16 if PARTS in columns_of else 12, 6.4)
    places = list(figure.subplots(2, 4 if PARTS in columns_of else 3, sharex=True).flat)
    for axis in places[len(columns_of) :]:
        axis.set_visible(False)
    axes = dict(zip(columns_of, places, strict=False))
    for title, axis in axes.items():
        for number, column in enumerate(columns_of[title]):
            style = line_style(number)
            axis.plot(table[column], color=style["color"], alpha=0.4, linewidth=1)
            smooth = table[column].ewm(span=max(2, len(table) // 10)).mean()
            word = column.removeprefix(PART) if title == PARTS else WORDS.get(column)
            axis.plot(smooth, **style, linewidth=2, label=word)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("PPO step", fontsize=9)
        axis.grid(alpha=0.3)
    axes[VALUE_FIT].set_ylim(bottom=0)
    held_out = metrics_csv.with_name("eval.csv")
    if held_out.exists():
        draw_held_out(axes, columns_of, pd.read_csv(held_out).set_index("step"))
    for axis in axes.values():
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    add_key(figure, held_out.exists())
    partial = picture.with_name(f".{picture.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    rename(partial, picture)


def draw_held_out(axes: dict[str, Any], columns_of: dict[str, list[str]], evaluations: pd.DataFrame) -> None:
    """Draw the columns of each panel that evaluations have; of the two of KL the exact one."""
    for title, axis in axes.items():
        for number, column in enumerate(columns_of[title]):
            if column not in evaluations or column == "kl_seq":
                continue
            several = {"color": line_style(number)["color"]} if title == PARTS else {}
            axis.plot(evaluations[column], **{**HELD_OUT, **several})


def add_key(figure: Any, with_held_out: bool) -> None:
    """Say below all panels what thin lines, thick lines and points are."""
    axis = figure.axes[0]
    handles = [
        *axis.plot([], [], color=BLUE, alpha=0.4, linewidth=1, label="thin: each batch"),
        *axis.plot([], [], color=BLUE, linewidth=2, label="thick: running mean"),
    ]
    if with_held_out:
        handles += axis.plot([], [], **HELD_OUT, label="held-out prompts; step 0 is the base")
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
