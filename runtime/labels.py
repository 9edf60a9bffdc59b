"""Labels as a data set has them: which cells hold one, whether they are numbers or names, and what they are called."""

import numbers
import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from config import UserError

import numpy as np
import pandas as pd

NUMERAL = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d+)?", re.ASCII)  # 007 and 1e3 are names
NONE_WORDS = {"na", "n/a", "nan", "none", "null"}
WORDS = {"true": True, "false": False}


def classes(cells: Sequence[Any], where: str) -> list[str | int | None]:
    """The labels of a column: numbers if all are whole numbers or spell them, else names; None where one is missing.

    Where all are -1 all are missing. Fractions, lists and such are refused, in a message that begins with `where`.
    """
    # 1. Blank cells have no label, and a label is a name or a number
    labels = [None if is_missing(cell) or (isinstance(cell, str) and not cell.strip()) else cell for cell in cells]
    for label in labels:
        if label is not None and not isinstance(label, str | bool | numbers.Real | np.bool_ | Decimal):
            raise UserError(f"{where} holds {_short(label)}, which is not a label: choose another with --label_column")
    # 2. All are names unless all are numbers, among which NA and the like mean that there is none
    values = [None if label is None else _number(label) for label in labels]
    present = {value for value in values if value is not None}
    names = {label for label, value in zip(labels, values, strict=True) if label is not None and value is None}
    words_for_none = {name for name in names if name.strip().lower() in NONE_WORDS}
    if names != words_for_none or (names and not present):
        return [None if label is None else _name(label) for label in labels]
    # 3. Numbers of classes are whole
    for value in values:
        if value is not None and value != value // 1:
            raise UserError(
                f"{where} holds {value:g}, which is a degree and no class: choose another column with "
                "--label_column, or make classes of the degrees"
            )
    if present == {-1}:
        return [None] * len(values)
    kind = bool if all(isinstance(value, bool) for value in present) else int
    return [None if value is None else kind(value) for value in values]


def is_missing(cell: Any) -> bool:
    """Whether a cell holds nothing: None, NaN and the like."""
    return cell is None or (pd.api.types.is_scalar(cell) and bool(pd.isna(cell)))


def _number(label: Any) -> bool | float | None:
    """The number that a label is or spells; None if it is a name."""
    if isinstance(label, bool | np.bool_):
        return bool(label)
    if not isinstance(label, str):
        return int(label) if isinstance(label, numbers.Integral) else float(label)
    text = label.strip().lower()
    if not NUMERAL.fullmatch(text):
        return WORDS.get(text)
    return float(text) if "." in text else int(text)


def _name(label: Any) -> str:
    if isinstance(label, str):
        return label.strip()
    value = _number(label)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def label_names(labels: Sequence[str | int | None], names: str | None = None) -> list[str | None]:
    """Labels as names: those in `names`, or NEGATIVE and POSITIVE for 0 and 1 (or -1 and 1), or as they are.

    `names` is such as "0=neutral,1=positive,-1=negative"; a label with an empty name counts as missing. Refused are
    labels where -1 may mean a class or that there is none, and `names` that lack a label.
    """
    present = {label for label in labels if label is not None}
    name_of = _common_names(present) if names is None else _given_names(names)
    for label in sorted(map(str, present)):
        if label not in name_of:
            raise UserError(
                f"label_names={names!r} lacks the label {label}: add {label}=NAME, or {label}= to leave its texts out"
            )
    return [None if label is None else name_of[str(label)] or None for label in labels]


def _common_names(present: set[str | int]) -> dict[str, str]:
    if present in ({0, 1}, {-1, 1}):
        return dict(zip(map(str, sorted(present)), ("NEGATIVE", "POSITIVE"), strict=True))
    if -1 in present and min(present) == -1 and len(present) > 1:
        listed = ", ".join(map(str, sorted(present)))
        example = ",".join(f"{label}=..." for label in sorted(present, key=lambda label: (label == -1, label)))
        raise UserError(
            f"the labels are {listed}, where -1 may be a class or say that there is no label: name them, "
            f"--label_names {example}, with nothing after = where there is no label"
        )
    return {str(label): str(label) for label in present}


def _given_names(names: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in names.split(",")]
    if not all(equals and label.strip() for label, equals, _ in pairs):
        raise UserError(f"label_names={names!r} is not understood: write such as 0=neutral,1=positive,-1=negative")
    return {label.strip(): name.strip() for label, _, name in pairs}


def describe_labels(labels: Sequence[str | int | None], names: Sequence[str | None], most: int = 12) -> str:
    """What labels are taken for, and how often each occurs: 'labels: 0 = NEGATIVE (12,500), 1 = POSITIVE (12,500)'."""
    counts = Counter(zip(labels, names, strict=True))
    named = [pair for pair in counts if pair[1] is not None]
    shown = []
    for label, name in sorted(named, key=lambda pair: (isinstance(pair[0], str), pair[0])):
        taken_for = name if str(label) == name else f"{label} = {name}"
        shown.append(f"{taken_for} ({counts[label, name]:,})")
    if len(shown) > most:
        shown[most:] = [f"{len(shown) - most} others"]
    missing = len(labels) - sum(counts[pair] for pair in named)
    if missing or not shown:
        shown.append(f"none ({missing:,})")
    return "labels: " + ", ".join(shown)
