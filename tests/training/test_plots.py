"""The picture of a run."""

from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest

from training.plots import VALUE_FIT, plot_curves

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("lowest", [-0.9, -40.0])
def test_a_value_fit_that_falls_without_bound_is_cut_and_marked(
    lowest: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pd.read_csv(ROOT / "results" / "tiny_metrics.csv")
    fit = np.linspace(0.9, lowest, len(table))
    table.assign(explained_var=fit).to_csv(tmp_path / "metrics.csv", index=False)
    figures: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    plot_curves(tmp_path / "metrics.csv", tmp_path / "curves.png", "positive")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = [axis for axis in figures[0].axes if axis.get_title() == VALUE_FIT]
    assert axis.get_ylim()[0] > -1.2
    marked = [x for line in axis.lines if line.get_marker() == "v" for x in line.get_xdata()]
    assert marked == table.step[fit < -1].tolist()
    labels = [text.get_text() for text in axis.get_legend().get_texts()] if axis.get_legend() else []
    assert ("below −1" in labels) == (lowest < -1)
