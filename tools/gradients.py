"""How much of PPO's gradient is signal, for every way of telling which token earned the score.

    python -m tools.gradients                                         of gpt2, as train.py would begin
    python -m tools.gradients --train "--policy_name ckpts/policy_lm"     of a policy that was trained
    python -m tools.gradients --draw results/gradients.csv            only the table

The policy answers `groups` batches of prompts. Each batch gives one estimate g of the gradient of the mean score, for
each reward_every and gae_lambda from the same responses. The mean of g_i g_j over different batches estimates the
signal |E g|^2 without bias, the mean of g_i g_i signal and noise together; both are weighted as Adam weighs them, by
one over the root mean square of each weight's gradient. `cosine` is that of the true gradients, between each way and
the unbiased one, which pays everything at the end and has lambda 1. `responses` is how many it takes for signal to
equal noise (the gradient noise scale of McCandlish et al. 2018, arXiv 1812.06162, times the batch).
"""

import itertools
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError, opt, parse_config, run_tool, with_changes  # isort: skip  (before torch)

import pandas as pd
import torch
from torch import Tensor
from tqdm import trange
from transformers.hf_argparser import HfArgumentParser

import train
from model import GPT2WithValueHead, Sequences
from utils import compute_gae, quiet_libraries, spread_scores, write_whole

UNBIASED = (0, 1.0)  # reward_every and gae_lambda


@dataclass(frozen=True, kw_only=True)
class GradientsConfig:
    """Settings of `python -m tools.gradients`."""

    train: str = opt("", "Flags of train.py: models, prompts, lengths, batch_size.")
    groups: int = opt(16, "Batches to compare with each other.")
    reward_every: str = opt("1,2,4,0", "Values to compare.")
    gae_lambda: str = opt("0,0.5,0.8,0.95,1", "Values to compare, each with each.")
    csv: str = opt("results/gradients.csv", "The table.")
    draw: str | None = opt(None, "Only print this table.")


def main(argv: list[str] | None = None) -> None:
    """Measure, keep the table, and print it."""
    parser = HfArgumentParser(GradientsConfig, allow_abbrev=False, description=__doc__)
    cfg = GradientsConfig(**vars(parser.parse_args(argv)))
    if cfg.groups < 2:
        raise UserError(f"groups={cfg.groups} must be at least 2: noise shows where estimates differ")
    path = Path(cfg.draw or cfg.csv)
    if cfg.draw is None:
        quiet_libraries()
        table = measure(cfg)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, table.to_csv(index=False, float_format="%.4g", lineterminator="\n"))
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a table that this tool wrote")
    print(pd.read_csv(path).to_string(index=False))


def measure(cfg: GradientsConfig) -> pd.DataFrame:
    """One row per way (raises UserError)."""
    run = train.resolve(parse_config(TrainConfig, ["--eval_every=0", *shlex.split(cfg.train)]))
    run = with_changes(run, reward_every=1)  # of which every coarser one is a part
    parts = train.load_parts(run)
    ways = dict.fromkeys([UNBIASED, *itertools.product(numbers(cfg.reward_every, int), numbers(cfg.gae_lambda, float))])
    moments = {way: Moments() for way in ways}
    for group in trange(1, cfg.groups + 1, unit="batch", dynamic_ncols=True):
        seqs = train.act(parts, run, group)
        scores, running = train.score(parts, run, seqs), train.running_scores(parts, run, seqs)
        assert running is not None
        unbiased: Tensor | None = None
        for every, lam in ways:
            paid = spread_scores(scores, seen(running, every), seqs.response_mask)
            if not every:
                paid = spread_scores(scores - scores.mean(), None, seqs.response_mask)
            credit, _ = compute_gae(paid, torch.zeros_like(paid), seqs.response_mask, 1.0, lam)
            gradient = policy_gradient(parts.policy, seqs, credit, run.minibatch_size)
            unbiased = gradient if unbiased is None else unbiased
            moments[every, lam].add(gradient, unbiased)
    scale = moments[UNBIASED].square.div(cfg.groups).sqrt().clamp(min=1e-12)
    rows = [
        {"reward_every": every, "gae_lambda": lam, **found.figures(moments[UNBIASED], 1 / scale, run.batch_size)}
        for (every, lam), found in moments.items()
    ]
    return pd.DataFrame(rows).assign(batch=run.batch_size, groups=cfg.groups, train=cfg.train)


def numbers(text: str, kind: type) -> list[Any]:
    """`1,2` -> [1, 2] (raises UserError)."""
    try:
        return [kind(x) for x in text.split(",")]
    except ValueError:
        raise UserError(f"{text!r} is not understood: write numbers with commas between them") from None


def seen(running: Tensor, every: int) -> Tensor | None:
    """Of the scores after each token (B, R), those after every so many; None for none."""
    if not every:
        return None
    place = torch.arange(1, running.shape[1] + 1, device=running.device)
    return torch.where(place % every == 0, running, math.nan)


def policy_gradient(policy: GPT2WithValueHead, seqs: Sequences, credit: Tensor, rows_at_a_time: int) -> Tensor:
    """The gradient (weights,) of PPO's loss where it begins, at ratio 1: of -sum(credit log pi) over the tokens."""
    policy.zero_grad()
    for rows in torch.arange(len(credit), device=credit.device).split(rows_at_a_time):
        logprobs, _, _ = policy.evaluate_responses(seqs.select(rows), with_entropy=False)
        (-(credit[rows] * logprobs).sum() / seqs.response_mask.sum()).backward()
    return torch.cat([weight.grad.flatten() for weight in policy.lm.parameters() if weight.grad is not None])


class Moments:
    """Sums over batches, weight by weight, from which products of different batches follow."""

    def __init__(self) -> None:
        self.count, self.total, self.square, self.cross = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())

    def add(self, gradient: Tensor, unbiased: Tensor) -> None:
        """Add one batch's gradient, beside the unbiased one of the same batch."""
        self.count += 1
        self.total = self.total + gradient
        self.square = self.square + gradient.square()
        self.cross = self.cross + gradient * unbiased

    def figures(self, unbiased: "Moments", weight: Tensor, batch: int) -> dict[str, float]:
        """Signal to noise of one batch, the length of the true gradient and its cosine, against the unbiased one."""
        pairs = self.count * (self.count - 1)
        signal = _sum(weight * (self.total.square() - self.square)) / pairs
        true = _sum(weight * (unbiased.total.square() - unbiased.square)) / pairs
        cross = _sum(weight * (self.total * unbiased.total - self.cross)) / pairs
        noise = _sum(weight * self.square) / self.count - signal
        found = signal > 0 and true > 0  # else there is too much noise to tell
        return {
            "signal_to_noise": signal / noise,
            "responses": batch * noise / signal if found else math.nan,
            "length": math.sqrt(signal / true) if found else math.nan,
            "cosine": cross / math.sqrt(signal * true) if found else math.nan,
        }


def _sum(x: Tensor) -> float:
    return x.double().sum().item()


if __name__ == "__main__":
    run_tool(main)
