"""Pictures that are drawn into files: matplotlib without a window or a notebook to show them in.

matplotlib fails when it is imported if MPLBACKEND names a backend that is not installed, such as a notebook's. A file
needs none. It takes a second to import, and is imported only where something is drawn.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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


def table_colour(number: int) -> Any:
    """One of 20 colours, which begin anew after the last."""
    with _without_backend():
        from matplotlib import colormaps
    return colormaps["tab20"](number % 20)
