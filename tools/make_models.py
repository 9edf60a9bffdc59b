"""Makes a tokenizer, a GPT-2 language model and a DistilBERT classifier from any labelled texts.

`python -m tools.make_models --dataset reviews.csv --out models/mine --size small` writes the
folders `policy/` and `reward/` that train.py takes as --policy_name and --rm_name. The same code
makes the tiny world of the offline preset, once, from generated reviews.
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from config import UserError, opt, parse_tool, run_tool  # isort: skip  (before torch: see there)

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from data import label_names, load_examples
from tools import tiny_reviews
from utils import loading, resolve_device

END, PAD, CLS = "<|endoftext|>", "<|pad|>", "<|cls|>"


# --- sizes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Net:
    """Shape and training of one model; a batch holds about `batch_tokens` tokens."""

    layers: int
    width: int
    heads: int
    dropout: float
    steps: int
    batch_tokens: int
    lr: float


@dataclass(frozen=True)
class Recipe:
    """Every number that shapes the two models; lengths are in tokens.

    The classifier learns from pieces of crop_min to crop_max tokens that start at most crop_start
    into the text, because it will judge responses, not whole reviews. It is measured on what
    follows the first `skip` tokens, up to crop_max of them.
    """

    vocab_size: int
    context: int
    lm: Net
    rm: Net
    crop_min: int
    crop_max: int
    crop_start: int
    skip: int


SIZES = {
    "tiny": Recipe(
        vocab_size=2048,
        context=128,
        lm=Net(layers=2, width=128, heads=8, dropout=0.0, steps=560, batch_tokens=1024, lr=4e-3),
        rm=Net(layers=2, width=128, heads=4, dropout=0.0, steps=240, batch_tokens=2048, lr=1.5e-3),
        crop_min=4,
        crop_max=80,
        crop_start=16,
        skip=10,
    ),
    "small": Recipe(
        vocab_size=8192,
        context=256,
        lm=Net(layers=4, width=256, heads=4, dropout=0.0, steps=700, batch_tokens=4096, lr=2e-3),
        rm=Net(layers=3, width=256, heads=4, dropout=0.1, steps=1000, batch_tokens=4096, lr=5e-4),
        crop_min=24,
        crop_max=200,
        crop_start=10_000,
        skip=16,
    ),
    "124m": Recipe(
        vocab_size=50257,
        context=1024,
        lm=Net(layers=12, width=768, heads=12, dropout=0.1, steps=2000, batch_tokens=32768, lr=3e-4),
        rm=Net(layers=6, width=768, heads=12, dropout=0.1, steps=2000, batch_tokens=16384, lr=5e-5),
        crop_min=24,
        crop_max=200,
        crop_start=10_000,
        skip=16,
    ),
}


# --- command line ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MakeConfig:
    """Settings of `python -m tools.make_models`."""

    dataset: str = field(metadata={"help": "Labelled texts: a hub name, a folder or a file."})
    out: str = field(metadata={"help": "Folder to make: policy/, reward/ and report.json."})
    size: Literal["tiny", "small", "124m"] = opt("small", "Shape and schedule of both models.")
    split: str = opt("train", "Split with labels; a part of it is kept back to measure on.")
    lm_split: str | None = opt(None, "Splits for the language model, joined by + (default: split).")
    text_column: str = opt("text", "Column that holds the text.")
    label_column: str = opt("label", "Column that holds the label; rows without one are left out.")
    init: str | None = opt(None, "Language model to continue from, with its tokenizer.")
    reward_init: str | None = opt(None, "Encoder or classifier to continue from, with its tokenizer.")
    lm_steps: int | None = opt(None, "Optimiser steps of the language model (default: the size's).")
    rm_steps: int | None = opt(None, "Optimiser steps of the classifier (default: the size's).")
    lm_lr: float | None = opt(None, "Largest step size of the language model (default: the size's).")
    rm_lr: float | None = opt(None, "Largest step size of the classifier (default: the size's).")
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "auto takes CUDA where present.")
    seed: int = opt(0, "Fixes the weights drawn, the rows kept back and the order of batches.")

    @property
    def recipe(self) -> Recipe:
        """The recipe of the size, with the numbers given on the command line put in."""
        recipe = SIZES[self.size]
        lm: dict[str, Any] = {"steps": self.lm_steps, "lr": self.lm_lr}
        rm: dict[str, Any] = {"steps": self.rm_steps, "lr": self.rm_lr}
        return replace(
            recipe,
            lm=replace(recipe.lm, **{k: v for k, v in lm.items() if v is not None}),
            rm=replace(recipe.rm, **{k: v for k, v in rm.items() if v is not None}),
        )


def parse_flags(argv: Sequence[str] | None = None) -> MakeConfig:
    """Command line -> settings (raises UserError)."""
    cfg = parse_tool(MakeConfig, argv, MakeConfig.__doc__)
    for name in ("lm_steps", "rm_steps", "lm_lr", "rm_lr"):
        value = getattr(cfg, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name}={value} must be more than 0")
    if Path(cfg.out).exists():
        raise UserError(f"out={cfg.out} exists: remove it or choose another folder")
    return cfg


def main(argv: Sequence[str] | None = None) -> None:
    """Make both models as the command line says and report how good they are."""
    cfg = parse_flags(argv)
    device = torch.device(resolve_device(cfg.device))
    corpus = load_corpus(cfg)
    try:
        with _quiet(), new_folder(Path(cfg.out)) as folder:
            report = make_models(corpus, cfg.recipe, folder, cfg.seed, device, cfg.init, cfg.reward_init)
    except OSError as error:
        raise _unwritable("out", Path(cfg.out), error) from None
    print(f"{cfg.out}: {_summary(report)}", file=sys.stderr)


# --- what is learned from -------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Texts for the language model, labelled ones for the classifier, and labelled ones kept back.

    A label is an index into `names`.
    """

    lm_texts: list[str]
    texts: list[str]
    labels: list[int]
    held_texts: list[str]
    held_labels: list[int]
    names: list[str]


