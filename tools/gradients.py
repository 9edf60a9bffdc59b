"""How much of the policy gradient is signal, for every way of telling which token earned the score.

    python -m tools.gradients                                             of gpt2, as train.py would begin
    python -m tools.gradients --train "--policy_name ckpts/policy_lm"     of a policy that was trained
    python -m tools.gradients --draw results/gradients.csv                only the table

The policy answers `batches` batches of prompts. Each gives one estimate g of the gradient of the mean score, for each
reward_every and gae_lambda from the same responses; without critic, discount, whitening and the price of KL, so that
nothing but the way differs. Products g_i g_j of different batches estimate the signal |E g|^2, products g_i g_i signal
and noise together. Each weight counts by one over the root mean square of its gradient in `pilot` batches of their own
(plus the mean of that over all weights), as it does for Adam with its eps. `signal_to_noise` is that of one batch, with
its standard error; `responses` is how many it takes for signal to equal noise (the gradient noise scale of McCandlish
et al. 2018, arXiv 1812.06162). `length` and `cosine` compare the true gradient with that of REINFORCE, which pays
everything at the end, has lambda 1 and is unbiased; they are left out where the signal is within two standard errors of
nothing.

Keeps one vector as large as the policy for each way.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from config import TrainConfig, UserError, numbers, opt, parse_config, parse_tool, run_tool, with_changes, words  # isort: skip

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import trange

import train
from model import GPT2WithValueHead, Sequences
from tools.tables import read_table, ready_for_table
from utils import ENOUGH, compute_gae, quiet_libraries, spread_scores, write_whole

Way = tuple[int, float]  # reward_every and gae_lambda
REINFORCE: Way = (0, 1.0)


@dataclass(frozen=True, kw_only=True)
class GradientsConfig:
    """Settings of `python -m tools.gradients`."""

    train: str = opt("", "Flags of train.py: models, prompts, lengths, batch_size.")
    batches: int = opt(24, "Batches to compare with each other.")
    pilot: int = opt(4, "Batches before them, to weigh by.")
    reward_every: str = opt("1,2,4,0", "Values to compare.")
    gae_lambda: str = opt("0,0.5,0.8,0.95,1", "Values to compare, each with each.")
    csv: str = opt("gradients.csv", "The table.")
    draw: str | None = opt(None, "Only print this table.")


def main(argv: list[str] | None = None) -> None:
    """Measure, keep the table, and print it."""
    cfg = parse_tool(GradientsConfig, argv, __doc__)
    if cfg.batches < 3 or cfg.pilot < 1:
        raise UserError("batches must be at least 3 and pilot at least 1: noise shows where estimates differ")
    path = Path(cfg.draw or cfg.csv)
    if cfg.draw is None:
        ready_for_table(path)
        quiet_libraries()
        write_whole(path, measure(cfg).to_csv(index=False, float_format="%.3g", lineterminator="\n"))
    print(read_table(path).to_string(index=False))


def measure(cfg: GradientsConfig) -> pd.DataFrame:
    """One row per way (raises UserError)."""
    run = parse_config(TrainConfig, [*words("train", cfg.train), "--eval_every=0", "--gamma=1", "--reward_every=1"])
    asked = itertools.product(numbers("reward_every", cfg.reward_every, int),
                              numbers("gae_lambda", cfg.gae_lambda, float))  # fmt: skip
    ways = list(dict.fromkeys([REINFORCE, *asked]))
    for every, lam in ways:
        with_changes(run, reward_every=every, gae_lambda=lam)  # refuses what is out of range
    if run.batch_size < ENOUGH:
        raise UserError(f"batch_size={run.batch_size} leaves running scores unused: take {ENOUGH} or more")
    run = train.resolve(run)
    parts = train.load_parts(run)
    square = torch.zeros(())
    found = {way: Products() for way in ways}
    for batch in trange(1, cfg.pilot + cfg.batches + 1, unit="batch", dynamic_ncols=True):
        observed = observe(parts, run, batch)
        if batch <= cfg.pilot:
            square = square + policy_gradient(parts.policy, observed, REINFORCE, run).square() / cfg.pilot
            continue
        size = square.sqrt()  # damped by its mean, so that weights that hardly moved in the pilot do not count most
        scale = (size + size.mean()).clamp(min=1e-12).rsqrt()  # it comes twice in a product
        textbook = scale * policy_gradient(parts.policy, observed, REINFORCE, run)
        before = found[REINFORCE].total
        for way in ways:
            gradient = textbook if way == REINFORCE else scale * policy_gradient(parts.policy, observed, way, run)
            found[way].add(gradient, textbook, before)
    rows = [
        {"reward_every": way[0], "gae_lambda": way[1], **products.figures(found[REINFORCE], run.batch_size)}
        for way, products in found.items()
    ]
    return pd.DataFrame(rows).assign(batch=run.batch_size, batches=cfg.batches, train=cfg.train)


@dataclass(frozen=True, eq=False)
class Observed:
    """A batch's responses, their scores (B,), and those of the unfinished responses after every token (B, R)."""

    seqs: Sequences
    scores: Tensor
    running: Tensor


