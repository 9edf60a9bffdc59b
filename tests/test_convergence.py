"""The whole method reaches the right answer on a language small enough to write down (fact 17 of docs/facts.md).

PPO with the reward r and the penalty beta maximises E[r(y)] - beta KL(policy || reference). Over
all responses y the maximum is known: policy(y) = reference(y) exp(r(y) / beta) / Z, and its value
is beta log Z.
"""

import copy
import itertools
from pathlib import Path
from typing import cast

from config import TrainConfig

import pytest
import torch
from conftest import EOS, make_policy, make_rollout, same_weights, weights_of
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data import PromptBatch
from model import GPT2WithValueHead, Sequences, add_own_critic, sample_responses
from ppo import Models, build_optimizer, collect_rollout, ppo_update
from reward import PythonReward, ScoreScale
from utils import uniforms

VOCAB, LONGEST, PROMPT = 5, 3, 2


BETA = 0.4


RESPONSES = [
    y
    for n in range(1, LONGEST + 1)
    for y in itertools.product(range(VOCAB), repeat=n)
    if EOS not in y[:-1] and (n == LONGEST or y[-1] == EOS)
]


MOST_VARIATION, MOST_KL, LEAST_GAIN = 0.02, 0.008, 0.98


@torch.no_grad()
def log_distribution(policy: GPT2WithValueHead) -> Tensor:
    """Log-probability of every response (85,), by the library's own forward pass in float64."""
    lm = copy.deepcopy(policy.lm).double()
    result = []
    for y in RESPONSES:
        logp = torch.log_softmax(lm(input_ids=torch.tensor([[PROMPT, *y]])).logits[0], -1)
        result.append(logp[torch.arange(len(y)), torch.tensor(y)].sum())
    return torch.stack(result)


def variation(p: Tensor, q: Tensor) -> float:
    return (p.exp() - q.exp()).abs().sum().item() / 2


def divergence(p: Tensor, q: Tensor) -> float:
    return (p.exp() * (p - q)).sum().item()


def is_close(p: Tensor, q: Tensor) -> bool:
    return variation(p, q) < MOST_VARIATION and divergence(p, q) < MOST_KL


def train(policy: GPT2WithValueHead, reference: GPT2WithValueHead, rewards: Tensor, cfg: TrainConfig) -> None:
    """The whole of PPO on the language, paid with the rewards (85,) of its responses."""
    number = {y: i for i, y in enumerate(RESPONSES)}
    optimizer = build_optimizer(policy, cfg)
    prompts = torch.full((cfg.batch_size, 1), PROMPT)
    for step in range(1, cfg.total_steps + 1):
        u = uniforms(cfg.seed, step, cfg.batch_size, LONGEST)
        seqs = sample_responses(policy, prompts, prompts > 0, u, eos_id=EOS)
        rows = zip(seqs.responses.tolist(), seqs.response_mask.sum(1).tolist(), strict=True)
        scores = rewards[[number[tuple(row[:n])] for row, n in rows]]
        rollout = make_rollout(policy, reference, seqs, scores, BETA, kl_in_loss=cfg.kl_in_loss)
        ppo_update(policy, optimizer, rollout, cfg, step)


def test_ppo_reaches_the_known_optimum() -> None:
    assert len(RESPONSES) == 85
    policy, reference = make_policy(VOCAB), make_policy(VOCAB)
    frozen = weights_of(reference)
    rewards = torch.rand(85, generator=torch.Generator().manual_seed(1)) * 2 - 1
    start = log_distribution(reference)
    assert start.exp().sum().item() == pytest.approx(1, abs=1e-9)

    def target(beta: float) -> Tensor:
        return torch.log_softmax(start + rewards / beta, 0)

    def objective(p: Tensor) -> float:
        return (p.exp() @ rewards.double()).item() - BETA * divergence(p, start)

    cfg = TrainConfig(
        total_steps=140,
        batch_size=512,
        minibatch_size=512,
        ppo_epochs=4,
        lr=3e-3,
        lr_schedule="linear",
        kl_coef=BETA,
        gae_lambda=1.0,
    )
    train(policy, reference, rewards, cfg)

    learned, best = log_distribution(policy), target(BETA)
    assert learned.exp().sum().item() == pytest.approx(1, abs=1e-9)
    assert variation(learned, best) < MOST_VARIATION
    assert divergence(learned, best) < MOST_KL
    gain = (objective(learned) - objective(start)) / (objective(best) - objective(start))
    assert LEAST_GAIN < gain <= 1 + 1e-9, "nothing is better than the optimum"
    # the tolerance tells right from wrong: neither the start nor the optimum of another beta passes
    assert not is_close(start, best)
    assert not is_close(learned, start)
    for wrong in (BETA * 2, BETA / 2):
        assert not is_close(target(wrong), best)
        assert not is_close(learned, target(wrong))
    # and the optimum has the value that theory says
    log_z = torch.logsumexp(start + rewards / BETA, 0).item()
    assert objective(best) == pytest.approx(BETA * log_z, abs=1e-6)
    assert same_weights(reference, frozen)


