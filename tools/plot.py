"""Draws the curves of a run again: `python -m tools.plot ckpts` writes ckpts/curves.png from ckpts/metrics.csv."""

import sys
from pathlib import Path

from config import UserError

from runtime.cli import run
from training.plots import plot_curves
from training.run_folder import saved_label


def main() -> None:
    """Draw the run whose folder the command line names."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "ckpts")
    if not (folder / "metrics.csv").is_file():
        raise UserError(f"{folder}/metrics.csv does not exist: name the folder of a run")
    plot_curves(folder / "metrics.csv", folder / "curves.png", saved_label(folder / "config.json"))
    print(folder / "curves.png")


if __name__ == "__main__":
    sys.exit(run(main))