def load_corpus(cfg: MakeConfig) -> Corpus:
    """Read the data set; a tenth of its labelled rows, 2,000 at most, is kept back (UserError)."""
    texts, labels = load_examples(cfg.dataset, cfg.split, cfg.text_column, cfg.label_column)
    named = label_names(labels or [])
    rows = [(text, label) for text, label in zip(texts, named, strict=True) if label is not None]
    values = sorted({label for _, label in rows})
    where = f"label_column={cfg.label_column!r} of {cfg.dataset}"
    if len(values) < 2:
        raise UserError(f"{where} holds {len(values)} different labels, and a classifier needs two or more")
    if len(values) > 20:
        raise UserError(f"{where} holds {len(values)} different labels: is it the column of the labels?")
    random.Random(cfg.seed).shuffle(rows)
    n_held = min(2000, max(1, len(rows) // 10))
    held, kept = rows[:n_held], rows[n_held:]
    held_texts = {text for text, _ in held}
    lm_texts = list(texts)
    if cfg.lm_split is not None:
        splits = [load_examples(cfg.dataset, split, cfg.text_column)[0] for split in cfg.lm_split.split("+")]
        lm_texts = list(itertools.chain.from_iterable(splits))
    return Corpus(
        lm_texts=[text for text in lm_texts if text not in held_texts],
        texts=[text for text, _ in kept],
        labels=[values.index(label) for _, label in kept],
        held_texts=[text for text, _ in held],
        held_labels=[values.index(label) for _, label in held],
        names=values,
    )


# --- tokenizers -----------------------------------------------------------------------------------


def train_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with this many tokens at most, the special ones included."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD, CLS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def policy_tokenizer(bpe: Tokenizer, context: int) -> PreTrainedTokenizerBase:
    """The language model's tokenizer: BOS = EOS, and no padding token, as in GPT-2."""
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, unk_token=END, model_max_length=context
    )


def reward_tokenizer(bpe: Tokenizer, context: int) -> PreTrainedTokenizerBase:
    """The classifier's tokenizer: each text starts with a token whose state is classified."""
    bpe = Tokenizer.from_str(bpe.to_str())
    bpe.post_processor = processors.TemplateProcessing(single=f"{CLS} $A", special_tokens=[(CLS, bpe.token_to_id(CLS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, cls_token=CLS, unk_token=PAD, model_max_length=context
    )


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


# --- batches --------------------------------------------------------------------------------------

Batch = dict[str, Tensor]


def length_batches(lengths: Sequence[int], batch_tokens: int, rng: random.Random) -> list[list[int]]:
    """Deal rows of about equal length into batches of at most batch_tokens, in random order."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], rng.random()))
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    rng.shuffle(batches)
    return batches


def lm_batch(rows: Sequence[list[int]]) -> Batch:
    """Rows -> input_ids and labels (B, T); no mask: nothing looks to its right."""
    labels = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": labels.clamp(min=0), "labels": labels}


def lm_batches(rows: Sequence[list[int]], batch_tokens: int, rng: random.Random) -> Iterator[Batch]:
    """Batches for the language model without end, in a new order each epoch."""
    while True:
        for chosen in length_batches([len(row) for row in rows], batch_tokens, rng):
            yield lm_batch([rows[i] for i in chosen])


def rm_batch(rows: Sequence[list[int]], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Token rows without special tokens -> input_ids, attention_mask (B, T) and labels (B,)."""
    around = tokenizer("")["input_ids"]  # what the tokenizer puts before and after a text, if anything
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
) -> Iterator[Batch]:
    """Batches for the classifier without end; each epoch sees another piece of every text."""
    while True:
        pieces = [draw_piece(row, recipe, rng) for row in rows]
        for chosen in length_batches([len(piece) for piece in pieces], recipe.rm.batch_tokens, rng):
            yield rm_batch([pieces[i] for i in chosen], [labels[i] for i in chosen], tokenizer)


def draw_piece(row: list[int], recipe: Recipe, rng: random.Random) -> list[int]:
    """A random piece of a text: where it starts and how long it is are drawn evenly."""
    start = rng.randint(0, max(0, min(recipe.crop_start, len(row) - recipe.crop_min)))
    return row[start : start + rng.randint(recipe.crop_min, recipe.crop_max)]


# --- training -------------------------------------------------------------------------------------


def fit(model: nn.Module, batches: Iterator[Batch], net: Net, device: torch.device, title: str) -> None:
    """Minimise the model's loss with AdamW; the step size rises for a twentieth, then falls."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=net.lr, betas=(0.9, 0.99), fused=True)
    warmup = max(1, net.steps // 20)
    model.to(device).train()
    for step, batch in enumerate(tqdm(itertools.islice(batches, net.steps), title, net.steps, mininterval=1)):
        for group in optimizer.param_groups:
            group["lr"] = net.lr * min((step + 1) / warmup, (net.steps - step) / net.steps)
        loss = _loss(model, batch, device)
        if not loss.isfinite():
            raise UserError(f"the loss of the {title} is {loss.item()} at step {step}: lower its step size")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _loss(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    return _forward(model, batch, device).loss


def _forward(model: nn.Module, batch: Batch, device: torch.device) -> Any:
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return model(**{name: tensor.to(device) for name, tensor in batch.items()})


@torch.no_grad()
def nats_per_token(model: nn.Module, rows: Sequence[list[int]], batch_tokens: int, device: torch.device) -> float:
    """Mean cross-entropy of all predicted tokens of the rows."""
    total, count = 0.0, 0
    for chosen in length_batches([len(row) for row in rows], batch_tokens, random.Random(0)):
        batch = lm_batch([rows[i] for i in chosen])
        n = int((batch["labels"][:, 1:] >= 0).sum())
        total += _forward(model, batch, device).loss.item() * n
        count += n
    return total / count


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
    for chosen in length_batches([len(row) for row in rows], batch_tokens, random.Random(0)):
        batch = rm_batch([rows[i] for i in chosen], [labels[i] for i in chosen], tokenizer)
        right += int((_forward(model, batch, device).logits.argmax(-1).cpu() == batch["labels"]).sum())
    return right / len(rows)


# --- models ---------------------------------------------------------------------------------------


def make_models(
    corpus: Corpus,
    recipe: Recipe,
    out: Path,
    seed: int,
    device: torch.device,
    init: str | None = None,
    reward_init: str | None = None,
) -> dict[str, Any]:
    """Train, measure and write both models and report.json into `out`; returns the report."""
    torch.manual_seed(seed)
    bpe = train_bpe(corpus.lm_texts, recipe.vocab_size)
    classifier, reward_report = train_reward(corpus, recipe, bpe, reward_init, out / "reward", seed, device)
    vectors = None
    if init is None and reward_init is None:  # otherwise the two have different tokens
        vectors = classifier.get_input_embeddings().weight
    policy_report = train_policy(corpus, recipe, bpe, init, out / "policy", seed, device, vectors)
    report = {"policy": policy_report, "reward": reward_report, "recipe": asdict(recipe)}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


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

    A text starts at position 0 with its own first token, as prompts do, and ends with EOS. A fresh
    model starts from the classifier's word `vectors` (V, width) where they fit: they tell good from
    bad, which is the last thing that a language model finds out by itself.
    """
    start = time.perf_counter()
    model, tokenizer = _load_policy(init) if init else _new_policy(bpe, recipe)
    words = model.get_input_embeddings().weight
    if vectors is not None and vectors.shape == words.shape:
        words.data.copy_(vectors.detach())
    context = min(recipe.context, model.config.n_positions)
    rows, held = (
        [row for ids in _encode(tokenizer, texts) if len(row := [*ids, tokenizer.eos_token_id][:context]) > 1]
        for texts in (corpus.lm_texts, corpus.held_texts)
    )
    batches = lm_batches(rows, recipe.lm.batch_tokens, random.Random(seed))
    fit(model, batches, recipe.lm, device, "language model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "held_out_nats_per_token": nats_per_token(model, held, recipe.lm.batch_tokens, device),
        "held_out_texts": len(held),
        "texts": len(rows),
        "weights": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _new_policy(bpe: Tokenizer, recipe: Recipe) -> tuple[Any, PreTrainedTokenizerBase]:
    net, end = recipe.lm, bpe.token_to_id(END)
    config = GPT2Config(
        vocab_size=bpe.get_vocab_size(),
        n_positions=recipe.context,
        n_layer=net.layers,
        n_embd=net.width,
        n_head=net.heads,
        initializer_range=_spread(net.width),
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=net.dropout,
        embd_pdrop=net.dropout,
        attn_pdrop=net.dropout,
        bos_token_id=end,
        eos_token_id=end,
    )
    return GPT2LMHeadModel(config), policy_tokenizer(bpe, recipe.context)


def _spread(width: int) -> float:
    """Standard deviation of fresh weights: GPT-2's 0.02 at width 768, more in narrower models."""
    return 0.02 * (768 / width) ** 0.5


def _load_policy(name: str) -> tuple[Any, PreTrainedTokenizerBase]:
    with loading("init", name, "language model"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    if tokenizer.eos_token_id is None:
        raise UserError(f"init={name} has a tokenizer without an EOS token: save one with it")
    return model, tokenizer


def train_reward(
    corpus: Corpus,
    recipe: Recipe,
    bpe: Tokenizer,
    init: str | None,
    folder: Path,
    seed: int,
    device: torch.device,
) -> tuple[Any, dict[str, Any]]:
    """Train the classifier on pieces of the labelled texts and save it with its tokenizer.

    Returns the classifier and its part of the report.
    """
    start = time.perf_counter()
    model, tokenizer = _load_reward(init, corpus.names) if init else _new_reward(bpe, recipe, corpus.names)
    rows = _encode(tokenizer, corpus.texts)
    batches = rm_batches(rows, corpus.labels, recipe, tokenizer, random.Random(seed))
    fit(model, batches, recipe.rm, device, "classifier")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    held = [judged_part(row, recipe) for row in _encode(tokenizer, corpus.held_texts)]
    report = {
        "held_out_accuracy": accuracy(model, tokenizer, held, corpus.held_labels, recipe.rm.batch_tokens, device),
        "held_out_texts": len(held),
        "texts": len(rows),
        "labels": corpus.names,
        "weights": model.num_parameters(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    return model, report


def judged_part(row: list[int], recipe: Recipe) -> list[int]:
    """What a response would be: all but the first `skip` tokens (or half), cut at crop_max."""
    start = min(recipe.skip, len(row) // 2)
    return row[start : start + recipe.crop_max]


def _new_reward(bpe: Tokenizer, recipe: Recipe, names: list[str]) -> tuple[Any, PreTrainedTokenizerBase]:
    net, longest = (
        recipe.rm,
        recipe.crop_max + 1,
    )  # no position goes untrained; longer texts are cut
    tokenizer = reward_tokenizer(bpe, longest)
    config = DistilBertConfig(
        vocab_size=bpe.get_vocab_size(),
        max_position_embeddings=longest,
        n_layers=net.layers,
        dim=net.width,
        hidden_dim=4 * net.width,
        initializer_range=_spread(net.width),
        n_heads=net.heads,
        dropout=net.dropout,
        attention_dropout=net.dropout,
        seq_classif_dropout=net.dropout,
        pad_token_id=tokenizer.pad_token_id,
        **_label_names(names),
    )
    return DistilBertForSequenceClassification(config), tokenizer


def _load_reward(name: str, names: list[str]) -> tuple[Any, PreTrainedTokenizerBase]:
    with loading("reward_init", name, "classifier"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, ignore_mismatched_sizes=True, **_label_names(names)
        )
    if tokenizer.pad_token_id is None:
        raise UserError(f"reward_init={name} has a tokenizer without a padding token: save one with it")
    return model, tokenizer


def _label_names(names: list[str]) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _summary(report: dict[str, Any]) -> str:
    policy, reward = report["policy"], report["reward"]
    return (
        f"language model {policy['held_out_nats_per_token']:.3f} nats per token, "
        f"classifier {reward['held_out_accuracy']:.1%} right, "
        f"both on {reward['held_out_texts']:,} texts kept back"
    )


# --- the tiny world -------------------------------------------------------------------------------


@dataclass(frozen=True)
class TinyRecipe:
    """Every number of the tiny world; the name of its folder is a hash of them."""

    reviews_version: int = tiny_reviews.VERSION
    train_rows: int = 12_000
    test_rows: int = 2_000
    seed: int = 0
    models: Recipe = SIZES["tiny"]


TINY = TinyRecipe()
TINY_NAMES = {
    "tiny:policy": "policy",
    "tiny:reward": "reward",
    "tiny:reviews/train": "train.jsonl",
    "tiny:reviews/test": "test.jsonl",
}


def resolve_name(name: str, split: str = "train") -> str:
    """The path that a `tiny:` name stands for, made first if need be; any other name as it is (raises UserError)."""
    if not name.startswith("tiny:"):
        return name
    key = f"{name}/{split}" if name == "tiny:reviews" else name
    if key not in TINY_NAMES:
        raise UserError(f"{key} is not part of the tiny world: choose {', '.join(TINY_NAMES)}")
    return str(tiny_world() / TINY_NAMES[key])


def tiny_world() -> Path:
    """The folder of the offline models and reviews, made the first time that it is asked for.

    It lies in GPT2_PPO_CACHE, or in gpt2-ppo of the user's cache folder; raises UserError where
    that cannot be written.
    """
    key = hashlib.sha256(json.dumps(asdict(TINY), sort_keys=True).encode()).hexdigest()[:12]
    world = cache_root() / f"tiny-{key}"
    if not world.is_dir():
        try:
            with _quiet(), new_folder(world) as folder:
                _make_tiny_world(TINY, folder, world)
        except OSError as error:
            if not world.is_dir():  # where it is, another process was first
                raise _unwritable("GPT2_PPO_CACHE", world, error) from None
    return world.resolve()


def cache_root() -> Path:
    """Where made models are kept between runs."""
    if cache := os.environ.get("GPT2_PPO_CACHE"):
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2-ppo"


def _make_tiny_world(recipe: TinyRecipe, folder: Path, world: Path) -> None:
    print(
        f"Making the offline models, once, in {world}: a small GPT-2 and a classifier of invented "
        "film reviews (about a minute on two cores).",
        file=sys.stderr,
    )
    texts, labels = tiny_reviews.generate_reviews(recipe.train_rows + recipe.test_rows, recipe.seed)
    n = recipe.train_rows
    names = ["negative", "positive"]
    for file, rows in (("train.jsonl", slice(n)), ("test.jsonl", slice(n, None))):
        lines = [{"text": text, "label": names[label]} for text, label in zip(texts[rows], labels[rows], strict=True)]
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    corpus = Corpus(texts[:n], texts[:n], labels[:n], texts[n:], labels[n:], names)
    # On the CPU everywhere, and without a trace in the caller's random state: a run must not depend
    # on whether it was the one that made the models.
    with torch.random.fork_rng():
        report = make_models(corpus, recipe.models, folder, recipe.seed, torch.device("cpu"))
    print(f"Done: {_summary(report)}.", file=sys.stderr)


# --- folders --------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden sibling that takes the name `out` once the block has ended well, else is removed.

    Raises OSError where it cannot be written, or where `out` has come into being meanwhile.
    """
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for left in out.parent.glob(f".{out.name}.*"):  # by those who were killed; who is still at it was so lately
            with contextlib.suppress(OSError):
                if left.stat().st_mtime < time.time() - 24 * 3600:
                    shutil.rmtree(left, ignore_errors=True)


def _unwritable(setting: str, out: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"{setting}: {out} cannot be written ({reason}): name another folder")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries from warnings nobody can act on and from bars over the saving of files."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


if __name__ == "__main__":
    run_tool(main)
