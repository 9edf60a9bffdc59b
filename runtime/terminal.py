"""What a terminal shows: bars over long work, text shaded by numbers, and columns of it side by side."""

import itertools
import operator
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 30.0  # in a log
PATIENCE = 1.0  # seconds before a bar appears: what is quick shows none

# From this number on, this background of the 256 that terminals have; light enough for black text on any theme
SHADES = ((0.05, 230), (0.15, 223), (0.4, 216), (1.0, 209), (2.5, 202))
GAP = 3  # blanks between columns
NARROWEST = 28  # a column; with less room columns are stacked

Cell = tuple[str, float]  # a character and the number that it is shaded by


def progress_bar(
    work: Iterable[T] | None = None,
    title: str = "",
    unit: str = "it",
    total: int | None = None,
    initial: int = 0,
    leave: bool = True,
    delay: float = 0.0,
) -> Any:
    """A bar with the time left, over work or updated by hand; where stderr is no terminal, a line now and then."""
    kind = tqdm if sys.stderr.isatty() else ProgressLines
    return kind(work, title or None, total, unit=unit, initial=initial, leave=leave, delay=delay, dynamic_ncols=True)


def progress(work: Iterable[T], title: str, unit: str, total: int | None = None) -> Iterable[T]:
    """The same work, with a bar and the time left once it takes more than a moment; it leaves nothing behind."""
    bar: Iterable[T] = progress_bar(work, title, unit, total, leave=False, delay=PATIENCE)
    return bar


class ProgressLines:
    """What tqdm shows, as lines for a log: one every half minute, and one at the end of what leaves its bar.

    A log keeps every state of a bar that is drawn anew several times a second.
    """

    def __init__(
        self,
        work: Iterable[Any] | None = None,
        desc: str | None = None,
        total: int | None = None,
        *,
        unit: str = "it",
        initial: int = 0,
        leave: bool = True,
        **_: Any,
    ) -> None:
        """Begin; the arguments are tqdm's, of which those on drawing mean nothing here."""
        self.work: Iterable[Any] = () if work is None else work
        self.title = desc or ""
        self.unit = unit
        self.leave = leave
        self.total = total or operator.length_hint(self.work) or None
        self.initial = self.done = initial
        self.postfix = ""
        self.is_open = True
        self.begun = self.printed = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for one in self.work:
                yield one
                self.update()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Count what was done."""
        self.done += n
        if time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES:
            self._print()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """What stands at the end of the next line."""
        self.postfix = text

    def set_postfix(self, **figures: object) -> None:
        """The same from names and figures."""
        self.postfix = ", ".join(f"{name}={figure}" for name, figure in figures.items())

    def close(self) -> None:
        """Print the last line."""
        if self.is_open and self.leave:
            self._print()
        self.is_open = False

    def _print(self) -> None:
        self.printed = time.monotonic()
        line = tqdm.format_meter(
            self.done,
            self.total,
            self.printed - self.begun,
            prefix=self.title,
            unit=self.unit,
            initial=self.initial,
            postfix=self.postfix or None,
        )
        with suppress(OSError, ValueError):  # stderr may be closed
            print(line, file=sys.stderr, flush=True)


def can_shade(stream: TextIO) -> bool:
    """Whether colours may be written to a stream: a terminal that has them, unless NO_COLOR is set (no-color.org)."""
    old_console = os.name == "nt" and not {"WT_SESSION", "ANSICON", "TERM"} & os.environ.keys()
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and not old_console and stream.isatty()


def cells(pieces: Iterable[tuple[str, float]]) -> list[Cell]:
    """Characters of texts with their numbers; none of them can steer a terminal, as an escape sequence would."""
    return [(_harmless(char), x) for text, x in pieces for char in text]


def _harmless(char: str) -> str:
    if char == "\t":
        return " "
    return char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}"


def wrap(text: Sequence[Cell], width: int) -> list[list[Cell]]:
    """Lines of at most `width` characters, broken at blanks where there are any."""
    lines: list[list[Cell]] = []
    for is_break, group in itertools.groupby(text, lambda cell: cell[0] == "\n"):
        line = list(group)
        if is_break:
            lines += [[]] * (len(line) - 1)
            continue
        while line := list(itertools.dropwhile(lambda cell: cell[0] == " ", line)):
            end = min(len(line), width)
            if len(line) > width:
                blanks = [i for i, (char, _) in enumerate(line[: width + 1]) if char == " "]
                end = blanks[-1] if blanks else width
            lines.append(line[:end])
            line = line[end:]
    return lines


def paint(line: Iterable[Cell], shaded: bool) -> str:
    """A line as text, with escape codes where it is to be shaded."""
    if not shaded:
        return "".join(char for char, _ in line)
    painted = ""
    for colour, run in itertools.groupby(line, lambda cell: _colour(cell[1])):
        text = "".join(char for char, _ in run)
        painted += text if colour is None else f"\x1b[30;48;5;{colour}m{text}\x1b[0m"
    return painted


def _colour(x: float) -> int | None:
    return next((colour for least, colour in reversed(SHADES) if x >= least), None)


def side_by_side(columns: Sequence[tuple[str, Sequence[Cell]]], width: int, shaded: bool) -> str:
    """Texts under their headings, side by side in `width` characters, or below each other where that is too narrow."""
    each = (width - GAP * (len(columns) - 1)) // len(columns)
    if each < NARROWEST and len(columns) > 1:
        return "\n".join(side_by_side([column], width, shaded) for column in columns)
    blocks = [[cells([(head[:each], 0.0)]), *wrap(text, each)] for head, text in columns]
    lines: list[str] = []
    for row in itertools.zip_longest(*blocks, fillvalue=()):
        painted = [paint(line, shaded) + " " * (each + GAP - len(line)) for line in row]
        lines.append("".join(painted).rstrip(" "))
    return "\n".join(lines)