def observe(parts: train.Parts, run: TrainConfig, batch: int) -> Observed:
    """Let the policy answer, and score the answers after every token."""
    seqs = train.act(parts, run, batch)
    running = train.running_scores(parts, run, seqs)
    assert running is not None
    return Observed(seqs, train.score(parts, run, seqs), running)


def advantages(observed: Observed, way: Way) -> Tensor:
    """What a way makes of the scores: (B, R), without critic and discount."""
    every, lam = way
    scores, mask = observed.scores, observed.seqs.response_mask
    if every:
        place = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        rewards = spread_scores(scores, torch.where(place % every == 0, observed.running, math.nan), mask)
    else:  # against the mean of the others, so that no response weighs on its own baseline
        rewards = spread_scores((scores - scores.mean()) * len(scores) / max(1, len(scores) - 1), None, mask)
    return compute_gae(rewards, torch.zeros_like(rewards), mask, 1.0, lam)[0]


def policy_gradient(policy: GPT2WithValueHead, observed: Observed, way: Way, run: TrainConfig) -> Tensor:
    """The gradient (weights,) of PPO's policy loss where it begins, at ratio 1: of -mean(advantage log pi)."""
    policy.zero_grad()
    advantage, mask = advantages(observed, way), observed.seqs.response_mask
    for rows in torch.arange(len(mask), device=mask.device).split(run.micro_batch_size or run.minibatch_size):
        logprobs, _, _ = policy.evaluate_responses(observed.seqs.select(rows), with_entropy=False)
        (-(advantage[rows] * logprobs).sum() / mask.sum()).backward()
    return torch.cat([weight.grad.flatten() for weight in policy.lm.parameters() if weight.grad is not None])


class Products:
    """Products of a way's gradients with each other and with REINFORCE's, batch by batch."""

    def __init__(self) -> None:
        self.total, self.count = torch.zeros(()), 0
        self.own, self.pairs, self.cross = list[float](), list[float](), list[float]()

    def add(self, gradient: Tensor, textbook: Tensor, textbook_total: Tensor) -> None:
        """Add one batch: its gradient, REINFORCE's of the same batch, and the sum of REINFORCE's before it."""
        if self.count:
            self.pairs.append(_dot(gradient, self.total) / self.count)
            self.cross.append((_dot(gradient, textbook_total) + _dot(textbook, self.total)) / (2 * self.count))
        self.own.append(_dot(gradient, gradient))
        self.total, self.count = self.total + gradient, self.count + 1

    def signal(self) -> tuple[float, float]:
        """The squared length of the true gradient, and its standard error (while noise is the larger part)."""
        pairs, weights = np.array(self.pairs), np.arange(1, self.count)  # each batch is compared with so many
        signal = float(np.average(pairs, weights=weights))
        return signal, float(np.sqrt(np.sum((weights * (pairs - signal)) ** 2)) / weights.sum())

    def figures(self, textbook: "Products", batch: int) -> dict[str, float]:
        """The row of the table; NaN for what the noise hides."""
        signal, error = self.signal()
        true, true_error = textbook.signal()
        noise = float(np.mean(self.own)) - signal
        names = ("signal_to_noise", "standard_error", "responses", "length", "cosine")
        row = dict.fromkeys(names, math.nan)
        if noise > 0:
            row |= {"signal_to_noise": signal / noise, "standard_error": error / noise}
        if noise > 0 and signal > 2 * error:
            row["responses"] = batch * noise / signal
            if true > 2 * true_error:
                cross = np.average(self.cross, weights=np.arange(1, self.count))
                row |= {"length": math.sqrt(signal / true), "cosine": float(cross) / math.sqrt(signal * true)}
        return row


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))


if __name__ == "__main__":
    run_tool(main)
