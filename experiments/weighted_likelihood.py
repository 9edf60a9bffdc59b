"""What plain imitation finds: trains the network, without PPO, on the optimal policy's own responses.

    python -m experiments.weighted_likelihood --kl 1 --out runs/limit --train "--policy_name gpt2 --lr 1e-4"
    python -m tools.interpolate ckpts runs/limit --curve --each          beside PPO, on one picture

The optimal policy is pi_ref(y) exp(score(y) / beta) / Z. Base's own responses, each weighted by exp(score / beta), are
samples of it. With enough of them, maximising their weighted likelihood finds the nearest policy that the network can
represent (reward-weighted regression, Peters and Schaal 2007; distributional policy gradients, Korbak et al. 2022).
Nothing is explored, and no critic is needed. A PPO far below the result has lost something on the way.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from config import TrainConfig, UserError, opt

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from evaluation.frontier import BETAS, frontier
from model import GPT2WithValueHead, Sequences
from ppo import build_optimizer, learning_rate
from runtime.cli import parse_config, parse_flags, run, words
from runtime.device import keep_freed_memory
from runtime.files import new_folder, write_atomic
from runtime.hub import quiet_libraries
from training.commands import eval_command
from training.estimate import timed
from training.parts import Parts, load_parts, resolve
from training.run_record import describe, describe_reward
from utils import output_embedding, uniforms


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """Settings of `python -m experiments.weighted_likelihood`."""

    kl: float = opt(1.0, "KL of the optimal policy to learn from, in nats per response.")
    answers: int = opt(16, "Base's responses per prompt.")
    batches: int = opt(40, "Batches of prompts.")
    warmup: int = opt(50, "Optimiser steps over which the step size rises.")
    train: str = opt("", "Flags of train.py: models, data, lengths, batch_size, minibatch_size, lr.")
    out: str = opt("likelihood", "Folder to make, in the form of a run.", path="written")


@dataclass(frozen=True, eq=False)
class Draw:
    """One response of base to each prompt of a batch, and their weights (B,), which are 1 on average over draws."""

    seqs: Sequences
    weights: Tensor


def main(argv: Sequence[str] | None = None) -> None:
    """Sample, weigh and train."""
    cfg = parse_flags(LikelihoodConfig, argv, __doc__)
    run_cfg = check_settings(cfg)
    quiet_libraries()
    run_cfg = resolve(run_cfg)
    parts = load_parts(run_cfg)
    keep_freed_memory()
    draws = weigh(*sample(cfg, run_cfg, parts), cfg.kl)
    train_on(draws, parts, replace(run_cfg, total_steps=len(draws), warmup_steps=min(cfg.warmup, len(draws) - 1)))
    record = {**describe(run_cfg), "reward": describe_reward(parts.models), "weighted_likelihood": vars(cfg)}
    with new_folder(Path(cfg.out)) as folder:
        parts.models.policy.save_pretrained(folder)
        parts.models.tokenizer.save_pretrained(folder / "policy_lm")
        write_atomic(folder / "config.json", json.dumps(record, indent=2) + "\n")
    print(f"done: {eval_command(Path(cfg.out) / 'policy_lm', run_cfg.rm_name)}")


def check_settings(cfg: LikelihoodConfig) -> TrainConfig:
    """The settings of the run."""
    if Path(cfg.out).exists():
        raise UserError(f"out={cfg.out} exists: remove it or choose another folder")
    for name, least in (("answers", 2), ("batches", 1), ("warmup", 0)):
        if getattr(cfg, name) < least:
            raise UserError(f"{name}={getattr(cfg, name)} must be at least {least}")
    if not 0 < cfg.kl < np.log(cfg.answers):
        raise UserError(f"kl={cfg.kl} must be more than 0 and less than log(answers) = {np.log(cfg.answers):.2f}")
    run_cfg = parse_config(TrainConfig, [*words("train", cfg.train), f"--ckpt_dir={cfg.out}"])
    if (run_cfg.temperature, run_cfg.top_k, run_cfg.top_p) != (1.0, 0, 1.0):
        raise UserError("train: temperature, top_k and top_p must be left out, because base itself is sampled from")
    return run_cfg


def sample(cfg: LikelihoodConfig, run_cfg: TrainConfig, parts: Parts) -> tuple[list[Sequences], np.ndarray]:
    """Base's responses, batch by batch and draw by draw, and their scores (prompts, draws)."""
    models, seqs, scores = parts.models, list[Sequences](), list[Tensor]()
    pairs = list(itertools.product(range(1, cfg.batches + 1), range(cfg.answers)))
    for batch, draw in timed(pairs, "sampling base", "batch"):
        noise = uniforms(run_cfg.seed + 1 + draw, batch, run_cfg.batch_size, run_cfg.max_new_tokens)
        prompts = parts.prompts.batch(batch)
        seqs.append(models.respond(models.reference, prompts, noise, run_cfg))
        scores.append(models.score(seqs[-1], prompts.columns, run_cfg).total.cpu())
    by_prompt = torch.stack(scores).unflatten(0, (cfg.batches, cfg.answers)).transpose(1, 2).flatten(0, 1)
    return seqs, by_prompt.double().numpy()


