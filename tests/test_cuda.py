"""The facts that could differ on a GPU: skipped where there is none."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from config import TrainConfig

import pandas as pd
import pytest
import torch
from conftest import (
    TIMINGS,
    make_policy,
    make_rollout,
    pad_more,
    ragged_prompts,
    real_tokens,
    run,
    same_weights,
    weights_of,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import utils
from data import PromptBatch
from model import Decoding, GPT2WithValueHead, Sampler, Sequences, UnfinishedResponses, evaluate_both, sample_responses
from ppo import Models, Rollout, build_optimizer, collect_rollout, ppo_update
from reward import SentimentReward
from runtime.recording import Recorded
from training.memory import fit_micro_batches
from utils import map_tensors, uniforms

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.3,
    torch.float16: 0.05,
}  # nats per token, on random weights made large on purpose
EVERY_DTYPE = pytest.mark.parametrize("dtype", list(TOLERANCE))


def sampled(dtype: torch.dtype) -> tuple[GPT2WithValueHead, GPT2WithValueHead, Sequences]:
    policy, reference = make_policy(60).cuda(), make_policy(60).cuda()
    policy.dtype = reference.dtype = dtype
    return policy, reference, sample_responses(policy, *ragged_prompts(8, 6, 60), uniforms(0, 1, 8, 10), eos_id=0)


def on_cpu(seqs: Sequences) -> Sequences:
    return map_tensors(lambda x: x.cpu(), seqs)


def on_gpu(seqs: Sequences) -> Sequences:
    return Sequences.of(*(x.cuda() for x in (seqs.tokens, seqs.attention_mask, seqs.response_mask, seqs.logprobs)))


@contextmanager
def waits() -> Iterator[list[warnings.WarningMessage]]:
    """What makes the host wait for the GPU, as torch itself notices it."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found[:] = [w for w in found if "synchroniz" in str(w.message)]


# --- sampling and evaluating ----------------------------------------------------------------------------------------


@EVERY_DTYPE
def test_cuda_sampler_and_scorer_agree_and_padding_changes_nothing(dtype: torch.dtype) -> None:
    policy, reference, seqs = sampled(dtype)
    logprobs = evaluate_both(policy, reference, seqs)[0]
    assert (logprobs - seqs.logprobs).abs().max() < TOLERANCE[dtype]
    padded = on_gpu(pad_more(on_cpu(seqs), 5))
    assert (evaluate_both(policy, reference, padded)[0] - logprobs).abs().max() < TOLERANCE[dtype]


def test_cuda_agrees_with_the_cpu() -> None:
    policy, reference, seqs = sampled(torch.float32)
    logprobs, here = evaluate_both(policy, reference, seqs)[0].cpu(), on_cpu(seqs)
    policy.cpu()
    for row in range(len(logprobs)):
        tokens, prompt = real_tokens(here, row)
        logits = policy.lm(input_ids=tokens[None]).logits[0].log_softmax(-1)
        expected = logits[prompt - 1 : -1].gather(1, tokens[prompt:, None]).squeeze(1)
        assert torch.allclose(logprobs[row, : len(expected)], expected, atol=1e-3)


def test_cuda_samples_the_tokens_of_the_cpu_in_every_rollout() -> None:
    """Also after an update, when the recorded step reads new weights at the old place."""
    policy = make_policy(60)
    there = copy.deepcopy(policy).cuda()
    sampler = Sampler()
    for seed in range(3):
        prompts, noise = ragged_prompts(8, 6, 60, seed), uniforms(seed, 1, 8, 24)
        expected = sample_responses(policy, *prompts, noise, eos_id=0)
        found = on_cpu(sample_responses(there, *prompts, noise, eos_id=0, sampler=sampler))
        assert torch.equal(found.responses, expected.responses)
        assert torch.equal(found.response_mask, expected.response_mask)
        assert torch.equal(found.lengths, expected.lengths)
        assert torch.allclose(found.logprobs, expected.logprobs, atol=1e-3)
        with torch.no_grad():
            for weight, same in zip(policy.parameters(), there.parameters(), strict=True):
                weight += 0.02 * torch.randn_like(weight)
                same.copy_(weight)
    assert there in sampler.kept


