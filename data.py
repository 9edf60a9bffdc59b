"""Prompts: labelled or plain text from the hub, a folder or a file, cut to token prompts and served in batches.

Owns texts, their labels and the order of prompts; runtime/tables.py reads the files. It knows nothing of models.
"""

import numbers
import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from config import UserError

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from runtime.tables import column_list, load_table
from runtime.terminal import progress

# --- text -----------------------------------------------------------------------------------------------------------


def load_examples(
    dataset: str,
    split: str,
    text_column: str,
    label_column: str | None = None,
    revision: str | None = None,
    config: str | None = None,
) -> tuple[list[str], list[str | int | None] | None]:
    """Read the texts of a data set, and its labels where a column is named.

    `<br />` becomes a space, and rows without text are left out, with a note. Labels are names, or class ids where
    no names are known; a missing one is None. Raises UserError where the data set, split or column is missing.
    """
    table = load_table(dataset, split, text_column, revision, config)
    for setting, column in (("text_column", text_column), ("label_column", label_column)):
        if column is not None and column not in table:
            raise UserError(
                f"{setting}={column!r} is not in {dataset}: name one of its columns, {column_list(table)}, with "
                f"--{setting}"
            )
    cells = list(table[text_column])
    rows = [i for i, cell in enumerate(cells) if isinstance(cell, str) and cell.strip()]
    left_out = _without_text(cells)
    if not rows:
        raise UserError(
            f"dataset {dataset} holds no text in column {text_column!r} (its rows: {left_out or 'none'}): choose "
            "another with --text_column, or --dataset"
        )
    if left_out:
        print(
            f"note: {len(cells) - len(rows):,} of {len(cells):,} rows of {dataset} have no text in column "
            f"{text_column!r} and are left out: {left_out}"
        )
    texts = [_clean(cells[i]) for i in rows]
    if label_column is None:
        return texts, None
    labels = list(table[label_column])
    return texts, classes([labels[i] for i in rows], f"label_column={label_column!r} of {dataset}")


def _without_text(cells: Sequence[Any]) -> str:
    """What the cells without text hold: '10 blank, 2 int'."""
    kinds = Counter(
        "blank" if isinstance(cell, str) or is_missing(cell) else type(cell).__name__
        for cell in cells
        if not isinstance(cell, str) or not cell.strip()
    )
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())


LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which JSON can spell and no tokenizer takes


def _clean(text: str) -> str:
    return LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text.replace("<br />", " "))


class Pair(NamedTuple):
    """Two responses to one prompt, which may be empty, of which the first was preferred."""

    prompt: str
    chosen: str
    rejected: str


