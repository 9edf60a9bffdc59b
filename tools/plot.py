"""Draws the curves of a run again: `python -m tools.plot ckpts` writes ckpts/curves.png from ckpts/metrics.csv."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from config import UserError, opt

from runtime.cli import parse_flags, run
from runtime.saved_run import SavedRun
from training.plots import plot_curves


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Settings of `python -m tools.plot`."""

    run: str = opt("ckpts", "Folder of a run; --run may be left out.", path="read")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the run whose folder the command line names (raises UserError)."""
    folder = Path(parse_flags(PlotConfig, argv, __doc__, first="run").run)
    if not (folder / "metrics.csv").is_file():
        raise UserError(f"{folder}/metrics.csv does not exist: name the folder of a run")
    plot_curves(folder / "metrics.csv", folder / "curves.png", SavedRun(folder).label)
    print(folder / "curves.png")


if __name__ == "__main__":
    sys.exit(run(main))
