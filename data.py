"""Prompts: labelled or plain text from the hub, a folder or a file, cut to token prompts and served in batches.

Owns what is read from disk and the order of prompts. It knows nothing of models.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from config import UserError

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from runtime.hub import require_hub
from runtime.terminal import progress

FILE_KINDS = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")


def is_file(dataset: str) -> bool:
    """Whether `dataset` names a single file, which has no splits."""
    return Path(dataset).suffix in FILE_KINDS


# --- text -----------------------------------------------------------------------------------------------------------


def load_examples(
    dataset: str, split: str, text_column: str, label_column: str | None = None, revision: str | None = None
) -> tuple[list[str], list[str | int | None] | None]:
    """Read the texts of a data set, and its labels where a column is named.

    `<br />` becomes a space and empty rows are left out. Class ids with known names become the names; a missing
    label (-1 in Hugging Face data sets) becomes None. Raises UserError where the data set, split or column is missing.
    """
    table = _read_file(dataset, text_column) if is_file(dataset) else _read_dataset(dataset, split, revision)
    for setting, column in (("text_column", text_column), ("label_column", label_column)):
        if column is not None and column not in table:
            raise UserError(f"{setting}={column!r} is not in {dataset}: its columns are {', '.join(map(str, table))}")
    table = table[table[text_column].map(lambda text: isinstance(text, str) and bool(text.strip()))]
    if table.empty:
        raise UserError(f"dataset {dataset} holds no text in column {text_column!r}: choose another with --dataset")
    texts = table[text_column].str.replace("<br />", " ", regex=False).tolist()
    return texts, None if label_column is None else [_label(x) for x in table[label_column]]


class Pair(NamedTuple):
    """Two responses to one prompt, which may be empty, of which the first was preferred."""

    prompt: str
    chosen: str
    rejected: str


def load_pairs(dataset: str, split: str, revision: str | None = None) -> list[Pair]:
    """Read preferences: columns chosen and rejected, and prompt if there is one (raises UserError).

    Pairs of the same two texts say nothing and are left out.
    """
    table = _read_file(dataset, "prompt") if is_file(dataset) else _read_dataset(dataset, split, revision)
    if missing := {"chosen", "rejected"} - set(table):
        raise UserError(
            f"dataset {dataset} has no column {' and '.join(sorted(missing))}: its columns are "
            f"{', '.join(map(str, table))}; to make pairs from labelled texts name a label, --chosen_label"
        )
    columns = [name for name in Pair._fields if name in table]
    rows = [row for row in table[columns].to_dict("records") if row["chosen"] != row["rejected"]]
    for row in rows:
        for name, text in row.items():
            if not isinstance(text, str):
                raise UserError(f"column {name} of dataset {dataset} holds {type(text).__name__}, not text: save it as "
                                "text, the turns of a conversation joined")  # fmt: skip
    return [Pair(row.get("prompt", ""), row["chosen"], row["rejected"]) for row in rows]


def label_names(labels: Sequence[str | int | None]) -> list[str | None]:
    """Labels as names; labels that are only 0 and 1 mean negative and positive."""
    plain = {label for label in labels if label is not None} == {0, 1}
    names = {0: "NEGATIVE", 1: "POSITIVE"}
    return [None if label is None else names[int(label)] if plain else str(label) for label in labels]


def _label(value: Any) -> str | int | None:
    if isinstance(value, str):
        return value or None
    try:
        return None if pd.isna(value) or value == -1 else int(value)
    except (TypeError, ValueError):  # a list, say
        raise UserError(f"label_column holds {value!r}, which is not a label: choose another") from None


def _read_file(name: str, text_column: str) -> pd.DataFrame:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"dataset {name} does not exist: check the path given to --dataset")
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                return pd.read_json(file, lines=True, dtype=False, convert_dates=False)
        if path.suffix == ".txt":
            return pd.DataFrame({text_column: path.read_text(encoding="utf-8").splitlines()})
        separator = "\t" if path.suffix == ".tsv" else ","  # "NA" and "None" are texts like any other
        return pd.read_csv(path, sep=separator, encoding="utf-8", keep_default_na=False, dtype={text_column: str})
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise UserError(f"dataset {name} is not UTF-8 ({reason}): save it as UTF-8") from None
    except pd.errors.EmptyDataError:
        raise UserError(f"dataset {name} is empty: choose another with --dataset") from None
    except (ValueError, OSError) as error:
        raise UserError(f"dataset {name} cannot be read as {path.suffix}: {error}") from None


def _read_dataset(name: str, split: str, revision: str | None) -> pd.DataFrame:
    import datasets  # 1 s to import, and not needed for files

    require_hub("dataset", name)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            found = datasets.load_from_disk(name)
            if isinstance(found, datasets.DatasetDict) and split not in found:
                raise UserError(f"split={split!r} is not in dataset {name}: choose {', '.join(found)}")
            table = found[split] if isinstance(found, datasets.DatasetDict) else found
        else:
            table = datasets.load_dataset(name, split=split, revision=revision)
    except (ValueError, KeyError) as error:
        raise UserError(f"split={split!r} of dataset {name} cannot be loaded: {error}") from None
    except (OSError, datasets.exceptions.DatasetsError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise UserError(f"dataset {name} cannot be loaded: {error}") from None
    frame = table.to_pandas()
    for column, feature in table.features.items():
        if isinstance(feature, datasets.ClassLabel):
            frame[column] = [feature.names[int(i)] if i >= 0 else None for i in frame[column]]
    return frame


# --- prompts --------------------------------------------------------------------------------------------------------


def load_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], min_prompt_len: int, max_prompt_len: int
) -> list[list[int]]:
    """Cut every text to its first max_prompt_len tokens; texts with fewer than min_prompt_len are left out.

    Raises UserError where none remains.
    """
    window = 8 * max_prompt_len  # characters; nearly always enough, so that long reviews are not tokenised whole
    heads = [_head(text, window) for text in texts]
    prompts = tokenize(tokenizer, heads)
    for i, (text, head) in enumerate(zip(texts, heads, strict=True)):
        if head != text and len(prompts[i]) < max_prompt_len:
            prompts[i] = tokenize(tokenizer, [text])[0]
    prompts = [ids[:max_prompt_len] for ids in prompts if len(ids) >= min_prompt_len]
    if not prompts:
        raise UserError(f"no prompt has min_prompt_len={min_prompt_len} tokens or more: lower it, or change --dataset")
    return prompts


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