@EVERY_DTYPE
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}], ids=str)
def test_cuda_replayed_steps_equal_steps_taken_one_by_one(
    dtype: torch.dtype, sampling: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(60).cuda()
    policy.dtype = dtype

    def draw(seed: int, sampler: Sampler) -> Sequences:
        prompts = ragged_prompts(8, 6, 60)
        return sample_responses(policy, *prompts, uniforms(seed, 1, 8, 40), eos_id=0, sampler=sampler, **sampling)

    sampler = Sampler()
    replayed = [draw(0, sampler), draw(1, sampler)]
    monkeypatch.setattr(Recorded, "record", lambda self: self.function)
    sampler = Sampler()
    for seed in (0, 1):
        one_by_one = draw(seed, sampler)
        for name in ("tokens", "response_mask", "logprobs"):
            assert torch.equal(getattr(replayed[seed], name), getattr(one_by_one, name)), name


@EVERY_DTYPE
def test_cuda_chunks_of_gpt2s_vocabulary_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """50,257 columns, which are not a multiple of anything; logits must not be rounded to bfloat16 on their way."""
    policy, reference = (make_policy(50257, seed, initializer_range=0.05).cuda() for seed in (0, 1))
    policy.dtype = reference.dtype = dtype
    seqs = sample_responses(policy, *ragged_prompts(8, 6, 50257), uniforms(0, 1, 8, 10), eos_id=0)
    whole, whole_grads = evaluate_both(policy, reference, seqs), gradients(policy, seqs)
    monkeypatch.setattr(utils, "GPU_CHUNK_FLOATS", 3 * 10 * 50257)
    assert len(policy.chunk(seqs)) == 3
    for a, b in zip(whole, evaluate_both(policy, reference, seqs), strict=True):
        assert (a - b).abs().max() < 1e-4
    for a, b in zip(whole_grads, gradients(policy, seqs), strict=True):
        assert (a - b).norm() <= 1e-2 * a.norm()
    assert (policy.evaluate_responses(seqs)[0] - whole[0]).abs().max() < 1e-4
    wide, narrow = torch.randn(64, 32).cuda(), torch.randn(300, 32).cuda()
    found = utils.padded_logits(wide.bfloat16(), narrow.bfloat16())[:, :300]
    assert (found - wide.bfloat16().float() @ narrow.bfloat16().float().T).abs().max() < 1e-3


def gradients(policy: GPT2WithValueHead, seqs: Sequences) -> list[Tensor]:
    policy.zero_grad()
    policy.evaluate_responses(seqs)[0].sum().backward()
    return [weight.grad.clone() for weight in policy.lm.parameters()]


# --- scores, updates, whole runs ------------------------------------------------------------------------------------

CFG = TrainConfig(
    batch_size=8, minibatch_size=4, ppo_epochs=2, max_new_tokens=10, reward_every=2, lr=1e-3, rm_name="classifier"
)


def collected(
    policy: GPT2WithValueHead, classifier: Path, tokenizer: PreTrainedTokenizerFast, device: str, cfg: TrainConfig = CFG
) -> Rollout:
    reference = make_policy(len(tokenizer), seed=1).to(device).requires_grad_(False)
    models = Models(policy, reference, SentimentReward(str(classifier), device=device), tokenizer)
    return collect_rollout(models, PromptBatch(*ragged_prompts(8, 16, len(tokenizer))), uniforms(0, 1, 8, 10), cfg, 0.1)


@pytest.mark.parametrize("kl_in_loss", [False, True])
def test_cuda_scores_rewards_and_updates_are_those_of_the_cpu(
    kl_in_loss: bool, classifier_dir: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    cfg = replace(CFG, kl_in_loss=kl_in_loss)
    policy = make_policy(len(tokenizer), critic=True)
    there = copy.deepcopy(policy).cuda()
    expected = collected(policy, classifier_dir, tokenizer, "cpu", cfg)
    found = collected(there, classifier_dir, tokenizer, "cuda", cfg)
    for name in ("scores", "partial_scores", "logprobs", "ref_logprobs", "values"):
        assert torch.allclose(getattr(found, name).cpu(), getattr(expected, name), atol=1e-3, equal_nan=True), name
    assert torch.allclose(found.rewards().cpu(), expected.rewards(), atol=2e-3)
    assert found.metrics() == pytest.approx(expected.metrics(), rel=1e-2, abs=1e-3)
    here, gpu = (ppo_update(p, build_optimizer(p, cfg), r, cfg, 1) for p, r in ((policy, expected), (there, found)))
    for name in ("policy_loss", "value_loss", "approx_kl", "grad_norm", "ratio_max"):
        assert gpu[name] == pytest.approx(here[name], rel=2e-2, abs=2e-3), name


@EVERY_DTYPE
def test_cuda_ratio_starts_at_1_and_an_update_moves_only_the_policy(dtype: torch.dtype) -> None:
    policy, reference, seqs = sampled(dtype)
    rollout = make_rollout(policy, reference, seqs, torch.randn(8, device="cuda"), 0.1)
    still = TrainConfig(batch_size=8, minibatch_size=8, ppo_epochs=1, lr=0.0)
    stats = ppo_update(policy, build_optimizer(policy, still), rollout, still, 1)
    assert stats["ratio_max"] == pytest.approx(1, abs=1e-2)
    frozen, before = weights_of(reference), weights_of(policy)
    moving = TrainConfig(batch_size=8, minibatch_size=4, ppo_epochs=2, lr=1e-3)
    ppo_update(policy, build_optimizer(policy, moving), rollout, moving, 1)
    assert same_weights(reference, frozen)
    assert not same_weights(policy, before)


def test_cuda_finds_the_micro_batch_that_memory_suffices_for(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference, _ = sampled(torch.float32)
    models = Models(policy, reference, None, None)  # type: ignore[arg-type]
    cfg = TrainConfig(batch_size=8, minibatch_size=8, min_prompt_len=1, max_prompt_len=6, max_new_tokens=10)
    original = GPT2WithValueHead.response_hidden

    def cramped(self: GPT2WithValueHead, some: Sequences) -> Tensor:
        if len(some.tokens) > 2:
            torch.empty(2**50, device="cuda")  # a petabyte
        return original(self, some)

    assert fit_micro_batches(models, cfg) == cfg
    monkeypatch.setattr(GPT2WithValueHead, "response_hidden", cramped)
    assert fit_micro_batches(models, cfg).micro_batch_size == 2


def test_cuda_training_and_resuming(flags: dict[str, str], tmp_path: Path, no_pictures: None) -> None:
    """train.main whole; a run that was resumed has the columns of one that was not, up to the order of sums."""
    flags = {**flags, "device": "cuda", "eval_every": "2", "eval_prompts": "4", "reward_every": "2"}
    table = pd.read_csv(run(flags, "--dtype", "bfloat16") / "metrics.csv")
    assert len(table) == 3
    assert (table.ratio_max > 0).all()
    assert (table.skipped == 0).all()
    whole = pd.read_csv(run({**flags, "ckpt_dir": str(tmp_path / "whole")}) / "metrics.csv")
    short = {**flags, "ckpt_dir": str(tmp_path / "parts")}
    run({**short, "total_steps": "2", "lr_schedule": "constant"})
    parts = pd.read_csv(run({**short, "lr_schedule": "constant"}, "--resume", "--allow_changes") / "metrics.csv")
    columns = ["score_mean", "kl_seq", "entropy", "response_len"]
    assert list(parts.columns) == list(whole.columns)
    assert parts[columns].iloc[0].to_dict() == pytest.approx(whole[columns].iloc[0].to_dict(), rel=1e-2, abs=1e-2)
    assert set(TIMINGS) < set(parts.columns)


# --- waits ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_cuda_sampling_steps_wait_for_nothing() -> None:
    policy = make_policy(60).cuda()
    responses = UnfinishedResponses(policy, 16, torch.Size((8, 10)), Decoding(0, 0.8, 9, 0.9))
    responses.begin(*ragged_prompts(8, 16, 60), uniforms(0, 1, 8, 10))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            responses.step()
        responses.clear()
        responses.begin(*ragged_prompts(8, 16, 60), uniforms(0, 1, 8, 10))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_minibatches_wait_once(classifier_dir: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = make_policy(len(tokenizer), critic=True).cuda()
    rollout, counts = collected(policy, classifier_dir, tokenizer, "cuda"), {}
    for size in (8, 2, 4):  # the first one warms up
        cfg = TrainConfig(batch_size=8, minibatch_size=size, ppo_epochs=1, lr=1e-3)
        with waits() as found:
            ppo_update(policy, build_optimizer(policy, cfg), rollout, cfg, 1)
        counts[size] = len(found)
    assert (counts[2] - counts[4]) / 2 <= 1, counts
