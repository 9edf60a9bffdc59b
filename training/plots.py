"""Pictures of a run."""

import itertools
from pathlib import Path

from runtime.files import read_table

VALUE_FIT = "value fit (explained variance, cut at −1)"  # where returns hardly differ it falls without bound
PANELS = {  # title -> columns drawn together
    "sentiment (score −1 … 1)": ["sentiment_mean"],
    "positive responses": ["positive_rate"],
    "KL to the reference, nats per response": ["kl_seq", "kl_seq_exact"],
    "entropy, nats per token": ["entropy"],
    VALUE_FIT: ["explained_var"],
    "response length, tokens": ["response_len"],
}


def plot_curves(metrics_csv: Path, picture: Path) -> None:
    """Draw the columns of metrics.csv over steps: thin as measured, thick as a running mean."""
    from matplotlib.figure import Figure  # a second to import, and only needed here

    table = read_table(metrics_csv, "step", *itertools.chain(*PANELS.values())).set_index("step")
    table["explained_var"] = table["explained_var"].clip(lower=-1)
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, (title, columns) in zip(figure.subplots(2, 3, sharex=True).flat, PANELS.items(), strict=True):
        for column, colour in zip(columns, ("tab:blue", "tab:orange"), strict=False):
            axis.plot(table[column], color=colour, alpha=0.35, linewidth=1)
            smooth = table[column].ewm(span=max(2, len(table) // 10)).mean()
            axis.plot(smooth, color=colour, linewidth=2, label=column)
        if title == VALUE_FIT:
            axis.set_ylim(-1.05, 1.05)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if len(columns) > 1:
            axis.legend(fontsize=8)
    figure.supxlabel("PPO step", fontsize=10)
    partial = picture.with_name(f".{picture.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(picture)
