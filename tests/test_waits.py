"""What the host waits for, counted on a device that is not there, and that the results are those of the CPU."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from config import TrainConfig

import pytest
import torch
from conftest import EOS, forked, make_policy, ragged_prompts, sample, weights_of
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data import PromptBatch
from experiments import pretend
from experiments.pretend import OnDevice, Watch, moved
from model import Decoding, GPT2WithValueHead, Sampler, UnfinishedResponses, sample_responses
from ppo import Models, Rollout, build_optimizer, collect_rollout, ppo_update
from reward import SentimentReward
from utils import uniforms

CFG = TrainConfig(
    batch_size=8, minibatch_size=2, ppo_epochs=1, max_new_tokens=10, reward_every=2, lr=1e-3, total_steps=9, rm_name="x"
)


def on_device(policy: GPT2WithValueHead) -> GPT2WithValueHead:
    copied = moved(copy.deepcopy(policy))
    assert isinstance(copied, GPT2WithValueHead)
    return copied


def held(x: Tensor) -> Tensor:
    return x.held if isinstance(x, OnDevice) else x


def collect(
    policy: GPT2WithValueHead,
    classifier_dir: Path,
    tokenizer: PreTrainedTokenizerFast,
    on: bool,
    cfg: TrainConfig = CFG,
) -> tuple[Rollout, Watch]:
    """A whole rollout with its scores after every second token, on the device or not."""
    reference = make_policy(len(tokenizer), seed=1).requires_grad_(False)
    reward = SentimentReward(str(classifier_dir))
    if on:
        reference = on_device(reference)
        reward.model = moved(reward.model)
    models = Models(policy, reference, reward, tokenizer)
    with Watch() as watch:
        prompts = PromptBatch(*ragged_prompts(8, 16, len(tokenizer), 1))
        rollout = collect_rollout(models, prompts, uniforms(0, 1, 8, 10), cfg, 0.1)
    return rollout, watch


@torch.no_grad()
def a_sampling_step_waits_for_nothing(_: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = on_device(make_policy())
    with Watch():
        responses = UnfinishedResponses(policy, 6, torch.Size((8, 10)), Decoding(EOS, 0.8, 9, 0.9))
    for seed in (0, 1):
        with Watch() as watch:
            responses.begin(*ragged_prompts(8, 6, 20, seed), uniforms(seed, 1, 8, 10))
            for _ in range(9):
                responses.step()
            responses.clear()
        assert watch.operations > 500
        assert watch.count == 0, watch.waits


def sampling_reads_lengths_once_and_whether_rows_are_alive_every_few_tokens(
    _: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    policy = make_policy(critic=True)
    there = on_device(policy)
    prompts = ragged_prompts(8, 16)
    sampler = Sampler()
    kept = []
    for seed in (0, 1):  # the second rollout uses the first one's sampler
        expected = sample_responses(policy, *prompts, uniforms(seed, 1, 8, 20), eos_id=EOS, sampler=sampler)
        with Watch() as watch:
            found = sample_responses(there, *prompts, uniforms(seed, 1, 8, 20), eos_id=EOS, sampler=sampler)
        assert watch.waits == {"_local_scalar_dense": 2, "copy to the host": 1}
        assert torch.equal(held(found.tokens), expected.tokens)
        assert torch.equal(held(found.response_mask), expected.response_mask)
        assert torch.equal(found.lengths, expected.lengths)
        kept.append(sampler.kept[there])
        assert policy not in sampler.kept
        with torch.no_grad():
            for name, weight in there.named_parameters():
                noise = 0.02 * torch.randn(weight.shape)
                weight.held.add_(noise)
                policy.get_parameter(name).add_(noise)
    assert kept[0] is kept[1]


def scoring_copies_to_the_host_once(classifier_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(len(tokenizer), critic=True)
    expected, _ = collect(policy, classifier_dir, tokenizer, on=False)
    sampling = Watch()
    there = on_device(policy)
    with sampling:
        sample_responses(there, *ragged_prompts(8, 16, len(tokenizer), 1), uniforms(0, 1, 8, 10), eos_id=EOS)
    found, watch = collect(there, classifier_dir, tokenizer, on=True)
    assert watch.waits["copy to the host"] - sampling.waits["copy to the host"] == 1
    assert watch.waits["copy from the host"] == 0
    for name in ("logprobs", "ref_logprobs", "values", "exact_kl", "entropy", "scores"):
        assert torch.allclose(held(getattr(found, name)), getattr(expected, name), atol=1e-4), name
    partial = held(found.partial_scores)
    assert partial.isfinite().any()
    assert torch.allclose(partial, expected.partial_scores, atol=1e-4, equal_nan=True)


def an_update_waits_once_per_minibatch(classifier_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    policy, waits = make_policy(len(tokenizer), critic=True), {}
    for size, kl_in_loss in ((2, False), (4, False), (2, True)):
        cfg = replace(CFG, minibatch_size=size, kl_in_loss=kl_in_loss)
        twin, there = copy.deepcopy(policy), on_device(policy)
        here, _ = collect(twin, classifier_dir, tokenizer, on=False, cfg=cfg)
        rollout, _ = collect(there, classifier_dir, tokenizer, on=True, cfg=cfg)
        expected = ppo_update(twin, build_optimizer(twin, cfg), here, cfg, 1)
        with Watch() as watch:
            row = ppo_update(there, build_optimizer(there, cfg), rollout, cfg, 1)
        waits[size, kl_in_loss] = watch.count
        for name in expected:
            if name != "seconds_update":
                assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
        weights = weights_of(there)
        for name, weight in twin.named_parameters():
            assert (held(weights[name]) - weight).abs().max() < 1e-4, name
    assert (waits[2, False] - waits[4, False]) / 2 <= 1, waits  # 4 minibatches against 2
    assert waits[2, False] < 25
    assert waits[2, True] == waits[2, False]


def what_waits_is_counted_and_what_does_not_is_not(_: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The device's own test: each kind of wait, and mixing it with the host."""
    with Watch() as watch:
        x = torch.arange(6.0).to(torch.device(pretend.NAME, 0), non_blocking=True)
        y = x[torch.arange(3).to(x.device, non_blocking=True)] + 1
        torch.where(y > 1, y, 0).sum().isfinite()
        assert watch.count == 0
        for wait in (
            lambda: x.cpu(),
            lambda: float(x.sum()),
            lambda: bool((x > 2).any()),
            lambda: x[x > 2],
            lambda: x.nonzero(),
            lambda: x.unique(),
            lambda: torch.zeros(6).to(x.device),
            lambda: x.copy_(torch.zeros(6)),
            lambda: x[torch.arange(3)],
            lambda: x.tolist(),
        ):
            before = watch.count
            wait()
            assert watch.count > before
        with pytest.raises(AssertionError, match="mixes"):
            x + torch.ones(6)
    assert torch.equal(sample(make_policy()).tokens, sample(make_policy()).tokens)


CHECKS = [
    a_sampling_step_waits_for_nothing,
    sampling_reads_lengths_once_and_whether_rows_are_alive_every_few_tokens,
    scoring_copies_to_the_host_once,
    an_update_waits_once_per_minibatch,
    what_waits_is_counted_and_what_does_not_is_not,
]


def check_on_device(check: Callable[..., None], classifier_dir: Path, gpt2_dir: Path) -> None:
    torch.manual_seed(0)
    pretend.register()
    with pretend.attention_by_formula():
        check(classifier_dir, PreTrainedTokenizerFast.from_pretrained(gpt2_dir))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_waits(check: Callable[..., None], classifier_dir: Path, gpt2_dir: Path, tmp_path: Path) -> None:
    """Each in a process of its own, because torch must know the device before anything is differentiated."""
    if not pretend.is_possible():
        pytest.skip("this torch has no backends written in Python")
    said = tmp_path / "said.txt"
    child = forked(partial(check_on_device, check, classifier_dir, gpt2_dir), said)
    child.join(100)
    assert child.exitcode == 0, said.read_text()
