"""Pictures of a run: `python -m tools.plot ckpts` draws ckpts/curves.png from ckpts/metrics.csv again."""

import itertools
import sys
from pathlib import Path

from config import UserError, run_tool  # isort: skip  (before torch: see there)

from tools.tables import read_table

PANELS = {  # title -> columns drawn together
    "sentiment (score −1 … 1)": ["sentiment_mean"],
    "positive responses": ["positive_rate"],
    "KL to the reference, nats per response": ["kl_seq", "kl_seq_exact"],
    "entropy, nats per token": ["entropy"],
    "value fit (explained variance)": ["explained_var"],
    "response length, tokens": ["response_len"],
}


def plot_curves(metrics_csv: Path, picture: Path) -> None:
    """Draw the columns of metrics.csv over steps: thin as measured, thick as a running mean."""
    import matplotlib  # a second to import, and only needed here

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    table = read_table(metrics_csv, "step", *itertools.chain(*PANELS.values())).set_index("step")
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained", sharex=True)
    for axis, (title, columns) in zip(axes.flat, PANELS.items(), strict=True):
        for column, colour in zip(columns, ("tab:blue", "tab:orange"), strict=False):
            axis.plot(table[column], color=colour, alpha=0.35, linewidth=1)
            smooth = table[column].ewm(span=max(2, len(table) // 10)).mean()
            axis.plot(smooth, color=colour, linewidth=2, label=column)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if len(columns) > 1:
            axis.legend(fontsize=8)
    figure.supxlabel("PPO step", fontsize=10)
    partial = picture.with_name(f".{picture.name}.partial")
    figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)
    partial.replace(picture)


def main() -> None:
    """Draw the run whose folder the command line names."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "ckpts")
    if not (folder / "metrics.csv").is_file():
        raise UserError(f"{folder}/metrics.csv does not exist: name the folder of a run")
    plot_curves(folder / "metrics.csv", folder / "curves.png")
    print(folder / "curves.png")


if __name__ == "__main__":
    run_tool(main)
