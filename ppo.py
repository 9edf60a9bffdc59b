"""Proximal policy optimisation, written out: the rollout, the clipped loss, the update, the KL controller.

References: Schulman et al. 2017 (PPO, arXiv 1707.06347), Schulman et al. 2016 (GAE, 1506.02438), Ziegler et al. 2019
(KL in the per-token reward, adaptive beta, 1909.08593). Tensors are float32 (B, R) unless said otherwise: B responses
of up to R tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from config import TrainConfig, UserError

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from data import PromptBatch, select_cells
from model import GPT2WithValueHead, ReferenceStates, Sampler, Sequences, decode, evaluate_both, sample_responses
from reward import PART, UNSCALED, Classifier, Context, Reward, Scores, ScoreScale, normalized_sum, score_responses
from runtime.device import Stopwatch
from runtime.distributed import (
    all_reduce_max,
    all_reduce_sum,
    gather_rows,
    raise_on_all_ranks,
    rank_slice,
    sum_gradients,
    world_size,
)
from runtime.tables import Columns
from utils import (
    compute_gae,
    expected_scores,
    explained_variance,
    inverse_std,
    map_tensors,
    masked_mean,
    mean_error_of_others,
    pad_right,
    permutation,
    shape_rewards,
    take_rows,
    whiten,
)

# --- the rollout ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Models:
    """The models behind a rollout: the policy, its frozen reference and the reward, with the policy's tokenizer.

    score_scale standardises scores before they become rewards; sampler keeps a GPU's memory from rollout to rollout.
    """

    policy: GPT2WithValueHead
    reference: GPT2WithValueHead
    reward: Reward
    tokenizer: PreTrainedTokenizerBase
    score_scale: ScoreScale = UNSCALED
    sampler: Sampler = field(default_factory=Sampler)

    def respond(self, model: GPT2WithValueHead, prompts: PromptBatch, uniforms: Tensor, cfg: TrainConfig) -> Sequences:
        """Sample one response per prompt from the policy or the reference; uniforms (B, R)."""
        return sample_responses(
            model,
            prompts.ids,
            prompts.mask,
            uniforms,
            eos_id=int(self.tokenizer.eos_token_id),
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            sampler=self.sampler,
        )

    def score(self, seqs: Sequences, columns: Columns, cfg: TrainConfig) -> Scores:
        """Scores of the responses; columns are those of their prompts (raises UserError where the reward fails)."""
        responses = seqs.texts(self.tokenizer, cfg.reward_on_prompt)
        context = Context(seqs.token_lists[1], columns)
        return score_responses(self.reward, responses, seqs.prompt_texts(self.tokenizer), cfg.rm_name, context)

    def partial_scores(self, seqs: Sequences, columns: Columns, cfg: TrainConfig) -> Tensor:
        """Scores (B, R) of each unfinished response after every reward_every tokens, NaN elsewhere (raises UserError).

        columns are those of the prompts. With reward_every 0 nothing is scored.
        """
        device = seqs.tokens.device
        partial_scores = torch.full(seqs.response_mask.shape, math.nan, device=device)
        if cfg.reward_every == 0:
            return partial_scores
        # 1. what is scored: the first tokens of each response that goes on after them
        prompts, responses = seqs.token_lists
        places = []  # row, and column of the last token scored
        prefixes = []
        for length in range(cfg.reward_every, partial_scores.shape[1], cfg.reward_every):
            for row, response in enumerate(responses):
                if len(response) > length:
                    before = prompts[row] if cfg.reward_on_prompt else []
                    places.append((row, length - 1))
                    prefixes.append(before + response[:length])
        if not places:
            return partial_scores
        # 2. their scores, each at the last token of its prefix
        texts = decode(self.tokenizer, prefixes)
        prompt_texts = seqs.prompt_texts(self.tokenizer)
        rows = [row for row, _ in places]
        tokens = [responses[row][: last + 1] for row, last in places]
        context = Context(tokens, select_cells(columns, rows))
        scores = score_responses(self.reward, texts, [prompt_texts[row] for row in rows], cfg.rm_name, context)
        if scores.token_rewards is not None:
            raise UserError(
                f"rm_name={cfg.rm_name} gives a number per token, and reward_every={cfg.reward_every} scores "
                "unfinished responses: take --reward_every 0 --gae_lambda 1"
            )
        at_rows, at_tokens = torch.tensor(places).T.to(device, non_blocking=True)
        partial_scores[at_rows, at_tokens] = scores.total.to(partial_scores)
        return partial_scores


@dataclass(frozen=True, eq=False)
class Rollout:
    """What was observed when each prompt got one response; advantages and returns are derived from it.

    logprobs, ref_logprobs, exact_kl and entropy are (B, R), in nats. logprobs are evaluated as the update will evaluate
    them, so that the ratio starts at 1; the sampler's own, in sequences, serve the self-check. values (B, R) are the
    critic's: a correction to expected_scores(), and their sum is the baseline. scores (B,) and partial_scores
    (B, R), those of the unfinished responses, NaN where there is none, are as the reward gave them; score_scale
    standardises them. parts are what scores are the weighted sum of, each (B,); normalized_weights, if any, are their
    weights where each is normalised. token_rewards (B, R) are what of the scores was earned token by token. has_label
    says whether scores are 2 P(label) - 1. With ref_states the price of KL is part of the loss, and the rewards are
    scores alone. seconds says how long each phase took.
    """

    sequences: Sequences
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    exact_kl: Tensor
    entropy: Tensor
    partial_scores: Tensor
    scores: Tensor
    kl_coef: float
    score_scale: ScoreScale = UNSCALED
    has_label: bool = True
    ref_states: ReferenceStates | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    normalized_weights: dict[str, float] = field(default_factory=dict)
    token_rewards: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for x in (self.logprobs, self.ref_logprobs, self.values, self.exact_kl, self.entropy, self.partial_scores):
            assert x.shape == self.mask.shape
        assert self.ref_states is None or self.ref_states.hidden.shape[:2] == self.mask.shape
        assert self.scores.shape == self.mask.shape[:1]

    def widened(self, width: int) -> "Rollout":
        """The same rollout with responses padded on the right to `width` tokens; scores stay as they are."""
        return map_tensors(lambda x: pad_right(x, width - self.mask.shape[1]), self)

    def gathered(self) -> "Rollout":
        """The rollouts of all ranks as one, the same on every rank."""
        if world_size() == 1:
            return self
        rows = int(all_reduce_sum(torch.tensor(len(self.scores))))
        return map_tensors(lambda x: gather_rows(x, rows), self.widened(int(all_reduce_max(self.mask.shape[1]))))

    @staticmethod
    def cat(rollouts: Sequence["Rollout"]) -> "Rollout":
        """Several rollouts of prompts of one width as one."""
        assert len({(rollout.kl_coef, rollout.score_scale) for rollout in rollouts}) == 1
        width = max(rollout.mask.shape[1] for rollout in rollouts)
        return map_tensors(lambda *xs: torch.cat(xs), *(rollout.widened(width) for rollout in rollouts))

    def rewards(self) -> Tensor:
        """The rewards per token (B, R): the price of KL, unless the loss has it, and the score.

        What of the score was earned token by token is paid there, and the rest on the last token.
        """
        scores = self.paid_scores()
        kl_coef = 0.0 if self.ref_states is not None else self.kl_coef
        if self.token_rewards is None:
            return shape_rewards(scores, self.kl, self.mask, kl_coef)
        token_rewards = self.token_rewards / self.score_scale.std
        return shape_rewards(scores - token_rewards.sum(1), self.kl, self.mask, kl_coef) + token_rewards

    def paid_scores(self) -> Tensor:
        """The scores (B,) in the unit in which they are paid."""
        if self.normalized_weights:
            return normalized_sum(self.parts, self.normalized_weights)
        return self.score_scale.standardize(self.scores)

    def expected_scores(self) -> Tensor:
        """The final score to expect before each token (B, R), predicted from the response's partial scores.

        The regression is fitted on the other responses' scores; before the first partial score their mean is expected.
        0 without partial scores.
        """
        scores = self.score_scale.standardize(self.scores)
        partial_scores = self.score_scale.standardize(self.partial_scores)
        return expected_scores(scores, partial_scores, self.mask)

    @property
    def kl(self) -> Tensor:
        """log pi - log pi_ref of the sampled tokens (B, R), in nats, 0 outside the mask."""
        return torch.where(self.mask, self.logprobs - self.ref_logprobs, 0)

    @property
    def mask(self) -> Tensor:
        """The response mask (B, R)."""
        return self.sequences.response_mask

    def metrics(self) -> dict[str, float]:
        """Averages over responses or, for kl_token and entropy, real tokens; and the share of different responses."""
        means = {"score_mean": self.scores.mean()}
        means |= {f"{PART}{name}": part.mean() for name, part in self.parts.items()}
        if self.has_label:
            means["positive_rate"] = (self.scores > 0).float().mean()
        means |= {
            "kl_seq": self.kl.sum(1).mean(),
            "kl_seq_exact": self.exact_kl.sum(1).mean(),
            "kl_token": masked_mean(self.kl, self.mask),
            # what PPO maximises, also where the price of KL is in the loss
            "reward_mean": (self.paid_scores() - self.kl_coef * self.kl.sum(1)).mean(),
            "entropy": masked_mean(self.entropy, self.mask),
            "response_len": self.mask.sum(1).float().mean(),
        }
        _, responses = self.sequences.token_lists
        distinct = {tuple(response) for response in responses}
        numbers = torch.stack(list(means.values())).tolist()  # one copy from the device
        return {**dict(zip(means, numbers, strict=True)), "distinct_rate": len(distinct) / len(self.scores)}


def collect_rollout(
    models: Models, prompts: PromptBatch, uniforms: Tensor, cfg: TrainConfig, kl_coef: float
) -> Rollout:
    """Sample one response per prompt, score it, and record all that the update needs.

    uniforms (B, max_new_tokens) are all the randomness. Each rank takes its share of the rows, and all of them get the
    whole rollout. Raises UserError on every rank where one of them fails.
    """
    rows = rank_slice(len(uniforms))
    own = prompts.select(rows)
    watch = Stopwatch(models.policy.lm.device)
    with raise_on_all_ranks():
        # 1. sample
        seqs = models.respond(models.policy, own, uniforms[rows], cfg)
        seconds_generate = watch.lap()
        seqs.copy_to_host()
        # 2. evaluate under policy and reference
        ref_states = ReferenceStates.of(models.reference, seqs)
        evaluation = evaluate_both(models.policy, models.reference, seqs, ref_states.hidden)
        # 3. score
        scores = models.score(seqs, own.columns, cfg)
        partial_scores = models.partial_scores(seqs, own.columns, cfg)
        token_rewards = put_token_rewards(scores, models.reward, seqs.response_mask)
    rollout = Rollout(
        sequences=seqs,
        logprobs=evaluation.logprobs,
        ref_logprobs=evaluation.ref_logprobs,
        values=evaluation.values,
        exact_kl=evaluation.exact_kl,
        entropy=evaluation.entropy,
        partial_scores=partial_scores,
        scores=scores.total,
        kl_coef=kl_coef,
        score_scale=models.score_scale,
        has_label=models.reward.label is not None,
        ref_states=ref_states if cfg.kl_in_loss else None,
        parts={name: part.total for name, part in scores.parts.items()},
        normalized_weights=scores.weights if cfg.normalize_parts else {},
        token_rewards=token_rewards,
    ).gathered()
    return replace(rollout, seconds={"seconds_generate": seconds_generate, "seconds_score": watch.lap()})


def put_token_rewards(scores: Scores, reward: Reward, response_mask: Tensor) -> Tensor | None:
    """The rewards per token at the width of the responses (B, R), 0 where there are none; None for a classifier.

    So all ranks have them or none has, also one without rows.
    """
    if scores.token_rewards is None:
        return None if isinstance(reward, Classifier) else torch.zeros_like(response_mask, dtype=torch.float32)
    return pad_right(scores.token_rewards, response_mask.shape[1] - scores.token_rewards.shape[1])


# --- the loss -------------------------------------------------------------------------------------------------------

LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of a rollout as the loss needs them: all rows, a minibatch, a micro-batch or a chunk of one.

    Everything is (B, R), but for hidden states (B, R, H). returns are targets of the value head.

    kl_price (scalar) is beta / std(advantages), the cost of one nat on the scale of the whitened advantages. ref_states
    is None where the rewards have KL.
    """

    sequences: Sequences
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    kl_price: Tensor | float = 0.0
    ref_states: ReferenceStates | None = None

    def __len__(self) -> int:
        return len(self.logprobs)

    def select(self, rows: Tensor | slice) -> "Batch":
        """Some of the rows."""
        return map_tensors(lambda x: take_rows(x, rows), self)

    def split(self, size: int) -> Iterator["Batch"]:
        """The rows in order, `size` at a time."""
        for first in range(0, len(self), size):
            yield self.select(slice(first, first + size))


