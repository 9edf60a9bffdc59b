"""PPO against tables, a whole update written out in float64, and an independent library's loss."""

import copy
import dataclasses
import itertools
import math
from dataclasses import replace
from typing import Any

from config import PRESETS, TrainConfig

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import EOS, make_policy, make_rollout, pad_more, real_tokens, run, same_weights, sample, weights_of
from torch import Tensor

import ppo
import utils
from model import GPT2WithValueHead, Sequences, sample_responses
from ppo import Batch, KLController, Rollout, collect_rollout, learning_rate, ppo_loss, ppo_update
from runtime.cli import parse_config
from training.parts import load_parts, resolve
from utils import uniforms

SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "minibatch_size": 8,
    "ppo_epochs": 1,
    "lr": 0.01,
    "lr_schedule": "constant",
    "gae_lambda": 0.95,
    "kl_coef": 0.05,
    "max_grad_norm": 1e6,
    "total_steps": 10,
}


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**{**SETTINGS, **changes})


def sgd(policy: GPT2WithValueHead) -> torch.optim.SGD:
    """Plain gradient descent: the change of the weights is the gradient itself."""
    return torch.optim.SGD(policy.parameters(), lr=123.0)


def hand_sequences(mask: Tensor) -> Sequences:
    """Sequences of which only the response mask matters."""
    rows, width = mask.shape
    tokens = torch.ones(rows, 1 + width, dtype=torch.int64)
    attention = torch.cat([torch.ones(rows, 1).bool(), mask], 1)
    return Sequences.of(tokens, attention, mask, torch.zeros(mask.shape))


def rollout_of(
    policy: GPT2WithValueHead,
    seqs: Sequences | None = None,
    kl_coef: float = 0.05,
    kl_in_loss: bool = False,
    **sampling: float,
) -> Rollout:
    """A rollout on ragged rows with scores between -1 and 1."""
    seqs = sample(policy, **sampling) if seqs is None else seqs
    scores = torch.rand(len(seqs.tokens), generator=torch.Generator().manual_seed(5)) * 2 - 1
    return make_rollout(policy, make_policy(seed=1), seqs, scores, kl_coef, kl_in_loss=kl_in_loss)


def one_token(
    ratio: float = 1.0,
    advantage: float = 0.0,
    value: float = 0.0,
    old_value: float = 0.0,
    target: float = 0.0,
    cfg: TrainConfig | None = None,
) -> tuple[float, float, float, dict[str, Tensor]]:
    """Loss of one token, its gradient in the log-probability and the value, and the statistics."""
    one = torch.ones(1, 1)
    new_logprobs = (one * math.log(ratio) - 1).requires_grad_()
    new_values = (one * value).requires_grad_()
    batch = Batch(hand_sequences(one.bool()), one * -1, one * old_value, one * advantage, one * target)
    loss, stats = ppo_loss(new_logprobs, new_values, one * 0, batch, cfg or settings(value_coef=1.0), 1)
    loss.backward()
    grads = [0.0 if x.grad is None else x.grad.item() for x in (new_logprobs, new_values)]
    return loss.item(), grads[0], grads[1], stats


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad"),
    [
        # clip_range 0.2; loss = max(-A r, -A clip(r)), d loss / d log r = -A r where the first is
        # taken
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # already far enough in the good direction: clipped
        (0.5, 2.0, -1.0, -1.0),  # gone the wrong way: never clipped
        (1.0, -2.0, 2.0, 2.0),
        (0.9, -2.0, 1.8, 1.8),
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_ppo_loss_clips_the_surrogate(ratio: float, advantage: float, loss: float, grad: float) -> None:
    got, got_grad, _, stats = one_token(ratio=ratio, advantage=advantage)
    assert got == pytest.approx(loss, abs=1e-6)
    assert got_grad == (0 if grad == 0 else pytest.approx(grad, abs=1e-6))
    assert stats["policy_loss"].item() == pytest.approx(loss, abs=1e-6)
    assert stats["clip_frac"].item() == float(abs(ratio - 1) > 0.2)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "grad"),
    [
        # value_clip_range 0.2; half the larger of (v - R)^2 and (clip(v) - R)^2, the gradient being
        # v - R
        (0.1, 0.0, 1.0, 0.405, -0.9),
        (0.1, 0.0, 0.0, 0.005, 0.1),
        (0.5, 0.0, 1.0, 0.32, 0.0),  # moved far towards the target: clipped at 0.2
        (-0.5, 0.0, -1.0, 0.32, 0.0),
        (0.5, 0.0, 0.0, 0.125, 0.5),  # moved away from the target: never clipped
        (0.5, 0.0, -1.0, 1.125, 1.5),
        (0.5, 0.0, 0.45, 0.03125, 0.0),  # shot past the target: the clipped one is the larger
        (1.3, 1.0, 3.0, 1.62, 0.0),
    ],
)
def test_ppo_loss_clips_the_value(value: float, old: float, target: float, loss: float, grad: float) -> None:
    got, _, got_grad, stats = one_token(value=value, old_value=old, target=target)
    assert got == pytest.approx(loss, abs=1e-6)
    assert got_grad == (0 if grad == 0 else pytest.approx(grad, abs=1e-6))
    assert stats["value_loss"].item() == pytest.approx(loss, abs=1e-6)


def random_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Batch, Tensor]:
    """Ragged tensors that reach every branch: new log-probs, new values, entropy, batch, mask."""
    torch.manual_seed(seed)
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 7, 2, 9])[:, None]
    old, new = -torch.rand(6, 9), -torch.rand(6, 9)
    old_values, values = torch.randn(6, 9), torch.randn(6, 9)
    batch = Batch(hand_sequences(mask), old, old_values, torch.randn(6, 9), torch.randn(6, 9))
    return new, old_values + 0.4 * values, torch.rand(6, 9), batch, mask


