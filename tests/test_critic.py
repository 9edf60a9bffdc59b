"""A critic of its own: what it sees, what it is fitted to, and that it leaves the policy's gradient as it is."""

import copy
import math
from dataclasses import replace
from typing import Any

from config import TrainConfig, UserError

import pytest
import torch
from conftest import make_policy, make_rollout, real_tokens, same_weights, sample, weights_of
from torch import Tensor

from model import GPT2WithValueHead, add_own_critic, evaluate_both
from ppo import Rollout, accumulate_gradients, build_optimizer, estimate_advantages, lambda_of, ppo_update
from utils import mean_error_of_others

SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "minibatch_size": 8,
    "ppo_epochs": 1,
    "lr": 0.01,
    "lr_schedule": "constant",
    "reward_every": 0,
    "gae_lambda": 0.9,
    "kl_coef": 0.05,
    "max_grad_norm": 1e6,
    "total_steps": 10,
    "critic": "own",
}
SHARED = {"critic": "shared"}


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**SETTINGS, **changes})


def with_own_critic(seed: int = 0) -> GPT2WithValueHead:
    """A policy whose critic has other weights than it, and a head that is not zero."""
    policy = make_policy(seed=seed)
    add_own_critic(policy, make_policy(seed=7).requires_grad_(False))
    with torch.no_grad():
        for weight in policy.critic.value_head.parameters():
            weight.normal_(std=0.3)
    return policy


def rollout_of(policy: GPT2WithValueHead, scores: Tensor | None = None) -> Rollout:
    """A rollout on ragged rows with scores between -1 and 1."""
    seqs = sample(policy)
    if scores is None:
        scores = torch.rand(len(seqs.tokens), generator=torch.Generator().manual_seed(5)) * 2 - 1
    return make_rollout(policy, make_policy(seed=1), seqs, scores, kl_coef=0.05)


def float64_values(critic: GPT2WithValueHead, rollout: Rollout) -> list[Tensor]:
    """The values of each row's response tokens, by the library's forward pass, differentiable."""
    values = []
    for row in range(len(rollout.scores)):
        tokens, start = real_tokens(rollout.sequences, row)
        hidden = critic.lm.transformer(input_ids=tokens[None]).last_hidden_state[0, start - 1 : -1]
        values.append(hidden @ critic.value_head.weight[0] + critic.value_head.bias)
    return values


def test_it_starts_as_the_reference_with_values_of_exactly_zero() -> None:
    policy, reference = make_policy(), make_policy(seed=1).requires_grad_(False)
    add_own_critic(policy, reference)
    assert same_weights(policy.critic.lm, weights_of(reference.lm))
    assert all(weight.requires_grad for weight in policy.critic.parameters())
    assert not any(weight.requires_grad for weight in reference.parameters())
    seqs = sample(policy)
    assert not evaluate_both(policy, reference, seqs).values.any()


def test_values_are_those_of_its_own_network() -> None:
    policy = with_own_critic()
    rollout = rollout_of(policy)
    exact = copy.deepcopy(policy.critic).double()
    for row, values in enumerate(float64_values(exact, rollout)):
        ours = rollout.values[row][rollout.mask[row]]
        assert torch.allclose(ours.double(), values, atol=1e-5)
    assert not rollout.values[~rollout.mask].any()
    policy.own_critic = None
    assert not rollout_of(policy).values.any(), "the policy's own head is zero"


def test_it_sees_only_what_came_before_the_token() -> None:
    policy = with_own_critic()
    seqs = sample(policy)
    before = evaluate_both(policy, policy, seqs).values
    moved = 0.0
    for t in range(seqs.response_mask.shape[1]):
        tokens = seqs.tokens.clone()
        tokens[:, seqs.prompt_len + t] = (tokens[:, seqs.prompt_len + t] + 1) % 20
        after = evaluate_both(policy, policy, replace(seqs, tokens=tokens)).values
        assert torch.allclose(after[:, : t + 1], before[:, : t + 1], atol=1e-6)
        moved = max(moved, float((after - before).abs().max()))
    assert moved > 0.1


