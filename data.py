"""Prompts: labelled or plain text from the hub, a folder or a file, cut to token prompts and served in batches.

Owns texts, the columns that go with them, and the order of prompts; runtime/tables.py reads the files,
runtime/labels.py the labels. It knows nothing of models.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from config import UserError

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from runtime.labels import classes, describe_labels, is_missing, label_names
from runtime.tables import Columns, column_list, load_table
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
    no names are known; a missing one is None.
    """
    table = load_table(dataset, split, text_column, revision, config)
    for setting, column in (("text_column", text_column), ("label_column", label_column)):
        if column is not None:
            _check_column(table, dataset, setting, column)
    texts, rows = _texts_of(table, dataset, text_column)
    if label_column is None:
        return texts, None
    labels = list(table[label_column])
    return texts, classes([labels[i] for i in rows], f"label_column={label_column!r} of {dataset}")


@dataclass(frozen=True)
class Texts:
    """Texts of a data set, with a cell of each of some of its columns for every text."""

    texts: list[str]
    columns: Columns

    def select(self, rows: Sequence[int]) -> "Texts":
        """Some of the rows."""
        return Texts([self.texts[i] for i in rows], select_cells(self.columns, rows))


def load_texts(
    dataset: str,
    split: str,
    text_column: str,
    choose_columns: Callable[[list[str]], list[str]],
    revision: str | None = None,
    config: str | None = None,
) -> Texts:
    """Read the texts of a data set as load_examples does, and the columns that choose_columns takes from all of them.

    Only those are kept. Cells are numbers, texts, None and lists of such as the file has them, class ids with known
    names as the names.
    """
    table = load_table(dataset, split, text_column, revision, config)
    _check_column(table, dataset, "text_column", text_column)
    texts, rows = _texts_of(table, dataset, text_column)
    cells_of = {str(name): cells for name, cells in table.items()}
    chosen = choose_columns(list(cells_of))
    return Texts(texts, {name: [_plain(cell) for cell in cells_of[name].iloc[rows].tolist()] for name in chosen})


def _plain(cell: Any) -> Any:
    """A cell without the types of numpy and pandas; a missing one is None."""
    if isinstance(cell, np.ndarray | list):
        return [_plain(x) for x in cell]
    if isinstance(cell, dict):
        return {key: _plain(x) for key, x in cell.items()}
    if isinstance(cell, np.generic):
        return _plain(cell.item())
    return None if is_missing(cell) else cell


def select_cells(columns: Columns, rows: Sequence[int]) -> Columns:
    """Some rows of some columns."""
    return {name: [cells[i] for i in rows] for name, cells in columns.items()}


def _check_column(table: pd.DataFrame, dataset: str, setting: str, column: str) -> None:
    """Refuse a column that is not there."""
    if column not in table:
        raise UserError(
            f"{setting}={column!r} is not in {dataset}: name one of its columns, {column_list(table)}, with --{setting}"
        )


def _texts_of(table: pd.DataFrame, dataset: str, text_column: str) -> tuple[list[str], list[int]]:
    """The texts of a table and their rows; a note counts the rows without text."""
    cells = list(table[text_column])
    rows = [i for i, cell in enumerate(cells) if isinstance(cell, str) and cell.strip()]
    without_text = Counter(kind for kind in map(_kind_without_text, cells) if kind)
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in without_text.items())
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
    return [_without_surrogates(cells[i].replace("<br />", " ")) for i in rows], rows


def _kind_without_text(cell: Any) -> str:
    """What a cell without text holds: blank, int and so on; empty where there is text."""
    if isinstance(cell, str):
        return "" if cell.strip() else "blank"
    return "blank" if is_missing(cell) else type(cell).__name__


LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which JSON can spell and no tokenizer takes


def _without_surrogates(text: str) -> str:
    return LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


class Pair(NamedTuple):
    """Two responses to one prompt, which may be empty, of which the first was preferred."""

    prompt: str
    chosen: str
    rejected: str