def numpy_loss(
    new: Any, values: Any, entropy: Any, batch: Batch, mask: Any, cfg: TrainConfig, count: int
) -> tuple[float, dict[str, float]]:
    """The same in float64 numpy, from the papers' formulas."""
    new, values, entropy, old, old_values, advantages, returns = (
        x.detach().double().numpy()[mask.numpy()]
        for x in (new, values, entropy, batch.logprobs, batch.values, batch.advantages, batch.returns)
    )
    ratio = np.exp(new - old)
    clipped = np.clip(ratio, 1 - cfg.clip_range, 1 + cfg.clip_range)
    policy_loss = -np.minimum(ratio * advantages, clipped * advantages).sum()
    near = np.clip(values, old_values - cfg.value_clip_range, old_values + cfg.value_clip_range)
    value_loss = np.maximum((values - returns) ** 2, (near - returns) ** 2).sum() / 2
    total = policy_loss + cfg.value_coef * value_loss - cfg.ent_coef * entropy.sum()
    stats = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "approx_kl": (ratio - 1 - np.log(ratio)).sum(),
        "clip_frac": (np.abs(ratio - 1) > cfg.clip_range).sum(),
        "ratio_max": ratio.max(),
    }
    return total / count, stats


@pytest.mark.parametrize(
    "cfg",
    [
        settings(),
        settings(ent_coef=0.3, value_coef=0.7),
        settings(clip_range=0.1, value_clip_range=0.5, value_coef=2.0),
    ],
)
def test_ppo_loss_equals_float64(cfg: TrainConfig) -> None:
    new, values, entropy, batch, mask = random_batch()
    loss, stats = ppo_loss(new, values, entropy, batch, cfg, 77)
    expected, expected_stats = numpy_loss(new, values, entropy, batch, mask, cfg, 77)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    for name, x in expected_stats.items():
        assert stats[name].item() == pytest.approx(x, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("log_ratio", [100.0, 1e4, math.inf, -100.0, -math.inf])
@pytest.mark.parametrize("advantage", [1.5, 0.0, -1.5])
def test_a_ratio_beyond_float32_does_not_lose_its_minibatch(log_ratio: float, advantage: float) -> None:
    """The token counts with a ratio of exp(+-20) and gets no gradient; that of its neighbour is what it would be."""
    mask = torch.ones(1, 2).bool()
    zero, new = torch.zeros(1, 2), torch.tensor([[log_ratio - 1, -1.0]]).requires_grad_()
    batch = Batch(hand_sequences(mask), zero - 1, zero, torch.tensor([[advantage, 2.0]]), zero)
    loss, stats = ppo_loss(new, zero, zero, batch, settings(), 1)
    loss.backward()
    ratio = math.exp(math.copysign(20, log_ratio))
    expected = -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage) - 2.0
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert new.grad is not None
    assert new.grad.tolist() == [[0.0, -2.0]]
    assert all(x.isfinite() for x in stats.values())
    assert stats["ratio_max"].item() == pytest.approx(max(ratio, 1.0), rel=1e-6)


@pytest.mark.parametrize("log_ratio", [19.9, 5.0, -5.0, -19.9])
def test_below_exp_20_a_ratio_counts_as_it_is(log_ratio: float) -> None:
    """For a negative advantage and a large ratio nothing is clipped: d loss / d log r = -A r."""
    loss, grad, _, stats = one_token(ratio=math.exp(log_ratio), advantage=-1.0)
    assert loss == pytest.approx(max(math.exp(log_ratio), 0.8), rel=1e-5)
    assert grad == pytest.approx(math.exp(log_ratio) if log_ratio > 0 else 0.0, rel=1e-5)
    assert stats["approx_kl"].item() == pytest.approx(math.exp(log_ratio) - 1 - log_ratio, rel=1e-5)


def test_ppo_loss_gradient_equals_finite_differences() -> None:
    new, values, entropy, batch, mask = random_batch()
    cfg = settings(ent_coef=0.3, value_coef=0.7)
    inputs = [x.double().requires_grad_() for x in (new, values, entropy)]
    wide = Batch(
        batch.sequences,
        batch.logprobs.double(),
        batch.values.double(),
        batch.advantages.double(),
        batch.returns.double(),
    )
    ppo_loss(*inputs, wide, cfg, 32)[0].backward()
    for which, x in enumerate(inputs):
        for i, j in [(0, 0), (0, 8), (1, 3), (2, 0), (3, 5), (4, 1), (5, 2)]:
            shifted = [y.detach().clone() for y in inputs]
            values_at = []
            for step in (1e-6, -2e-6):
                shifted[which][i, j] += step
                values_at.append(numpy_loss(*shifted, wide, mask, cfg, 32)[0])
            slope = (values_at[0] - values_at[1]) / 2e-6
            assert x.grad is not None
            assert x.grad[i, j].item() == pytest.approx(slope, abs=1e-6)


def test_ppo_loss_ignores_what_is_masked() -> None:
    new, values, entropy, batch, mask = random_batch()
    cfg = settings(ent_coef=0.3)
    loss, stats = ppo_loss(new, values, entropy, batch, cfg, 32)
    junk = [torch.where(mask, x, 9.0) for x in (new, values, entropy)]
    other = Batch(
        batch.sequences,
        *(torch.where(mask, x, -9.0) for x in (batch.logprobs, batch.values)),
        *(torch.where(mask, x, 5.0) for x in (batch.advantages, batch.returns)),
    )
    inputs = [x.requires_grad_() for x in junk]
    junk_loss, junk_stats = ppo_loss(*inputs, other, cfg, 32)
    assert junk_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    for name in stats:
        assert junk_stats[name].item() == pytest.approx(stats[name].item(), rel=1e-6), name
    junk_loss.backward()
    for x in inputs:
        assert x.grad is not None
        assert (x.grad[~mask] == 0).all()


def test_ppo_loss_of_micro_batches_adds_up() -> None:
    new, values, entropy, batch, mask = random_batch()
    cfg = settings(ent_coef=0.1)
    whole, whole_stats = ppo_loss(new, values, entropy, batch, cfg, int(mask.sum()))
    parts = [
        ppo_loss(new[i], values[i], entropy[i], batch.select(i), cfg, int(mask.sum())) for i in torch.arange(6).split(2)
    ]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-5)
    for name in ("policy_loss", "value_loss", "approx_kl", "clip_frac"):
        total = sum(stats[name].item() for _, stats in parts)
        assert total == pytest.approx(whole_stats[name].item(), rel=1e-5)


