"""Pictures that are drawn into files: matplotlib without a window or a notebook to show them in.

matplotlib fails when it is imported if MPLBACKEND names a backend that is not installed, such as a notebook's. A file
needs none. It takes a second to import, and is imported only where something is drawn.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Colours that colour-blind readers can tell apart (Okabe and Ito 2008)
BLUE, VERMILLION, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
ORANGE = "#E69F00"
GREY = "#757575"  # of texts: readable on white and on black
# Colour, line and marker of the first series, the second, and so on: 5, 3 and 7 of them make 105 that differ
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, SKY)
LINES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@contextmanager
def _without_backend() -> Iterator[None]:
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def blank_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, laid out so that its texts fit."""
    with _without_backend():
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def line_style(number: int) -> dict[str, str]:
    """Colour and line of one of several series."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number % len(LINES)]}


def point_style(number: int) -> dict[str, str]:
    """Colour and marker of one of several series."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
