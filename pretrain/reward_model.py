"""A DistilBERT classifier of texts, for use as a reward."""

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from config import UserError

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerBase,
)

from data import tokenize
from pretrain.bpe import reward_tokenizer
from pretrain.corpus import Corpus
from pretrain.fitting import ModelInputs, fit, forward, initial_std, length_batches
from pretrain.recipes import Recipe
from runtime.hub import load_tokenizer, load_weights
from runtime.saved_run import policy_folder
from runtime.terminal import progress


def rm_batch(rows: Sequence[list[int]], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> ModelInputs:
    """Token rows without special tokens -> input_ids, attention_mask (B, T) and labels (B,)."""
    around = tokenizer("")["input_ids"]  # special tokens before and after a text, if any
    ids = pad_sequence(
        [torch.tensor([*around[:1], *row, *around[1:]]) for row in rows], batch_first=True, padding_value=-1
    )
    mask = ids >= 0
    return {
        "input_ids": ids.masked_fill(~mask, tokenizer.pad_token_id),
        "attention_mask": mask.long(),
        "labels": torch.tensor(labels),
    }


def rm_batches(
    rows: Sequence[list[int]],
    labels: Sequence[int],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
) -> Iterator[ModelInputs]:
    """Batches for the classifier without end; each epoch sees another piece of every text."""
    while True:
        pieces = [draw_piece(row, recipe, rng) for row in rows]
        for chosen in length_batches([len(piece) for piece in pieces], recipe.rm.batch_tokens, rng):
            yield rm_batch([pieces[i] for i in chosen], [labels[i] for i in chosen], tokenizer)


def draw_piece(row: list[int], recipe: Recipe, rng: random.Random) -> list[int]:
    """A random piece of a text; its start and its length are drawn uniformly."""
    start = rng.randint(0, max(0, min(recipe.crop_start, len(row) - recipe.crop_min)))
    return row[start : start + rng.randint(recipe.crop_min, recipe.crop_max)]


@torch.no_grad()
def accuracy(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    labels: Sequence[int],
    batch_tokens: int,
    device: torch.device,
) -> float:
    """Share of the rows whose likeliest label is the true one."""
    right = 0
    order = length_batches([len(row) for row in rows], batch_tokens, random.Random(0))
    for chosen in progress(order, "measuring", "batch"):
        batch = rm_batch([rows[i] for i in chosen], [labels[i] for i in chosen], tokenizer)
        likeliest = forward(model, batch, device).logits.argmax(-1).cpu()
        right += int((likeliest == batch["labels"]).sum())
    return right / len(rows)


def train_reward(
    corpus: Corpus, recipe: Recipe, bpe: Tokenizer, init: str | None, folder: Path, seed: int, device: torch.device
) -> tuple[Any, dict[str, Any]]:
    """Train the classifier on pieces of the labelled texts and save it with its tokenizer.

    Returns the classifier and its part of the report.
    """
    start = time.perf_counter()
    model, tokenizer = _load_reward(init, corpus.names) if init else _new_reward(bpe, recipe, corpus.names)
    rows = tokenize(tokenizer, corpus.texts)
    batches = rm_batches(rows, corpus.labels, recipe, tokenizer, random.Random(seed))
    fit(model, batches, recipe.rm.steps, recipe.rm.lr, device, "classifier")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    held_out = [response_part(row, recipe) for row in tokenize(tokenizer, corpus.held_texts)]
    right = accuracy(model, tokenizer, held_out, corpus.held_labels, recipe.rm.batch_tokens, device)
    report = {
        "held_out_accuracy": right,
        "held_out_texts": len(held_out),
        "texts": len(rows),
        "labels": corpus.names,
        "weights": model.num_parameters(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    return model, report


def response_part(row: list[int], recipe: Recipe) -> list[int]:
    """The part that a response would be: all but the first `skip` tokens (or half), cut at crop_max."""
    start = min(recipe.skip, len(row) // 2)
    return row[start : start + recipe.crop_max]


def _new_reward(bpe: Tokenizer, recipe: Recipe, names: list[str]) -> tuple[Any, PreTrainedTokenizerBase]:
    net = recipe.rm
    longest = recipe.crop_max + 1  # every position is trained; longer texts are cut
    tokenizer = reward_tokenizer(bpe, longest)
    config = DistilBertConfig(
        vocab_size=bpe.get_vocab_size(),
        max_position_embeddings=longest,
        n_layers=net.layers,
        dim=net.width,
        hidden_dim=4 * net.width,
        initializer_range=initial_std(net.width),
        n_heads=net.heads,
        dropout=net.dropout,
        attention_dropout=net.dropout,
        seq_classif_dropout=net.dropout,
        pad_token_id=tokenizer.pad_token_id,
        **_label_names(names),
    )
    return DistilBertForSequenceClassification(config), tokenizer


def _load_reward(name: str, names: list[str]) -> tuple[Any, PreTrainedTokenizerBase]:
    name = policy_folder(name)
    tokenizer = load_tokenizer("reward_init", name)
    model = load_weights(
        AutoModelForSequenceClassification, "reward_init", name, "classifier", new_head=True, **_label_names(names)
    )
    if tokenizer.pad_token_id is None:
        raise UserError(f"reward_init={name} has a tokenizer without a padding token: save one with it")
    return model, tokenizer


def _label_names(names: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
