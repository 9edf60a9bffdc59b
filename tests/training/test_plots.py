"""The picture of a run."""

import itertools
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest

from training.plots import VALUE_FIT, plot_curves

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(("fit", "ratio"), [(0.75, 0.5), (0.0, 1.0), (-3.0, 2.0), (np.nan, np.nan)])
def test_the_critics_error_is_drawn_beside_the_spread_of_what_it_expects(
    fit: float, ratio: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pd.read_csv(ROOT / "results" / "tiny_metrics.csv")
    spread = np.linspace(0.9, 0.1, len(table))
    table.assign(explained_var=fit, return_std=spread).to_csv(tmp_path / "metrics.csv", index=False)
    figures: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    plot_curves(tmp_path / "metrics.csv", tmp_path / "curves.png", "positive")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (axis,) = [axis for axis in figures[0].axes if axis.get_title() == VALUE_FIT]
    of_batches = [line.get_ydata() for line in axis.lines if line.get_alpha()]
    assert of_batches[0] == pytest.approx(spread)
    assert of_batches[1] == pytest.approx(ratio * spread, nan_ok=True)
    assert axis.get_ylim()[0] == 0
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "its standard deviation",
        "that of the critic's error",
    ]


def test_lines_and_points_are_explained_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.read_csv(ROOT / "results" / "tiny_metrics.csv")
    table.to_csv(tmp_path / "metrics.csv", index=False)
    held_out = pd.DataFrame(
        {"step": [0, 10], "score_mean": [0.1, 0.9], "kl_seq": [0.0, 7.0], "kl_seq_exact": [0.0, 2.0]}
    )
    held_out.to_csv(tmp_path / "eval.csv", index=False)
    figures: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    plot_curves(tmp_path / "metrics.csv", tmp_path / "curves.png", "positive")
    figure = figures[0]
    (key,) = figure.legends
    texts = [text.get_text() for text in key.get_texts()]
    assert texts == ["thin: each batch", "thick: running mean", "held-out prompts; step 0 is the base"]
    points = {
        axis.get_title(): list(zip(*line.get_data(), strict=True))
        for axis in figure.axes
        for line in axis.lines
        if line.get_marker() == "D" and len(line.get_xdata())
    }
    assert points == {
        "sentiment (score −1 … 1)": [(0, 0.1), (10, 0.9)],
        "KL to the reference, nats per response": [(0, 0.0), (10, 2.0)],
    }
    words = [text for axis in figure.axes if axis.get_legend() for text in axis.get_legend().get_texts()]
    assert not [text.get_text() for text in words if text.get_text() in table.columns]
    # nothing lies over anything else, and nothing is cut off
    figure.canvas.draw()
    boxes = [key.get_window_extent(), *(axis.xaxis.label.get_window_extent() for axis in figure.axes)]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    for axis in figure.axes:
        ends = axis.get_tightbbox().extents
        assert (ends >= [0, 0, 0, 0]).all()
        assert (ends <= [*figure.bbox.size, *figure.bbox.size]).all()
