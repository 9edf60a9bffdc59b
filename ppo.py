"""Proximal policy optimisation, written out: the rollout, the clipped loss, the update, the KL controller.

References: Schulman et al. 2017 (PPO, arXiv 1707.06347), Schulman et al. 2016 (GAE, 1506.02438), Ziegler et al. 2019
(KL in the per-token reward, adaptive beta, 1909.08593). Tensors are float32 (B, R) unless said otherwise.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from config import TrainConfig
from model import GPT2WithValueHead, Sequences, score_responses
from utils import (
    GradientSum,
    compute_gae,
    explained_variance,
    gather_rows,
    largest,
    masked_mean,
    permutation,
    shape_rewards,
    share_of,
    sum_of_all,
    whiten,
    world_size,
)


@dataclass(frozen=True, eq=False)
class Rollout:
    """What was observed when each prompt was answered once; advantages and returns are derived from it.

    logprobs, ref_logprobs, values, exact_kl and entropy are (B, R), in nats; running (B, R) are scores of the
    unfinished responses, NaN where there is none; scores (B,) in [-1, 1].
    """

    sequences: Sequences
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    exact_kl: Tensor
    entropy: Tensor
    running: Tensor
    scores: Tensor
    kl_coef: float

    def __post_init__(self) -> None:
        for x in (self.logprobs, self.ref_logprobs, self.values, self.exact_kl, self.entropy, self.running):
            assert x.shape == self.mask.shape
        assert self.scores.shape == self.mask.shape[:1]

    def of_all(self) -> "Rollout":
        """The rollouts of all processes as one, the same everywhere: what follows is then as in one process."""
        if world_size() == 1:
            return self
        rows = int(sum_of_all(torch.tensor(len(self.scores))))
        wide = self._widened(int(largest(self.mask.shape[1])))
        return self._with_tensors([gather_rows(x, rows) for x in wide])

    @staticmethod
    def join(rollouts: list["Rollout"]) -> "Rollout":
        """Several rollouts of prompts of one width as one."""
        width = max(rollout.mask.shape[1] for rollout in rollouts)
        wide = [rollout._widened(width) for rollout in rollouts]
        return rollouts[0]._with_tensors([torch.cat(parts) for parts in zip(*wide, strict=True)])

    def _widened(self, width: int) -> list[Tensor]:
        """All tensors, with responses padded to this width."""
        extra = width - self.mask.shape[1]
        tensors = [*self.sequences.tensors(), self.logprobs, self.ref_logprobs, self.values, self.exact_kl,
                   self.entropy, self.running]  # fmt: skip
        return [*(F.pad(x, (0, 0) * (x.dim() - 2) + (0, extra)) for x in tensors), self.scores]

    def _with_tensors(self, tensors: list[Tensor]) -> "Rollout":
        of_sequences = len(self.sequences.tensors())
        names = [f.name for f in fields(self) if f.name not in ("sequences", "kl_coef")]
        changes: dict[str, Any] = dict(zip(names, tensors[of_sequences:], strict=True))
        return replace(self, sequences=self.sequences.with_tensors(tensors[:of_sequences]), **changes)

    def rewards(self) -> Tensor:
        """The rewards per token (B, R), shaped over the whole batch."""
        return shape_rewards(self.scores, self.logprobs, self.ref_logprobs, self.mask, self.kl_coef, self.running)[0]

    @property
    def kl(self) -> Tensor:
        """log pi - log pi_ref of the sampled tokens (B, R), in nats, 0 outside the mask."""
        return torch.where(self.mask, self.logprobs - self.ref_logprobs, 0)

    @property
    def mask(self) -> Tensor:
        """The response mask (B, R)."""
        return self.sequences.response_mask

    def metrics(self) -> dict[str, float]:
        """Averages over responses or, for kl_token and entropy, over real tokens; distinct_rate is a share of them."""
        means = {
            "sentiment_mean": self.scores.mean(),
            "positive_rate": (self.scores > 0).float().mean(),
            "kl_seq": self.kl.sum(1).mean(),
            "kl_seq_exact": self.exact_kl.sum(1).mean(),
            "kl_token": masked_mean(self.kl, self.mask),
            "reward_mean": (self.scores - self.kl_coef * self.kl.sum(1)).mean(),
            "entropy": masked_mean(self.entropy, self.mask),
            "response_len": self.mask.sum(1).float().mean(),
        }
        different = len(self.sequences.responses.unique(dim=0)) / len(self.scores)
        return {**{name: value.item() for name, value in means.items()}, "distinct_rate": different}


def make_rollout(
    policy: GPT2WithValueHead, reference: GPT2WithValueHead, seqs: Sequences, scores: Tensor, kl_coef: float,
    running: Tensor | None = None,
) -> Rollout:  # fmt: skip
    """Record what policy, critic and reference think of the responses, beside their scores (B,).

    running (B, R), if given, are the scores of the unfinished responses up to a token, NaN where not looked up.
    """
    logprobs, ref_logprobs, values, entropy, exact_kl = score_responses(policy, reference, seqs)
    running = torch.full_like(logprobs, math.nan) if running is None else running
    return Rollout(seqs, logprobs, ref_logprobs, values, exact_kl, entropy, running, scores, kl_coef)


@dataclass(frozen=True, eq=False)
class Batch:
    """What the loss compares the new policy with: everything (B, R)."""

    sequences: Sequences
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, rows: Tensor) -> "Batch":
        """The same for some responses only."""
        parts = (self.logprobs, self.values, self.advantages, self.returns)
        return Batch(self.sequences.select(rows), *(x[rows] for x in parts))


def ppo_loss(
    new_logprobs: Tensor, new_values: Tensor, entropy: Tensor, batch: Batch, cfg: TrainConfig, token_count: Tensor | int
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, clipped value loss and entropy bonus, summed over real tokens / token_count.

    token_count is that of the whole minibatch, so that the losses of its micro-batches add up to its mean. Returns the
    loss (scalar) and, for the report, sums over real tokens (Schulman et al. 2017, eq. 7 and 9).
    """
    mask = batch.sequences.response_mask
    log_ratio = torch.where(mask, new_logprobs - batch.logprobs, 0)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - cfg.clip_range, 1 + cfg.clip_range)
    policy_loss = torch.maximum(-batch.advantages * ratio, -batch.advantages * clipped_ratio)

    clipped_values = batch.values + (new_values - batch.values).clamp(-cfg.value_clip_range, cfg.value_clip_range)
    value_loss = 0.5 * torch.maximum((new_values - batch.returns) ** 2, (clipped_values - batch.returns) ** 2)

    def total(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0).sum()

    loss = total(policy_loss) + cfg.value_coef * total(value_loss) - cfg.ent_coef * total(entropy)
    with torch.no_grad():
        sums = {
            "policy_loss": total(policy_loss),
            "value_loss": total(value_loss),
            "approx_kl": total(ratio - 1 - log_ratio),  # k3 of Schulman 2020: unbiased and never negative
            "clip_frac": total(((ratio - 1).abs() > cfg.clip_range).float()),
            "ratio_max": ratio.max(),
        }
    return loss / token_count, sums


