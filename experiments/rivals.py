"""Rivals of PPO: each is planted into train.py by replacing the few functions in which it differs.

    python -m experiments.rivals rloo --preset tiny --ckpt_dir runs/rloo            train.py by another method
    python -m experiments.rivals grpo --responses 8 --preset tiny --ckpt_dir runs/grpo

Models, sampler, log-probabilities, prompts, reference, optimiser and run folder are the product's, and so is every
setting: ppo_epochs, minibatch_size and clip_range hold for the rivals as well. A rival with k responses per prompt
takes batch_size / k prompts in a step, each k times, so that every method has as many episodes in a step.

In the equations y is a response of T tokens to the prompt x, r its score, pi the policy, ref the reference and beta
kl_coef. J is maximised, L minimised. The rivals' advantages are not whitened.
"""

import math
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from config import TrainConfig, UserError

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import GradScaler

import ppo
import train
import utils
from data import PromptBatch, PromptStream
from experiments.planting import Function, Substitute, planted, replaced
from experiments.weighted_likelihood import weighted_loss
from model import GPT2WithValueHead
from ppo import LARGEST_LOG_RATIO, NO_SCALER, Batch, Models, Rollout, UpdateStats
from runtime import cli
from runtime.cli import numbers, parse_config, was_launched
from runtime.saved_run import SavedRun, resume_folder
from training import commands, parts, run_record
from training.parts import Parts

RESPONSES = 4  # per prompt, unless --responses says otherwise
AT_END = ("--reward_every=0", "--gae_lambda=1", "--critic=shared")
LEAST_STD = 1e-4  # of the scores of a group: all alike, they teach nothing


@dataclass(frozen=True)
class Method:
    """A method: what is planted, given the number of responses per prompt; the docstring says what it is.

    flags are settings without which it is another method. responses is None where their number can be chosen.
    """

    plant: Callable[[int], Sequence[Substitute]]
    flags: tuple[str, ...] = AT_END
    responses: int | None = 1

    @property
    def name(self) -> str:
        """The name of its function."""
        return self.plant.__name__

    @property
    def is_rival(self) -> bool:
        """Whether anything is planted: else it is the product with its flags."""
        return bool(self.plant(RESPONSES))


METHODS: dict[str, Method] = {}


def method(*flags: str, responses: int | None = 1) -> Callable[[Function], Function]:
    """Add the decorated function to METHODS."""

    def add(plant: Function) -> Function:
        METHODS[plant.__name__] = Method(plant, flags or AT_END, responses)
        return plant

    return add


def find_method(name: str) -> Method:
    """The method of a name (raises UserError)."""
    if name not in METHODS:
        raise UserError(f"method={name!r} is unknown: choose {', '.join(METHODS)}")
    return METHODS[name]


# --- training by a method -------------------------------------------------------------------------------------------


def main() -> None:
    """Train by the method that the first word names; the others are flags of train.py (raises UserError)."""
    if len(sys.argv) < 2:
        raise UserError("name a method, then flags of train.py: python -m experiments.rivals rloo --preset tiny")
    train_by(find_method(sys.argv[1]), sys.argv[2:])


