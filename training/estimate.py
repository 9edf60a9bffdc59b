"""How long work will take: a run on the CPU by its matrix products, other work by its first part."""

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from config import TrainConfig

import torch
from tqdm import tqdm

from model import GPT2WithValueHead
from ppo import Models
from reward import Classifier
from runtime.device import matmul_rate
from runtime.distributed import world_size
from runtime.terminal import progress_bar

T = TypeVar("T")

SLOWDOWN = 2.0  # steps take 1.8 to 2.5 times as long as their matrix products would (results/benchmark.csv)
SHORT = 20.0  # seconds: other work that is over by then is not worth announcing
LONG = 1800.0  # seconds: a run that is over by then is not worth announcing
SLOWEST = 5e9  # FLOP/s that every CPU reaches: where that suffices nothing need be measured


def note_slow_run(models: Models, cfg: TrainConfig, steps: int) -> str | None:
    """A line that says about how long so many steps will take here and what to do instead; None unless that is long."""
    if cfg.device != "cpu" or world_size() > 1:
        return None
    work = SLOWDOWN * sum(flops(models, cfg).values())
    if steps * work / SLOWEST < LONG:
        return None
    seconds = work / matmul_rate("cpu", getattr(torch, cfg.dtype), size=1024)
    if steps * seconds < LONG:
        return None
    return (
        f"without a GPU this will take about {duration(steps * seconds)} ({steps} steps of {duration(seconds)}): for a "
        "first try take --preset tiny, a smaller --policy_name and --rm_name, or fewer --total_steps"
    )


def timed(work: Sequence[T], title: str, unit: str, measured: int = 0) -> Iterator[T]:
    """The same work behind a bar; once its first unit is done, a line says how long the others will take.

    measured is the number of the unit to go by, where the first is not like most.
    """
    with progress_bar(work, title, unit) as bar:
        for number, one in enumerate(bar):
            begun = time.monotonic()
            yield one
            seconds = (len(work) - number - 1) * (time.monotonic() - begun)
            if number == measured and seconds >= SHORT:
                tqdm.write(f"{title} will take another {duration(seconds)} or so")


def duration(seconds: float) -> str:
    """Seconds in words: 90 s, 5 minutes, 3 hours, 2 days."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def flops(models: Models, cfg: TrainConfig) -> dict[str, float]:
    """FLOPs that a step needs at least, by phase; a backward pass costs twice its forward pass.

    A reward in Python counts as free.
    """
    tokens = cfg.max_prompt_len + cfg.max_new_tokens

    def transformer(model: GPT2WithValueHead) -> float:
        c = model.lm.config
        layers = tokens * c.n_layer * (24 * c.n_embd**2 + 2 * tokens * c.n_embd)
        layers -= cfg.max_prompt_len * 20 * c.n_embd**2  # of the prompt, the last block needs keys and values alone
        return float(cfg.batch_size * layers)

    def forward(model: GPT2WithValueHead) -> float:
        return transformer(model) + logits(model)

    def logits(model: GPT2WithValueHead) -> float:
        return cfg.batch_size * 2 * cfg.max_new_tokens * model.lm.config.n_embd * model.lm.config.vocab_size

    tokens_read = cfg.max_new_tokens  # by the reward, of each response
    if cfg.reward_every:
        tokens_read += sum(range(cfg.reward_every, cfg.max_new_tokens, cfg.reward_every))
    judge: float = 0
    if isinstance(models.reward, Classifier):
        weights = models.reward.model.named_parameters()
        judge = 2 * cfg.batch_size * tokens_read * sum(p.numel() for name, p in weights if "embeddings" not in name)
    update = 3 * forward(models.policy)
    if cfg.kl_in_loss:
        update += logits(models.reference)
    score = forward(models.policy) + forward(models.reference) + judge
    if models.policy.own_critic is not None:
        update += 3 * transformer(models.policy.own_critic)
        score += transformer(models.policy.own_critic)
    return {"generate": forward(models.policy), "score": score, "update": cfg.ppo_epochs * update}
