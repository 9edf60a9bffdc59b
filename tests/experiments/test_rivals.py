"""The rivals of PPO: gradients against the papers' formulas in float64, optima by enumeration, and whole runs."""

import copy
import itertools
import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import EOS, make_policy, make_rollout, real_tokens, sample
from test_convergence import BETA, LONGEST, PROMPT, RESPONSES, VOCAB, divergence, is_close, log_distribution, variation
from torch import Tensor

import ppo
import train
from data import PromptStream
from experiments.planting import Substitute, planted
from experiments.rivals import METHODS, OfflineRollout, RepeatedPrompts, find_method, taught, train_by
from model import GPT2WithValueHead, Sequences, sample_responses
from ppo import Rollout, build_optimizer, ppo_update
from runtime.cli import parse_config

ROWS, GROUP, PRICE, CLIP = 8, 4, 0.3, 0.2
RIVALS = [name for name, method in METHODS.items() if method.is_rival]


def planted_update(name: str, count: int) -> list[Substitute]:
    """What a method replaces in the update; where its responses come from is left to the test."""
    outside = ("load_parts", "collect_rollout")
    return [substitute for substitute in METHODS[name].plant(count) if substitute.replaces not in outside]


# --- the gradients --------------------------------------------------------------------------------------------------


class Float64:
    """Policy or reference in float64, by the library's own forward pass, one response at a time."""

    def __init__(self, policy: GPT2WithValueHead, seqs: Sequences) -> None:
        self.lm = copy.deepcopy(policy.lm).double()
        self.seqs = seqs

    def distributions(self, row: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities (T, V) of all tokens at each place of a response, and the response (T,)."""
        tokens, start = real_tokens(self.seqs, row)
        logits = self.lm(input_ids=tokens[None]).logits[0, start - 1 : -1]
        return torch.log_softmax(logits, -1), tokens[start:]

    def logprobs(self, row: int) -> Tensor:
        """Log-probabilities (T,) of a response's tokens."""
        everything, tokens = self.distributions(row)
        return everything[torch.arange(len(tokens)), tokens]


def surrogate(new: Tensor, acting: Tensor, advantage: float) -> Tensor:
    """PPO's clipped objective at each token; its gradient is advantage * grad log pi where nothing has moved yet."""
    ratio = (new - acting).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)


def others(values: list[float], group: int, i: int) -> list[float]:
    """The other values in the group of i."""
    first = i // group * group
    return [values[j] for j in range(first, first + group) if j != i]


