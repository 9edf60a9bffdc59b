"""Tokenizer, language model and classifier, made together from one corpus."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pretrain.bpe import train_bpe
from pretrain.corpus import Corpus
from pretrain.language_model import train_policy
from pretrain.recipes import Recipe
from pretrain.reward_model import train_reward


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


def describe_models(report: dict[str, Any]) -> str:
    """How good both models are, on one line."""
    policy = report["policy"]
    reward = report["reward"]
    return (
        f"language model {policy['held_out_nats_per_token']:.3f} nats per token, "
        f"classifier {reward['held_out_accuracy']:.1%} right, "
        f"both on {reward['held_out_texts']:,} held-out texts"
    )
