"""Tiny random models and a tokenizer trained in memory, so that every test runs offline on a CPU
in moments.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # no threads to load models of a few thousand weights

import copy
import json
import multiprocessing
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from config import EvalConfig, TrainConfig

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import eval as eval_script
import train
from data import Pair
from experiments.torture import remains
from model import GPT2WithValueHead, ReferenceStates, Sequences, evaluate_both, sample_responses
from ppo import Rollout
from pretrain.tiny_reviews import generate_reviews
from runtime import cli
from runtime.cli import parse_config
from tools.make_models import main as make_models_main
from training.run_record import describe
from utils import uniforms

TIMINGS = ["seconds_generate", "seconds_score", "seconds_update", "tokens_per_second", "peak_memory_mb"]
Config = TypeVar("Config", TrainConfig, EvalConfig)
EOS = 0  # also BOS, and the id that fills padding, as with the real GPT-2

CORPUS: Sequence[str] = [
    "A film this good is rare. The acting is superb, and the ending made me cry!",
    "I've never seen a worse movie; it's dull, badly lit and two hours too long.",
    "The plot? Nothing happens. Yet the music - by a great composer - is lovely.",
    "Ein schöner Film, naïve but touching. 10/10, I would watch it again & again.",
] * 10


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, the fastest for models this small, and fresh random state."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """A test that hangs fails after five minutes, and says where each of its threads is."""

    def fail(*_: object) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"{names.get(ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()
        ]
        # no error that the program could take for its own
        pytest.fail("\n".join(["this test has taken five minutes: it hangs", *stacks]), pytrace=False)

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def make_lm(vocab: int = 20, seed: int = 0, **changes: object) -> GPT2LMHeadModel:
    """A random GPT-2 whose weights are large enough for every mistake to show; biases are random
    too.
    """
    settings: dict[str, object] = {
        "vocab_size": vocab,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "initializer_range": 0.3,
        "bos_token_id": EOS,
        "eos_token_id": EOS,
    }
    torch.manual_seed(seed)
    lm = GPT2LMHeadModel(GPT2Config(**{**settings, **changes}))
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.2)
            elif "ln_" in name:
                weight.add_(0.2 * torch.randn_like(weight))
        # EOS is made likelier, about one token in eight, so that responses end at different times
        lm.transformer.wte.weight[EOS] += 2 * F.normalize(lm.transformer.ln_f.bias, dim=0)
    return lm


def make_policy(vocab: int = 20, seed: int = 0, critic: bool = False, **changes: object) -> GPT2WithValueHead:
    """A policy around make_lm; with `critic`, its value head is random instead of zero."""
    return with_critic(GPT2WithValueHead(make_lm(vocab, seed, **changes)), critic)


def with_critic(policy: GPT2WithValueHead, critic: bool = True) -> GPT2WithValueHead:
    """The policy, its value head random where `critic` says so."""
    if critic:
        with torch.no_grad():
            for weight in policy.value_head.parameters():
                weight.normal_(std=0.3)
    return policy


def ragged_prompts(rows: int, width: int, vocab: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Left-padded prompts of 1 to `width` tokens, among them EOS; the padding is EOS as well."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, width), generator=random)
    lengths = torch.randint(1, width + 1, (rows,), generator=random)
    lengths[0] = width
    mask = torch.arange(width) >= width - lengths[:, None]
    return ids.masked_fill(~mask, EOS), mask


def sample(
    policy: GPT2WithValueHead, rows: int = 8, width: int = 6, new: int = 10, seed: int = 0, **sampling: float
) -> Sequences:
    """Ragged prompts with sampled responses that end at different times."""
    prompts = ragged_prompts(rows, width, policy.lm.config.vocab_size, seed)
    return sample_responses(policy, *prompts, uniforms(seed, 1, rows, new), eos_id=EOS, **sampling)


def make_rollout(
    policy: GPT2WithValueHead,
    reference: GPT2WithValueHead,
    seqs: Sequences,
    scores: Tensor,
    kl_coef: float,
    partial: Tensor | None = None,
    kl_in_loss: bool = False,
) -> Rollout:
    """A rollout with scores made up by a test; with kl_in_loss the reference is frozen."""
    logprobs, ref_logprobs, values, entropy, exact_kl = evaluate_both(policy, reference, seqs)
    partial = torch.full_like(logprobs, torch.nan) if partial is None else partial
    ref_states = ReferenceStates.of(reference.requires_grad_(False), seqs) if kl_in_loss else None
    return Rollout(
        seqs, logprobs, ref_logprobs, values, exact_kl, entropy, partial, scores, kl_coef, ref_states=ref_states
    )


def pad_more(seqs: Sequences, pads: int) -> Sequences:
    """The same rows with `pads` more columns of padding on the left."""
    rows = len(seqs.tokens)
    return Sequences.of(
        tokens=torch.cat([torch.full((rows, pads), EOS), seqs.tokens], 1),
        attention_mask=torch.cat([torch.zeros(rows, pads, dtype=torch.bool), seqs.attention_mask], 1),
        response_mask=seqs.response_mask,
        logprobs=seqs.logprobs,
        temperature=seqs.temperature,
        support=seqs.support,
    )


def real_tokens(seqs: Sequences, row: int) -> tuple[Tensor, int]:
    """One row without padding, and how many of its tokens are prompt. Uses only the masks."""
    width = seqs.response_mask.shape[1]
    prompt = seqs.tokens[row, :-width][seqs.attention_mask[row, :-width]]
    return torch.cat([prompt, seqs.tokens[row, -width:][seqs.response_mask[row]]]), len(prompt)


@torch.no_grad()
def exact_logits(lm: GPT2LMHeadModel, tokens: Tensor) -> Tensor:
    """The library's own logits (T, V) for one unpadded row, in float64."""
    return copy.deepcopy(lm).double().eval()(input_ids=tokens[None]).logits[0]


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same_weights(model: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether no weight has changed by a single bit."""
    return all(torch.equal(w, before[name]) for name, w in model.named_parameters())


def train_tokenizer(vocab: int, specials: list[str], corpus: Sequence[str] = CORPUS) -> Tokenizer:
    """A byte-level BPE, which can spell every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer: byte-level, EOS = BOS, no padding token."""
    eos = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(300, [eos]), bos_token=eos, eos_token=eos, unk_token=eos
    )


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a tiny GPT-2 and its tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    make_lm(len(tokenizer), n_positions=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_classifier(folder: Path, id2label: dict[int, str], swap: bool = False) -> Path:
    """A tiny DistilBERT and its tokenizer; `swap` exchanges its first two outputs."""
    torch.manual_seed(3)
    bpe = train_tokenizer(280, ["<pad>", "<unk>", "<cls>"])
    bpe.post_processor = processors.TemplateProcessing(single="<cls> $A", special_tokens=[("<cls>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", unk_token="<unk>", cls_token="<cls>", model_max_length=48
    )
    model = DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=len(tokenizer),
            dim=32,
            hidden_dim=64,
            n_layers=2,
            n_heads=2,
            max_position_embeddings=48,
            initializer_range=0.4,
            dropout=0.5,
            seq_classif_dropout=0.5,
            num_labels=len(id2label),
            id2label=id2label,
            label2id={label: index for index, label in id2label.items()},
        )
    )
    if swap:
        with torch.no_grad():
            order = [1, 0, *range(2, len(id2label))]
            model.classifier.weight.copy_(model.classifier.weight[order].clone())
            model.classifier.bias.copy_(model.classifier.bias[order].clone())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny sentiment classifier."""
    return save_classifier(tmp_path_factory.mktemp("classifier"), {0: "negative", 1: "positive"})


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    rows = [{"text": f"{i} {text}", "label": "positive"} for i, text in enumerate(CORPUS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


MAKING = ["--size", "tiny", "--lm_steps", "2", "--rm_steps", "2"]


def write_labelled_csv(path: Path, names: list[str] | list[int]) -> Path:
    """80 generated reviews; the first name is that of good ones."""
    texts, labels = generate_reviews(80, seed=0)
    lines = [f'"{text}",{names[1 - label]}' for text, label in zip(texts, labels, strict=True)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path


def made_pairs(n: int, prompt: str = "") -> list[Pair]:
    """Preferences that hang on one word, with prompts of their own if wanted."""
    rng = np.random.default_rng(0)
    good, bad = ["lovely", "superb", "a joy"], ["dull", "awful", "a bore"]
    texts = [[f"it was {rng.choice(words)} and {i}" for words in (good, bad)] for i in range(n)]
    return [Pair(f"{prompt}{i}" if prompt else "", *pair) for i, pair in enumerate(texts)]


def write_pairs(path: Path, pairs: list[Pair]) -> Path:
    path.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in pairs))
    return path


def make_models(dataset: Path | str, out: Path, *flags: str) -> Path:
    """Both models from a labelled file, by tools.make_models, in two steps each."""
    torch.set_num_threads(1)  # more threads add up in another order
    make_models_main(["--dataset", str(dataset), "--out", str(out), *MAKING, *flags])
    return out


@pytest.fixture(scope="session")
def labelled_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled_csv(tmp_path_factory.mktemp("labelled") / "reviews.csv", ["good", "bad"])


@pytest.fixture(scope="session")
def made_models(labelled_csv: Path) -> Path:
    return make_models(labelled_csv, labelled_csv.parent / "nested" / "made")


@pytest.fixture
def flags(gpt2_dir: Path, classifier_dir: Path, reviews: Path, tmp_path: Path) -> dict[str, str]:
    return {
        "policy_name": str(gpt2_dir),
        "rm_name": str(classifier_dir),
        "dataset": str(reviews),
        "ckpt_dir": str(tmp_path / "run"),
        "device": "cpu",
        "dtype": "float32",
        "total_steps": "3",
        "batch_size": "8",
        "minibatch_size": "4",
        "ppo_epochs": "2",
        "max_prompt_len": "12",
        "min_prompt_len": "4",
        "max_new_tokens": "8",
        "lr": "1e-3",
        "sample_every": "2",
        "save_every": "2",
    }


def run_script(cls: type[Config], main: Callable[[Config], object]) -> None:
    """What the last line of a script does, with sys.argv; raises SystemExit unless the exit code is 0."""
    if code := cli.run(lambda: main(parse_config(cls))):
        raise SystemExit(code)


def run(flags: dict[str, str], *extra: str) -> Path:
    """Train in this process, as the command line does; returns the run folder."""
    argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
    sys.argv = ["train.py", *argv, *extra]
    run_script(TrainConfig, train.main)
    return Path(flags["ckpt_dir"])


def exact(folder: Path) -> dict[str, str]:
    """What a run must leave behind bit for bit, without its checkpoints: another save_every keeps others.

    As digests: pytest compares unequal bytes line by line, which can take it many minutes.
    """
    return {name: digest for name, digest in remains(folder).items() if not name.startswith("state")}


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves take nearly a second each and are no part of what must be the same."""
    monkeypatch.setattr("training.run_folder.plot_curves", lambda *_: None)


@pytest.fixture
def split_reviews(tmp_path: Path) -> Path:
    """A saved data set with splits; three reviews of the test split also occur in the training split."""
    import datasets

    train = [f"{i} {text}" for i, text in enumerate(CORPUS)]
    test = [f"{100 + i} {text}" for i, text in enumerate(CORPUS[:20])] + train[:3]
    sets = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in (("train", train), ("test", test))}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "reviews")
    return tmp_path / "reviews"


@pytest.fixture
def finished_run(tmp_path: Path, gpt2_dir: Path, classifier_dir: Path, split_reviews: Path) -> Path:
    """A run folder whose policy is the base with slightly different weights."""

    cfg = TrainConfig(
        policy_name=str(gpt2_dir),
        rm_name=str(classifier_dir),
        dataset=str(split_reviews),
        device="cpu",
        max_prompt_len=12,
        min_prompt_len=4,
        max_new_tokens=8,
        ckpt_dir=str(tmp_path / "run"),
    )
    policy = GPT2WithValueHead.from_pretrained(str(gpt2_dir))
    with torch.no_grad():
        policy.lm.transformer.wte.weight += 0.05 * torch.randn_like(policy.lm.transformer.wte.weight)
    policy.save_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(gpt2_dir).save_pretrained(tmp_path / "run" / "policy_lm")
    (tmp_path / "run" / "config.json").write_text(json.dumps(describe(cfg)))
    return tmp_path / "run"


def run_eval(folder: Path, out: Path, *extra: str) -> tuple[pd.DataFrame, dict]:
    sys.argv = [
        "eval.py",
        "--policy_path",
        str(folder / "policy_lm"),
        "--n_samples",
        "20",
        "--batch_size",
        "8",
        "--out_csv",
        str(out / "eval_results.csv"),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        *extra,
    ]
    run_script(EvalConfig, eval_script.main)
    results = pd.read_csv(out / "eval_results.csv", keep_default_na=False, float_precision="round_trip")
    return results, json.loads((out / "eval_summary.json").read_text())


# Forked from a process that has only imported: one that has computed has threads, whose locks a fork may take along
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train", "eval", "pytest", "matplotlib.pyplot"])


def forked(work: Callable[[], object], said: Path, **variables: str) -> multiprocessing.context.ForkServerProcess:
    """Work in a process of its own, which need not load torch anew; what it prints is appended to a file."""
    process = PROCESSES.Process(target=in_its_own_process, args=(work, said, variables), daemon=True)
    process.start()
    return process


def in_its_own_process(work: Callable[[], object], said: Path, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    with said.open("a", buffering=1) as sys.stdout:
        sys.stderr = sys.__stderr__ = sys.stdout
        work()


def as_processes(count: int, work: Callable[[], object], said: Path) -> list[int | None]:
    """Work as torchrun would start it, in some processes at a time; returns their exit codes, None after 100 s."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    children = [forked(work, said, RANK=str(i), LOCAL_RANK=str(i), **job) for i in range(count)]
    ends = time.monotonic() + 100
    for child in children:
        child.join(max(0, ends - time.monotonic()))
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    return codes
