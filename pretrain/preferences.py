"""A reward model trained on preferences: of two responses to a prompt, the chosen one should score higher."""

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from config import UserError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from data import Pair
from pretrain.fitting import ModelInputs, fit, forward, length_batches
from runtime.classifiers import longest_input, pad_rows
from runtime.hub import load_tokenizer, load_weights
from runtime.saved_run import policy_folder
from runtime.terminal import progress

# Words of a piece of a labelled text
SHORTEST = 5
LONGEST = 50
MOST_HELD_OUT = 2000


@dataclass(frozen=True)
class PairTexts:
    """The texts that are scored, as tokens: chosen[i] was preferred to rejected[i]."""

    chosen: list[list[int]]
    rejected: list[list[int]]

    def lengths(self) -> list[int]:
        """Tokens of each pair, both rows padded to the longer one."""
        return [2 * max(map(len, pair)) for pair in zip(self.chosen, self.rejected, strict=True)]


class BradleyTerry(nn.Module):
    """The loss -log sigmoid(score(chosen) - score(rejected)) of a reward model (Bradley and Terry 1952).

    A batch holds the chosen texts and then, in the same order, the rejected ones.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        """The mean loss of a batch and the margins (pairs,) score(chosen) - score(rejected)."""
        chosen, rejected = self.model(**inputs).logits.float().squeeze(-1).chunk(2)
        return SimpleNamespace(loss=-F.logsigmoid(chosen - rejected).mean(), margins=chosen - rejected)


def pairs_from_labels(labelled: Sequence[tuple[str, str]], chosen_label: str, seed: int = 0) -> list[Pair]:
    """Pieces of texts with one label, each chosen over a piece of a random text with another.

    Both pieces have lengths of one distribution, so that length says nothing.
    """
    rng = random.Random(seed)
    liked = [text for text, label in labelled if label == chosen_label]
    others = [text for text, label in labelled if label != chosen_label]
    if not liked or not others:
        labels = ", ".join(sorted({label for _, label in labelled})[:5])
        raise UserError(
            f"chosen_label={chosen_label!r} must be the label of some texts and not of all: choose {labels}"
        )
    rng.shuffle(liked)
    return [Pair("", _piece(text, rng), _piece(rng.choice(others), rng)) for text in liked]


def _piece(text: str, rng: random.Random) -> str:
    """Some consecutive words of a text, as they are written."""
    places = [match.span() for match in re.finditer(r"\S+", text)]
    first = rng.randrange(max(1, len(places) - SHORTEST + 1))
    last = min(len(places), first + rng.randint(SHORTEST, LONGEST)) - 1
    return text[places[first][0] : places[last][1]]


def split_pairs(pairs: Sequence[Pair], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and about a tenth of them to measure on, with no prompt (or chosen text) in both."""
    keys = list(dict.fromkeys(pair.prompt or pair.chosen for pair in pairs))
    random.Random(seed).shuffle(keys)
    held_out_keys = set(keys[: min(MOST_HELD_OUT, len(keys) // 10)])
    training: list[Pair] = []
    held_out: list[Pair] = []
    for pair in pairs:
        part = held_out if (pair.prompt or pair.chosen) in held_out_keys else training
        part.append(pair)
    return training, held_out


def join(prompt: str, response: str) -> str:
    """A response after its prompt, with white space between them."""
    apart = not prompt or prompt[-1].isspace() or response[:1].isspace()
    return prompt + response if apart else f"{prompt} {response}"


class PreferenceTrainer:
    """An encoder with one output, on its way to become a reward model."""

    def __init__(self, init: str, with_prompt: bool, device: torch.device) -> None:
        """Load any encoder, classifier or language model; its head is new."""
        self.with_prompt = with_prompt
        self.device = device
        init = policy_folder(init)
        self.tokenizer = load_tokenizer("init", init)
        self.model = load_weights(
            AutoModelForSequenceClassification, "init", init, "encoder", new_head=True, num_labels=1
        )
        if self.tokenizer.pad_token_id is None:  # a language model: its last real token is scored
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.truncation_side = "left" if with_prompt else "right"  # as train.py cuts
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.model.config.problem_type = None
        self.model.config.reward_on_prompt = with_prompt  # which train.py compares with its setting
        self.max_length = longest_input(self.model, self.tokenizer)

    def tell_apart(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs whose two texts still differ where they are cut to the model's length; says how many do not."""
        texts = self.encode(pairs)
        different = [a != b for a, b in zip(texts.chosen, texts.rejected, strict=True)]
        if not all(different):
            print(
                f"note: {different.count(False):,} of {len(pairs):,} pairs are left out: chosen and rejected are the "
                f"same {self.max_length} tokens, the most that the model reads"
            )
        return list(itertools.compress(pairs, different))

    def train(self, pairs: Sequence[Pair], epochs: float, lr: float, batch_tokens: int, seed: int) -> None:
        """Fit the model to some epochs of the pairs, in batches of about batch_tokens tokens."""
        torch.manual_seed(seed)
        texts = self.encode(pairs)
        per_epoch = len(length_batches(texts.lengths(), batch_tokens, random.Random(seed)))
        batches = (self.batch(texts, rows) for rows in _epochs(texts, batch_tokens, seed))
        fit(BradleyTerry(self.model), batches, max(1, round(epochs * per_epoch)), lr, self.device, "reward model")

    @torch.no_grad()
    def margins(self, pairs: Sequence[Pair], batch_tokens: int) -> Tensor:
        """score(chosen) - score(rejected) of each pair (n,): above 0 where the model agrees."""
        texts = self.encode(pairs)
        model = BradleyTerry(self.model).eval()
        margins = torch.empty(len(pairs))
        for rows in progress(length_batches(texts.lengths(), batch_tokens, random.Random(0)), "measuring", "batch"):
            margins[rows] = forward(model, self.batch(texts, rows), self.device).margins.cpu()
        return margins

    def encode(self, pairs: Sequence[Pair]) -> PairTexts:
        """The tokens of both texts of each pair, with special tokens, and the prompt where it is scored too."""

        def ids(texts: list[str]) -> list[list[int]]:
            rows = self.tokenizer(texts, truncation=True, max_length=self.max_length, verbose=False)["input_ids"]
            return [row or [self.tokenizer.pad_token_id] for row in rows]

        if not self.with_prompt:
            pairs = [pair._replace(prompt="") for pair in pairs]
        return PairTexts(
            ids([join(pair.prompt, pair.chosen) for pair in pairs]),
            ids([join(pair.prompt, pair.rejected) for pair in pairs]),
        )

    def batch(self, texts: PairTexts, rows: Sequence[int]) -> ModelInputs:
        """The chosen texts of some pairs and then the rejected ones, padded: input_ids and attention_mask (2n, T)."""
        ids = [texts.chosen[i] for i in rows] + [texts.rejected[i] for i in rows]
        input_ids, attention_mask = pad_rows(ids, self.tokenizer.pad_token_id)
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def _epochs(texts: PairTexts, batch_tokens: int, seed: int) -> Iterator[list[int]]:
    """The rows of each batch, epoch after epoch in new random order."""
    for epoch in itertools.count():
        yield from length_batches(texts.lengths(), batch_tokens, random.Random(f"{seed} {epoch}"))