@torch.no_grad()
def optimum_with_kl_in_the_loss(reference: GPT2WithValueHead, rewards: Tensor) -> Tensor:
    """Log-probability of every response where each token is reference exp(Q / BETA) / Z, Q the mean reward it leads to.

    Found from the last token backwards. The KL still to be paid is no part of Q, so this is another distribution than
    reference(y) exp(r(y) / BETA) / Z.
    """
    lm, number = copy.deepcopy(reference.lm).double(), {y: i for i, y in enumerate(RESPONSES)}

    def solve(prefix: tuple[int, ...]) -> tuple[Tensor, dict[tuple[int, ...], Tensor]]:
        """The mean reward from a prefix on, and the log-probabilities of the responses that begin with it."""
        if prefix in number:
            return rewards[number[prefix]].double(), {prefix: torch.zeros(()).double()}
        ends = [solve((*prefix, token)) for token in range(VOCAB)]
        q = torch.stack([value for value, _ in ends])
        start = torch.log_softmax(lm(input_ids=torch.tensor([[PROMPT, *prefix]])).logits[0, -1], -1)
        logp = torch.log_softmax(start + q / BETA, -1)
        return logp.exp() @ q, {y: logp[i] + rest for i, (_, found) in enumerate(ends) for y, rest in found.items()}

    found = solve(())[1]
    return torch.stack([found[y] for y in RESPONSES])


def test_kl_in_the_loss_reaches_its_own_optimum() -> None:
    policy, reference = make_policy(VOCAB), make_policy(VOCAB)
    rewards = torch.rand(85, generator=torch.Generator().manual_seed(1)) * 2 - 1
    cfg = TrainConfig(
        total_steps=140,
        batch_size=512,
        minibatch_size=512,
        ppo_epochs=4,
        lr=3e-3,
        kl_coef=BETA,
        gae_lambda=1.0,
        kl_in_loss=True,
    )
    train(policy, reference, rewards, cfg)
    learned, best = log_distribution(policy), optimum_with_kl_in_the_loss(reference, rewards)
    assert variation(learned, best) < 0.03
    assert divergence(learned, best) < MOST_KL
    # neither the start nor the optimum of KL in the rewards is near
    start = log_distribution(reference)
    for wrong in (start, torch.log_softmax(start + rewards / BETA, 0)):
        assert variation(learned, wrong) > 0.1
        assert divergence(learned, wrong) > 5 * MOST_KL


@torch.no_grad()
def true_values(policy: GPT2WithValueHead, rewards: Tensor) -> dict[tuple[int, ...], float]:
    """The mean reward from each prefix on, under a policy: a sum over all responses that begin with it."""
    probability = log_distribution(policy).exp()
    values = {}
    for prefix in {y[:n] for y in RESPONSES for n in range(len(y))}:
        rows = [i for i, y in enumerate(RESPONSES) if y[: len(prefix)] == prefix]
        values[prefix] = float(probability[rows] @ rewards[rows].double() / probability[rows].sum())
    return values


@torch.no_grad()
def learned_values(policy: GPT2WithValueHead) -> dict[tuple[int, ...], float]:
    """What the policy's critic says before each token of each response."""
    values = {}
    for y in RESPONSES:
        tokens = torch.tensor([[PROMPT, *y]])
        real = torch.ones(1, len(y), dtype=torch.bool)
        seqs = Sequences.of(tokens, torch.ones_like(tokens).bool(), real, torch.zeros(1, len(y)))
        by_token = policy.critic.values(policy.critic.response_hidden(seqs))[0].tolist()
        values |= {y[:n]: value for n, value in enumerate(by_token)}
    return values


OWN_CRITIC = {
    "batch_size": 512,
    "minibatch_size": 512,
    "ppo_epochs": 4,
    "lr": 3e-3,
    "kl_coef": BETA,
    "critic": "own",
    "critic_lr": 1e-3,
    "lambda_warmup_steps": 40,
    "warmup_steps": 10,
    "value_coef": 1.0,
}