def weigh(seqs: Sequence[Sequences], scores: np.ndarray, kl: float) -> list[Draw]:
    """The draws with weights exp(score / beta), for the beta whose optimal policy is nearest to `kl` nats from base."""
    best = frontier(scores)
    kls, rewards = best.kl.mean(0), best.reward.mean(0)
    nearest = int(np.abs(kls - kl).argmin())
    print(
        f"beta {BETAS[nearest]:.3g}: the optimal policy scores {rewards[nearest]:+.3f} at {kls[nearest]:.2f} nats, "
        f"base {scores.mean():+.3f}"
    )
    weights = np.exp((scores - scores.max(1, keepdims=True)) / BETAS[nearest])
    weights /= weights.mean(1, keepdims=True)
    rows = len(seqs[0].tokens)
    by_draw = torch.tensor(weights, dtype=torch.float32).unflatten(0, (-1, rows)).transpose(1, 2).reshape(-1, rows)
    return [Draw(one, own.to(one.tokens.device)) for one, own in zip(seqs, by_draw, strict=True)]


def train_on(draws: Sequence[Draw], parts: Parts, cfg: TrainConfig) -> None:
    """Take one optimiser step on each draw, in random order, with the step sizes of a run of as many steps."""
    policy = parts.models.policy
    optimizer = build_optimizer(policy, cfg)
    order = np.random.default_rng(cfg.seed).permutation(len(draws)).tolist()
    for step, number in enumerate(timed(order, "weighted likelihood", "step"), 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        optimizer_step(policy, parts.models.reference, optimizer, draws[number], cfg)


def optimizer_step(
    policy: GPT2WithValueHead,
    reference: GPT2WithValueHead,
    optimizer: torch.optim.Optimizer,
    draw: Draw,
    cfg: TrainConfig,
) -> None:
    """One step on a draw, in passes of minibatch_size responses."""
    policy.zero_grad()
    for rows in torch.arange(len(draw.weights)).split(cfg.minibatch_size):
        loss = weighted_loss(policy, reference, draw.seqs.select(rows), draw.weights[rows])
        (loss / len(draw.weights)).backward()
    clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
    optimizer.step()


def weighted_loss(policy: GPT2WithValueHead, reference: GPT2WithValueHead, seqs: Sequences, weights: Tensor) -> Tensor:
    """Negative weighted log-likelihood, summed over responses (scalar), up to a constant and with less noise.

    The weights (B,) are 1 on average, and base's own mean log-likelihood under the policy is, but for a constant,
    -KL(base || policy) at each token, exact over the vocabulary. So only weight - 1 goes with the sampled tokens.
    """
    logprobs = vocabulary_logprobs(policy, seqs)
    ref_logprobs = vocabulary_logprobs(reference, seqs)
    sampled = logprobs.gather(1, seqs.responses[seqs.response_mask][:, None]).squeeze(1)
    per_token = weights[:, None].expand_as(seqs.response_mask)[seqs.response_mask]
    exact_kl = (ref_logprobs.exp() * (ref_logprobs - logprobs)).sum()
    return exact_kl - ((per_token - 1) * sampled).sum()


def vocabulary_logprobs(model: GPT2WithValueHead, seqs: Sequences) -> Tensor:
    """Log-probabilities (tokens, V) float32 at every real response token."""
    hidden = model.response_hidden(seqs)[seqs.response_mask].to(model.dtype)
    return torch.log_softmax((hidden @ output_embedding(model.lm.lm_head.weight, model.dtype).T).float(), -1)


if __name__ == "__main__":
    sys.exit(run(main))