def test_approx_kl_is_never_negative_and_right_on_average() -> None:
    """Fact 10: over an enumerated 50-token softmax, E[k3] = E[k1] = KL(acting || new), and k3 >=
    0.
    """
    old, new = torch.log_softmax(torch.randn(2, 50).double(), -1)
    cfg = settings()
    k3 = torch.zeros(50).double()
    for token in range(50):
        mask = torch.ones(1, 1).bool()
        zero = torch.zeros(1, 1).double()
        batch = Batch(hand_sequences(mask), old[token].view(1, 1), zero, zero, zero)
        _, stats = ppo_loss(new[token].view(1, 1), zero, zero, batch, cfg, 1)
        k3[token] = stats["approx_kl"]
    kl = (old.exp() * (old - new)).sum().item()
    assert (k3 >= 0).all()
    assert k3.max() > 1
    assert (old.exp() * k3).sum().item() == pytest.approx(kl, rel=1e-6)


def test_ppo_loss_equals_an_independent_library() -> None:
    """torchrl's ClipPPOLoss on the same tensors, values and gradients."""
    pytest.importorskip("torchrl")
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torchrl.modules import ValueOperator
    from torchrl.objectives import ClipPPOLoss

    torch.manual_seed(0)
    n, vocab = 200, 11
    logits, critic = torch.nn.Embedding(n, vocab), torch.nn.Embedding(n, 1)
    rows, actions = torch.arange(n), torch.randint(0, vocab, (n,))
    old = torch.log_softmax(logits.weight.detach() + 0.3 * torch.randn(n, vocab), -1)[rows, actions]
    old_values = critic.weight.detach()[:, 0] + 0.3 * torch.randn(n)
    advantages, returns = torch.randn(n), torch.randn(n)

    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(logits, in_keys=["state"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        ),
    )
    theirs = ClipPPOLoss(
        actor,
        ValueOperator(critic, in_keys=["state"]),
        clip_epsilon=0.2,
        clip_value=0.2,
        entropy_coeff=0.3,
        critic_coeff=0.5 * 0.7,  # theirs is the whole square, ours half of it
        loss_critic_type="l2",
        normalize_advantage=False,
    )
    out = theirs(
        TensorDict(
            {
                "state": rows,
                "action": actions,
                theirs.tensor_keys.sample_log_prob: old,
                "advantage": advantages[:, None],
                "value_target": returns[:, None],
                "state_value": old_values[:, None],
            },
            batch_size=[n],
        )
    )
    expected = out["loss_objective"] + out["loss_critic"] + out["loss_entropy"]
    grads = torch.autograd.grad(expected, [logits.weight, critic.weight])

    logp = torch.log_softmax(logits.weight, -1)
    entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
    batch = Batch(
        hand_sequences(torch.ones(n, 1).bool()), *(x[:, None] for x in (old, old_values, advantages, returns))
    )
    cfg = settings(value_coef=0.7, ent_coef=0.3)
    loss, stats = ppo_loss(logp[rows, actions][:, None], critic.weight, entropy, batch, cfg, n)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert stats["clip_frac"].item() / n == pytest.approx(out["clip_fraction"].item(), abs=1e-6)
    assert 0.1 < out["clip_fraction"] < 0.9
    for ours, theirs_ in zip(torch.autograd.grad(loss, [logits.weight, critic.weight]), grads, strict=True):
        assert torch.allclose(ours, theirs_, atol=1e-6)


def test_make_rollout_puts_the_score_on_the_last_real_token() -> None:
    policy, reference = make_policy(critic=True), make_policy(seed=1)
    seqs = sample(policy, rows=12)
    scores = torch.linspace(-1, 1, 12)
    rollout = make_rollout(policy, reference, seqs, scores, 0.3)
    logprobs, values, _ = policy.evaluate_responses(seqs)
    ref_logprobs, _, _ = reference.evaluate_responses(seqs)
    mask = seqs.response_mask
    assert torch.equal(rollout.mask, mask)
    for row, n in enumerate(mask.sum(1).tolist()):
        kl = (logprobs - ref_logprobs)[row, :n].detach()
        expected = -0.3 * kl
        expected[n - 1] += scores[row]
        assert torch.allclose(rollout.kl[row, :n], kl, atol=2e-5)
        assert torch.allclose(rollout.rewards()[row, :n], expected, atol=2e-5)
        assert torch.allclose(rollout.values[row, :n], values[row, :n], atol=1e-5)
    for x in (rollout.kl, rollout.rewards(), rollout.values, rollout.logprobs, rollout.exact_kl):
        assert (x[~mask] == 0).all()
        assert not x.requires_grad


def test_rollout_metrics_equal_their_definitions() -> None:
    rollout = rollout_of(make_policy())
    metrics, mask = rollout.metrics(), rollout.mask.numpy()
    logprobs, ref, entropy, exact = (
        np.where(mask, x.double().numpy(), 0)
        for x in (rollout.logprobs, rollout.ref_logprobs, rollout.entropy, rollout.exact_kl)
    )
    scores = rollout.scores.double().numpy()
    kl_seq, n = (logprobs - ref).sum(1), mask.sum()
    expected = {
        "score_mean": scores.mean(),
        "positive_rate": (scores > 0).mean(),
        "kl_seq": kl_seq.mean(),
        "kl_seq_exact": exact.sum(1).mean(),
        "kl_token": kl_seq.sum() / n,
        "reward_mean": (scores - 0.05 * kl_seq).mean(),
        "entropy": entropy.sum() / n,
        "response_len": n / len(mask),
    }
    assert len(set(mask.sum(1).tolist())) > 2, "the rows should be ragged"
    for name, x in expected.items():
        assert metrics[name] == pytest.approx(x, rel=1e-5), name