def test_a_critic_of_its_own_learns_the_true_values() -> None:
    """While the policy stands still, each value becomes the mean reward that follows."""
    policy, reference = make_policy(VOCAB), make_policy(VOCAB)
    add_own_critic(policy, reference)
    rewards = torch.rand(85, generator=torch.Generator().manual_seed(1)) * 2 - 1
    still = {"lr": 0.0, "warmup_steps": 0, "lambda_warmup_steps": 0, "critic_lr": 3e-4, "total_steps": 60}
    train(policy, reference, rewards, TrainConfig(**{**OWN_CRITIC, **still}, gae_lambda=0.5))
    values, exact = learned_values(policy), true_values(reference, rewards)
    assert values.keys() == exact.keys()
    start = log_distribution(reference).exp()
    errors = []
    for prefix in exact:
        reached = float(start[[i for i, y in enumerate(RESPONSES) if y[: len(prefix)] == prefix]].sum())
        errors.append((reached, (values[prefix] - exact[prefix]) ** 2, exact[prefix] ** 2))
    weights, squares, zeros = map(torch.tensor, zip(*errors, strict=True))
    share = float(weights @ squares / (weights @ zeros))
    assert share < 0.03, "of the error of values that are all zero"


@pytest.mark.parametrize("gae_lambda", [1.0, 0.9])
def test_ppo_with_a_critic_of_its_own_reaches_the_known_optimum(gae_lambda: float) -> None:
    policy, reference = make_policy(VOCAB), make_policy(VOCAB)
    add_own_critic(policy, reference)
    rewards = torch.rand(85, generator=torch.Generator().manual_seed(1)) * 2 - 1
    train(policy, reference, rewards, TrainConfig(**OWN_CRITIC, total_steps=140, gae_lambda=gae_lambda))
    start, learned = log_distribution(reference), log_distribution(policy)
    best = torch.log_softmax(start + rewards / BETA, 0)
    assert is_close(learned, best), (variation(learned, best), divergence(learned, best))
    assert not is_close(start, best)


def test_a_python_reward_reaches_the_known_optimum(tmp_path: Path) -> None:
    """A function of the texts in a file, in units of its own, through collect_rollout as in training.

    The optimum is reference(y) exp((r(y) - mean) / (std beta)) / Z, with mean and std as they are for the reference.
    """
    (tmp_path / "my_rewards.py").write_text(
        "def letters(responses, prompts):\n"
        "    assert set(prompts) == {'c'}\n"
        "    return [250 + 30 * r.count('b') - 20 * r.count('d') + 9 * len(r) for r in responses]\n"
    )
    policy, reference = make_policy(VOCAB), make_policy(VOCAB)
    reward = PythonReward(f"{tmp_path / 'my_rewards.py'}:letters")
    letters = "_bcde"  # EOS has no letter
    texts = ["".join(letters[token] for token in y if token != EOS) for y in RESPONSES]
    tokenizer = cast(PreTrainedTokenizerBase, Letters(letters))
    rewards = reward(texts, ["c"] * len(texts)).double()
    start = log_distribution(reference)
    mean = start.exp() @ rewards
    std = (start.exp() @ (rewards - mean) ** 2).sqrt()
    best = torch.log_softmax(start + (rewards - mean) / (BETA * std), 0)

    cfg = TrainConfig(
        total_steps=110,
        batch_size=512,
        minibatch_size=512,
        ppo_epochs=4,
        lr=3e-3,
        kl_coef=BETA,
        max_new_tokens=LONGEST,
        reward_every=0,
        gae_lambda=1.0,
    )
    models = Models(policy, reference, reward, tokenizer, ScoreScale(mean.item(), std.item()))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, eps=1e-5, weight_decay=0.0)
    prompts = torch.full((cfg.batch_size, 1), PROMPT)
    for step in range(1, cfg.total_steps + 1):
        noise = uniforms(cfg.seed, step, cfg.batch_size, LONGEST)
        rollout = collect_rollout(models, PromptBatch(prompts, prompts > 0), noise, cfg, cfg.kl_coef)
        ppo_update(policy, optimizer, rollout, cfg, step)
    learned = log_distribution(policy)
    assert is_close(learned, best), (variation(learned, best), divergence(learned, best))
    assert not is_close(start, best)
    for wrong in (2, 0.5):
        assert not is_close(learned, torch.log_softmax(start + (rewards - mean) / (BETA * wrong * std), 0))


class Letters:
    """A tokenizer whose tokens are letters and whose first token is EOS."""

    eos_token_id = EOS

    def __init__(self, letters: str) -> None:
        self.letters = letters

    def batch_decode(self, rows: list[list[int]], **_: object) -> list[str]:
        return ["".join(self.letters[token] for token in row if token != EOS) for row in rows]