def float64_critic_gradient(rollout: Rollout, critic: GPT2WithValueHead, cfg: TrainConfig) -> dict[str, Tensor]:
    """The gradient of value_coef (v - reward still to come)^2 / 2, a mean over tokens, whatever lambda is."""
    exact = copy.deepcopy(critic).double()
    total = torch.zeros(()).double()
    for row, values in enumerate(float64_values(exact, rollout)):
        n = len(values)
        rewards = -cfg.kl_coef * (rollout.logprobs - rollout.ref_logprobs)[row, :n].double()
        rewards[-1] += rollout.scores[row].double()
        reward_to_go = torch.stack([rewards[t:].sum() for t in range(n)])
        total = total + cfg.value_coef * ((values - reward_to_go) ** 2).sum() / 2
    (total / rollout.mask.sum()).backward()
    return {name: weight.grad for name, weight in exact.named_parameters()}


@pytest.mark.parametrize(("micro", "gae_lambda"), [(0, 0.9), (1, 0.9), (3, 0.5), (4, 1.0)])
def test_it_is_fitted_to_the_reward_still_to_come_whatever_lambda_is(micro: int, gae_lambda: float) -> None:
    policy = with_own_critic()
    rollout = rollout_of(policy)
    cfg = settings(micro_batch_size=micro, gae_lambda=gae_lambda)
    batch, _ = estimate_advantages(rollout, cfg, step=1)
    accumulate_gradients(policy, batch, cfg)
    expected = float64_critic_gradient(rollout, policy.critic, cfg)
    for name, weight in policy.critic.named_parameters():
        assert weight.grad is not None, name
        assert torch.allclose(weight.grad.double(), expected[name], atol=1e-5), name
    assert max(float(grad.abs().max()) for grad in expected.values()) > 1e-3


def test_the_policys_gradient_is_that_of_its_advantages_alone() -> None:
    """The same as that of a policy without a critic in its loss."""
    policy = with_own_critic()
    rollout = rollout_of(policy)
    cfg = settings()
    batch, _ = estimate_advantages(rollout, cfg, step=1)
    accumulate_gradients(policy, batch, cfg)
    alone = make_policy()
    accumulate_gradients(alone, batch, settings(value_coef=0.0, **SHARED))
    for (name, ours), (_, theirs) in zip(policy.lm.named_parameters(), alone.lm.named_parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-7), name
    assert all(weight.grad is None for weight in policy.value_head.parameters())


def test_mean_error_of_others_by_hand() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    targets = torch.tensor([[1.0, 1.0, 9.0], [0.0, 0.0, 3.0], [-2.0, 9.0, 9.0]])
    predictions = torch.zeros(3, 3)
    # mean errors of the rows: 1, 1 and -2
    lacks = mean_error_of_others(targets, predictions, mask)
    assert lacks.tolist() == [[-0.5], [-0.5], [1.0]]
    assert mean_error_of_others(targets[:1], predictions[:1], mask[:1]).tolist() == [[0.0]]


def test_no_response_is_judged_by_its_own_score() -> None:
    """With lambda 1 advantage = reward still to come - baseline, so one score moves its own advantages by as much.

    The baselines of all others move, that of its own does not.
    """
    policy = with_own_critic()
    rollout = rollout_of(policy)
    cfg = settings(gae_lambda=1.0)
    raised = replace(rollout, scores=rollout.scores + torch.eye(8)[3])
    own, others = [], []
    for one in (rollout, raised):
        rewards_to_go = one.rewards().flip(1).cumsum(1).flip(1)
        lacks = mean_error_of_others(rewards_to_go, one.values, one.mask)
        own.append(lacks[3])
        others.append(lacks[[0, 1, 2, 4, 5, 6, 7]])
    assert torch.allclose(own[0], own[1], atol=1e-6)
    assert torch.allclose(others[0] + 1 / 7, others[1], atol=1e-5)
    # and estimate_advantages uses it so: before whitening the raised row moves by 1, the others by -1/7
    before, after = (unwhitened_differences(one, cfg) for one in (rollout, raised))
    moved = (after - before)[rollout.mask]
    row = torch.arange(8)[:, None].expand_as(rollout.mask)[rollout.mask]
    assert torch.allclose(moved[row == 3], torch.tensor(1.0), atol=1e-4)
    assert torch.allclose(moved[row != 3], torch.tensor(-1 / 7), atol=1e-4)


