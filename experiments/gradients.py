"""How much of the policy gradient is signal, for every way of assigning the score to tokens.

    python -m experiments.gradients                                             of gpt2, as train.py would begin
    python -m experiments.gradients --train "--policy_name ckpts/policy_lm"     of a policy that was trained

The policy responds to `batches` batches of prompts. Each batch gives one estimate g of the gradient of the mean score
for each reward_every and gae_lambda, from the same responses and without critic, discount, whitening and KL penalty.
The products g_i g_j of different batches estimate the signal |E g|^2, the products g_i g_i estimate signal plus noise.
Each weight is divided by the root mean square of its gradient over `pilot` batches (plus the mean of that over all
weights), as Adam does with its eps. `signal_to_noise` is that of one batch, with its standard error; `responses` is how
many make signal equal noise (the gradient noise scale of McCandlish et al. 2018, arXiv 1812.06162). `length` and
`cosine` compare the true gradient with that of REINFORCE, which pays the whole score at the end, has lambda 1 and is
unbiased. They are left out where the signal is within two standard errors of zero.

Memory: one vector as large as the policy for each way.
"""

import itertools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from config import TrainConfig, UserError, opt

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from experiments.runner import write_table
from model import GPT2WithValueHead, Sequences
from runtime.cli import numbers, parse_config, parse_flags, run, words
from runtime.files import check_table_path
from runtime.hub import quiet_libraries
from training.estimate import timed
from training.parts import Parts, load_parts, resolve
from utils import MIN_ROWS_TO_PREDICT, compute_gae, expected_scores, shape_rewards, uniforms

Way = tuple[int, float]  # reward_every and gae_lambda
REINFORCE: Way = (0, 1.0)


@dataclass(frozen=True, kw_only=True)
class GradientsConfig:
    """Settings of `python -m experiments.gradients`."""

    train: str = opt("", "Flags of train.py: models, prompts, lengths, batch_size.")
    batches: int = opt(24, "Batches to compare with each other.")
    pilot: int = opt(4, "Batches before them, to weigh by.")
    reward_every: str = opt("1,2,4,0", "Values to compare.")
    gae_lambda: str = opt("0,0.5,0.8,0.95,1", "Values to compare, each with each.")
    csv: str = opt("gradients.csv", "The table.", path="written")


def main(argv: list[str] | None = None) -> None:
    """Measure, keep the table, and print it."""
    cfg = parse_flags(GradientsConfig, argv, __doc__)
    if cfg.batches < 3 or cfg.pilot < 1:
        raise UserError("batches must be at least 3 and pilot at least 1: noise shows where estimates differ")
    check_table_path(Path(cfg.csv))
    quiet_libraries()
    table = measure(cfg)
    write_table(Path(cfg.csv), table, "%.3g")
    print(table.to_string(index=False, float_format="%.3g"))


def measure(cfg: GradientsConfig) -> pd.DataFrame:
    """One row per way."""
    # 1. settings, all checked before anything is loaded
    run_cfg = observed_settings(cfg.train)
    reward_every = numbers("reward_every", cfg.reward_every, int)
    gae_lambda = numbers("gae_lambda", cfg.gae_lambda, float)
    ways = list(dict.fromkeys([REINFORCE, *itertools.product(reward_every, gae_lambda)]))
    for every, lam in ways:
        replace(run_cfg, reward_every=every, gae_lambda=lam)  # refuses what is out of range
    if run_cfg.batch_size < MIN_ROWS_TO_PREDICT:
        raise UserError(
            f"batch_size={run_cfg.batch_size} leaves partial scores unused: take {MIN_ROWS_TO_PREDICT} or more"
        )
    run_cfg = resolve(run_cfg)
    parts = load_parts(run_cfg)

    # 2. the gradients, batch by batch
    policy, square = parts.models.policy, torch.zeros(())
    products = {way: Products() for way in ways}
    for batch in timed(range(1, cfg.pilot + cfg.batches + 1), "measuring gradients", "batch", measured=cfg.pilot):
        observed = observe(parts, run_cfg, batch)
        gradient = policy_gradient(policy, observed, REINFORCE, run_cfg)
        if batch <= cfg.pilot:
            square = square + gradient.square() / cfg.pilot
            continue
        size = square.sqrt()  # damped by its mean, so that weights that hardly moved in the pilot do not count most
        scale = (size + size.mean()).clamp(min=1e-12).rsqrt()  # it comes twice in a product
        reinforce = scale * gradient
        reinforce_before = products[REINFORCE].total
        for way in ways:
            own = reinforce if way == REINFORCE else scale * policy_gradient(policy, observed, way, run_cfg)
            products[way].add(own, reinforce, reinforce_before)

    # 3. the table
    rows = []
    for (every, lam), product in products.items():
        figures = product.figures(products[REINFORCE], run_cfg.batch_size)
        rows.append({"reward_every": every, "gae_lambda": lam, **figures})
    return pd.DataFrame(rows).assign(batch=run_cfg.batch_size, batches=cfg.batches, train=cfg.train)