def ppo_loss(
    new_logprobs: Tensor, new_values: Tensor, entropy: Tensor, batch: Batch, cfg: TrainConfig, token_count: Tensor | int
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, clipped value loss and entropy bonus, summed over real tokens / token_count.

    token_count is that of the whole minibatch, so the losses of its micro-batches add up to its mean. Returns the loss
    (scalar) and sums over real tokens for the statistics (Schulman et al. 2017, eq. 7 and 9; the clipped value loss is
    that of OpenAI's baselines).

    The log of a ratio is kept within 20 of 0, because exp(89) is infinite in float32 and would lose the minibatch. A
    token beyond that gets no policy gradient, and counts in approx_kl and ratio_max with that ratio.
    """
    mask = batch.sequences.response_mask

    def total(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0).sum()

    log_ratio = torch.where(mask, new_logprobs - batch.logprobs, 0).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - cfg.clip_range, 1 + cfg.clip_range)
    policy_loss = torch.maximum(-batch.advantages * ratio, -batch.advantages * clipped_ratio)

    clipped_values = batch.values + (new_values - batch.values).clamp(-cfg.value_clip_range, cfg.value_clip_range)
    value_loss = 0.5 * torch.maximum((new_values - batch.returns) ** 2, (clipped_values - batch.returns) ** 2)

    loss = total(policy_loss) + cfg.value_coef * total(value_loss) - cfg.ent_coef * total(entropy)
    with torch.no_grad():
        sums = {
            "policy_loss": total(policy_loss),
            "value_loss": total(value_loss),
            "approx_kl": total(ratio - 1 - log_ratio),  # k3 of Schulman 2020: unbiased, never negative
            "clip_frac": total(((ratio - 1).abs() > cfg.clip_range).float()),
            "tokens": mask.sum(),
            "ratio_max": ratio.max(),
        }
    return loss / token_count, sums


def kl_loss(exact_kl: Tensor, batch: Batch, token_count: Tensor | int) -> Tensor:
    """The price of the exact KL to the reference at the tokens of a batch, summed / token_count (scalar).

    exact_kl (B, R) is KL(policy || reference) over the whole vocabulary, differentiable; a nat costs batch.kl_price.
    The optimum is not quite that of KL in the rewards: see docs/facts.md.
    """
    return torch.where(batch.sequences.response_mask, batch.kl_price * exact_kl, 0).sum() / token_count


# --- the update -----------------------------------------------------------------------------------------------------

NO_SCALER = GradScaler(enabled=False)


def ppo_update(
    policy: GPT2WithValueHead,
    optimizer: Optimizer,
    rollout: Rollout,
    cfg: TrainConfig,
    step: int,
    scaler: GradScaler = NO_SCALER,
) -> dict[str, float]:
    """Improve the policy on one rollout: ppo_epochs passes in new random order, one optimiser step per minibatch.

    Changes policy, optimizer and scaler in place. A minibatch whose loss or gradient is not finite changes nothing and
    is counted. Returns the update's columns of metrics.csv: averages over all real tokens of all minibatches, the
    largest ratio and counts, on every rank the same.
    """
    watch = Stopwatch(rollout.mask.device)
    optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)  # the policy's; that of an own critic is constant

    # advantages
    batch, value_fit = estimate_advantages(rollout, cfg, step)
    stats = UpdateStats(rollout.mask.device)
    for epoch in range(cfg.ppo_epochs):
        epoch_stats = UpdateStats(rollout.mask.device)  # apart, for target_kl
        for rows in permutation(cfg.seed, step, epoch, len(batch)).split(cfg.minibatch_size):
            # loss and backward
            policy.zero_grad()
            minibatch_stats = accumulate_gradients(policy, batch.select(rows), cfg, scaler)
            # sum over processes
            sum_gradients(policy)
            minibatch_stats.all_reduce()
            # clip
            scaler.unscale_(optimizer)
            minibatch_stats.grad_norms = clip_gradients(optimizer, cfg.max_grad_norm)
            # step
            counted = step_if_finite(optimizer, minibatch_stats, scaler)
            epoch_stats.add(counted)
        stats.add(epoch_stats)
        if cfg.target_kl is not None and epoch_stats.mean("approx_kl") > cfg.target_kl:
            break
    return {
        **stats.metrics(),
        **value_fit,
        "epochs": epoch + 1,
        "micro_batch_size": cfg.micro_batch_size or cfg.minibatch_size,
        "lr": learning_rate(cfg, step),
        "seconds_update": watch.lap(),
    }


def estimate_advantages(rollout: Rollout, cfg: TrainConfig, step: int) -> tuple[Batch, dict[str, float]]:
    """Whitened advantages and the critic's returns at PPO step 1, 2, …, with what of the rollout the loss needs.

    A critic of its own is fitted to the reward still to come, whatever gae_lambda is for the advantages (decoupled GAE,
    VC-PPO, arXiv 2503.01491). Also returns two columns of metrics.csv: return_std, the spread of the reward still to
    come, and explained_var, the share of its variance that the baseline explains: 1 all, 0 nothing.
    """
    mask = rollout.mask
    rewards = rollout.rewards()
    expected = rollout.expected_scores()
    baseline = expected + rollout.values  # what partial scores tell, and the critic's correction
    # with lambda 1 advantage + baseline is the reward still to come, whatever the baseline
    _, reward_to_go = compute_gae(rewards, baseline, mask, cfg.gamma, gae_lambda=1.0)
    if cfg.critic == "own":
        baseline = baseline + mean_error_of_others(reward_to_go, baseline, mask)
    advantages, returns = compute_gae(rewards, baseline, mask, cfg.gamma, lambda_of(cfg, step))
    targets = reward_to_go if cfg.critic == "own" else returns
    batch = Batch(
        sequences=rollout.sequences,
        logprobs=rollout.logprobs,
        values=rollout.values,
        advantages=whiten(advantages, mask),
        returns=targets - expected,
        kl_price=rollout.kl_coef * inverse_std(advantages, mask),
        ref_states=rollout.ref_states,
    )
    value_fit = {
        "return_std": reward_to_go[mask].std(correction=0).item(),
        "explained_var": explained_variance(reward_to_go, baseline, mask),
    }
    return batch, value_fit


def accumulate_gradients(
    policy: GPT2WithValueHead, minibatch: Batch, cfg: TrainConfig, scaler: GradScaler = NO_SCALER
) -> "UpdateStats":
    """Add to the policy's gradient that of the (scaled) loss on this rank's rows of a minibatch; returns statistics.

    A micro-batch is one pass through the transformer. The loss is a sum over tokens, so the heads run on a few rows (a
    chunk) at a time, which collects the gradient of the last hidden states; one backward pass then takes it through the
    transformer. The logits of all tokens, 50,257 each for GPT-2, never exist at once. A critic of its own collects the
    gradient of its hidden states in the same way.
    """
    token_count = minibatch.sequences.response_mask.sum()  # of all ranks' rows
    own = minibatch.select(rank_slice(len(minibatch)))
    stats = UpdateStats(token_count.device)
    for micro in own.split(cfg.micro_batch_size or cfg.minibatch_size):
        hidden = policy.response_hidden(micro.sequences)
        states = hidden.detach().requires_grad_()
        critic_hidden = policy.critic_hidden(micro.sequences, hidden)
        critic_states = states if critic_hidden is hidden else critic_hidden.detach().requires_grad_()
        for rows in policy.chunk(micro.sequences):
            loss, sums = total_loss(policy, states[rows], critic_states[rows], micro.select(rows), cfg, token_count)
            scaler.scale(loss).backward()
            stats.add_sums(sums)
        hidden.backward(states.grad)
        if critic_hidden is not hidden:
            critic_hidden.backward(critic_states.grad)
    return stats


def total_loss(
    policy: GPT2WithValueHead,
    hidden: Tensor,
    critic_hidden: Tensor,
    batch: Batch,
    cfg: TrainConfig,
    token_count: Tensor | int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss of some rows from hidden states (B, R, H), plus the price of KL where the rewards lack it."""
    new = policy.evaluate_hidden(hidden, batch.sequences, with_entropy=cfg.ent_coef > 0, ref_states=batch.ref_states)
    new_values = policy.critic.values(critic_hidden)
    loss, sums = ppo_loss(new.logprobs, new_values, new.entropy, batch, cfg, token_count)
    if batch.ref_states is not None:
        loss = loss + kl_loss(new.exact_kl, batch, token_count)
    return loss, sums


def clip_gradients(optimizer: Optimizer, max_norm: float) -> Tensor:
    """Scale gradients down to a norm, those of a critic of its own apart; returns the norms before."""
    norms = [clip_grad_norm_(group["params"], max_norm) for group in optimizer.param_groups]
    return torch.stack(norms)


def step_if_finite(optimizer: Optimizer, minibatch_stats: "UpdateStats", scaler: GradScaler) -> "UpdateStats":
    """Take an optimiser step, unless loss or gradient is not finite; returns the statistics, or the count of a skip.

    Where only the scaled gradient is not finite the loss scale was too large, and the scaler lowers it. Whether a step
    is taken is decided here and not by scaler.step, because the loss counts, too.
    """
    counted = UpdateStats(minibatch_stats.ratio_max.device)
    if minibatch_stats.is_finite():
        optimizer.step()
        counted = minibatch_stats
        counted.steps = 1
    elif minibatch_stats.overflowed(scaler):
        counted.overflows = 1
    else:
        counted.skipped = 1
    scaler.update()
    return counted


class UpdateStats:
    """Running sums of an update, so that every statistic is a mean over all its tokens.

    They stay tensors on their device until the end of the update: reading a number waits for the GPU. grad_norms are
    sums over optimiser steps: the policy's and, if it has a network of its own, the critic's.
    """

    NAMES = ("policy_loss", "value_loss", "approx_kl", "clip_frac", "tokens")

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums: dict[str, Tensor] = {name: torch.zeros((), device=device) for name in self.NAMES}
        self.ratio_max = torch.zeros((), device=device)
        self.grad_norms = torch.zeros(1, device=device)
        self.steps = 0
        self.skipped = 0
        self.overflows = 0

    def add_sums(self, sums: dict[str, Tensor]) -> None:
        """Add sums over real tokens, as ppo_loss returns them."""
        self.sums = {name: total + sums[name].detach() for name, total in self.sums.items()}
        self.ratio_max = torch.maximum(self.ratio_max, sums["ratio_max"])

    def add(self, other: "UpdateStats") -> None:
        """Add all of another; grad_norms are those before clipping, one per optimiser step."""
        self.add_sums({**other.sums, "ratio_max": other.ratio_max})
        self.grad_norms = self.grad_norms + other.grad_norms
        self.steps += other.steps
        self.skipped += other.skipped
        self.overflows += other.overflows

    def all_reduce(self) -> None:
        """Add the sums of all ranks."""
        if world_size() > 1:
            totals = all_reduce_sum(torch.stack(list(self.sums.values())))
            self.sums = dict(zip(self.sums, totals, strict=True))
            self.ratio_max = torch.full_like(self.ratio_max, all_reduce_max(float(self.ratio_max)))

    def is_finite(self) -> bool:
        """Whether every sum and gradient is a number: with one process the only wait for the GPU in a minibatch."""
        losses = torch.stack([*self.sums.values(), self.ratio_max])
        return bool(torch.cat([losses, self.grad_norms]).isfinite().all())

    def overflowed(self, scaler: GradScaler) -> bool:
        """Whether only the scaled gradient is not finite, and a lower factor is left to try."""
        losses = torch.stack([*self.sums.values(), self.ratio_max])
        return scaler.is_enabled() and bool(losses.isfinite().all()) and scaler.get_scale() > 1

    def mean(self, name: str) -> float:
        """A sum divided by its number of tokens (NaN where every minibatch was skipped)."""
        return float(self.sums[name] / self.sums["tokens"])

    def metrics(self) -> dict[str, float]:
        """All statistics as one row."""
        return {
            **{name: self.mean(name) for name in self.NAMES if name != "tokens"},
            "ratio_max": float(self.ratio_max),
            "grad_norm": float(self.grad_norms[0]) / self.steps if self.steps else math.nan,
            "updates": self.steps,
            "skipped": self.skipped,
            "overflows": self.overflows,
        }


def build_optimizer(policy: GPT2WithValueHead, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW over policy and critic, with eps 1e-5 as in OpenAI's PPO and without weight decay.

    A critic of its own is the second group. Its gradients are small beside 1e-5, so its eps is Adam's 1e-8.
    """
    critic_weights = [] if policy.own_critic is None else list(policy.own_critic.parameters())
    own = set(critic_weights)
    groups: list[dict[str, Any]] = [{"params": [p for p in policy.parameters() if p not in own]}]
    if critic_weights:
        groups.append({"params": critic_weights, "lr": cfg.critic_lr, "eps": 1e-8})
    return torch.optim.AdamW(groups, lr=cfg.lr, eps=1e-5, weight_decay=0.0, fused=True)


def build_scaler(policy: GPT2WithValueHead) -> GradScaler:
    """A factor on the loss that keeps small gradients within float16's range; it does nothing in other precisions."""
    return GradScaler(policy.lm.device.type, enabled=policy.dtype == torch.float16)


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """The learning rate of PPO step 1, 2, …: it rises over warmup_steps, then falls linearly to 0 or is constant."""
    if step <= cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    if cfg.lr_schedule == "constant":
        return cfg.lr
    return cfg.lr * (1 - (step - 1 - cfg.warmup_steps) / (cfg.total_steps - cfg.warmup_steps))


def lambda_of(cfg: TrainConfig, step: int) -> float:
    """GAE's lambda at PPO step 1, 2, …: it falls linearly from 1 to gae_lambda over lambda_warmup_steps.

    At 1 any critic leaves the expected gradient as it is. The lower lambda is, the more a critic that foresees little
    biases it.
    """
    if step > cfg.lambda_warmup_steps:
        return cfg.gae_lambda
    return 1 - (1 - cfg.gae_lambda) * (step - 1) / cfg.lambda_warmup_steps


@dataclass
class KLController:
    """beta, fixed or steered to a target KL by a proportional rule (Ziegler et al. 2019, section 2.2).

    Libraries that set a horizon instead of a gain mean gain = batch_size / horizon.
    """

    coef: float
    target: float | None = None
    gain: float = 0.1

    def update(self, kl_seq: float) -> None:
        """Raise beta if kl_seq (nats, mean over the batch) was above the target, else lower it, by gain / 5 at most."""
        if self.target is not None and math.isfinite(kl_seq):
            error = max(-0.2, min(0.2, kl_seq / self.target - 1))
            self.coef *= 1 + self.gain * error