def loss_of_paper(name: str, new: Float64, acting: Float64, ref: Float64, scores: list[float], group: int) -> Tensor:
    """The loss that a method minimises, written down anew."""
    with torch.no_grad():
        old = [acting.logprobs(i) for i in range(ROWS)]
        reference = [ref.logprobs(i) for i in range(ROWS)]
    now = [new.logprobs(i) for i in range(ROWS)]
    if name in ("reinforce", "rloo"):
        paid = [scores[i] - PRICE * (old[i] - reference[i]).sum().item() for i in range(ROWS)]
        size = ROWS if name == "reinforce" else group
        total = torch.zeros(()).double()
        for i in range(ROWS):
            rest = others(paid, size, i)
            total = total + surrogate(now[i], old[i], paid[i] - sum(rest) / len(rest)).sum()
        return -total / ROWS
    if name in ("grpo", "dr_grpo"):
        total = torch.zeros(()).double()
        for i in range(ROWS):
            own = torch.tensor([scores[i], *others(scores, group, i)]).double()
            advantage = (own[0] - own.mean()).item()
            length = 1
            if name == "grpo":
                advantage /= own.std().item() + 1e-4
                length = len(now[i])
            k3 = (reference[i] - now[i]).exp() - (reference[i] - now[i]) - 1
            total = total + (surrogate(now[i], old[i], advantage) - PRICE * k3).sum() / length
        return -total / ROWS
    if name == "best_of_n":
        total = torch.zeros(()).double()
        for i in range(ROWS):
            all_of_group = [scores[i], *others(scores, group, i)]
            weight = group * math.exp(scores[i] / PRICE) / sum(math.exp(s / PRICE) for s in all_of_group)
            p, q = new.distributions(i)[0], ref.distributions(i)[0].detach()
            total = total + (weight - 1) * now[i].sum() - (q.exp() * (q - p)).sum()
        return -total / ROWS
    losses = []
    for i in range(0, ROWS, 2):
        better, worse = (i, i + 1) if scores[i] > scores[i + 1] else (i + 1, i)
        margin = (now[better] - reference[better]).sum() - (now[worse] - reference[worse]).sum()
        losses.append(torch.log1p(torch.exp(-PRICE * margin)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("moved", [False, True], ids=["first step", "later steps"])
@pytest.mark.parametrize("name", RIVALS)
def test_the_gradient_is_that_of_the_papers_formula(name: str, moved: bool) -> None:
    policy, reference = make_policy(), make_policy(seed=1)
    seqs = sample(policy, ROWS)
    assert len(set(seqs.response_mask.sum(1).tolist())) > 3, "lengths differ"
    scores = torch.rand(ROWS, generator=torch.Generator().manual_seed(5)) * 2 - 1
    group = METHODS[name].responses or GROUP
    cfg = TrainConfig(batch_size=ROWS, minibatch_size=ROWS, clip_range=CLIP, micro_batch_size=0)
    rollout = make_rollout(policy, reference, seqs, scores, PRICE)
    if name in ("best_of_n", "dpo"):
        base = make_rollout(policy, reference, seqs, scores, PRICE, kl_in_loss=True)
        rollout = OfflineRollout(**vars(replace(rollout, scores=-scores)) | {"base": base})
    acting = Float64(policy, seqs)
    if moved:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(7)
            for weight in policy.lm.parameters():
                weight.add_(0.01 * torch.randn(weight.shape, generator=generator))
    new = Float64(policy, seqs)
    if moved and name in ("rloo", "grpo"):
        ratio = torch.cat([(new.logprobs(i) - acting.logprobs(i)).exp() for i in range(ROWS)])
        assert ((ratio - 1).abs() > CLIP).any(), "some are clipped"
        assert ((ratio - 1).abs() < CLIP).any()

    with planted(*planted_update(name, group)):
        batch, _ = ppo.estimate_advantages(rollout, cfg, step=1)
        policy.zero_grad()
        stats = ppo.accumulate_gradients(policy, batch, cfg)
    loss_of_paper(name, new, acting, Float64(reference, seqs), scores.double().tolist(), group).backward()

    assert stats.is_finite()
    assert policy.value_head.weight.grad is None or not policy.value_head.weight.grad.any()
    for (weight_name, weight), exact in zip(policy.lm.named_parameters(), new.lm.parameters(), strict=True):
        assert weight.grad is not None
        scale = exact.grad.abs().max().item()
        torch.testing.assert_close(weight.grad.double(), exact.grad, atol=2e-4 * scale, rtol=1e-3, msg=weight_name)


@pytest.mark.parametrize("name", ["reinforce", "rloo", "grpo", "dr_grpo"])
def test_micro_batches_change_no_gradient(name: str) -> None:
    policy, reference = make_policy(), make_policy(seed=1)
    rollout = make_rollout(policy, reference, sample(policy, ROWS), torch.linspace(-1, 1, ROWS), PRICE)
    gradients = []
    for size in (0, 1, 3):
        cfg = TrainConfig(batch_size=ROWS, minibatch_size=ROWS, micro_batch_size=size)
        with planted(*planted_update(name, GROUP)):
            batch, _ = ppo.estimate_advantages(rollout, cfg, step=1)
            policy.zero_grad()
            ppo.accumulate_gradients(policy, batch, cfg)
        gradients.append(torch.cat([weight.grad.flatten() for weight in policy.lm.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], atol=1e-5, rtol=1e-4)


def test_pairs_stay_together_in_every_minibatch() -> None:
    with planted(*METHODS["dpo"].plant(2)):
        order = ppo.permutation(0, 1, 0, 16)
    assert sorted(order.tolist()) == list(range(16))
    assert order.tolist() != list(range(16))
    assert (order[1::2] == order[::2] + 1).all()
    assert (order[::2] % 2 == 0).all()


def test_a_tie_and_a_group_of_equals_teach_nothing() -> None:
    policy, reference = make_policy(), make_policy()
    rollout = make_rollout(policy, reference, sample(policy, ROWS), torch.full((ROWS,), 0.5), PRICE)
    cfg = TrainConfig(batch_size=ROWS, minibatch_size=ROWS)
    for name in ("grpo", "dr_grpo", "rloo", "reinforce", "dpo_online"):
        with planted(*planted_update(name, METHODS[name].responses or GROUP)):
            batch, _ = ppo.estimate_advantages(rollout, cfg, step=1)
        assert not batch.advantages.any(), name


# --- the optima -----------------------------------------------------------------------------------------------------


def language() -> tuple[GPT2WithValueHead, GPT2WithValueHead, Tensor, Tensor]:
    """Policy, reference, its log-probabilities (85,) and the rewards (85,) of test_convergence.py."""
    policy, reference = make_policy(VOCAB), make_policy(VOCAB)
    rewards = torch.rand(85, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return policy, reference, log_distribution(reference), rewards


def settings(**changes: Any) -> TrainConfig:
    known = {"total_steps": 90, "batch_size": 256, "minibatch_size": 256, "ppo_epochs": 3, "lr": 2e-3, "kl_coef": BETA}
    return TrainConfig(**{**known, **changes}, warmup_steps=5, gae_lambda=1.0)


def learn(
    name: str, count: int, cfg: TrainConfig, offline: bool = False, bradley_terry: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Train by a method on the language; returns the reference (85,), the rewards (85,) and what was learnt (85,).

    offline: the reference responds, not the policy. bradley_terry: the better one of a pair is drawn, with probability
    sigmoid(difference of the rewards). The random numbers of a step are Sobol's, spread evenly, so that few steps are
    enough. A point is a group of responses, unless they are many.
    """
    policy, reference, start, rewards = language()
    number = {y: i for i, y in enumerate(RESPONSES)}
    optimizer = build_optimizer(policy, cfg)
    prompts = torch.full((cfg.batch_size, 1), PROMPT)
    size = count if 1 < count < 16 else 1
    for step in range(1, cfg.total_steps + 1):
        points = torch.quasirandom.SobolEngine(size * LONGEST + 1, scramble=True, seed=step).draw(
            cfg.batch_size // size
        )
        noise = points[:, 1:].reshape(cfg.batch_size, LONGEST).double()
        seqs = sample_responses(reference if offline else policy, prompts, prompts > 0, noise, eos_id=EOS)
        rows = zip(seqs.responses.tolist(), seqs.response_mask.sum(1).tolist(), strict=True)
        scores = rewards[[number[tuple(row[:n])] for row, n in rows]]
        if bradley_terry:
            first, second = scores.view(-1, 2).unbind(1)
            wins = points[:, 0] < torch.sigmoid(first - second)
            scores = torch.stack([wins, ~wins], 1).flatten().float()
        rollout = make_rollout(policy, reference, seqs, scores, BETA, kl_in_loss=name == "best_of_n")
        with planted(*planted_update(name, count)):
            ppo_update(policy, optimizer, rollout, cfg, step)
    return start, rewards, log_distribution(policy)


def optimum(start: Tensor, rewards: Tensor, beta: float = BETA) -> Tensor:
    """Log-probabilities of ref exp(r / beta) / Z."""
    return torch.log_softmax(start + rewards.double() / beta, 0)


@pytest.mark.parametrize(("name", "count"), [("reinforce", 1), ("rloo", 4)])
def test_a_policy_gradient_reaches_the_optimum_of_ppo(name: str, count: int) -> None:
    start, rewards, learned = learn(name, count, settings())
    best = optimum(start, rewards)
    assert is_close(learned, best), (variation(learned, best), divergence(learned, best))
    assert not is_close(start, best)
    for wrong in (2 * BETA, BETA / 2):
        assert not is_close(learned, optimum(start, rewards, wrong))


class Tabular:
    """Policies of the language as a table: logits (prefixes, V), and the responses' paths through it."""

    def __init__(self) -> None:
        prefixes = sorted({y[:n] for y in RESPONSES for n in range(len(y))}, key=lambda y: (len(y), y))
        number = {prefix: i for i, prefix in enumerate(prefixes)}
        self.prefixes = prefixes
        self.mask = torch.tensor([[n < len(y) for n in range(LONGEST)] for y in RESPONSES])
        self.state = torch.tensor([[number[y[:n]] if n < len(y) else 0 for n in range(LONGEST)] for y in RESPONSES])
        self.token = torch.tensor([[y[n] if n < len(y) else 0 for n in range(LONGEST)] for y in RESPONSES])

    def logprobs(self, logits: Tensor) -> Tensor:
        """Log-probabilities (85, LONGEST) of the responses' tokens, 0 behind their ends."""
        found = torch.log_softmax(logits, -1)[self.state, self.token]
        return torch.where(self.mask, found, 0)

    def logits_of(self, log_distribution: Tensor) -> Tensor:
        """The table of a distribution over responses, from the mass behind every prefix."""
        mass = log_distribution.exp()
        rows = []
        for prefix in self.prefixes:
            branches = [(*prefix, token) for token in range(VOCAB)]
            rows.append([sum(p for p, y in zip(mass, RESPONSES, strict=True) if y[: len(b)] == b) for b in branches])
        return torch.tensor(rows).log()


@cache
def optimum_of_grpo(by_std: bool, by_length: bool) -> Tensor:
    """Where the mean of GRPO's gradient is 0, over all responses by their probabilities, with a group without end."""
    _, _, start, rewards = language()
    table = Tabular()
    reference = table.logprobs(table.logits_of(start))
    logits = table.logits_of(start).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    lengths = table.mask.sum(1, keepdim=True) if by_length else 1
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 1500)
        new = table.logprobs(logits)
        chance = new.sum(1).exp().detach()
        advantage = rewards.double() - chance @ rewards.double()
        if by_std:
            advantage = advantage / (chance @ advantage**2).sqrt()
        k3 = torch.where(table.mask, (reference - new).exp() - 1 - (reference - new), 0)
        objective = (advantage[:, None] * (new - new.detach()).exp() - BETA * k3) / lengths
        loss = -(chance[:, None] * torch.where(table.mask, objective, 0)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-5
    return table.logprobs(logits).sum(1).detach()


@pytest.mark.parametrize(("name", "divided"), [("grpo", True), ("dr_grpo", False)])
def test_grpo_reaches_its_own_optimum(name: str, divided: bool) -> None:
    """k3 in the loss pulls towards the reference by KL(ref || pi), so it is another optimum than PPO's."""
    start, rewards, learned = learn(name, 256, settings())
    best = optimum_of_grpo(by_std=divided, by_length=divided)
    assert variation(learned, best) < 0.07
    assert divergence(learned, best) < 0.03
    of_the_other = optimum_of_grpo(by_std=not divided, by_length=not divided)
    for wrong in (start, optimum(start, rewards), of_the_other):
        assert divergence(learned, wrong) > 0.09


@torch.no_grad()
def test_dr_grpo_has_an_optimum_in_closed_form() -> None:
    """Token by token ref / (1 - A / beta), A the advantage of the token: found from the last token backwards."""
    _, _, start, rewards = language()
    number = {y: i for i, y in enumerate(RESPONSES)}
    table = Tabular()
    ref_rows = dict(zip(table.prefixes, torch.softmax(table.logits_of(start), -1), strict=True))

    def solve(prefix: tuple[int, ...]) -> tuple[Tensor, dict[tuple[int, ...], Tensor]]:
        if prefix in number:
            return rewards[number[prefix]].double(), {prefix: torch.zeros(()).double()}
        ends = [solve((*prefix, token)) for token in range(VOCAB)]
        q = torch.stack([value for value, _ in ends])
        low, high = q.max(), q.max() + BETA  # of V + beta, at which the probabilities sum to 1
        for _ in range(100):
            middle = (low + high) / 2
            too_much = (BETA * ref_rows[prefix] / (middle - q)).sum() > 1
            low, high = (middle, high) if too_much else (low, middle)
        p = ref_rows[prefix] / (1 - (q - (high - BETA)) / BETA)
        return p @ q, {y: p[i].log() + rest for i, (_, found) in enumerate(ends) for y, rest in found.items()}

    found = solve(())[1]
    with torch.enable_grad():
        best = optimum_of_grpo(by_std=False, by_length=False)
    torch.testing.assert_close(torch.stack([found[y] for y in RESPONSES]), best, atol=1e-3, rtol=0)


def test_best_of_n_reaches_the_optimum_of_ppo() -> None:
    start, rewards, learned = learn("best_of_n", 256, settings(total_steps=60), offline=True)
    best = optimum(start, rewards)
    assert variation(learned, best) < 0.04
    assert divergence(learned, best) < 0.02
    assert divergence(start, best) > 0.3, "else this would not tell"


def loss_of_ranked_pairs(p: Tensor, start: Tensor, rewards: Tensor) -> float:
    """DPO's loss over all pairs of responses of the reference, ranked by their rewards."""
    log_ratio = p - start
    sign = (rewards[:, None] - rewards).sign()
    losses = -F.logsigmoid(BETA * sign * (log_ratio[:, None] - log_ratio))
    return float(start.exp() @ losses @ start.exp())


def test_dpo_on_ranked_pairs_has_no_finite_optimum() -> None:
    """The better of a pair always wins, so the loss falls without end towards the best response, whatever beta is."""
    start, rewards, learned = learn("dpo", 2, settings(total_steps=40), offline=True)
    losses = [loss_of_ranked_pairs(optimum(start, rewards, beta), start, rewards) for beta in (1, 0.3, 0.1, 0.03, 0.01)]
    assert losses == sorted(losses, reverse=True)
    of_ppo = optimum(start, rewards)
    assert loss_of_ranked_pairs(learned, start, rewards) < loss_of_ranked_pairs(of_ppo, start, rewards)
    assert divergence(learned, start) > 5 * divergence(of_ppo, start)
    assert learned.exp() @ rewards.double() > of_ppo.exp() @ rewards.double()


def test_online_dpo_on_ranked_pairs_ends_with_one_response() -> None:
    """Pairs of one response teach nothing, so a policy that has found one stays with it."""
    start, rewards, learned = learn("dpo_online", 2, settings(total_steps=40))
    assert learned.exp().max() > 0.99
    assert divergence(learned, start) > 2 * divergence(optimum(start, rewards), start)


@pytest.mark.parametrize("name", ["dpo", "dpo_online"])
def test_dpo_on_drawn_preferences_reaches_the_optimum_of_ppo(name: str) -> None:
    """Where the better response wins with probability sigmoid(r+ - r-), as the paper assumes."""
    cfg = settings(batch_size=512, minibatch_size=512, ppo_epochs=2, lr=1e-3)
    start, rewards, learned = learn(name, 2, cfg, offline=name == "dpo", bradley_terry=True)
    best = optimum(start, rewards)
    assert divergence(learned, best) < 0.07
    for wrong in (start, optimum(start, rewards, BETA / 4)):
        assert divergence(learned, wrong) > 0.14


# --- whole runs -----------------------------------------------------------------------------------------------------


def words(flags: dict[str, str]) -> list[str]:
    return list(itertools.chain.from_iterable((f"--{name}", value) for name, value in flags.items()))


@pytest.mark.parametrize("name", METHODS)
def test_a_run_has_the_form_of_every_run(name: str, flags: dict[str, str], no_pictures: None) -> None:
    train_by(find_method(name), [*words(flags), "--total_steps", "2", "--eval_every", "2"])
    folder = Path(flags["ckpt_dir"])
    metrics = pd.read_csv(folder / "metrics.csv")
    assert metrics.episodes.tolist() == [8, 16]
    assert metrics[["score_mean", "kl_seq_exact", "grad_norm", "seconds_update"]].notna().all(axis=None)
    assert metrics.kl_seq.iloc[0] == pytest.approx(0, abs=1e-3), "the policy's own responses are reported"
    assert (metrics.grad_norm > 0).all()
    assert metrics.updates.tolist() == [4, 4]
    record = json.loads((folder / "config.json").read_text())
    assert record["method"] == name
    assert record["responses_per_prompt"] == (METHODS[name].responses or 4)
    assert (folder / "policy_lm" / "model.safetensors").is_file()
    card = (folder / "policy_lm" / "README.md").read_text()
    assert ("fine-tuned by proximal policy optimisation" in card) == name.startswith("ppo")
    assert ("- ppo\n" in card) == name.startswith("ppo"), "its tag"
    evaluations = pd.read_csv(folder / "eval.csv")
    assert evaluations.kl_seq_exact.iloc[0] == pytest.approx(0, abs=1e-4)
    assert evaluations.kl_seq_exact.iloc[1] > 1e-4, "the policy responds to held-out prompts, and has moved"


def test_a_step_has_each_prompt_as_often_as_it_has_responses() -> None:
    stream = PromptStream([[i] for i in range(1, 30)], 8, seed=0)
    batch = RepeatedPrompts(stream, 4).batch(3)
    assert batch.ids.shape == (8, 1)
    first, second = batch.ids[:4].unique().tolist(), batch.ids[4:].unique().tolist()
    assert len(first) == len(second) == 1
    assert first != second
    assert RepeatedPrompts(stream, 4).indices(1)[::4] + RepeatedPrompts(stream, 4).indices(2)[::4] == [
        *PromptStream([[i] for i in range(1, 30)], 4, seed=0).indices(1)
    ], "as many prompts as a step without repetition would need are used up"


def test_offline_methods_learn_from_responses_of_base(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, no_pictures: None
) -> None:
    """After the first step policy and base differ: what is learnt from is base's, what is reported the policy's."""
    seen: list[Rollout] = []

    def watch(right: Any, rollout: Rollout, **rest: Any) -> Any:
        seen.append(rollout)
        return right(rollout=rollout, **rest)

    reported: list[Rollout] = []

    def watch_metrics(right: Any, self: Rollout) -> Any:
        reported.append(self)
        return right(self)

    watchers = Substitute(ppo, "ppo_update", watch), Substitute(Rollout, "metrics", watch_metrics)
    with planted(*watchers):
        train_by(find_method("dpo"), [*words(flags), "--total_steps", "3", "--lr", "0.01", "--eval_every", "3"])
    assert {type(rollout) for rollout in seen} == {OfflineRollout}
    assert {type(rollout) for rollout in reported} == {Rollout, OfflineRollout}, "base responds in training alone"
    last = seen[-1]
    base = taught(last)
    assert base is not last
    sampler_said, reference_says = base.sequences.logprobs, base.ref_logprobs
    torch.testing.assert_close(sampler_said, reference_says, atol=1e-3, rtol=1e-3)
    assert (last.logprobs - last.sequences.logprobs).abs().max() < 1e-3
    assert (last.logprobs - last.ref_logprobs).abs().max() > 0.05


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("rloo", ["--responses", "3"], "responses=3 must be 2 or more and divide batch_size=8"),
        ("reinforce", ["--responses", "4"], "responses: reinforce has 1"),
        ("rloo", ["--responses", "four"], "responses='four' is not understood"),
        ("dpo", ["--minibatch_size", "1"], "splits a pair"),
        ("grpo", ["--kl_in_loss", "true"], "kl_in_loss is PPO's"),
        ("reinforce", ["--batch_size", "1", "--minibatch_size", "1"], "batch_size=1 has nothing"),
    ],
)
def test_wrong_settings_are_one_line(name: str, more: list[str], message: str, flags: dict[str, str]) -> None:
    with pytest.raises(UserError, match=message):
        train_by(find_method(name), [*words(flags), *more])


def test_a_run_is_resumed_by_its_own_method_only(flags: dict[str, str], no_pictures: None) -> None:
    few = [*words(flags), "--total_steps", "1", "--eval_every", "0"]
    train_by(find_method("rloo"), few)
    train_by(find_method("rloo"), [*few, "--resume"])  # it has ended
    with pytest.raises(UserError, match="is no run of grpo"):
        train_by(find_method("grpo"), [*few, "--resume"])
    with pytest.raises(UserError, match="is no run of rloo with 2 per prompt"):
        train_by(find_method("rloo"), [*few, "--responses", "2", "--resume"])
    with pytest.raises(UserError, match=r"started by experiments.rivals as rloo: .* -m experiments\.rivals rloo"):
        train.main(parse_config(TrainConfig, [*few[:-3], "2", *few[-2:], "--resume"]))


def test_rivals_run_in_one_process(flags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="grpo runs in one process"):
        train_by(find_method("grpo"), words(flags))


def test_an_unknown_method_names_the_choices() -> None:
    with pytest.raises(UserError, match="method='trpo' is unknown: choose ppo_at_end, "):
        find_method("trpo")


def test_each_method_is_short_and_has_its_equation() -> None:
    import inspect

    for method in METHODS.values():
        doc = inspect.getdoc(method.plant)
        assert doc is not None
        assert len(inspect.getsource(method.plant).splitlines()) <= 60
        if method.name not in ("ppo_own_critic",):
            assert " = " in doc, method.name