def load_pairs(dataset: str, split: str, revision: str | None = None, config: str | None = None) -> list[Pair]:
    """Read preferences: columns chosen and rejected, and prompt if there is one.

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
        Pair(
            prompt=_without_surrogates(row.get("prompt", "")),
            chosen=_without_surrogates(row["chosen"]),
            rejected=_without_surrogates(row["rejected"]),
        )
        for row in rows
    ]


def load_labelled(
    dataset: str,
    split: str,
    text_column: str,
    label_column: str,
    names: str | None = None,
    revision: str | None = None,
    config: str | None = None,
) -> tuple[list[str], list[str | None]]:
    """Read texts with the names of their labels, and say in one line what the labels are.

    `names` is the setting label_names.
    """
    texts, labels = load_examples(dataset, split, text_column, label_column, revision, config)
    named = label_names(labels or [], names)
    print(describe_labels(labels or [], named))
    return texts, named


# --- prompts --------------------------------------------------------------------------------------------------------


def load_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], min_prompt_len: int, max_prompt_len: int
) -> dict[int, list[int]]:
    """Cut every text to its first max_prompt_len tokens; texts with fewer than min_prompt_len are left out.

    The result is by the row of the text. A prompt ends with a whole character, so it may be some tokens shorter.
    """
    reviews = first_tokens(tokenizer, texts, min_prompt_len, max_prompt_len + SPAN)
    prompts = {row: cut(tokenizer, ids, max_prompt_len) for row, ids in reviews.items()}
    prompts = {row: ids for row, ids in prompts.items() if ids}
    if not prompts:
        raise UserError(f"max_prompt_len={max_prompt_len} holds no whole character of any text: raise it")
    return prompts


def first_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], at_least: int, at_most: int
) -> dict[int, list[int]]:
    """The first tokens, which may end inside a character, of every text that has enough of them, by its row."""
    window = 8 * at_most  # characters; nearly always enough, so that long reviews are not tokenised whole
    heads = [_head(text, window) for text in texts]
    rows = tokenize(tokenizer, heads)
    for i, (text, head) in enumerate(zip(texts, heads, strict=True)):
        if head != text and len(rows[i]) < at_most:
            rows[i] = tokenize(tokenizer, [text])[0]
    kept = {i: ids[:at_most] for i, ids in enumerate(rows) if len(ids) >= at_least}
    if not kept:
        raise UserError(f"no prompt has min_prompt_len={at_least} tokens or more: lower it, or change --dataset")
    return kept


SPAN = 3  # tokens: a character has 4 bytes at most, so the rest of one is at most 3 tokens away


def cut(tokenizer: PreTrainedTokenizerBase, ids: list[int], longest: int) -> list[int]:
    """The first `longest` tokens at most, fewer where the last ones would be part of a character only."""
    end = min(longest, len(ids))
    while 0 < end < len(ids):
        before = ids[max(0, end - SPAN) : end]
        after = ids[end : end + SPAN]
        if not _splits_character(tokenizer, before, after):
            break
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
    if len(text) <= window:
        return text
    head_and_last_word = text[:window].rsplit(None, 1)
    return head_and_last_word[0] if len(head_and_last_word) == 2 else text


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens; a bar shows the way through many."""
    rows: list[list[int]] = []
    for first in progress(range(0, len(texts), AT_A_TIME), "tokenizing", "batch"):
        some = list(texts[first : first + AT_A_TIME])
        rows += tokenizer(some, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return rows


def split_held_out(prompts: dict[int, list[int]], count: int, seed: int) -> tuple[list[int], list[int]]:
    """The rows of the prompts to train on, and of `count` held-out ones (a tenth at most), with no copy in both."""
    rows = list(prompts)
    count = min(count, max(1, len(rows) // 10))
    order = np.random.default_rng(seed).permutation(len(rows))
    held_out = [rows[i] for i in order[:count]]
    copies = {tuple(prompts[row]) for row in held_out}
    train = [row for row in rows if tuple(prompts[row]) not in copies]
    return train or rows, held_out


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists -> ids (B, P) int64 and mask (B, P) bool, padded on the left with 0, which the mask hides."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    return ids, mask


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Left-padded prompts, ids and mask (B, P), and the cells of the data set's columns that go with each."""

    ids: torch.Tensor
    mask: torch.Tensor
    columns: Columns = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: slice) -> "PromptBatch":
        """Some of the rows."""
        return PromptBatch(self.ids[rows], self.mask[rows], {name: cells[rows] for name, cells in self.columns.items()})


class PromptStream:
    """An endless stream of prompts: each epoch is a new permutation, each step takes the next batch of it.

    The batch of a step depends on (seed, step) alone, so no cursor has to be saved. columns have a cell per prompt.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], batch_size: int, seed: int, columns: Columns | None = None
    ) -> None:
        self.prompts = prompts
        self.columns = columns or {}
        self.batch_size = batch_size
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=int)  # the permutation of that epoch

    def indices(self, step: int) -> list[int]:
        """Indices of the prompts of a step (1, 2, …): batch_size of them."""
        first = (step - 1) * self.batch_size
        return [self._at(k) for k in range(first, first + self.batch_size)]

    def batch(self, step: int) -> PromptBatch:
        """The left-padded prompts of a step."""
        rows = self.indices(step)
        return PromptBatch(*pad_left([self.prompts[i] for i in rows]), select_cells(self.columns, rows))

    def _at(self, k: int) -> int:
        epoch, place = divmod(k, len(self.prompts))
        if self._epoch != epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
        return int(self._order[place])