def load_pairs(dataset: str, split: str, revision: str | None = None, config: str | None = None) -> list[Pair]:
    """Read preferences: columns chosen and rejected, and prompt if there is one (raises UserError).

    Pairs of the same two texts say nothing and are left out.
    """
    table = load_table(dataset, split, "prompt", revision, config)
    if missing := {"chosen", "rejected"} - set(table):
        raise UserError(
            f"dataset {dataset} has no column {' and '.join(sorted(missing))}: its columns are "
            f"{column_list(table)}; to make pairs from labelled texts name a label, --chosen_label"
        )
    columns = [name for name in Pair._fields if name in table]
    rows = [row for row in table[columns].to_dict("records") if row["chosen"] != row["rejected"]]
    for row in rows:
        for name, text in row.items():
            if not isinstance(text, str):
                raise UserError(
                    f"column {name} of dataset {dataset} holds {type(text).__name__}, not text: save it as "
                    "text, the turns of a conversation joined"
                )
    return [
        Pair(*(LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", row.get(name, "")) for name in Pair._fields))
        for row in rows
    ]


# --- labels ---------------------------------------------------------------------------------------------------------


def load_labelled(
    dataset: str,
    split: str,
    text_column: str,
    label_column: str,
    names: str | None = None,
    revision: str | None = None,
    config: str | None = None,
) -> tuple[list[str], list[str | None]]:
    """Read texts with the names of their labels, and say in one line what the labels are (raises UserError).

    `names` is the setting label_names.
    """
    texts, labels = load_examples(dataset, split, text_column, label_column, revision, config)
    named = label_names(labels or [], names)
    print(describe_labels(labels or [], named))
    return texts, named


NUMERAL = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d+)?", re.ASCII)  # 007 and 1e3 are names
NONE_WORDS = {"na", "n/a", "nan", "none", "null"}
WORDS = {"true": True, "false": False}


def classes(cells: Sequence[Any], where: str) -> list[str | int | None]:
    """The labels of a column: numbers if all are whole numbers or spell them, else names; None where one is missing.

    Where all are -1 all are missing. Raises UserError, which begins with `where`, for fractions and for lists and such.
    """
    labels = [None if is_missing(cell) or (isinstance(cell, str) and not cell.strip()) else cell for cell in cells]
    labels = _without_words_for_none(labels)
    for label in labels:
        if label is not None and not isinstance(label, str | bool | numbers.Real | np.bool_ | Decimal):
            raise UserError(f"{where} holds {_short(label)}, which is not a label: choose another with --label_column")
    values = [None if label is None else _number(label) for label in labels]
    if any(value is None and label is not None for value, label in zip(values, labels, strict=True)):
        return [None if label is None else _name(label) for label in labels]
    for value in values:
        if value is not None and value != value // 1:
            raise UserError(
                f"{where} holds {value:g}, which is a degree and no class: choose another column with "
                "--label_column, or make classes of the degrees"
            )
    present = {value for value in values if value is not None}
    if present == {-1}:
        return [None] * len(values)
    whole = bool if all(isinstance(value, bool) for value in present) else int
    return [None if value is None else whole(value) for value in values]


def _without_words_for_none(labels: list[Any]) -> list[Any]:
    """Labels where NA and the like mean that there is none, if all the others are numbers."""
    words = [isinstance(label, str) and label.strip().lower() in NONE_WORDS for label in labels]
    others = [label for label, is_word in zip(labels, words, strict=True) if label is not None and not is_word]
    if not others or any(isinstance(label, str) and _number(label) is None for label in others):
        return labels
    return [None if is_word else label for label, is_word in zip(labels, words, strict=True)]


def _number(label: Any) -> bool | float | None:
    """The number that a label is or spells; None if it is a name."""
    if isinstance(label, bool | np.bool_):
        return bool(label)
    if not isinstance(label, str):
        return int(label) if isinstance(label, numbers.Integral) else float(label)
    text = label.strip()
    if text.lower() in WORDS or not NUMERAL.fullmatch(text):
        return WORDS.get(text.lower())
    return float(text) if "." in text else int(text)


def _name(label: Any) -> str:
    value = _number(label)
    return label.strip() if isinstance(label, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def is_missing(cell: Any) -> bool:
    """Whether a cell holds nothing: None, NaN and the like."""
    return cell is None or (pd.api.types.is_scalar(cell) and bool(pd.isna(cell)))


def label_names(labels: Sequence[str | int | None], names: str | None = None) -> list[str | None]:
    """Labels as names: those in `names`, or NEGATIVE and POSITIVE for 0 and 1 (or -1 and 1), or as they are.

    `names` is such as "0=neutral,1=positive,-1=negative"; a label with an empty name counts as missing. Raises
    UserError where -1 may mean a class or that there is none, and where `names` lacks a label.
    """
    present = {label for label in labels if label is not None}
    known = _common_names(present) if names is None else _given_names(names)
    for label in sorted(map(str, present)):
        if label not in known:
            raise UserError(
                f"label_names={names!r} lacks the label {label}: add {label}=NAME, or {label}= to leave its texts out"
            )
    return [None if label is None else known[str(label)] or None for label in labels]


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
    missing = sum(counts.pop(pair) for pair in list(counts) if pair[1] is None)
    ordered = sorted(counts, key=lambda pair: (isinstance(pair[0], str), pair[0]))
    words = [
        f"{name if str(label) == name else f'{label} = {name}'} ({counts[label, name]:,})" for label, name in ordered
    ]
    words[most:] = [f"{len(words) - most} others"] if len(words) > most else []
    return "labels: " + ", ".join(words + ([f"none ({missing:,})"] if missing or not words else []))


# --- prompts --------------------------------------------------------------------------------------------------------


def load_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], min_prompt_len: int, max_prompt_len: int
) -> list[list[int]]:
    """Cut every text to its first max_prompt_len tokens; texts with fewer than min_prompt_len are left out.

    A prompt ends with a whole character, so it may be some tokens shorter. Raises UserError where none remains.
    """
    reviews = first_tokens(tokenizer, texts, min_prompt_len, max_prompt_len + SPAN)
    prompts = [ids for ids in (cut(tokenizer, ids, max_prompt_len) for ids in reviews) if ids]
    if not prompts:
        raise UserError(f"max_prompt_len={max_prompt_len} holds no whole character of any text: raise it")
    return prompts


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], at_least: int, at_most: int
) -> list[list[int]]:
    """The first tokens of every text that has enough of them, which may end inside a character.

    Raises UserError where none has.
    """
    window = 8 * at_most  # characters; nearly always enough, so that long reviews are not tokenised whole
    heads = [_head(text, window) for text in texts]
    rows = tokenize(tokenizer, heads)
    for i, (text, head) in enumerate(zip(texts, heads, strict=True)):
        if head != text and len(rows[i]) < at_most:
            rows[i] = tokenize(tokenizer, [text])[0]
    rows = [ids[:at_most] for ids in rows if len(ids) >= at_least]
    if not rows:
        raise UserError(f"no prompt has min_prompt_len={at_least} tokens or more: lower it, or change --dataset")
    return rows