def test_rollout_metrics_are_unmoved_by_padding_and_order() -> None:
    policy = make_policy()
    seqs = sample(policy)
    plain = rollout_of(policy, seqs)
    padded = rollout_of(policy, pad_more(seqs, 9))
    order = torch.tensor([3, 7, 0, 1, 6, 5, 2, 4])
    mixed = make_rollout(policy, make_policy(seed=1), seqs.select(order), plain.scores[order], 0.05)
    for other in (padded, mixed):
        assert other.metrics() == pytest.approx(plain.metrics(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"top_k": 6}, {"top_p": 0.8, "temperature": 1.4}])
def test_ratio_is_1_before_the_first_step(sampling: dict[str, float]) -> None:
    policy = make_policy(critic=True)
    rollout = rollout_of(policy, **sampling)
    new_logprobs, _, _ = policy.evaluate_responses(rollout.sequences)
    ratio = (new_logprobs - rollout.logprobs).exp()[rollout.mask]
    assert (ratio - 1).abs().max() < 1e-5
    sampled = (rollout.sequences.logprobs - rollout.logprobs).exp()[rollout.mask]
    assert (sampled - 1).abs().max() < 2e-5


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 6}])
def test_ppo_update_with_lr_0_changes_nothing(sampling: dict[str, float]) -> None:
    policy = make_policy(critic=True)
    before = weights_of(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0, weight_decay=0.1)
    cfg = settings(lr=0.0, ppo_epochs=3, minibatch_size=2)
    for step in (1, 2):
        row = ppo_update(policy, optimizer, rollout_of(policy, **sampling), cfg, step)
        assert row["ratio_max"] == pytest.approx(1, abs=1e-5)
        assert row["approx_kl"] == pytest.approx(0, abs=1e-7)
        assert row["clip_frac"] == 0
        assert row["updates"] == 12
        assert row["skipped"] == 0
        assert row["lr"] == 0
    assert same_weights(policy, before)


