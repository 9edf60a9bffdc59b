"""Makes a reward model from preferences: pairs of responses of which one was chosen.

    python -m tools.make_reward --dataset pairs.jsonl --init distilbert/distilbert-base-uncased --out models/rm
    python train.py --rm_name models/rm

The data set has columns chosen and rejected, and prompt if it likes. It is any text file of train.py's kinds, a folder
or a hub name. --chosen_label makes pairs from labelled texts: a piece of a text with that label is chosen over a piece
of another.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from config import DATASET_CONFIG_HELP, LABEL_NAMES_HELP, POSITIVE, UserError, opt

import torch

from data import Pair, load_labelled, load_pairs
from evaluation.intervals import wilson_ci
from pretrain.preferences import PreferenceTrainer, pairs_from_labels, split_pairs
from pretrain.tiny_world import resolve_name
from reward import full_label
from runtime.cli import parse_flags, run, shell_command
from runtime.device import resolve_device
from runtime.files import new_folder
from runtime.hub import quiet_libraries


@dataclass(frozen=True, kw_only=True)
class MakeRewardConfig:
    """Settings of `python -m tools.make_reward`."""

    dataset: str = field(metadata={"help": "Pairs, or labelled texts: a hub name, a folder or a file.", "path": "read"})
    out: str = field(metadata={"help": "Folder to make.", "path": "written"})
    init: str = opt(
        "distilbert/distilbert-base-uncased", "Encoder to start from, or a classifier or language model.", path="read"
    )
    split: str = opt("train", "Split of the data set; a tenth of it is held out to measure on.", heading="Which texts")
    with_prompt: bool | None = opt(
        None, "true or false: score prompt + response (default: if there are prompts); train.py must do the same."
    )
    chosen_label: str | None = opt(None, "Make pairs from labelled texts: this label is chosen over the others.")
    text_column: str = opt("text", "Column of the labelled texts.")
    label_column: str = opt("label", "Column of their labels.")
    label_names: str | None = opt(None, LABEL_NAMES_HELP)
    dataset_config: str | None = opt(None, DATASET_CONFIG_HELP)
    epochs: float = opt(1.0, "Passes over the pairs.", POSITIVE, heading="How it is trained")
    lr: float = opt(5e-5, "Largest step size; small models want more, 1e-3 for the tiny ones.", POSITIVE)
    batch_tokens: int = opt(8192, "Tokens per optimiser step.", POSITIVE)
    device: Literal["auto", "cpu", "cuda", "mps"] = opt(
        "auto", "auto takes cuda, else mps (Apple), else cpu.", heading="Where and how it runs"
    )
    seed: int = opt(0, "Fixes the new head, the held-out pairs and the order of batches.")


def read_settings(argv: Sequence[str] | None = None) -> MakeRewardConfig:
    """Command line -> settings."""
    cfg = parse_flags(MakeRewardConfig, argv, __doc__)
    if Path(cfg.out).exists():
        raise UserError(f"out={cfg.out} exists: remove it or choose another folder")
    return cfg


def read_pairs(cfg: MakeRewardConfig) -> list[Pair]:
    """The pairs of the data set, or those made from its labels."""
    dataset = resolve_name(cfg.dataset, cfg.split)
    if cfg.chosen_label is None:
        return load_pairs(dataset, cfg.split, config=cfg.dataset_config)
    texts, labels = load_labelled(
        dataset, cfg.split, cfg.text_column, cfg.label_column, cfg.label_names, config=cfg.dataset_config
    )
    labelled = [(text, full_label(label)) for text, label in zip(texts, labels, strict=True) if label is not None]
    return pairs_from_labels(labelled, full_label(cfg.chosen_label), cfg.seed)


def check_enough(pairs: list[Pair], cfg: MakeRewardConfig) -> None:
    """Refuse so few pairs that nothing can be learnt from them, or measured on them."""
    if len(pairs) < 20:
        raise UserError(f"dataset {cfg.dataset} has {len(pairs)} pairs of different texts, and 20 are needed")


def main(argv: Sequence[str] | None = None) -> None:
    """Train a reward model as the command line says, and print how often it agrees with pairs it has not seen."""
    cfg = read_settings(argv)
    quiet_libraries()
    pairs = read_pairs(cfg)
    check_enough(pairs, cfg)
    with_prompt = any(pair.prompt for pair in pairs) if cfg.with_prompt is None else cfg.with_prompt
    device = torch.device(resolve_device(cfg.device))
    with new_folder(Path(cfg.out)) as folder:
        trainer = PreferenceTrainer(resolve_name(cfg.init), with_prompt, device)
        pairs = trainer.tell_apart(pairs)
        check_enough(pairs, cfg)
        training_pairs, held_out = split_pairs(pairs, cfg.seed)
        trainer.train(training_pairs, cfg.epochs, cfg.lr, cfg.batch_tokens, cfg.seed)
        agrees = (trainer.margins(held_out, cfg.batch_tokens) > 0).numpy()
        low, high = wilson_ci(agrees)
        trainer.model.save_pretrained(folder)
        trainer.tokenizer.save_pretrained(folder)
        report: dict[str, Any] = {
            "held_out_accuracy": float(agrees.mean()),
            "held_out_accuracy_ci": [low, high],
            "held_out_pairs": len(held_out),
            "pairs": len(training_pairs),
            "settings": asdict(cfg),
        }
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    share = f"{agrees.mean():.1%} [{low:.1%}, {high:.1%}]"
    print(f"trained on {len(training_pairs):,} pairs; agrees with {share} of {len(held_out):,} others")
    on_prompt = ["--reward_on_prompt"] if with_prompt else []
    print(f"next: {shell_command('python', 'train.py', '--rm_name', cfg.out, *on_prompt)}")


if __name__ == "__main__":
    sys.exit(run(main))
