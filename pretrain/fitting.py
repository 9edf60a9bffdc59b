"""Batches of about equal length, and the optimisation that both models share."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from config import UserError

import torch
from torch import Tensor, nn

from runtime.device import has_fast_bfloat16
from runtime.terminal import progress_bar

ModelInputs = dict[str, Tensor]


def length_batches(lengths: Sequence[int], batch_tokens: int, rng: random.Random) -> list[list[int]]:
    """Batches of rows of about equal length, by index, of at most batch_tokens tokens each, in random order."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], rng.random()))
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    rng.shuffle(batches)
    return batches


def fit(
    model: nn.Module, batches: Iterator[ModelInputs], steps: int, lr: float, device: torch.device, title: str
) -> None:
    """Minimise the model's loss with AdamW; the step size rises for a twentieth of the steps, then falls linearly."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    warmup = max(1, steps // 20)
    model.to(device).train()
    for step, batch in enumerate(progress_bar(itertools.islice(batches, steps), title, "step", steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, (steps - step) / steps)
        loss: Tensor = forward(model, batch, device).loss
        if not loss.isfinite():
            raise UserError(f"the loss of the {title} is {loss.item()} at step {step}: lower its step size")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def forward(model: nn.Module, batch: ModelInputs, device: torch.device) -> Any:
    """The model's output for a batch; on CUDA in bfloat16 where that is fast."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and has_fast_bfloat16(device)):
        return model(**{name: tensor.to(device) for name, tensor in batch.items()})


def initial_std(width: int) -> float:
    """Standard deviation of new weights: GPT-2's 0.02 at width 768, more in narrower models."""
    return 0.02 * (768 / width) ** 0.5
