"""Pictures of a run."""

import itertools
from pathlib import Path

from reward import score_title
from runtime.files import read_table, rename
from runtime.pictures import blank_figure

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")
VALUE_FIT = "value fit (1 perfect; low where scores hardly differ)"
PARTS = "parts of the score"
LOWEST_FIT = -1.0  # it can fall without bound


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
        VALUE_FIT: ["explained_var"],
        "response length, tokens": ["response_len"],
    }


def plot_curves(metrics_csv: Path, picture: Path, label: str | None) -> None:
    """Draw the columns of metrics.csv over steps: thin as measured, thick as a running mean."""
    names = read_table(metrics_csv, "step").columns
    columns_of = panels(label, [name for name in names if name.startswith("reward_") and name != "reward_mean"])
    drawn = [column for columns in columns_of.values() for column in columns]
    table = read_table(metrics_csv, "step", *drawn).set_index("step")
    cut = table.index[table["explained_var"] < LOWEST_FIT]
    table["explained_var"] = table["explained_var"].clip(lower=LOWEST_FIT)
    figure = blank_figure(16 if PARTS in columns_of else 12, 6)
    places = list(figure.subplots(2, 4 if PARTS in columns_of else 3, sharex=True).flat)
    for axis in places[len(columns_of) :]:
        axis.set_visible(False)
    axes = dict(zip(columns_of, places, strict=False))
    for title, axis in axes.items():
        for column, colour in zip(columns_of[title], itertools.cycle(COLOURS), strict=False):
            axis.plot(table[column], color=colour, alpha=0.35, linewidth=1)
            smooth = table[column].ewm(span=max(2, len(table) // 10)).mean()
            axis.plot(smooth, color=colour, linewidth=2, label=column)
        if len(columns_of[title]) > 1 or title == PARTS:
            axis.legend(fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axes[VALUE_FIT].set_ylim(LOWEST_FIT - 0.1, 1.05)
    if len(cut):
        axes[VALUE_FIT].plot(cut, [LOWEST_FIT] * len(cut), "v", color="tab:blue", markersize=4, label="below −1")
        axes[VALUE_FIT].legend(fontsize=8)
    figure.supxlabel("PPO step", fontsize=10)
    partial = picture.with_name(f".{picture.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    rename(partial, picture)