SPAN = 3  # tokens: a character has 4 bytes at most, so the rest of one is at most 3 tokens away


def cut(tokenizer: PreTrainedTokenizerBase, ids: list[int], longest: int) -> list[int]:
    """The first `longest` tokens at most, fewer where the last ones would be part of a character only."""
    end = min(longest, len(ids))
    while 0 < end < len(ids) and _splits_character(tokenizer, ids[max(0, end - SPAN) : end], ids[end : end + SPAN]):
        end -= 1
    return ids[:end]


def _splits_character(tokenizer: PreTrainedTokenizerBase, before: list[int], after: list[int]) -> bool:
    left = tokenizer.decode(before, clean_up_tokenization_spaces=False)
    if not left.endswith("\N{REPLACEMENT CHARACTER}"):
        return False
    right = tokenizer.decode(after, clean_up_tokenization_spaces=False)
    return left + right != tokenizer.decode(before + after, clean_up_tokenization_spaces=False)


AT_A_TIME = 1000  # texts: what the tokenizer keeps of each until it returns is many times its tokens


def _head(text: str, window: int) -> str:
    """The first `window` characters, cut before white space, which no token of GPT-2 spans."""
    parts = text[:window].rsplit(None, 1)
    return text if len(text) <= window or len(parts) < 2 else parts[0]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens; a bar shows the way through many."""
    found: list[list[int]] = []
    for first in progress(range(0, len(texts), AT_A_TIME), "tokenizing", "batch"):
        some = list(texts[first : first + AT_A_TIME])
        found += tokenizer(some, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return found


def split_held_out(prompts: Sequence[list[int]], count: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Split prompts into those to train on and `count` held-out ones (a tenth at most), with no copy in both."""
    order = np.random.default_rng(seed).permutation(len(prompts))[: min(count, max(1, len(prompts) // 10))]
    held_out = [prompts[i] for i in order] if count else []
    copies = set(map(tuple, held_out))
    train = [prompt for prompt in prompts if tuple(prompt) not in copies]
    return train or list(prompts), held_out


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists -> ids (B, P) int64 and mask (B, P) bool, padded on the left with 0, which the mask hides."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    return ids, mask


class PromptStream:
    """An endless stream of prompts: each epoch is a new permutation, each step takes the next batch of it.

    The batch of a step depends on (seed, step) alone, so no cursor has to be saved.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], batch_size: int, seed: int) -> None:
        self.prompts, self.batch_size, self.seed = prompts, batch_size, seed
        self._epoch, self._order = -1, np.empty(0, dtype=int)

    def indices(self, step: int) -> list[int]:
        """Indices of the prompts of a step (1, 2, …): batch_size of them."""
        first = (step - 1) * self.batch_size
        return [self._at(k) for k in range(first, first + self.batch_size)]

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The left-padded prompts of a step: ids and mask, both (B, P)."""
        return pad_left([self.prompts[i] for i in self.indices(step)])

    def _at(self, k: int) -> int:
        epoch, place = divmod(k, len(self.prompts))
        if self._epoch != epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
        return int(self._order[place])
