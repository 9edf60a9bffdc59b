"""A GPT-2 language model trained from texts."""

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from config import UserError

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from data import tokenize
from pretrain.bpe import END, policy_tokenizer
from pretrain.corpus import Corpus
from pretrain.fitting import ModelInputs, fit, forward, initial_std, length_batches
from pretrain.recipes import Recipe
from runtime.hub import load_tokenizer, load_weights
from runtime.saved_run import policy_folder
from runtime.terminal import progress


def lm_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], context: int) -> list[list[int]]:
    """The tokens of each text and EOS, cut to `context`; rows of one token are left out: nothing follows it."""
    rows = [[*ids, tokenizer.eos_token_id][:context] for ids in tokenize(tokenizer, texts)]
    return [row for row in rows if len(row) > 1]


def lm_batch(rows: Sequence[list[int]]) -> ModelInputs:
    """Rows -> input_ids and labels (B, T); no mask, because attention is causal."""
    labels = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": labels.clamp(min=0), "labels": labels}


def lm_batches(rows: Sequence[list[int]], batch_tokens: int, rng: random.Random) -> Iterator[ModelInputs]:
    """Batches for the language model without end, in a new order every epoch."""
    lengths = [len(row) for row in rows]
    while True:
        for chosen in length_batches(lengths, batch_tokens, rng):
            yield lm_batch([rows[i] for i in chosen])


@torch.no_grad()
def nats_per_token(model: nn.Module, rows: Sequence[list[int]], batch_tokens: int, device: torch.device) -> float:
    """Mean cross-entropy of all predicted tokens of the rows."""
    total = 0.0
    count = 0
    order = length_batches([len(row) for row in rows], batch_tokens, random.Random(0))
    for chosen in progress(order, "measuring", "batch"):
        batch = lm_batch([rows[i] for i in chosen])
        n = int((batch["labels"][:, 1:] >= 0).sum())
        total += forward(model, batch, device).loss.item() * n
        count += n
    return total / count


def train_policy(
    corpus: Corpus,
    recipe: Recipe,
    bpe: Tokenizer,
    init: str | None,
    folder: Path,
    seed: int,
    device: torch.device,
    vectors: Tensor | None = None,
) -> dict[str, Any]:
    """Train the language model on the first `context` tokens of each text; save it with tokenizer.

    A text starts at position 0 with its own first token, as prompts do, and ends with EOS. A new model starts from the
    classifier's word `vectors` (V, width) where they fit: they separate good from bad, which a language model learns
    last.
    """
    start = time.perf_counter()
    model, tokenizer = _load_policy(init) if init else _new_policy(bpe, recipe)
    words = model.get_input_embeddings().weight
    if vectors is not None and vectors.shape == words.shape:
        words.data.copy_(vectors.detach())
    context = min(recipe.context, model.config.n_positions)
    rows = lm_rows(tokenizer, corpus.lm_texts, context)
    held_out = lm_rows(tokenizer, corpus.held_texts, context)
    batches = lm_batches(rows, recipe.lm.batch_tokens, random.Random(seed))
    fit(model, batches, recipe.lm.steps, recipe.lm.lr, device, "language model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "held_out_nats_per_token": nats_per_token(model, held_out, recipe.lm.batch_tokens, device),
        "held_out_texts": len(held_out),
        "texts": len(rows),
        "weights": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _new_policy(bpe: Tokenizer, recipe: Recipe) -> tuple[Any, PreTrainedTokenizerBase]:
    net = recipe.lm
    end = bpe.token_to_id(END)
    config = GPT2Config(
        vocab_size=bpe.get_vocab_size(),
        n_positions=recipe.context,
        n_layer=net.layers,
        n_embd=net.width,
        n_head=net.heads,
        initializer_range=initial_std(net.width),
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=net.dropout,
        embd_pdrop=net.dropout,
        attn_pdrop=net.dropout,
        bos_token_id=end,
        eos_token_id=end,
    )
    return GPT2LMHeadModel(config), policy_tokenizer(bpe, recipe.context)


def _load_policy(name: str) -> tuple[Any, PreTrainedTokenizerBase]:
    name = policy_folder(name)
    tokenizer = load_tokenizer("init", name)
    model = load_weights(AutoModelForCausalLM, "init", name, "language model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"init={name} has a tokenizer without an EOS token: save one with it")
    return model, tokenizer
