"""The tiny offline world: invented reviews and two small models, made once and kept in a cache.

Looking up a `tiny:` name in a world that exists loads nothing of what makes it.
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from config import UserError

from pretrain.recipes import RECIPES, Recipe
from runtime.files import new_folder


@dataclass(frozen=True)
class TinyRecipe:
    """Every number of the tiny world; its folder is named by a hash of them."""

    reviews_version: int = 1  # raise it with every change of tiny_reviews.json
    train_rows: int = 12_000
    test_rows: int = 2_000
    seed: int = 0
    models: Recipe = RECIPES["tiny"]


TINY = TinyRecipe()
TINY_NAMES = {
    "tiny:policy": "policy",
    "tiny:reward": "reward",
    "tiny:reviews/train": "train.jsonl",
    "tiny:reviews/test": "test.jsonl",
}


def resolve_name(name: str, split: str = "train") -> str:
    """The path of a `tiny:` name, made first if need be; any other name as it is."""
    if not name.startswith("tiny:"):
        return name
    key = f"{name}/{split}" if name == "tiny:reviews" else name
    if key not in TINY_NAMES:
        raise UserError(f"{key} is not part of the tiny world: choose {', '.join(TINY_NAMES)}")
    return str(tiny_world() / TINY_NAMES[key])


def tiny_world() -> Path:
    """The folder of the offline models and reviews, made when it is first needed.

    It is in GPT2_PPO_CACHE, or in gpt2-ppo of the user's cache folder.
    """
    key = hashlib.sha256(json.dumps(asdict(TINY), sort_keys=True).encode()).hexdigest()[:12]
    world = cache_root() / f"tiny-{key}"
    if not world.is_dir():
        try:
            with new_folder(world, "GPT2_PPO_CACHE") as folder:
                _make_tiny_world(TINY, folder, world)
        except UserError:
            if not world.is_dir():  # otherwise another process was first
                raise
    return world.resolve()


def cache_root() -> Path:
    """Where made models are kept between runs."""
    if cache := os.environ.get("GPT2_PPO_CACHE"):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2-ppo"


def _make_tiny_world(recipe: TinyRecipe, folder: Path, world: Path) -> None:
    import torch

    from pretrain.corpus import Corpus
    from pretrain.models import describe_models, make_models
    from pretrain.tiny_reviews import generate_reviews
    from runtime.hub import quiet_libraries

    print(
        f"Making the offline models, once, in {world}: a small GPT-2 and a classifier of invented "
        "film reviews (about a minute on two cores).",
        file=sys.stderr,
    )
    texts, labels = generate_reviews(recipe.train_rows + recipe.test_rows, recipe.seed)
    n = recipe.train_rows
    names = ["negative", "positive"]
    for file, rows in (("train.jsonl", slice(n)), ("test.jsonl", slice(n, None))):
        lines = [
            json.dumps({"text": text, "label": names[label]}) + "\n"
            for text, label in zip(texts[rows], labels[rows], strict=True)
        ]
        (folder / file).write_text("".join(lines), encoding="utf-8")
    corpus = Corpus(texts[:n], texts[:n], labels[:n], texts[n:], labels[n:], names)
    quiet_libraries()
    # On the CPU everywhere, and with the caller's random state restored: a run must not depend on whether it made the
    # models itself.
    with torch.random.fork_rng(), torch.enable_grad():
        report = make_models(corpus, recipe.models, folder, recipe.seed, torch.device("cpu"))
    print(f"Done: {describe_models(report)}.", file=sys.stderr)
