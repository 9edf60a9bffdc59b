"""Makes a tokenizer, a GPT-2 language model and a DistilBERT classifier from any labelled texts.

`python -m tools.make_models --dataset reviews.csv --out models/mine --size small` writes the folders `policy/` and
`reward/` that train.py takes as --policy_name and --rm_name.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from config import DATASET_CONFIG_HELP, LABEL_NAMES_HELP, POSITIVE, TrainConfig, UserError, opt

import torch
from transformers import GPT2Config

from pretrain.corpus import load_corpus
from pretrain.models import describe_models, make_models
from pretrain.recipes import RECIPES, Net, Recipe
from reward import full_label
from runtime.cli import parse_flags, run, shell_command
from runtime.device import resolve_device
from runtime.files import new_folder
from runtime.hub import quiet_libraries


@dataclass(frozen=True, kw_only=True)
class MakeConfig:
    """Settings of `python -m tools.make_models`."""

    dataset: str = field(metadata={"help": "Labelled texts: a hub name, a folder or a file.", "path": "read"})
    out: str = field(metadata={"help": "Folder to make: policy/, reward/ and report.json.", "path": "written"})
    size: Literal["tiny", "small", "124m"] = opt("small", "Shape and schedule of both models.")
    split: str = opt("train", "Split with labels; a part of it is held out to measure on.", heading="Which texts")
    lm_split: str | None = opt(None, "Splits for the language model, joined by + (default: split).")
    text_column: str = opt("text", "Column that holds the text.")
    label_column: str = opt("label", "Column that holds the label; rows without one are left out.")
    label_names: str | None = opt(None, LABEL_NAMES_HELP)
    dataset_config: str | None = opt(None, DATASET_CONFIG_HELP)
    init: str | None = opt(
        None, "Language model to continue from, with its tokenizer.", heading="What is trained, and how", path="read"
    )
    reward_init: str | None = opt(None, "Encoder or classifier to continue from, with its tokenizer.", path="read")
    lm_layers: int | None = opt(None, "Layers of a new language model (default: the size's).", POSITIVE)
    lm_width: int | None = opt(
        None, "Width of a new language model, with a head for every 64 (default: the size's).", POSITIVE
    )
    lm_steps: int | None = opt(None, "Optimiser steps of the language model (default: the size's).", POSITIVE)
    rm_steps: int | None = opt(None, "Optimiser steps of the classifier (default: the size's).", POSITIVE)
    lm_lr: float | None = opt(None, "Largest step size of the language model (default: the size's).", POSITIVE)
    rm_lr: float | None = opt(None, "Largest step size of the classifier (default: the size's).", POSITIVE)
    device: Literal["auto", "cpu", "cuda", "mps"] = opt(
        "auto", "auto takes cuda, else mps (Apple), else cpu.", heading="Where and how it runs"
    )
    seed: int = opt(0, "Fixes the weights drawn, the held-out rows and the order of batches.")

    @property
    def recipe(self) -> Recipe:
        """The recipe of the size, with the numbers given on the command line put in."""
        recipe = RECIPES[self.size]
        lm: dict[str, Any] = {"steps": self.lm_steps, "lr": self.lm_lr, "layers": self.lm_layers}
        rm: dict[str, Any] = {"steps": self.rm_steps, "lr": self.rm_lr}
        if self.lm_width is not None:
            lm["width"] = self.lm_width
            lm["heads"] = max(1, self.lm_width // 64)
        return replace(recipe, lm=replace_given(recipe.lm, lm), rm=replace_given(recipe.rm, rm))


def replace_given(net: Net, numbers: dict[str, Any]) -> Net:
    """The net with those numbers that are given, and not None."""
    return replace(net, **{name: number for name, number in numbers.items() if number is not None})


def read_settings(argv: Sequence[str] | None = None) -> MakeConfig:
    """Command line -> settings."""
    cfg = parse_flags(MakeConfig, argv, __doc__)
    if cfg.recipe.lm.width % cfg.recipe.lm.heads:
        raise UserError(f"lm_width={cfg.lm_width} must be a multiple of {cfg.recipe.lm.heads}, one for each head")
    if Path(cfg.out).exists():
        raise UserError(f"out={cfg.out} exists: remove it or choose another folder")
    return cfg


def main(argv: Sequence[str] | None = None) -> None:
    """Make both models as the command line says, and print how good they are."""
    cfg = read_settings(argv)
    quiet_libraries()
    device = torch.device(resolve_device(cfg.device))
    corpus = load_corpus(
        cfg.dataset,
        cfg.split,
        cfg.text_column,
        cfg.label_column,
        lm_split=cfg.lm_split,
        seed=cfg.seed,
        names=cfg.label_names,
        config=cfg.dataset_config,
    )
    with new_folder(Path(cfg.out)) as folder:
        report = make_models(corpus, cfg.recipe, folder, cfg.seed, device, cfg.init, cfg.reward_init)
    print(f"{cfg.out}: {describe_models(report)}", file=sys.stderr)
    print(f"next: {next_command(cfg, corpus.names)}")


def next_command(cfg: MakeConfig, labels: Sequence[str]) -> str:
    """The command that trains the policy with these models and texts; its label is positive, or else the last one."""
    settings: dict[str, Any] = {
        "policy_name": Path(cfg.out) / "policy",
        "rm_name": Path(cfg.out) / "reward",
        "dataset": cfg.dataset,
    }
    for name in ("dataset_config", "split", "text_column"):
        if getattr(cfg, name) != getattr(TrainConfig, name):
            settings[name] = getattr(cfg, name)
    if TrainConfig.target_label not in map(full_label, labels):
        settings["target_label"] = labels[-1]
    context = GPT2Config.from_pretrained(Path(cfg.out) / "policy").n_positions
    if context < TrainConfig.max_prompt_len + TrainConfig.max_new_tokens:
        settings["max_prompt_len"] = context // 2
        settings["max_new_tokens"] = context // 2
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return shell_command("python", "train.py", *flags)


if __name__ == "__main__":
    sys.exit(run(main))