def train_by(chosen: Method, flags: Sequence[str]) -> None:
    """Train by a method; flags are train.py's and --responses (raises UserError)."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--responses", nargs="?", const="")
    own, rest = parser.parse_known_args(flags)
    cfg = parse_config(TrainConfig, [*rest, *chosen.flags])
    if parse_config(TrainConfig, [*chosen.flags, *rest]) != cfg:
        raise UserError(f"{chosen.name} has settings of its own, {' '.join(chosen.flags)}: leave those flags out")
    given = None if own.responses is None else numbers("responses", own.responses, int)[0]
    responses = check_settings(chosen, given, cfg)
    torch.manual_seed(cfg.seed)

    def record(right: Function, **call: Any) -> dict[str, Any]:
        return {**right(**call), "method": chosen.name, "responses_per_prompt": responses}

    def resume_command(right: Function, **call: Any) -> str:
        program = f"-m experiments.rivals {chosen.name}"
        if chosen.responses is None:
            program += f" --responses {responses}"
        return str(right(**call)).replace("train.py", program, 1)

    of_program = [Substitute(run_record, "run_record", record), Substitute(commands, "resume_command", resume_command)]
    with planted(*chosen.plant(responses), *of_program):
        train.main(cfg)


def check_settings(chosen: Method, responses: int | None, cfg: TrainConfig) -> int:
    """The responses per prompt (raises UserError where a setting does not fit the method)."""
    if responses is not None and chosen.responses is not None:
        raise UserError(f"responses: {chosen.name} has {chosen.responses} per prompt: leave it out")
    count = responses or chosen.responses or RESPONSES
    if chosen.responses is None and (count < 2 or cfg.batch_size % count):
        raise UserError(f"responses={count} must be 2 or more and divide batch_size={cfg.batch_size}: change one")
    if chosen.is_rival and cfg.kl_in_loss:
        raise UserError(f"kl_in_loss is PPO's, and {chosen.name} has a place of its own for KL: leave it out")
    if chosen.is_rival and cfg.batch_size < 2:
        raise UserError(f"batch_size={cfg.batch_size} has nothing to compare a response with: take 2 or more")
    if chosen.is_rival and was_launched():
        raise UserError(f"{chosen.name} runs in one process: start it without torchrun")
    if chosen.name == "best_of_n" and (cfg.temperature, cfg.top_k, cfg.top_p) != (1.0, 0, 1.0):
        raise UserError("best_of_n learns base's own distribution: leave temperature, top_k and top_p out")
    if cfg.minibatch_size % count and chosen.name.startswith("dpo"):
        raise UserError(f"minibatch_size={cfg.minibatch_size} splits a pair: take an even number")
    if cfg.resume:
        earlier = SavedRun(resume_folder(cfg.resume, cfg.ckpt_dir))
        is_same = [earlier.record.get(name) for name in ("method", "responses_per_prompt")] == [chosen.name, count]
        if earlier.exists and not is_same:
            raise UserError(
                f"{earlier.folder} is no run of {chosen.name} with {count} per prompt: choose another --ckpt_dir"
            )
    return count


# --- what several methods share -------------------------------------------------------------------------------------


class Repeated(PromptBatch):
    """The prompts of a training step."""


class RepeatedPrompts(PromptStream):
    """A stream in which each step has batch_size / k prompts, each k times in a row."""

    def __init__(self, stream: PromptStream, count: int) -> None:
        super().__init__(stream.prompts, stream.batch_size // count, stream.seed, stream.columns)
        self.count = count

    def indices(self, step: int) -> list[int]:
        """Indices of the prompts of a step."""
        return [i for i in super().indices(step) for _ in range(self.count)]

    def batch(self, step: int) -> PromptBatch:
        """The prompts of a step, marked as such."""
        return Repeated(**vars(super().batch(step)))


def repeat_prompts(count: int) -> Substitute:
    """Sample `count` responses to each prompt."""

    def load_parts(right: Function, **call: Any) -> Parts:
        loaded: Parts = right(**call)
        return replace(loaded, prompts=RepeatedPrompts(loaded.prompts, count))

    return Substitute(parts, "load_parts", load_parts)


@dataclass(frozen=True, eq=False)
class RivalBatch(Batch):
    """What a loss without a critic needs: the reference's log-probabilities (B, R), and beta in kl_price."""

    ref_logprobs: Tensor | None = None


def batch_of(rollout: Rollout, advantages: Tensor) -> tuple[RivalBatch, dict[str, float]]:
    """A batch in which each token has the advantage (B,) of its response, and values and their targets are 0."""
    zeros = torch.zeros_like(rollout.logprobs)
    batch = RivalBatch(
        sequences=rollout.sequences,
        logprobs=rollout.logprobs,
        values=zeros,
        advantages=torch.where(rollout.mask, advantages[:, None], 0),
        returns=zeros,
        kl_price=rollout.kl_coef,
        ref_states=rollout.ref_states,
        ref_logprobs=rollout.ref_logprobs,
    )
    return batch, {"return_std": math.nan, "explained_var": math.nan}  # there is no critic to report