def unwhitened_differences(rollout: Rollout, cfg: TrainConfig) -> Tensor:
    """Advantages before whitening, from the whitened ones: their mean and deviation are those of the oracle below."""
    batch, _ = estimate_advantages(rollout, cfg, step=1)
    rewards_to_go = rollout.rewards().flip(1).cumsum(1).flip(1)
    errors = (rewards_to_go - rollout.values).masked_fill(~rollout.mask, 0)
    by_row = errors.sum(1) / rollout.mask.sum(1)
    lacks = torch.stack([by_row[torch.arange(8) != i].mean() for i in range(8)])[:, None]
    raw = (rewards_to_go - rollout.values - lacks)[rollout.mask]
    return batch.advantages * raw.std(unbiased=False) + raw.mean()


def test_a_critic_that_lags_credits_no_token_for_being_the_last() -> None:
    """All scores rise by 1 beyond what it foresees: advantages stay what they were."""
    policy = with_own_critic()
    rollout = rollout_of(policy)
    later = replace(rollout, scores=rollout.scores + 1)
    cfg = settings(gae_lambda=0.5)
    one, other = (estimate_advantages(r, cfg, step=1)[0].advantages for r in (rollout, later))
    assert torch.allclose(one, other, atol=1e-5)
    shared = settings(gae_lambda=0.5, **SHARED)
    one, other = (estimate_advantages(r, shared, step=1)[0].advantages for r in (rollout, later))
    assert not torch.allclose(one, other, atol=0.1)


def test_lambda_falls_from_1_while_the_critic_learns() -> None:
    cfg = settings(lambda_warmup_steps=4, gae_lambda=0.6)
    assert [lambda_of(cfg, step) for step in range(1, 8)] == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.6, 0.6])
    assert lambda_of(settings(gae_lambda=0.6), 1) == 0.6
    policy = with_own_critic()
    rollout = rollout_of(policy)
    for step, gae_lambda in ((1, 1.0), (3, 0.8), (5, 0.6)):
        at_step = estimate_advantages(rollout, cfg, step)[0].advantages
        expected = estimate_advantages(rollout, settings(gae_lambda=gae_lambda), step=1)[0].advantages
        assert torch.allclose(at_step, expected, atol=1e-6)


def test_each_network_has_its_learning_rate_and_its_own_clipping() -> None:
    """A step of AdamW moves a weight with any gradient to speak of by its learning rate."""
    policy = with_own_critic()
    cfg = settings(lr=1e-3, critic_lr=3e-3, max_grad_norm=0.05)
    before, critic_before = weights_of(policy.lm), weights_of(policy.critic)
    row = ppo_update(policy, build_optimizer(policy, cfg), rollout_of(policy), cfg, 1)
    moved = max(float((w.detach() - before[name]).abs().max()) for name, w in policy.lm.named_parameters())
    critic_moved = max(
        float((w.detach() - critic_before[name]).abs().max()) for name, w in policy.critic.named_parameters()
    )
    assert moved == pytest.approx(1e-3, rel=0.05)
    assert critic_moved == pytest.approx(3e-3, rel=0.05)
    for part in (policy.lm, policy.critic):
        norm = math.sqrt(sum(float(w.grad.square().sum()) for w in part.parameters()))
        assert norm == pytest.approx(0.05, rel=1e-3)
    assert row["grad_norm"] > 0.05


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({**SHARED, "critic_lr": 1e-3}, "critic_lr is that of a critic of its own"),
        ({"critic": "both"}, "critic='both' is unknown"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        settings(**changes)
