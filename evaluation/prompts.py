"""Held-out prompts: the split they come from, without texts that were trained on, and notes where that is in doubt."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from config import EvalConfig, TrainConfig, UserError

import numpy as np
from transformers import PreTrainedTokenizerBase

from data import Texts, cut, first_tokens
from reward import Reward
from runtime.fingerprints import texts_sha256
from runtime.saved_run import SavedRun
from runtime.tables import has_splits, split_names
from training.parts import load_run_texts


class Review(NamedTuple):
    """The start of a review in tokens: the prompt, and what its author wrote next, max_new_tokens at most.

    cells are those of the data set's columns that the reward is given.
    """

    prompt: list[int]
    written: list[int]
    cells: dict[str, Any]


def evaluation_split(cfg: EvalConfig, run: TrainConfig) -> str:
    """The split that prompts are taken from: the one named, else test, else one that there is."""
    if cfg.split is not None or run.dataset.startswith("tiny:"):
        return cfg.split or "test"
    names = split_names(run.dataset, run.dataset_revision, run.dataset_config)
    if not names or "test" in names:
        return "test"
    split = "validation" if "validation" in names else run.split
    print(f"note: {run.dataset} has no split test, so prompts are taken from its split {split}")
    return split


def held_out_reviews(
    cfg: EvalConfig, run: TrainConfig, tokenizer: PreTrainedTokenizerBase, reward: Reward
) -> list[Review]:
    """n_samples reviews of the evaluation split in a seeded random order, none of which was trained on."""
    split = evaluation_split(cfg, run)
    data = held_out_texts(cfg, run, split, reward)
    longest = run.max_prompt_len + run.max_new_tokens
    order = np.random.default_rng(cfg.seed).permutation(len(data.texts))
    reviews: list[Review] = []
    for chunk in np.array_split(order, max(1, len(order) // (2 * cfg.n_samples))):  # tokenise no more than needed
        with suppress(UserError):  # none of these is long enough
            some = data.select(chunk.tolist())
            for row, ids in first_tokens(tokenizer, some.texts, run.min_prompt_len, longest).items():
                prompt = cut(tokenizer, ids, run.max_prompt_len)
                if prompt:
                    written = ids[len(prompt) : len(prompt) + run.max_new_tokens]
                    reviews.append(Review(prompt, written, {name: cells[row] for name, cells in some.columns.items()}))
        if len(reviews) >= cfg.n_samples:
            break
    if len(reviews) < 2:
        raise UserError(
            f"fewer than 2 reviews of split={split} of {run.dataset} have min_prompt_len={run.min_prompt_len} "
            "tokens and were not trained on: lower it, or change --split or --dataset"
        )
    if len(reviews) < cfg.n_samples:
        print(f"note: only {len(reviews)} prompts are long enough; n_samples={cfg.n_samples} was asked for")
    return reviews[: cfg.n_samples]


def held_out_texts(cfg: EvalConfig, run: TrainConfig, split: str, reward: Reward) -> Texts:
    """The different texts of a split, without those of the split that was trained on; of equal ones the first."""
    data = load_run_texts(run, split, reward)
    trained_on = data.texts
    seen: set[str] = set()
    if not has_splits(run.dataset) or split == run.split:
        print(f"note: if {run.dataset} was trained on, these prompts are not held out")
    else:
        trained_on = load_run_texts(run, run.split, None).texts
        seen = set(trained_on)
    note_changed_texts(trained_on, run, SavedRun.of_policy(cfg.policy_path))
    first_row = {text: row for row, text in reversed(list(enumerate(data.texts)))}
    return data.select(sorted(row for text, row in first_row.items() if text not in seen))


def note_changed_texts(texts: Sequence[str], run: TrainConfig, home: SavedRun | None) -> None:
    """Say so where the texts of the run's data set are not those that the policy was trained on."""
    before = None if home is None else home.fingerprints.get("dataset")
    if home is None or not before:
        return
    same_setting = (home.record["dataset"], home.record["text_column"]) == (run.dataset, run.text_column)
    if same_setting and before != texts_sha256(texts):
        print(
            f"note: {run.dataset} has changed since this policy was trained on it: prompts may not be held out, and "
            "the labels of the second judge may be others"
        )