def ppo_update(
    policy: GPT2WithValueHead, optimizer: Optimizer, rollout: Rollout, cfg: TrainConfig, step: int
) -> dict[str, float]:
    """Improve the policy on one rollout: ppo_epochs passes in fresh random order, one optimiser step per minibatch.

    Changes policy and optimizer in place. A minibatch whose loss or gradient is not finite changes nothing and is
    counted as skipped. Returns averages over all real tokens of all minibatches.
    """
    advantages, returns = compute_gae(rollout.rewards(), rollout.values, rollout.mask, cfg.gamma, cfg.gae_lambda)
    data = Batch(rollout.sequences, rollout.logprobs, rollout.values, whiten(advantages, rollout.mask), returns)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step)

    report, size = Report(), cfg.micro_batch_size or cfg.minibatch_size
    gradients = GradientSum([*reversed(list(policy.lm.parameters())), *policy.value_head.parameters()])
    for epoch in range(cfg.ppo_epochs):
        order = permutation(cfg.seed, step, epoch, len(rollout.mask)).to(rollout.mask.device)
        epoch_report = Report()
        for rows in order.split(cfg.minibatch_size):
            size = _learn(policy, optimizer, data.select(rows), cfg, size, epoch_report, gradients)
        report.add(epoch_report)
        if cfg.target_kl is not None and epoch_report.mean("approx_kl") > cfg.target_kl:
            break
    gradients.close()
    return {
        **report.metrics(),
        "explained_var": explained_variance(returns, rollout.values, rollout.mask),
        "epochs": epoch + 1,
        "micro_batch_size": -int(largest(-size)),
        "lr": learning_rate(cfg, step),
    }


def _learn(
    policy: GPT2WithValueHead, optimizer: Optimizer, minibatch: Batch, cfg: TrainConfig, size: int, report: "Report",
    gradients: GradientSum,
) -> int:  # fmt: skip
    """One optimiser step on one minibatch, in micro-batches that leave its gradient as it is.

    Each process takes its share of the rows. Where memory does not suffice for micro-batches of `size` responses they
    are halved, and the minibatch is begun anew: the gradient is the same, because nothing in it is random. Returns the
    size that sufficed.
    """
    token_count, device = minibatch.sequences.response_mask.sum(), minibatch.logprobs.device
    own = torch.arange(len(minibatch.logprobs), device=device)[share_of(len(minibatch.logprobs))]
    while True:
        optimizer.zero_grad()
        found = Report()
        try:
            pieces = own.split(size) if len(own) else ()
            for i, rows in enumerate(pieces, start=1):
                last = gradients if i == len(pieces) else None
                _backward(policy, minibatch.select(rows), cfg, token_count, found, last)
            break
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-size // 2)
        gradients.waiting = {}  # what was not sent yet is not complete any more
        torch.cuda.empty_cache()  # out here the failed pass is no longer held
    gradients.finish()
    found = found.of_all()
    grad_norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm))
    if math.isfinite(grad_norm) and found.is_finite():
        optimizer.step()
        found.add_step(grad_norm)
        report.add(found)
    else:
        optimizer.zero_grad()
        report.skipped += 1
    return size