def float64_update(policy: GPT2WithValueHead, rollout: Rollout, cfg: TrainConfig) -> dict[str, Tensor]:
    """ppo_epochs full-batch SGD steps, row by row without padding, in float64. Returns the
    weights.
    """
    model = copy.deepcopy(policy).double()
    reference = copy.deepcopy(rollout.ref_states.model).double() if rollout.ref_states else None
    seqs, rows = rollout.sequences, len(rollout.scores)
    lengths = seqs.response_mask.sum(1).tolist()
    advantages, returns = [], []
    for row, n in enumerate(lengths):
        kl_coef = cfg.kl_coef if rollout.ref_states is None else 0.0
        r = -kl_coef * (rollout.logprobs - rollout.ref_logprobs)[row, :n].double().numpy()
        r[-1] += rollout.scores[row].item()
        v = rollout.values[row, :n].double().numpy()
        delta = r + cfg.gamma * np.append(v[1:], 0) - v
        decay = cfg.gamma * cfg.gae_lambda
        advantages.append(np.array([sum(decay ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]))
        returns.append(advantages[-1] + v)
    flat = np.concatenate(advantages)
    for _ in range(cfg.ppo_epochs):
        total = torch.zeros(()).double()
        for row, n in enumerate(lengths):
            tokens, start = real_tokens(seqs, row)
            hidden = model.lm.transformer(input_ids=tokens[None]).last_hidden_state[0, start - 1 : -1]
            logits = hidden @ model.lm.lm_head.weight.T / seqs.temperature
            if seqs.support is not None:
                logits = logits.masked_fill(~seqs.support[row, :n], -1e30)
            logp = torch.log_softmax(logits, -1)
            new = logp[torch.arange(n), tokens[start:]]
            entropy = -(logp.exp() * logp).sum(-1)
            value = hidden @ model.value_head.weight[0] + model.value_head.bias
            a = torch.from_numpy((advantages[row] - flat.mean()) / flat.std())
            target, old_value = torch.from_numpy(returns[row]), rollout.values[row, :n].double()
            ratio = (new - rollout.logprobs[row, :n].double()).exp()
            surrogate = torch.min(ratio * a, ratio.clamp(1 - cfg.clip_range, 1 + cfg.clip_range) * a)
            near = old_value + (value - old_value).clamp(-cfg.value_clip_range, cfg.value_clip_range)
            value_loss = torch.max((value - target) ** 2, (near - target) ** 2) / 2
            total = total + (-surrogate + cfg.value_coef * value_loss - cfg.ent_coef * entropy).sum()
            if reference is not None:
                ref_hidden = reference.lm.transformer(input_ids=tokens[None]).last_hidden_state[0, start - 1 : -1]
                ref_logits = ref_hidden @ reference.lm.lm_head.weight.T / seqs.temperature
                if seqs.support is not None:
                    ref_logits = ref_logits.masked_fill(~seqs.support[row, :n], -1e30)
                kl = (logp.exp() * (logp - torch.log_softmax(ref_logits, -1))).sum(-1)
                total = total + cfg.kl_coef / flat.std() * kl.sum()
        model.zero_grad()
        (total / sum(lengths)).backward()
        norm = math.sqrt(sum(w.grad.square().sum().item() for w in model.parameters()))
        with torch.no_grad():
            for w in model.parameters():
                w -= cfg.lr * w.grad * min(1.0, cfg.max_grad_norm / norm)
    assert rows == len(lengths)
    return weights_of(model)


@pytest.mark.parametrize("kl_in_loss", [False, True])
@pytest.mark.parametrize(
    ("micro", "few"), [(0, 99), (1, 99), (2, 99), (4, 99), (8, 99), (0, 1), (0, 2), (0, 3), (4, 3)]
)
def test_ppo_update_equals_float64_for_every_micro_batch_size(
    micro: int, few: int, kl_in_loss: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts 6, 8, 9, 11 at once: three epochs of one minibatch, ragged rows, SGD; logits of a few rows at a time."""
    policy = make_policy(critic=True)
    rollout = rollout_of(policy, kl_in_loss=kl_in_loss)
    monkeypatch.setattr(utils, "CHUNK_FLOATS", few * rollout.mask.shape[1] * policy.lm.config.vocab_size)
    assert len(policy.chunk(rollout.sequences)) == -(-8 // few)
    assert len(set(rollout.mask.sum(1).tolist())) > 2
    cfg = settings(ppo_epochs=3, lr=0.05, micro_batch_size=micro, gamma=0.98, reward_every=0, ent_coef=0.02)
    expected, before = float64_update(policy, rollout, cfg), weights_of(policy)
    ppo_update(policy, sgd(policy), rollout, cfg, 1)
    moved = max((w - before[name]).abs().max().item() for name, w in policy.named_parameters())
    assert moved > 0.01
    for name, weight in policy.named_parameters():
        # float32 against float64 after three steps that move weights by about `moved`
        assert (weight - expected[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": 0.05},
        {"gae_lambda": 0.0, "value_coef": 1.0},
        {"gae_lambda": 1.0, "clip_range": 0.01, "value_clip_range": 0.01, "lr": 0.05},
        {"kl_coef": 0.5, "lr": 0.1, "ppo_epochs": 2},
        {"kl_coef": 0.5, "lr": 0.1, "ppo_epochs": 2, "kl_in_loss": True},
        {"kl_coef": 2.0, "ent_coef": 0.0, "kl_in_loss": True},
    ],
)
def test_ppo_update_equals_float64_for_every_setting(changes: dict[str, Any]) -> None:
    policy = make_policy(critic=True, seed=3)
    cfg = settings(**{"ppo_epochs": 3, "lr": 0.02, "ent_coef": 0.01, **changes})
    rollout = rollout_of(policy, kl_coef=cfg.kl_coef, kl_in_loss=cfg.kl_in_loss, temperature=0.8, top_k=9)
    expected = float64_update(policy, rollout, cfg)
    ppo_update(policy, sgd(policy), rollout, cfg, 1)
    for name, weight in policy.named_parameters():
        assert (weight - expected[name]).abs().max() < 2e-5, name


@pytest.mark.parametrize("kl_in_loss", [False, True])
def test_ppo_update_and_its_metrics_are_unmoved_by_padding_and_micro_batches(kl_in_loss: bool) -> None:
    policy = make_policy(critic=True)
    seqs = sample(policy)
    rows, finals = [], []
    for pads, micro in [(0, 0), (13, 0), (0, 1), (5, 2)]:
        model = copy.deepcopy(policy)
        cfg = settings(ppo_epochs=2, minibatch_size=4, micro_batch_size=micro, lr=0.02)
        rollout = rollout_of(model, pad_more(seqs, pads), kl_in_loss=kl_in_loss)
        rows.append(ppo_update(model, sgd(model), rollout, cfg, 1))
        finals.append(weights_of(model))
    assert rows[0]["approx_kl"] > 1e-4
    assert rows[0]["ratio_max"] > 1.05
    assert [row.pop("micro_batch_size") for row in rows] == [4, 4, 1, 2]
    assert all(row.pop("seconds_update") > 0 for row in rows)
    for row, weights in zip(rows[1:], finals[1:], strict=True):
        assert row == pytest.approx(rows[0], rel=1e-3, abs=1e-5)
        for name, weight in weights.items():
            assert (weight - finals[0][name]).abs().max() < 1e-5, name


def test_ppo_update_metrics_are_means_over_all_tokens_of_all_minibatches() -> None:
    """With lr = 0 nothing moves, so that the order (another one in each step) must not matter
    (fact 16).
    """
    policy = make_policy(critic=True)
    rollout = rollout_of(policy)
    cfg = settings(lr=0.0, minibatch_size=2, ppo_epochs=3)
    rows = [ppo_update(policy, sgd(policy), rollout, cfg, step) for step in (1, 2, 3)]
    whole = ppo_update(policy, sgd(policy), rollout, settings(lr=0.0), 1)
    for name in ("policy_loss", "value_loss", "approx_kl", "clip_frac", "explained_var", "ratio_max"):
        for row in rows:
            assert row[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name
    # advantages are whitened over the rollout, so their mean, and with it the loss at ratio 1, is 0
    assert whole["policy_loss"] == pytest.approx(0, abs=1e-6)
    values, returns = rollout.values, []
    for row, n in enumerate(rollout.mask.sum(1).tolist()):
        v, r = values[row, :n].double().numpy(), rollout.rewards()[row, :n].double().numpy()
        delta = r + np.append(v[1:], 0) - v
        gae = [sum(0.95 ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
        returns.append(np.array(gae) + v)
    target, v = np.concatenate(returns), values[rollout.mask].double().numpy()
    assert whole["value_loss"] == pytest.approx(((v - target) ** 2).mean() / 2, rel=1e-4)
    to_go = np.concatenate(
        [
            rollout.rewards()[row, :n].double().numpy()[::-1].cumsum()[::-1]
            for row, n in enumerate(rollout.mask.sum(1).tolist())
        ]
    )
    expected = 1 - (to_go - v).var() / to_go.var()
    assert whole["explained_var"] == pytest.approx(expected, rel=1e-4)
    assert whole["return_std"] == pytest.approx(to_go.std(), rel=1e-4)


def test_ppo_update_reports_the_mean_clip_fraction_and_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unequal minibatches: each token weighs the same, whatever minibatch it is in."""
    policy = make_policy(critic=True)
    rollout = rollout_of(policy)
    seen: list[tuple[Tensor, Tensor]] = []
    original = ppo.ppo_loss

    def spy(new: Tensor, values: Tensor, entropy: Tensor, batch: Batch, *rest: Any) -> Any:
        mask = batch.sequences.response_mask
        seen.append((new.detach()[mask].double(), batch.logprobs[mask].double()))
        return original(new, values, entropy, batch, *rest)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    cfg = settings(ppo_epochs=2, minibatch_size=2, lr=0.05, max_grad_norm=1.0)
    row = ppo_update(policy, sgd(policy), rollout, cfg, 1)
    assert len(seen) == 8
    assert len({len(new) for new, _ in seen}) > 1
    diff = torch.cat([new - old for new, old in seen])
    assert row["clip_frac"] == pytest.approx(((diff.exp() - 1).abs() > 0.2).double().mean().item())
    assert row["clip_frac"] > 0.02
    assert row["approx_kl"] == pytest.approx((diff.exp() - 1 - diff).mean().item(), rel=1e-4)
    assert row["ratio_max"] == pytest.approx(diff.exp().max().item(), rel=1e-5)


def visits(policy: GPT2WithValueHead, rollout: Rollout, cfg: TrainConfig, step: int = 1) -> list[list[int]]:
    """Which rows of the rollout each forward pass of an update saw."""
    seen: list[list[int]] = []
    original = policy.response_hidden
    keys = {tuple(row.tolist()): i for i, row in enumerate(rollout.sequences.tokens)}
    assert len(keys) == len(rollout.scores), "rows must differ"

    def spy(seqs: Sequences) -> Any:
        seen.append([keys[tuple(row.tolist())] for row in seqs.tokens])
        return original(seqs)

    policy.response_hidden = spy  # type: ignore[method-assign]
    ppo_update(policy, sgd(policy), rollout, cfg, step)
    del policy.response_hidden
    return seen


def test_ppo_update_visits_every_response_once_per_epoch_in_fresh_order() -> None:
    policy = make_policy()
    rollout = rollout_of(policy)
    cfg = settings(ppo_epochs=3, minibatch_size=4, micro_batch_size=2, lr=0.0)
    orders = []
    for step in (1, 2):
        seen = visits(policy, rollout, cfg, step)
        assert [len(rows) for rows in seen] == [2] * 12
        flat = [row for rows in seen for row in rows]
        orders += [flat[i : i + 8] for i in (0, 8, 16)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert visits(policy, rollout, cfg, 2)[:4] == seen[:4]  # a function of seed, step and epoch
    other = visits(policy, rollout, dataclasses.replace(cfg, seed=1), 2)
    assert other != seen


def test_advantages_are_whitened_once_over_the_whole_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(critic=True)
    rollout = rollout_of(policy)
    original, seen = ppo.ppo_loss, []

    def spy(new: Tensor, values: Tensor, entropy: Tensor, batch: Batch, *rest: Any) -> Any:
        seen.append(batch.advantages[batch.sequences.response_mask])
        return original(new, values, entropy, batch, *rest)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    ppo_update(policy, sgd(policy), rollout, settings(minibatch_size=2), 1)
    together = torch.cat(seen)
    assert together.mean().item() == pytest.approx(0, abs=1e-6)
    assert together.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert any(abs(part.mean().item()) > 0.1 for part in seen), "not each minibatch on its own"


def test_ppo_update_stops_at_target_kl() -> None:
    def passes(target: float | None) -> int:
        policy = make_policy()
        cfg = settings(ppo_epochs=6, minibatch_size=4, lr=0.05, target_kl=target)
        return len(visits(policy, rollout_of(policy), cfg))

    assert passes(None) == 12
    assert passes(1e6) == 12
    assert 1 <= passes(1e-7) <= 4  # at the first look after weights have moved
    assert passes(1e-7) <= passes(0.02) <= 12


def test_ppo_update_clips_the_gradient() -> None:
    changes = []
    for limit in (1e6, 0.25):
        policy = make_policy(critic=True)
        before = weights_of(policy)
        cfg = settings(lr=0.01, max_grad_norm=limit)
        row = ppo_update(policy, sgd(policy), rollout_of(policy), cfg, 1)
        change = torch.cat([(w - before[n]).flatten() for n, w in policy.named_parameters()])
        changes.append((change.detach() / 0.01, row["grad_norm"]))
    (free, norm), (clipped, norm_again) = changes
    assert norm == norm_again > 0.5, "the norm reported is that before clipping"
    assert free.norm().item() == pytest.approx(norm, rel=1e-3)
    assert clipped.norm().item() == pytest.approx(0.25, rel=1e-3)
    assert torch.cosine_similarity(free, clipped, 0) > 0.9999


def test_ppo_update_survives_huge_rewards() -> None:
    """Advantages are whitened, but the value loss is not: only clipping keeps this step small."""
    policy = make_policy()
    before = weights_of(policy)
    rollout = make_rollout(policy, make_policy(seed=1), sample(policy), torch.full((8,), 1e12), 0.05)
    ppo_update(policy, sgd(policy), rollout, settings(lr=0.01, max_grad_norm=1.0), 1)
    change = torch.cat([(w - before[n]).flatten() for n, w in policy.named_parameters()])
    assert 0 < change.norm() < 0.0101


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_ppo_update_skips_what_is_not_finite(poison: float) -> None:
    policy = make_policy(critic=True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0, weight_decay=0.1)
    ppo_update(policy, optimizer, rollout_of(policy), settings(), 1)
    before, state = weights_of(policy), copy.deepcopy(optimizer.state_dict()["state"])
    seqs = sample(policy)
    scores = torch.zeros(8)
    scores[3] = poison
    rollout = make_rollout(policy, make_policy(seed=1), seqs, scores, 0.05)
    row = ppo_update(policy, optimizer, rollout, settings(ppo_epochs=2, minibatch_size=4), 2)
    # whitening spreads it over the whole rollout
    assert row["skipped"] == 4
    assert row["updates"] == 0
    assert same_weights(policy, before)
    for index, moments in optimizer.state_dict()["state"].items():
        for name, x in moments.items():
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(state[index][name]))
    row = ppo_update(policy, optimizer, rollout_of(policy), settings(), 3)  # and learning goes on
    assert row["skipped"] == 0
    assert not same_weights(policy, before)
    assert all(w.isfinite().all() for w in policy.parameters())


def test_ppo_update_skips_only_the_minibatch_whose_logits_are_not_finite() -> None:
    """One long row alone reaches a position whose embedding is NaN."""
    policy = make_policy()
    mask = torch.ones(8, 10).bool()
    mask[1:, :7] = False
    ids = torch.randint(1, 20, (8, 10), generator=torch.Generator().manual_seed(0))
    u = torch.rand(8, 4, dtype=torch.float64) * 0.5 + 0.49
    rollout = rollout_of(policy, sample_responses(policy, ids, mask, u, eos_id=EOS))
    assert rollout.mask[0].all()
    with torch.no_grad():
        policy.lm.transformer.wpe.weight[11, 0] = math.nan
    before = weights_of(policy)
    row = ppo_update(policy, sgd(policy), rollout, settings(minibatch_size=2, ppo_epochs=2), 1)
    assert row["skipped"] == 2
    assert row["updates"] == 6
    for name, weight in policy.named_parameters():
        assert weight.isnan().sum() == (1 if name.endswith("wpe.weight") else 0), name
    assert (policy.lm.transformer.ln_f.bias - before["lm.transformer.ln_f.bias"]).abs().max() > 0
    # statistics are those of the other three minibatches
    assert all(math.isfinite(row[name]) for name in ("policy_loss", "value_loss", "approx_kl"))


def test_ppo_update_makes_a_good_response_likelier() -> None:
    policy = make_policy()
    seqs = sample(policy)
    scores = torch.full((8,), -1.0)
    scores[2] = 1.0
    rollout = make_rollout(policy, make_policy(), seqs, scores, 0.0)
    ppo_update(policy, sgd(policy), rollout, settings(ppo_epochs=2, lr=0.01), 1)
    gain = policy.evaluate_responses(seqs)[0].masked_fill(~rollout.mask, 0) - rollout.logprobs
    assert gain[2].sum() > 0.05
    assert gain[2].sum() == gain.sum(1).max()


def test_ppo_update_never_moves_the_reference() -> None:
    policy, reference = make_policy(), make_policy(seed=1)
    before = weights_of(reference)
    optimizer = sgd(policy)
    for step in (1, 2):
        rollout = make_rollout(policy, reference, sample(policy, seed=step), torch.rand(8), 0.1)
        ppo_update(policy, optimizer, rollout, settings(), step)
    assert same_weights(reference, before)
    assert all(weight.grad is None for weight in reference.parameters())


def test_ppo_update_teaches_the_critic() -> None:
    policy = make_policy()
    optimizer = torch.optim.Adam(policy.value_head.parameters(), lr=1.0)
    # the reward of a row is known from its first prompt token, so that returns can be predicted
    seqs = sample(policy, rows=8)
    rollout = make_rollout(policy, make_policy(), seqs, torch.tensor([-1.0, 1.0] * 4), 0.0)
    cfg = settings(lr=0.1, ppo_epochs=40, value_clip_range=10.0, value_coef=1.0)
    first = ppo_update(policy, optimizer, rollout, cfg, 1)["explained_var"]
    after = make_rollout(policy, make_policy(), seqs, rollout.scores, 0.0)
    second = ppo_update(policy, optimizer, after, cfg, 2)["explained_var"]
    assert first == pytest.approx(0, abs=1e-6)  # the critic started at zero
    assert second > 0.5


def test_learning_rate_falls_in_a_straight_line() -> None:
    cfg = settings(total_steps=10, lr=1.0, lr_schedule="linear")
    rates = [learning_rate(cfg, step) for step in range(1, 11)]
    assert rates == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_learning_rate_warms_up(schedule: str) -> None:
    cfg = settings(total_steps=12, warmup_steps=4, lr=2.0, lr_schedule=schedule)
    rates = [learning_rate(cfg, step) for step in range(1, 13)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert max(rates) == 2.0
    assert min(rates) > 0
    falls = [a - b for a, b in itertools.pairwise(rates[4:])]
    assert falls == pytest.approx([0.0 if schedule == "constant" else 0.25] * 7)


def test_ppo_update_sets_the_scheduled_learning_rate() -> None:
    policy = make_policy()
    optimizer = sgd(policy)
    cfg = settings(total_steps=10, lr=0.01, lr_schedule="linear")
    assert ppo_update(policy, optimizer, rollout_of(policy), cfg, 6)["lr"] == pytest.approx(0.005)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


def test_kl_controller_follows_its_closed_form() -> None:
    controller = KLController(0.1, target=5.0)
    expected = 0.1
    for kl in (5.0, 5.5, 4.9, 100.0, 0.0, -3.0, 6.0):
        controller.update(kl)
        expected *= 1 + 0.1 * min(max(kl / 5.0 - 1, -0.2), 0.2)
        assert controller.coef == pytest.approx(expected)
    controller = KLController(1.0, target=5.0)
    controller.update(1e9)
    assert controller.coef == pytest.approx(1.02)
    controller = KLController(1.0, target=5.0)
    controller.update(0.0)
    assert controller.coef == pytest.approx(0.98)


def test_the_trl_preset_steers_beta_as_trl_does() -> None:
    """TRL: beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * n_steps / horizon, with n_steps 128 and horizon 10,000."""
    cfg = PRESETS[TrainConfig]["trl"]
    controller, expected = KLController(cfg.kl_coef, cfg.adaptive_kl_target, cfg.adaptive_kl_gain), 0.2
    for kl in (0.0, 3.0, 6.3, 20.0):
        controller.update(kl)
        expected *= 1 + min(max((kl - 6) / 6, -0.2), 0.2) * 128 / 10_000
        assert controller.coef == pytest.approx(expected, rel=1e-12)


def test_kl_controller_without_target_stays() -> None:
    controller = KLController(0.1)
    controller.update(100.0)
    assert controller.coef == 0.1


def test_kl_controller_survives_a_kl_that_is_not_a_number() -> None:
    controller = KLController(0.1, target=5.0)
    controller.update(math.nan)
    assert math.isfinite(controller.coef)


def test_cat_of_rollouts_is_the_rollout_of_all_prompts() -> None:
    """Also where the longest response is only in one of them."""
    policy = make_policy()
    seqs = sample(policy)
    scores = torch.linspace(-1, 1, len(seqs.tokens))
    whole = make_rollout(policy, make_policy(seed=1), seqs, scores, 0.1, kl_in_loss=True)
    by_length = seqs.response_mask.sum(1).argsort()
    parts = []
    for rows in (by_length[:3], by_length[3:]):
        some = seqs.select(rows)
        width, prompts = int(some.response_mask.sum(1).max()), some.prompt_len
        short = replace(
            some,
            tokens=some.tokens[:, : prompts + width],
            attention_mask=some.attention_mask[:, : prompts + width],
            response_mask=some.response_mask[:, :width],
            logprobs=some.logprobs[:, :width],
        )
        parts.append(make_rollout(policy, make_policy(seed=1), short, scores[rows], 0.1, kl_in_loss=True))
    assert parts[0].mask.shape[1] < parts[1].mask.shape[1]
    joined = Rollout.cat(parts)
    assert joined.metrics() == pytest.approx(whole.metrics(), abs=1e-5)
    assert joined.ref_states is not None
    assert whole.ref_states is not None
    found, expected = joined.ref_states.hidden, whole.ref_states.hidden[by_length]
    torch.testing.assert_close(found[joined.mask], expected[joined.mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kl_in_loss", [False, True])
def test_kl_is_paid_in_the_rewards_or_in_the_loss(kl_in_loss: bool, flags: dict[str, str]) -> None:
    """As the setting says, and never in both."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    cfg = resolve(parse_config(TrainConfig, [*words, f"--kl_in_loss={kl_in_loss}", "--max_new_tokens=10"]))
    parts = load_parts(cfg)
    with torch.no_grad():
        for weight in parts.models.policy.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    rollout = collect_rollout(parts.models, parts.prompts.batch(1), uniforms(0, 1, 8, 10), cfg, 0.1)
    kl, last = rollout.logprobs - rollout.ref_logprobs, rollout.mask.sum(1) - 1
    expected = torch.where(rollout.mask, -0.1 * kl * (not kl_in_loss), 0)
    expected[torch.arange(len(last)), last] += rollout.scores
    assert kl.abs().max() > 0.1
    torch.testing.assert_close(rollout.rewards(), expected)
    if kl_in_loss:
        assert rollout.ref_states is not None
        torch.testing.assert_close(
            rollout.ref_states.hidden, parts.models.reference.response_hidden(rollout.sequences).detach()
        )
    else:
        assert rollout.ref_states is None


def test_partial_scores_are_part_of_the_baseline() -> None:
    """GAE sees plain rewards, and values plus expected scores, whichever process brought a row."""
    policy, reference = make_policy(critic=True), make_policy(seed=1)
    seqs = sample(policy, rows=12)
    scores = torch.linspace(-1, 1, 12)
    partial = torch.full(seqs.response_mask.shape, math.nan)
    partial[:, 0] = scores / 2
    rollout = make_rollout(policy, reference, seqs, scores, 0.1, partial)
    expected = utils.expected_scores(scores, partial, seqs.response_mask)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(rollout.expected_scores(), expected)
    halves = [
        make_rollout(policy, reference, seqs.select(rows), scores[rows], 0.1, partial[rows])
        for rows in torch.arange(12).split(6)
    ]
    torch.testing.assert_close(Rollout.cat(halves).expected_scores(), expected, atol=1e-5, rtol=1e-4)
    seen: list[tuple[Tensor, ...]] = []
    targets: list[Tensor] = []
    cfg = settings(lr=0.0, ppo_epochs=1, minibatch_size=12, batch_size=12)
    with pytest.MonkeyPatch.context() as patch:
        gae, loss = ppo.compute_gae, ppo.ppo_loss
        patch.setattr(ppo, "compute_gae", lambda *xs, **named: seen.append(xs[:2]) or gae(*xs, **named))
        patch.setattr(ppo, "ppo_loss", lambda *xs: targets.append(xs[3].returns) or loss(*xs))
        row = ppo_update(policy, torch.optim.SGD(policy.parameters(), lr=0.0), rollout, cfg, 1)
    baseline = expected + rollout.values
    plain = make_rollout(policy, reference, seqs, scores, 0.1).rewards()
    torch.testing.assert_close(seen[0], (plain, baseline))
    # the value head learns what is left
    _, returns = gae(plain, baseline, rollout.mask, cfg.gamma, cfg.gae_lambda)
    order = utils.permutation(cfg.seed, 1, 0, 12)
    torch.testing.assert_close(targets[0], (returns - expected)[order])
    # and how good both are together is told on the rewards that really came
    to_go = torch.where(rollout.mask, plain, 0).flip(1).cumsum(1).flip(1)
    assert row["explained_var"] == pytest.approx(utils.explained_variance(to_go, baseline, rollout.mask), abs=1e-4)


def test_partial_scores_are_those_of_the_unfinished_responses(flags: dict[str, str]) -> None:
    """Against one call of the reward per prefix; the step itself pays the same sum."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    cfg = resolve(parse_config(TrainConfig, [*words, "--reward_every=3", "--max_new_tokens=10"]))
    parts = load_parts(cfg)
    models = parts.models
    seqs = models.respond(models.policy, parts.prompts.batch(1), uniforms(0, 1, 8, 10), cfg)
    partial = models.partial_scores(seqs, {}, cfg)
    assert partial.shape == seqs.response_mask.shape
    for row, mask, found in zip(seqs.responses, seqs.response_mask, partial, strict=True):
        tokens = row[mask].tolist()
        for t in range(len(tokens)):
            if (t + 1) % 3 or t + 1 == len(tokens):
                assert found[t].isnan()
            else:
                text = models.tokenizer.decode(tokens[: t + 1])
                assert float(found[t]) == pytest.approx(float(models.reward([text], [])), abs=1e-5), (t, text)
    for every in (0, 99):
        assert models.partial_scores(seqs, {}, replace(cfg, reward_every=every)).isnan().all()
    rollout = collect_rollout(models, parts.prompts.batch(1), uniforms(0, 1, 8, 10), cfg, 0.1)
    assert torch.equal(rollout.sequences.tokens, seqs.tokens)
    assert torch.equal(rollout.partial_scores.nan_to_num(7), partial.nan_to_num(7))
    metrics = pd.read_csv(run(flags, "--reward_every", "3") / "metrics.csv")
    expected = metrics.score_mean - metrics.kl_coef * metrics.kl_seq
    assert metrics.reward_mean.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
