"""What a terminal shows: bars over long work, text shaded by numbers, and columns of it side by side."""

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
PATIENCE = 1.0  # seconds before a bar appears: what is quick shows none

# From this number on, this background of the 256 that terminals have; light enough for black text on any theme
SHADES = ((0.05, 230), (0.15, 223), (0.4, 216), (1.0, 209), (2.5, 202))
GAP = 3  # blanks between columns
NARROWEST = 28  # a column; with less room columns are stacked

Cell = tuple[str, float]  # a character and the number that it is shaded by


def progress(work: Iterable[T], title: str, unit: str, total: int | None = None) -> Iterable[T]:
    """The same work, with a bar and the time left once it takes more than a moment; it leaves nothing behind."""
    return tqdm(work, title, total, unit=unit, dynamic_ncols=True, leave=False, delay=PATIENCE)


def can_shade(stream: TextIO) -> bool:
    """Whether colours may be written to a stream: a terminal that has them, unless NO_COLOR is set (no-color.org)."""
    old_console = os.name == "nt" and not {"WT_SESSION", "ANSICON", "TERM"} & os.environ.keys()
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and not old_console and stream.isatty()


def cells(pieces: Iterable[tuple[str, float]]) -> list[Cell]:
    """Characters of texts with their numbers; none of them can steer a terminal, as an escape sequence would."""
    return [(char if char.isprintable() or char == "\n" else " " if char == "\t" else "\N{REPLACEMENT CHARACTER}", x)
            for text, x in pieces for char in text]  # fmt: skip


def wrap(text: Sequence[Cell], width: int) -> list[list[Cell]]:
    """Lines of at most `width` characters, broken at blanks where there are any."""
    lines: list[list[Cell]] = []
    for is_break, group in itertools.groupby(text, lambda cell: cell[0] == "\n"):
        line = list(group)
        if is_break:
            lines += [[]] * (len(line) - 1)
            continue
        while line := list(itertools.dropwhile(lambda cell: cell[0] == " ", line)):
            blanks = [i for i, (char, _) in enumerate(line[: width + 1]) if char == " "]
            end = len(line) if len(line) <= width else blanks[-1] if blanks else width
            lines.append(line[:end])
            line = line[end:]
    return lines


def paint(line: Iterable[Cell], shaded: bool) -> str:
    """A line as text, with escape codes where it is to be shaded."""
    if not shaded:
        return "".join(char for char, _ in line)
    runs = ((level, "".join(char for char, _ in run)) for level, run in itertools.groupby(line, lambda c: _level(c[1])))
    return "".join(text if level is None else f"\x1b[30;48;5;{level}m{text}\x1b[0m" for level, text in runs)


def _level(x: float) -> int | None:
    return next((colour for least, colour in reversed(SHADES) if x >= least), None)


def side_by_side(columns: Sequence[tuple[str, Sequence[Cell]]], width: int, shaded: bool) -> str:
    """Texts under their headings, side by side in `width` characters, or below each other where that is too narrow."""
    each = (width - GAP * (len(columns) - 1)) // len(columns)
    if each < NARROWEST:
        each, rows = width, [[column] for column in columns]
    else:
        rows = [list(columns)]
    lines: list[str] = []
    for row in rows:
        blocks = [[cells([(head[:each], 0.0)]), *wrap(text, each)] for head, text in row]
        for parts in itertools.zip_longest(*blocks, fillvalue=()):
            painted = (paint(part, shaded) + " " * (each + GAP - len(part)) for part in parts)
            lines.append("".join(painted).rstrip(" "))
    return "\n".join(lines)