def _backward(
    policy: GPT2WithValueHead, micro: Batch, cfg: TrainConfig, token_count: Tensor, report: "Report",
    gradients: GradientSum | None,
) -> None:  # fmt: skip
    """Add the gradient of a micro-batch: one pass through GPT-2, the loss above it for a few responses at a time.

    The loss is a sum over tokens, so each few can be taken back to the hidden states before the next; logits of all
    tokens, of which GPT-2 has 50,257 each, never exist at once. gradients is there for the last micro-batch only.
    """
    hidden = policy.response_hidden(micro.sequences)
    states = hidden.detach().requires_grad_()
    for rows in torch.arange(len(states), device=states.device).split(policy.responses_at_a_time(micro.sequences)):
        few = micro.select(rows)
        new = policy.evaluate_hidden(states[rows], few.sequences, with_entropy=cfg.ent_coef > 0)
        loss, sums = ppo_loss(*new, few, cfg, token_count)
        loss.backward()
        report.add_sums(sums, few.sequences.response_mask.sum())
    if gradients is not None:
        gradients.begin()
    hidden.backward(states.grad)


class Report:
    """Running sums of an update, so that every statistic is a mean over all tokens and not the last minibatch's.

    They stay tensors on their device until asked for: on a GPU, looking at a number waits for all that was begun.
    """

    def __init__(self) -> None:
        names = ("policy_loss", "value_loss", "approx_kl", "clip_frac")
        self.sums: dict[str, Tensor] = {name: torch.zeros(()) for name in names}
        self.ratio_max = self.tokens = torch.zeros(())
        self.grad_norms, self.steps, self.skipped = 0.0, 0, 0

    def add_sums(self, sums: dict[str, Tensor], tokens: Tensor) -> None:
        """Add one micro-batch: sums over its real tokens, and how many these are."""
        self._add(sums, sums["ratio_max"], tokens)

    def add_step(self, grad_norm: float) -> None:
        """Count one optimiser step and the norm of its gradient before clipping."""
        self.grad_norms += grad_norm
        self.steps += 1

    def add(self, other: "Report") -> None:
        """Add all that another report holds."""
        self._add(other.sums, other.ratio_max, other.tokens)
        self.grad_norms += other.grad_norms
        self.steps += other.steps
        self.skipped += other.skipped

    def _add(self, sums: dict[str, Tensor], ratio_max: Tensor, tokens: Tensor) -> None:
        self.sums = {name: total.to(tokens.device) + sums[name].detach() for name, total in self.sums.items()}
        self.ratio_max = torch.maximum(self.ratio_max.to(tokens.device), ratio_max)
        self.tokens = self.tokens.to(tokens.device) + tokens

    def of_all(self) -> "Report":
        """The sums of all processes."""
        whole = Report()
        sums = sum_of_all(torch.stack([*self.sums.values(), self.tokens.to(self.ratio_max)]))
        whole.sums, whole.tokens = dict(zip(self.sums, sums, strict=False)), sums[-1]
        whole.ratio_max = self.ratio_max
        if world_size() > 1:
            whole.ratio_max = torch.tensor(largest(float(self.ratio_max)), device=sums.device)
        return whole

    def is_finite(self) -> bool:
        """Whether every sum is a number."""
        return bool(torch.stack([*self.sums.values(), self.ratio_max]).isfinite().all())

    def mean(self, name: str) -> float:
        """A sum divided by the tokens it runs over (NaN where every minibatch was skipped)."""
        return float(self.sums[name] / self.tokens)

    def metrics(self) -> dict[str, float]:
        """All of it as one row."""
        return {
            **{name: self.mean(name) for name in self.sums},
            "ratio_max": float(self.ratio_max),
            "grad_norm": self.grad_norms / self.steps if self.steps else math.nan,
            "updates": self.steps,
            "skipped": self.skipped,
        }


def build_optimizer(policy: GPT2WithValueHead, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW over policy and critic; eps 1e-5 damps the first steps, and no weight is pulled towards 0."""
    return torch.optim.AdamW(policy.parameters(), lr=cfg.lr, eps=1e-5, weight_decay=0.0, fused=True)


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """Step size of step 1, 2, …: rising over warmup_steps, then falling evenly towards 0, or constant."""
    if step <= cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    if cfg.lr_schedule == "constant":
        return cfg.lr
    return cfg.lr * (1 - (step - 1 - cfg.warmup_steps) / (cfg.total_steps - cfg.warmup_steps))


@dataclass
class KLController:
    """beta, fixed or steered to a KL per response by a proportional rule (Ziegler et al. 2019, section 2.2)."""

    coef: float
    target: float | None = None
    gain: float = 0.1

    def update(self, kl_seq: float) -> None:
        """Raise beta where kl_seq (nats, mean over the batch) was above target, lower it where below, 2 % at most."""
        if self.target is not None and math.isfinite(kl_seq):
            error = max(-0.2, min(0.2, kl_seq / self.target - 1))
            self.coef *= 1 + self.gain * error