def leave_one_out(rewards: Tensor, count: int) -> Tensor:
    """Each reward (B,) less the mean of the others in its group of `count` in a row."""
    groups = rewards.view(-1, count)
    others = (groups.sum(1, keepdim=True) - groups) / (count - 1)
    return (groups - others).flatten()


def mean_over_responses(right: Function, cfg: TrainConfig, token_count: Any, **rest: Any) -> Any:
    """PPO's clipped loss, summed over the tokens of a response and averaged over responses instead of tokens."""
    return right(cfg=cfg, token_count=cfg.minibatch_size, **rest)


def stats_of(loss: Tensor, batch: Batch) -> UpdateStats:
    """The statistics of an update without ratios."""
    stats = UpdateStats(loss.device)
    tokens = batch.sequences.response_mask.sum()
    zero = torch.zeros_like(loss)
    sums = dict.fromkeys(stats.NAMES, zero) | {"policy_loss": loss.detach() * tokens, "tokens": tokens}
    stats.add_sums({**sums, "ratio_max": torch.ones_like(loss)})
    return stats


@dataclass(frozen=True, eq=False)
class OfflineRollout(Rollout):
    """The policy's responses, which are reported and teach nothing, with base's to the same prompts, which teach."""

    base: Rollout | None = None


def rollout_of_base(right: Function, models: Models, prompts: PromptBatch, cfg: TrainConfig, **rest: Any) -> Rollout:
    """In a training step base responds as well. seconds_* count base's responses only."""
    reported: Rollout = right(models=models, prompts=prompts, cfg=cfg, **rest)
    if not isinstance(prompts, Repeated):
        return reported
    respond = Models.respond

    def base_responds(self: Models, model: GPT2WithValueHead, *others: Any) -> Any:
        return respond(self, self.reference, *others)

    with replaced(Models, "respond", base_responds):
        base = right(models=models, prompts=prompts, cfg=replace(cfg, kl_in_loss=True), **rest)
    return OfflineRollout(**vars(reported) | {"base": base, "seconds": base.seconds})


def taught(rollout: Rollout) -> Rollout:
    """The responses to learn from."""
    return rollout.base if isinstance(rollout, OfflineRollout) and rollout.base is not None else rollout


# --- PPO itself -----------------------------------------------------------------------------------------------------


@method()
def ppo_at_end(count: int) -> Sequence[Substitute]:
    """PPO with a critic on the policy's own network, the score paid on the last token (Ziegler et al. 2019).

    J = E mean_t min(ratio_t A_t, clip(ratio_t) A_t), A_t = sum_{s >= t} (r [s = T] - beta log pi_s / ref_s) - V_t:
    GAE with lambda 1, whitened over the batch.
    """
    return []


@method("--reward_every=0", "--critic=own", "--gae_lambda=0.7", "--lambda_warmup_steps=20")
def ppo_own_critic(count: int) -> Sequence[Substitute]:
    """PPO with a critic that is a network of its own, as a Python reward gets it (config.py, PAID_AT_END).

    ppo_at_end with GAE's lambda falling from 1 to 0.7 while the critic learns (docs/facts.md).
    """
    return []


@method("--reward_every=1", "--gae_lambda=0.5")
def ppo_partial(count: int) -> Sequence[Substitute]:
    """PPO with partial scores, this project's default: a token is credited with the change in the expected score.

    V_t = E[r | score of the first t tokens] + the critic's correction, the expectation by a regression over the other
    responses of the batch; GAE with lambda 0.5.
    """
    return []


# --- policy gradients without a critic ------------------------------------------------------------------------------


@method()
def reinforce(count: int) -> Sequence[Substitute]:
    """REINFORCE with a batch baseline (Williams 1992; Kool et al. 2019): one response per prompt, a baseline of all.

    grad J = 1/B sum_i (R_i - mean of the other R) grad log pi(y_i | x_i),  R = r - beta log pi(y | x) / ref(y | x)

    The paper takes one gradient step per batch: --ppo_epochs 1 --minibatch_size BATCH_SIZE. More steps are
    importance-weighted and clipped token by token, as PPO's are.
    """

    def advantages(right: Function, rollout: Rollout, cfg: TrainConfig, step: int) -> tuple[Batch, dict[str, float]]:
        rewards = rollout.rewards().sum(1)
        return batch_of(rollout, leave_one_out(rewards, len(rewards)))

    return [Substitute(ppo, "estimate_advantages", advantages), Substitute(ppo, "ppo_loss", mean_over_responses)]


