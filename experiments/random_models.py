"""Models with random weights, and prompts for them: what a step costs does not depend on what the weights say."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)


@dataclass(frozen=True)
class Workload:
    """One PPO step: its models, each as layers, width and heads, and the shapes of its batch and of its update."""

    gpt2: tuple[int, int, int] = (4, 256, 4)
    distilbert: tuple[int, int, int] = (2, 256, 4)
    batch: int = 64
    prompt: int = 64
    response: int = 48
    epochs: int = 4
    minibatch: int = 16


def make_random_models(work: Workload, folder: Path, vocabulary: int = 50257) -> dict[str, str]:
    """Write both models, tokenizers of made-up words, and prompts; returns the settings of train.py that name them."""
    torch.manual_seed(0)
    reward_vocabulary = 30522
    policy, reward, prompts = folder / "policy", folder / "reward", folder / "prompts.txt"
    layers, width, heads = work.gpt2
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary)
    GPT2LMHeadModel(config).save_pretrained(policy)
    word_tokenizer(vocabulary, eos_token=f"w{vocabulary - 1}").save_pretrained(policy)

    layers, width, heads = work.distilbert
    config = DistilBertConfig(
        n_layers=layers,
        dim=width,
        hidden_dim=4 * width,
        n_heads=heads,
        vocab_size=reward_vocabulary,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    DistilBertForSequenceClassification(config).save_pretrained(reward)
    word_tokenizer(reward_vocabulary, pad_token="w0").save_pretrained(reward)

    words = torch.randint(1000, 20000, (4 * work.batch, work.prompt + 8)).tolist()
    words[::4] = [row[: 8 + i % work.prompt] for i, row in enumerate(words[::4])]  # real prompts are ragged, too
    prompts.write_text("\n".join(" ".join(f"w{i}" for i in row) for row in words), encoding="utf-8")
    return {"policy_name": str(policy), "rm_name": str(reward), "dataset": str(prompts)}


def word_tokenizer(size: int, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the words w0, w1, …"""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w1", model_max_length=512, **special)
