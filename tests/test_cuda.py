"""The facts that could differ on a GPU: skipped where there is none."""

from config import TrainConfig

import pytest
import torch
from conftest import make_policy, make_rollout, pad_more, ragged_prompts, real_tokens, same_weights, weights_of

import model
from model import evaluate_both, sample_responses
from ppo import build_optimizer, ppo_update
from utils import uniforms

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}  # nats per token, on random weights made large on purpose


def sampled(dtype: torch.dtype) -> tuple:
    policy, reference = make_policy(60).cuda(), make_policy(60).cuda()
    policy.dtype = reference.dtype = dtype
    ids, mask = (x.cuda() for x in ragged_prompts(8, 6, 60))
    return policy, reference, sample_responses(policy, ids, mask, uniforms(0, 1, 8, 10).cuda(), eos_id=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_sampler_and_scorer_agree_and_padding_changes_nothing(dtype: torch.dtype) -> None:
    policy, reference, seqs = sampled(dtype)
    logprobs = evaluate_both(policy, reference, seqs)[0]
    assert (logprobs - seqs.logprobs).abs().max() < TOLERANCE[dtype]
    seqs_on_cpu = type(seqs)(*(x.cpu() for x in (seqs.tokens, seqs.attention_mask, seqs.response_mask, seqs.logprobs)))
    padded = pad_more(seqs_on_cpu, 5)
    padded = type(seqs)(
        *(x.cuda() for x in (padded.tokens, padded.attention_mask, padded.response_mask, padded.logprobs))
    )
    assert (evaluate_both(policy, reference, padded)[0] - logprobs).abs().max() < TOLERANCE[dtype]


def test_cuda_agrees_with_the_cpu() -> None:
    policy, reference, seqs = sampled(torch.float32)
    logprobs = evaluate_both(policy, reference, seqs)[0].cpu()
    for row in range(len(logprobs)):
        tokens, prompt = real_tokens(seqs, row)
        logits = policy.cpu().lm(input_ids=tokens[None].cpu()).logits[0].log_softmax(-1)
        expected = logits[prompt - 1 : -1].gather(1, tokens[prompt:, None].cpu()).squeeze(1)
        assert torch.allclose(logprobs[row, : len(expected)], expected, atol=1e-3)
        policy.cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}], ids=str)
def test_cuda_replayed_steps_equal_steps_taken_one_by_one(
    dtype: torch.dtype, sampling: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(60).cuda()
    policy.dtype = dtype
    prompts = [x.cuda() for x in ragged_prompts(8, 6, 60)]
    draw = lambda: sample_responses(policy, *prompts, uniforms(0, 1, 8, 40).cuda(), eos_id=0, **sampling)  # noqa: E731
    replayed = draw()
    monkeypatch.setattr(model._Sampler, "recorded", lambda self: self.step)
    one_by_one = draw()
    assert torch.equal(replayed.tokens, one_by_one.tokens)
    assert torch.equal(replayed.response_mask, one_by_one.response_mask)
    assert torch.equal(replayed.logprobs, one_by_one.logprobs)