@method(responses=None)
def rloo(count: int) -> Sequence[Substitute]:
    """RLOO (Ahmadian et al. 2024, arXiv 2402.14740, section 2.2): k responses per prompt, each other's baseline.

    grad J = 1/k sum_i (R_i - 1/(k-1) sum_{j != i} R_j) grad log pi(y_i | x),  R = r - beta log pi(y | x) / ref(y | x)

    The paper takes one gradient step per batch: --ppo_epochs 1 --minibatch_size BATCH_SIZE. More steps are
    importance-weighted and clipped token by token, as PPO's are.
    """

    def advantages(right: Function, rollout: Rollout, cfg: TrainConfig, step: int) -> tuple[Batch, dict[str, float]]:
        return batch_of(rollout, leave_one_out(rollout.rewards().sum(1), count))

    return [
        repeat_prompts(count),
        Substitute(ppo, "estimate_advantages", advantages),
        Substitute(ppo, "ppo_loss", mean_over_responses),
    ]


@method(responses=None)
def grpo(count: int) -> Sequence[Substitute]:
    """GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3 and 4): the group's mean and deviation, k3 in the loss.

    J = 1/k sum_i 1/T_i sum_t (min(ratio A_i, clip(ratio) A_i) - beta k3_t),  A_i = (r_i - mean r) / std r,
    k3 = ref/pi - log(ref/pi) - 1, differentiated with pi

    The paper has k = 64, beta = 0.04 and one gradient step per batch: --responses 64 --kl_coef 0.04 --ppo_epochs 1
    --minibatch_size BATCH_SIZE.
    """
    return group_relative(count, by_std=True, by_length=True)


@method(responses=None)
def dr_grpo(count: int) -> Sequence[Substitute]:
    """Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, section 3.2): GRPO without division by deviation and by length.

    J = 1/k sum_i sum_t (min(ratio A_i, clip(ratio) A_i) - beta k3_t),  A_i = r_i - mean r

    The paper has k = 8 and beta = 0, and divides by a constant, which changes the size of the loss alone.
    """
    return group_relative(count, by_std=False, by_length=False)


def group_relative(count: int, by_std: bool, by_length: bool) -> Sequence[Substitute]:
    """GRPO with or without its two divisions."""

    def advantages(right: Function, rollout: Rollout, cfg: TrainConfig, step: int) -> tuple[Batch, dict[str, float]]:
        scores = rollout.paid_scores().view(-1, count)
        relative = scores - scores.mean(1, keepdim=True)
        if by_std:
            relative = relative / (scores.std(1, keepdim=True) + LEAST_STD)
        return batch_of(rollout, relative.flatten())

    def loss(right: Function, new_logprobs: Tensor, batch: RivalBatch, cfg: TrainConfig, **rest: Any) -> Any:
        assert batch.ref_logprobs is not None
        mask = batch.sequences.response_mask
        weight = 1 / mask.sum(1, keepdim=True) if by_length else 1.0
        weighted = replace(batch, advantages=weight * batch.advantages)
        rest["token_count"] = cfg.minibatch_size
        surrogate, sums = right(new_logprobs=new_logprobs, batch=weighted, cfg=cfg, **rest)
        log_ratio = torch.where(mask, batch.ref_logprobs - new_logprobs, 0).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        k3 = log_ratio.exp() - 1 - log_ratio
        return surrogate + batch.kl_price * (weight * k3).sum() / cfg.minibatch_size, sums

    return [
        repeat_prompts(count),
        Substitute(ppo, "estimate_advantages", advantages),
        Substitute(ppo, "ppo_loss", loss),
    ]


# --- likelihood of chosen responses ---------------------------------------------------------------------------------