# --- responses ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Observed:
    """A batch's responses, their scores (B,), and those of the unfinished responses after every token (B, R)."""

    seqs: Sequences
    scores: Tensor
    partial_scores: Tensor


def observed_settings(train: str) -> TrainConfig:
    """Settings of train.py for `observe`: a score after every token, no discount, all prompts (raises UserError)."""
    return parse_config(TrainConfig, [*words("train", train), "--eval_every=0", "--gamma=1", "--reward_every=1"])


def observe(parts: Parts, run_cfg: TrainConfig, batch: int) -> Observed:
    """Let the policy respond, and score the responses after every token."""
    models = parts.models
    noise = uniforms(run_cfg.seed, batch, run_cfg.batch_size, run_cfg.max_new_tokens)
    prompts = parts.prompts.batch(batch)
    seqs = models.respond(models.policy, prompts, noise, run_cfg)
    scores = models.score(seqs, prompts.columns, run_cfg).total
    return Observed(seqs, scores, models.partial_scores(seqs, prompts.columns, run_cfg))


def advantages(observed: Observed, way: Way) -> Tensor:
    """What a way makes of the scores: (B, R), without critic and discount."""
    every, lam = way
    scores, mask = observed.scores, observed.seqs.response_mask
    if every:
        place = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        partial_scores = torch.where(place % every == 0, observed.partial_scores, math.nan)
        expected = expected_scores(scores, partial_scores, mask)
    else:  # against the mean of the others, so that no response weighs on its own baseline
        scores = (scores - scores.mean()) * len(scores) / max(1, len(scores) - 1)
        expected = torch.zeros(mask.shape, device=mask.device)
    rewards = shape_rewards(scores, torch.zeros_like(expected), mask, kl_coef=0.0)
    return compute_gae(rewards, expected, mask, 1.0, lam)[0]


def policy_gradient(policy: GPT2WithValueHead, observed: Observed, way: Way, run_cfg: TrainConfig) -> Tensor:
    """The gradient (weights,) of PPO's policy loss where it begins, at ratio 1: of -mean(advantage log pi)."""
    policy.zero_grad()
    advantage, mask = advantages(observed, way), observed.seqs.response_mask
    for rows in torch.arange(len(mask), device=mask.device).split(run_cfg.micro_batch_size or run_cfg.minibatch_size):
        logprobs, *_ = policy.evaluate_responses(observed.seqs.select(rows), with_entropy=False)
        (-(advantage[rows] * logprobs).sum() / mask.sum()).backward()
    return torch.cat([weight.grad.flatten() for weight in policy.lm.parameters() if weight.grad is not None])


# --- signal and noise -----------------------------------------------------------------------------------------------


class Signal(NamedTuple):
    """The squared length of a true gradient, and its standard error (while noise is the larger part)."""

    square: float
    error: float


class Products:
    """Products of a way's gradients with each other and with REINFORCE's, batch by batch."""

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.zeros(())
        self.own: list[float] = []  # with itself
        self.pairs: list[float] = []  # with the mean of those before it
        self.cross: list[float] = []  # of both ways, each with the other's mean before it

    def add(self, gradient: Tensor, reinforce: Tensor, reinforce_before: Tensor) -> None:
        """Add one batch: its gradient, REINFORCE's of the same batch, and the sum of REINFORCE's before it."""
        if self.count:
            self.pairs.append(dot(gradient, self.total) / self.count)
            self.cross.append((dot(gradient, reinforce_before) + dot(reinforce, self.total)) / (2 * self.count))
        self.own.append(dot(gradient, gradient))
        self.total = self.total + gradient
        self.count += 1

    def signal(self) -> Signal:
        """What the pairs agree on; each batch counts as often as there were batches before it."""
        pairs, weights = np.array(self.pairs), np.arange(1, self.count)
        square = float(np.average(pairs, weights=weights))
        return Signal(square, float(np.sqrt(np.sum((weights * (pairs - square)) ** 2)) / weights.sum()))

    def figures(self, reinforce: "Products", batch: int) -> dict[str, float]:
        """The row of the table; NaN for what the noise hides."""
        signal, true = self.signal(), reinforce.signal()
        noise = float(np.mean(self.own)) - signal.square
        row = dict.fromkeys(("signal_to_noise", "standard_error", "responses", "length", "cosine"), math.nan)
        if noise <= 0:
            return row
        row["signal_to_noise"] = signal.square / noise
        row["standard_error"] = signal.error / noise
        if signal.square <= 2 * signal.error:
            return row
        row["responses"] = batch * noise / signal.square
        if true.square > 2 * true.error:
            cross = float(np.average(self.cross, weights=np.arange(1, self.count)))
            row["length"] = math.sqrt(signal.square / true.square)
            row["cosine"] = cross / math.sqrt(signal.square * true.square)
        return row


def dot(a: Tensor, b: Tensor) -> float:
    """Their product, summed in float64."""
    return float((a * b).sum(dtype=torch.float64))


if __name__ == "__main__":
    sys.exit(run(main))