@method(responses=None)
def best_of_n(count: int) -> Sequence[Substitute]:
    """Best-of-n distillation: the likelihood of base's responses, the better the more weight (Peters and Schaal 2007).

    L = -1/n sum_i w_i log pi(y_i | x),  w = n softmax(r / beta) over the n responses of base to x

    --kl_coef 0 keeps the best response alone (filtered likelihood, RAFT, Dong et al. 2023). With many responses the
    minimum is ref exp(r / beta) / Z. The loss is experiments.weighted_likelihood's, which has less noise. --ppo_epochs
    is how often each response is read.
    """

    def weights(right: Function, rollout: Rollout, cfg: TrainConfig, step: int) -> tuple[Batch, dict[str, float]]:
        base = taught(rollout)
        scores = base.paid_scores().view(-1, count)
        if rollout.kl_coef:
            shares = (scores / rollout.kl_coef).softmax(1)
        else:
            shares = F.one_hot(scores.argmax(1), count).to(scores)
        return batch_of(base, count * shares.flatten())

    def gradients(
        right: Function, policy: GPT2WithValueHead, minibatch: Batch, cfg: TrainConfig, scaler: GradScaler = NO_SCALER
    ) -> UpdateStats:
        assert minibatch.ref_states is not None
        reference = minibatch.ref_states.model
        loss = weighted_loss(policy, reference, minibatch.sequences, minibatch.advantages[:, 0]) / len(minibatch)
        scaler.scale(loss).backward()
        return stats_of(loss, minibatch)

    return [
        repeat_prompts(count),
        Substitute(ppo, "collect_rollout", rollout_of_base),
        Substitute(ppo, "estimate_advantages", weights),
        Substitute(ppo, "accumulate_gradients", gradients),
    ]


@method(responses=2)
def dpo_online(count: int) -> Sequence[Substitute]:
    """Online DPO (Guo et al. 2024, arXiv 2402.04792): DPO on two responses of the current policy, ranked by score.

    L = -log sigmoid(beta (log pi(y+ | x) / ref(y+ | x) - log pi(y- | x) / ref(y- | x)))

    One gradient step per batch is --ppo_epochs 1 --minibatch_size BATCH_SIZE. Equal scores teach nothing.
    """

    def preferences(right: Function, rollout: Rollout, cfg: TrainConfig, step: int) -> tuple[Batch, dict[str, float]]:
        own = taught(rollout)
        first, second = own.paid_scores().view(-1, 2).unbind(1)
        sign = (first - second).sign()
        return batch_of(own, torch.stack([sign, -sign], 1).flatten())

    def gradients(
        right: Function,
        policy: GPT2WithValueHead,
        minibatch: RivalBatch,
        cfg: TrainConfig,
        scaler: GradScaler = NO_SCALER,
    ) -> UpdateStats:
        assert minibatch.ref_logprobs is not None
        logprobs, _, _ = policy.evaluate_responses(minibatch.sequences, with_entropy=False)
        sign = minibatch.advantages[:, 0].view(-1, 2)  # + and - of a pair, or 0 and 0
        log_ratio = (logprobs - minibatch.ref_logprobs).sum(1).view(-1, 2)
        loss = -F.logsigmoid(minibatch.kl_price * (sign * log_ratio).sum(1)).mean()
        scaler.scale(loss).backward()
        return stats_of(loss, minibatch)

    def pairs_in_random_order(right: Function, n: int, **rest: Any) -> Tensor:
        first = 2 * right(n=n // 2, **rest)
        return torch.stack([first, first + 1], 1).flatten()

    return [
        repeat_prompts(count),
        Substitute(ppo, "estimate_advantages", preferences),
        Substitute(ppo, "accumulate_gradients", gradients),
        Substitute(utils, "permutation", pairs_in_random_order),
    ]


@method(responses=2)
def dpo(count: int) -> Sequence[Substitute]:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) on pairs of base's responses, ranked by score.

    L = -log sigmoid(beta (log pi(y+ | x) / ref(y+ | x) - log pi(y- | x) / ref(y- | x)))

    The pairs of a step are new ones, and --ppo_epochs is how often each is read, so it does not matter that they are
    sampled while training and not before. The paper has beta = 0.1, 64 pairs per gradient step and an lr of 1e-6.
    """
    return [*dpo_online(count), Substitute(ppo, "collect_rollout", rollout_of_base)]


if __name__ == "__main__":
    sys.exit(cli.run(main))
