"""The policy against the library's own loss, float64 runs and a sampler without a cache."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

from config import UserError

import numpy as np
import pytest
import torch
from conftest import (
    exact_logits,
    make_lm,
    make_policy,
    pad_more,
    ragged_prompts,
    real_tokens,
    same_weights,
    sample,
    weights_of,
    with_critic,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import model
import utils
from model import (
    Decoding,
    GPT2WithValueHead,
    ReferenceStates,
    Sequences,
    UnfinishedResponses,
    evaluate_both,
    load_reference,
    sample_responses,
)
from runtime.hub import load_gpt2
from utils import uniforms

TOLERANCE = 5e-5


SAMPLINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 7},
    {"top_p": 0.8},
    {"temperature": 0.8, "top_k": 10, "top_p": 0.9},
]


IDS = [" ".join(f"{k}={v}" for k, v in s.items()) or "plain" for s in SAMPLINGS]


def library_warp(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Temperature, top-k, top-p in the library's order; logits (N, V) -> log-probabilities."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return torch.log_softmax(warpers(None, logits), -1)


def expected_logprobs(lm: GPT2LMHeadModel, seqs: Sequences, row: int, **sampling: float) -> Tensor:
    """Log of the whole distribution (n, V) in which each response token of a row was chosen, in
    float64.
    """
    tokens, start = real_tokens(seqs, row)
    return library_warp(exact_logits(lm, tokens)[start - 1 : -1], **sampling)


def test_evaluate_responses_equals_the_library_loss() -> None:
    policy = make_policy(vocab=60)
    seqs = sample(policy, rows=10)
    logprobs, _, _ = policy.evaluate_responses(seqs)
    assert logprobs.dtype == torch.float32
    lengths = set()
    for row in range(10):
        tokens, start = real_tokens(seqs, row)
        labels = tokens.clone()
        labels[:start] = -100
        with torch.no_grad():
            loss = policy.lm(input_ids=tokens[None], labels=labels[None]).loss
        n = len(tokens) - start
        total = logprobs[row][seqs.response_mask[row]].sum().item()
        assert -total == pytest.approx(loss.item() * n, abs=1e-4)
        lengths.add((start, n))
    assert len(lengths) > 4, "the rows should be ragged"


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_evaluate_responses_equals_unpadded_float64(sampling: dict[str, float]) -> None:
    policy = make_policy(critic=True)
    seqs = sample(policy, **sampling)
    logprobs, values, entropy = policy.evaluate_responses(seqs)
    wide = copy.deepcopy(policy).double()
    for row in range(8):
        tokens, start = real_tokens(seqs, row)
        logp = expected_logprobs(policy.lm, seqs, row, **sampling)
        n = len(logp)
        chosen = logp[torch.arange(n), tokens[start:]]
        np.testing.assert_allclose(logprobs[row, :n].detach(), chosen, atol=TOLERANCE)
        plogp = torch.where(logp > -math.inf, logp.exp() * logp, 0).sum(-1)
        np.testing.assert_allclose(entropy[row, :n].detach(), -plogp, atol=TOLERANCE)
        with torch.no_grad():
            hidden = wide.lm.transformer(input_ids=tokens[None]).last_hidden_state[0, start - 1 : -1]
            value = hidden @ wide.value_head.weight[0] + wide.value_head.bias
        np.testing.assert_allclose(values[row, :n].detach(), value, atol=TOLERANCE)


@pytest.mark.parametrize("pads", [1, 2, 5, 20])
def test_evaluate_responses_is_unmoved_by_padding(pads: int) -> None:
    policy = make_policy(critic=True)
    seqs = sample(policy, rows=6)
    mask = seqs.response_mask

    def run(s: Sequences) -> tuple[list[Tensor], list[Tensor]]:
        outputs = [x.masked_fill(~mask, 0) for x in policy.evaluate_responses(s)]
        policy.zero_grad()
        (outputs[0].sum() + outputs[1].square().sum() + outputs[2].sum()).backward()
        return outputs, [w.grad.clone() for w in policy.parameters() if w.grad is not None]

    outputs, grads = run(seqs)
    padded, padded_grads = run(pad_more(seqs, pads))
    for a, b in zip(outputs, padded, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert len(grads) == len(padded_grads) == len(list(policy.parameters()))
    for a, b in zip(grads, padded_grads, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1, a.abs().max().item())


def test_evaluate_responses_does_not_see_what_is_masked() -> None:
    policy = make_policy(critic=True)
    seqs = sample(policy)
    tokens = torch.where(seqs.attention_mask, seqs.tokens, 13)
    assert not torch.equal(tokens, seqs.tokens)
    other = Sequences.of(tokens, seqs.attention_mask, seqs.response_mask, seqs.logprobs, seqs.temperature)
    for a, b in zip(policy.evaluate_responses(seqs), policy.evaluate_responses(other), strict=True):
        assert torch.allclose(a[seqs.response_mask], b[seqs.response_mask], atol=1e-6)


def test_values_do_not_see_the_token_they_judge() -> None:
    policy = make_policy(critic=True)
    seqs = sample(policy, rows=2, width=4, new=8, seed=2)
    full = Sequences.of(
        seqs.tokens,
        torch.cat([seqs.attention_mask[:, : seqs.prompt_len], torch.ones(2, 8).bool()], 1),
        torch.ones(2, 8).bool(),
        seqs.logprobs,
    )
    logprobs, values, entropy = policy.evaluate_responses(full)
    for t in range(8):
        tokens = full.tokens.clone()
        tokens[:, full.prompt_len + t :] = (tokens[:, full.prompt_len + t :] + 7) % 20
        other = Sequences.of(tokens, full.attention_mask, full.response_mask, full.logprobs)
        new_logprobs, new_values, new_entropy = policy.evaluate_responses(other)
        assert torch.equal(new_values[:, : t + 1], values[:, : t + 1])
        assert torch.equal(new_entropy[:, : t + 1], entropy[:, : t + 1])
        assert torch.equal(new_logprobs[:, :t], logprobs[:, :t])
        # and what comes after does see it
        assert ((new_values - values)[:, t + 1 :].abs() > 1e-3).all()
        assert ((new_logprobs - logprobs)[:, t].abs() > 1e-3).all()


def test_value_head_starts_at_zero() -> None:
    policy = make_policy()
    _, values, _ = policy.evaluate_responses(sample(policy))
    assert torch.equal(values, torch.zeros_like(values))
    assert values.dtype == torch.float32


def test_policy_has_no_dropout_in_either_mode() -> None:
    policy = make_policy(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    seqs = sample(policy)
    first = policy.evaluate_responses(seqs)
    assert policy.train() is policy
    again = policy.evaluate_responses(seqs)
    policy.train(True)
    assert not any(module.training for module in policy.modules())
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_load_reference_is_frozen(gpt2_dir: Path) -> None:
    reference = load_reference(str(gpt2_dir))
    assert not any(weight.requires_grad for weight in reference.parameters())
    assert not any(module.training for module in reference.modules())
    logprobs, _, _ = reference.evaluate_responses(sample(reference))
    assert not logprobs.requires_grad


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_generate_reports_the_logprobs_that_scoring_finds(sampling: dict[str, float]) -> None:
    policy, reference = make_policy(), make_policy(seed=1)
    seqs = sample(policy, rows=24, **sampling)
    mask = seqs.response_mask
    lengths = mask.sum(1)
    assert len(set(lengths.tolist())) > 3, "rows should end at different times"
    scored, _, _ = policy.evaluate_responses(seqs)
    assert (scored - seqs.logprobs)[mask].abs().max() < 2e-5  # float32 in two orders of summation
    scored = evaluate_both(policy, reference, seqs)[0]
    assert (scored - seqs.logprobs)[mask].abs().max() < 2e-5
    assert (seqs.support is None) == ("top_k" not in sampling and "top_p" not in sampling)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_generate_equals_a_sampler_without_cache(sampling: dict[str, float]) -> None:
    """One row at a time, unpadded, the whole forward pass for each token, in float64."""
    policy = make_policy(seed=4)
    prompt_ids, prompt_mask = ragged_prompts(12, 6, seed=4)
    u = uniforms(4, 1, 12, 10)
    seqs = sample_responses(policy, prompt_ids, prompt_mask, u, eos_id=EOS, **sampling)
    for row in range(12):
        tokens, response = prompt_ids[row][prompt_mask[row]], []
        while len(response) < 10 and EOS not in response:
            logits = exact_logits(policy.lm, tokens)[-1:]
            p = library_warp(logits, **sampling).exp()[0]
            below = (p.cumsum(0) <= u[row, len(response)] * p.sum()).sum().item()
            response.append(below)
            tokens = torch.cat([tokens, torch.tensor([below])])
        n = len(response)
        assert seqs.responses[row, :n].tolist() == response
        assert seqs.response_mask[row].sum() == n
        assert seqs.response_mask[row, :n].all()
        chosen = expected_logprobs(policy.lm, seqs, row, **sampling)[torch.arange(n), response]
        np.testing.assert_allclose(seqs.logprobs[row, :n], chosen, atol=TOLERANCE)


def test_generate_returns_consistent_masks() -> None:
    policy = make_policy()
    prompt_ids, prompt_mask = ragged_prompts(32, 6)
    seqs = sample_responses(policy, prompt_ids, prompt_mask, uniforms(0, 1, 32, 10), eos_id=EOS)
    width = seqs.responses.shape[1]
    assert seqs.prompt_len == 6
    assert seqs.tokens.shape == (32, 6 + width)
    assert width <= 10
    assert seqs.tokens.dtype == torch.int64
    assert seqs.temperature == 1.0
    assert torch.equal(seqs.tokens[:, :6][prompt_mask], prompt_ids[prompt_mask])
    assert torch.equal(seqs.attention_mask[:, :6], prompt_mask)
    assert torch.equal(seqs.attention_mask[:, 6:], seqs.response_mask)
    assert seqs.response_mask.dtype == seqs.attention_mask.dtype == torch.bool
    ended = 0
    for tokens, mask in zip(seqs.responses.tolist(), seqs.response_mask.tolist(), strict=True):
        end = tokens.index(EOS) + 1 if EOS in tokens else width
        assert mask == [t < end for t in range(width)]  # up to and including the first EOS
        ended += EOS in tokens
    assert 4 < ended < 32


def test_generate_ends_at_once_where_eos_comes_first() -> None:
    """u = 0 draws token 0, which is EOS; the other row goes on, and the prompt holds EOS itself."""
    policy = make_policy()
    u = torch.full((2, 5), 0.999, dtype=torch.float64)
    u[0] = 0
    prompts = (torch.tensor([[EOS, 3, 4], [EOS, EOS, 5]]), torch.tensor([[1, 1, 1], [0, 1, 1]]).bool())
    seqs = sample_responses(policy, *prompts, u, eos_id=EOS)
    assert seqs.response_mask.tolist() == [[True] + [False] * 4, [True] * 5]
    assert seqs.responses[0, 0] == EOS
    assert EOS not in seqs.responses[1]
    logp = expected_logprobs(policy.lm, seqs, 0)
    assert seqs.logprobs[0, 0].item() == pytest.approx(logp[0, EOS].item(), abs=TOLERANCE)
    alone = sample_responses(policy, prompts[0][:1], prompts[1][:1], u[:1], eos_id=EOS)
    assert alone.response_mask.sum() == 1
    assert alone.responses[0, 0] == EOS


def test_generate_stops_at_the_given_eos_only() -> None:
    policy = make_policy()
    prompts = ragged_prompts(32, 6)
    seqs = sample_responses(policy, *prompts, uniforms(0, 1, 32, 10), eos_id=11)
    for tokens, mask in zip(seqs.responses, seqs.response_mask, strict=True):
        real = tokens[mask].tolist()
        assert 11 not in real[:-1]
        assert len(real) == 10 or real[-1] == 11
    assert any(EOS in row[m].tolist() for row, m in zip(seqs.responses, seqs.response_mask, strict=True))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_generate_is_independent_of_batch_composition(sampling: dict[str, float]) -> None:
    policy = make_policy(seed=5)
    prompt_ids, prompt_mask = ragged_prompts(10, 7)
    u = uniforms(0, 1, 10, 8)
    together = sample_responses(policy, prompt_ids, prompt_mask, u, eos_id=EOS, **sampling)
    for row in range(10):
        start = int((~prompt_mask[row]).sum())  # alone, the row needs no padding at all
        alone = sample_responses(
            policy,
            prompt_ids[row : row + 1, start:],
            prompt_mask[row : row + 1, start:],
            u[row : row + 1],
            eos_id=EOS,
            **sampling,
        )
        mask = together.response_mask[row]
        assert torch.equal(together.responses[row][mask], alone.responses[0][alone.response_mask[0]])
        assert torch.allclose(together.logprobs[row][mask], alone.logprobs[0][alone.response_mask[0]], atol=2e-5)


def test_generate_changes_no_weight_and_needs_no_gradient() -> None:
    policy = make_policy()
    before = weights_of(policy)
    seqs = sample(policy)
    assert not seqs.logprobs.requires_grad
    assert same_weights(policy, before)


@pytest.mark.parametrize("prompt_len", [1, 4])
@pytest.mark.parametrize("new", [1, 2])
def test_generate_takes_the_shortest_prompts_and_responses(prompt_len: int, new: int) -> None:
    policy = make_policy(seed=6)
    prompt = torch.full((1, prompt_len), 3)
    seqs = sample_responses(policy, prompt, prompt > 0, torch.full((1, new), 0.6).double(), eos_id=EOS)
    logp = expected_logprobs(policy.lm, seqs, 0)
    n = len(logp)
    assert 1 <= n <= new
    chosen = logp[torch.arange(n), seqs.responses[0, :n]]
    np.testing.assert_allclose(seqs.logprobs[0, :n], chosen, atol=TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"activation_function": "relu"},
        {"tie_word_embeddings": False},
        {"n_inner": 48},
        {"layer_norm_epsilon": 0.3},
        {"n_head": 4, "n_layer": 3},
        {"reorder_and_upcast_attn": True},
    ],
    ids=lambda c: next(iter(c)),
)
def test_generate_follows_every_kind_of_gpt2(changes: dict[str, object]) -> None:
    policy = make_policy(**changes)
    seqs = sample(policy)
    for row in range(8):
        logp = expected_logprobs(policy.lm, seqs, row)
        n = len(logp)
        chosen = logp[torch.arange(n), seqs.responses[row, :n]]
        np.testing.assert_allclose(seqs.logprobs[row, :n], chosen, atol=TOLERANCE)


def upper_tail(chi2: float, df: int) -> float:
    return torch.special.gammaincc(torch.tensor(df / 2.0).double(), torch.tensor(chi2 / 2)).item()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_generate_draws_from_the_scored_distribution(sampling: dict[str, float]) -> None:
    """Chi-square of 100k draws on 20 tokens (fact 4)."""
    policy, n = make_policy(seed=7, n_layer=1, n_embd=16), 100_000
    prompt = torch.tensor([[3, 9]])
    seqs = sample_responses(
        policy, prompt.expand(n, -1), torch.ones(n, 2).bool(), uniforms(0, 1, n, 1), eos_id=EOS, **sampling
    )
    logp = library_warp(exact_logits(policy.lm, prompt[0])[-1:], **sampling)[0]
    counts = torch.bincount(seqs.responses[:, 0], minlength=20)
    assert (counts[logp == -math.inf] == 0).all()
    alive = logp > -math.inf
    expected = n * logp[alive].exp()
    assert expected.min() > 5, "chi-square needs a few of each"
    chi2 = ((counts[alive] - expected) ** 2 / expected).sum().item()
    # true in all but one of 10 000 seeds; a temperature off by a tenth gives 1e-50
    assert upper_tail(chi2, int(alive.sum()) - 1) > 1e-4
    scored, _, _ = policy.evaluate_responses(seqs.select(torch.arange(2000)))
    assert (scored[:, 0] - logp[seqs.responses[:2000, 0]]).abs().max() < TOLERANCE


def test_generate_draws_pairs_of_tokens_from_their_joint_distribution() -> None:
    policy, n = make_policy(vocab=6, seed=8, n_layer=1, n_embd=16, initializer_range=0.15), 100_000
    seqs = sample_responses(policy, torch.full((n, 1), 2), torch.ones(n, 1).bool(), uniforms(5, 3, n, 2), eos_id=EOS)
    first = library_warp(exact_logits(policy.lm, torch.tensor([2]))[-1:])[0].exp()
    expected = [n * first[EOS]]
    counts = [(seqs.responses[:, 0] == EOS).sum()]
    for a in range(1, 6):
        second = library_warp(exact_logits(policy.lm, torch.tensor([2, a]))[-1:])[0].exp()
        for b in range(6):
            expected.append(n * first[a] * second[b])
            counts.append((seqs.responses == torch.tensor([a, b])).all(1).sum())
    e, c = torch.stack(expected), torch.stack(counts).double()
    assert c.sum() == n
    assert e.min() > 5
    assert upper_tail(((c - e) ** 2 / e).sum().item(), len(e) - 1) > 1e-4


def test_loaded_model_computes_what_the_library_computes(gpt2_dir: Path) -> None:
    """Loading may exchange kernels; what the saved weights mean to others must not change."""
    policy = GPT2WithValueHead.from_pretrained(str(gpt2_dir))
    lm = GPT2LMHeadModel.from_pretrained(gpt2_dir)
    seqs = sample(policy)
    scored, _, _ = policy.evaluate_responses(seqs)
    for row in range(8):
        logp = expected_logprobs(lm, seqs, row)
        n = len(logp)
        chosen = logp[torch.arange(n), seqs.responses[row, :n]]
        np.testing.assert_allclose(scored[row, :n].detach(), chosen, atol=TOLERANCE)
        np.testing.assert_allclose(seqs.logprobs[row, :n], chosen, atol=TOLERANCE)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
@pytest.mark.parametrize("dtypes", [*itertools.product([torch.float32, torch.bfloat16], repeat=2)], ids=str)
def test_the_kl_of_the_loss_is_the_one_reported(
    dtypes: tuple[torch.dtype, torch.dtype], sampling: dict[str, float]
) -> None:
    """In every precision of policy and reference."""
    policy = GPT2WithValueHead(make_policy().lm, dtypes[0])
    reference = GPT2WithValueHead(make_policy(seed=1).lm, dtypes[1]).requires_grad_(False)
    seqs = sample(policy, **sampling)
    reported, states = evaluate_both(policy, reference, seqs)[4], ReferenceStates.of(reference, seqs)
    kl = policy.evaluate_hidden(policy.response_hidden(seqs), seqs, False, states).exact_kl
    assert reported.max() > 0.05
    torch.testing.assert_close(kl, reported, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_evaluate_both_equals_enumeration(sampling: dict[str, float]) -> None:
    """Policy and reference are both renormalised over what the sampler could have chosen."""
    policy, reference = make_policy(critic=True), make_policy(seed=1, critic=True)
    seqs = sample(policy, **sampling)
    scored = evaluate_both(policy, reference, seqs)
    assert all(not x.requires_grad and x.dtype == torch.float32 for x in scored)
    got = dict(zip(["logprobs", "ref_logprobs", "values", "entropy", "exact_kl"], scored, strict=True))
    _, values, _ = policy.evaluate_responses(seqs)
    for row in range(8):
        tokens, start = real_tokens(seqs, row)
        p = expected_logprobs(policy.lm, seqs, row, **sampling)
        n = len(p)
        alive = p > -math.inf
        if seqs.support is not None:
            assert torch.equal(seqs.support[row, :n], alive)
        z = exact_logits(reference.lm, tokens)[start - 1 : -1] / sampling.get("temperature", 1.0)
        q = torch.log_softmax(z.masked_fill(~alive, -math.inf), -1)
        chosen = torch.arange(n), tokens[start:]
        expected = {
            "logprobs": p[chosen],
            "ref_logprobs": q[chosen],
            "values": values[row, :n].detach().double(),
            "entropy": -torch.where(alive, p.exp() * p, 0).sum(-1),
            "exact_kl": torch.where(alive, p.exp() * (p - q), 0).sum(-1),
        }
        for name, x in expected.items():
            np.testing.assert_allclose(got[name][row, :n], x, atol=2 * TOLERANCE, err_msg=name)
            assert (got[name][row, n:] == 0).all(), name


def test_evaluate_both_of_a_model_against_itself_is_zero() -> None:
    policy, reference = make_policy(), make_policy()
    logprobs, ref_logprobs, _, _, kl = evaluate_both(policy, reference, sample(policy))
    assert torch.equal(logprobs, ref_logprobs)
    assert kl.abs().max() < 1e-6


def test_sequences_select_keeps_rows_together() -> None:
    policy = make_policy()
    seqs = sample(policy, top_k=5, temperature=0.9)
    rows = torch.tensor([5, 0, 3])
    some = seqs.select(rows)
    for name in ("tokens", "attention_mask", "response_mask", "logprobs", "support"):
        assert torch.equal(getattr(some, name), getattr(seqs, name)[rows]), name
    assert some.temperature == 0.9
    assert some.prompt_len == seqs.prompt_len
    all_rows, _, _ = policy.evaluate_responses(seqs)
    assert torch.allclose(policy.evaluate_responses(some)[0], all_rows[rows], atol=1e-5)


def test_bfloat16_concerns_matrix_products_only() -> None:
    exact = with_critic(GPT2WithValueHead(make_lm(300)))
    rough = GPT2WithValueHead(copy.deepcopy(exact.lm), torch.bfloat16)
    rough.value_head.load_state_dict(exact.value_head.state_dict())
    assert {weight.dtype for weight in rough.parameters()} == {torch.float32}
    seqs = sample(rough, rows=16)
    mask = seqs.response_mask
    for a, b in zip(exact.evaluate_responses(seqs), rough.evaluate_responses(seqs), strict=True):
        assert b.dtype == torch.float32
        error = (a - b)[mask].abs()
        # 8 bits of mantissa in logits of standard deviation 1.7, through two layers
        assert 0 < error.mean() < 0.05
        assert error.max() < 0.5
    assert seqs.logprobs.dtype == torch.float32
    # sampler and scorer round differently: the cache holds the same numbers, but sums run in
    # another order
    assert (rough.evaluate_responses(seqs)[0] - seqs.logprobs)[mask].abs().mean() < 0.05
    for x in evaluate_both(rough, exact, seqs):
        assert x.dtype == torch.float32
    rough.evaluate_responses(seqs)[0].sum().backward()
    assert {weight.grad.dtype for weight in rough.lm.parameters()} == {torch.float32}


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=IDS)
def test_generate_is_unmoved_by_dropping_rows_that_ended(
    sampling: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, widths = make_policy(), []
    read = UnfinishedResponses.read
    monkeypatch.setattr(UnfinishedResponses, "read", lambda self, *a: widths.append(len(a[0])) or read(self, *a))
    found = sample(policy, rows=16, new=20, **sampling)
    assert widths[0] == 16
    assert widths[-1] <= 8, "rows were dropped, more than once"
    monkeypatch.setattr(UnfinishedResponses, "drop_finished", lambda self: None)
    expected = sample(policy, rows=16, new=20, **sampling)
    assert widths[-1] == 16
    for name in ("tokens", "attention_mask", "response_mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert (found.support is None) == (expected.support is None)
    if expected.support is not None:
        assert torch.equal(found.support, expected.support)
    assert torch.allclose(found.logprobs, expected.logprobs, atol=TOLERANCE)


class Journal(TorchDispatchMode):
    """Writes down each operation with its arguments: tensors of the responses by name, all others by shape."""

    def __init__(self, responses: Any) -> None:
        super().__init__()
        kept = {
            **vars(responses),
            "cache": responses.cache.kept,
            "embedding": responses.weights.embedding,
            **dict(responses.weights.lm.named_parameters()),
        }
        self.names = {x.untyped_storage().data_ptr(): name for name, x in kept.items() if isinstance(x, Tensor)}
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        seen = [self.describe(x) for x in tree_leaves((args, kwargs, found))]
        self.lines.append(f"{func} {' '.join(seen)}")
        return found

    def describe(self, x: object) -> str:
        if not isinstance(x, Tensor):
            return str(x)
        return f"{self.names.get(x.untyped_storage().data_ptr(), 'new')}{tuple(x.shape)}{x.stride()}"


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_sampling_steps_are_the_same_operations_on_the_same_storages(dtype: torch.dtype) -> None:
    """What CUDA needs to record a step and replay it, also in the next rollout, after an update of the weights."""
    policy = make_policy()
    policy.dtype = dtype
    responses = UnfinishedResponses(policy, 6, torch.Size((8, 10)), Decoding(EOS, 0.8, 9, 0.9))
    journal, steps = Journal(responses), []
    for seed in (0, 1):
        responses.begin(*ragged_prompts(8, 6, policy.lm.config.vocab_size, seed), uniforms(seed, 1, 8, 10))
        for _ in range(9):
            journal.lines = []
            with journal:
                responses.step()
            steps.append(journal.lines)
        assert len(steps[0]) > 100
        assert any("cache(" in line for line in steps[0])
        found = responses.sequences()
        expected = sample(policy, seed=seed, temperature=0.8, top_k=9, top_p=0.9)
        for name in ("tokens", "attention_mask", "response_mask", "logprobs", "support"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        for weight in policy.parameters():
            weight += 0.02 * torch.randn_like(weight)
        responses.clear()
        assert found.logprobs.any(), "what was returned stays"
    assert all(step == steps[0] for step in steps)


def test_the_copy_with_half_projections_shares_everything_else() -> None:
    lm = make_lm()
    copied = model.projections_in(torch.bfloat16, lm)
    shared = {name for (name, a), b in zip(lm.named_parameters(), copied.parameters(), strict=True) if a is b}
    projections = {name for name, _ in lm.named_parameters() if any(c in name for c in ("c_attn", "c_proj", "c_fc"))}
    assert shared == {name for name, _ in lm.named_parameters()} - projections
    for (name, a), b in zip(lm.named_parameters(), copied.parameters(), strict=True):
        assert torch.equal(a.bfloat16() if name in projections else a, b), name
        assert a.dtype == torch.float32


def test_save_pretrained_round_trip(tmp_path: Path) -> None:
    policy = make_policy(critic=True)
    seqs = sample(policy)
    policy.save_pretrained(tmp_path)
    loaded = GPT2WithValueHead.load(tmp_path)
    assert same_weights(loaded, weights_of(policy))
    for a, b in zip(policy.evaluate_responses(seqs), loaded.evaluate_responses(seqs), strict=True):
        assert torch.allclose(a, b, atol=2e-5)  # loading may choose other, equivalent kernels
    assert loaded.evaluate_responses(seqs)[1].abs().max() > 0.1
    assert set(load_file(tmp_path / "value_head.safetensors")) == {"weight", "bias"}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy_lm").eval()
    assert isinstance(plain, GPT2LMHeadModel)
    with torch.no_grad():
        assert torch.equal(plain(seqs.tokens).logits, policy.lm(seqs.tokens).logits)


def test_from_pretrained_starts_the_value_head_at_zero_without_a_saved_one(gpt2_dir: Path) -> None:
    policy = GPT2WithValueHead.from_pretrained(str(gpt2_dir))
    assert all((weight == 0).all() for weight in policy.value_head.parameters())
    assert all(weight.requires_grad for weight in policy.parameters())
    assert all(weight.dtype == torch.float32 for weight in policy.parameters())


def test_load_gpt2_returns_float32_whatever_was_saved(tmp_path: Path) -> None:
    make_lm().bfloat16().save_pretrained(tmp_path)
    lm = load_gpt2(str(tmp_path), "policy_name")
    assert {weight.dtype for weight in lm.parameters()} == {torch.float32}


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_gpt2(str(folder), "ref_name")
    message = str(caught.value)
    assert "ref_name" in message
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_load_gpt2_refuses_what_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere")
    refused(tmp_path)  # an empty folder


def test_load_gpt2_refuses_a_folder_without_weights(tmp_path: Path) -> None:
    make_lm().config.save_pretrained(tmp_path)
    refused(tmp_path)


def test_load_gpt2_refuses_another_architecture(tmp_path: Path, classifier_dir: Path) -> None:
    refused(classifier_dir)
    config = GPTNeoConfig(
        vocab_size=20,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
    )
    GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    refused(tmp_path)


def test_load_gpt2_refuses_a_truncated_file(tmp_path: Path) -> None:
    make_lm().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-500])
    refused(tmp_path)


@pytest.mark.parametrize("missing", ["transformer.h.1.mlp.c_fc.weight", "transformer.wpe.weight"])
def test_load_gpt2_refuses_missing_weights(tmp_path: Path, missing: str) -> None:
    make_lm().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[missing]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path)


def test_load_gpt2_refuses_weights_of_another_shape(tmp_path: Path) -> None:
    make_lm().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.wpe.weight"] = torch.zeros(32, 32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path)


def test_load_gpt2_refuses_a_config_that_is_not_json(tmp_path: Path) -> None:
    make_lm().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path)


def test_load_refuses_a_damaged_or_absent_value_head(tmp_path: Path) -> None:
    make_policy(critic=True).save_pretrained(tmp_path)
    file = tmp_path / "value_head.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="ckpt_dir"):
        GPT2WithValueHead.load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="ckpt_dir"):
        GPT2WithValueHead.load(tmp_path)


EOS = 0


def ragged_mask(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def only_responses(tokens: Tensor, mask: Tensor) -> Sequences:
    """Sequences of these responses to prompts of one token."""
    one = torch.ones(len(tokens), 1)
    return Sequences.of(
        torch.cat([one.long(), tokens], 1), torch.cat([one.bool(), mask], 1), mask, torch.zeros(mask.shape)
    )


def test_texts_leave_out_eos_and_what_is_masked(tokenizer: PreTrainedTokenizerFast) -> None:
    """EOS first, in the middle, absent; the padding is EOS, and once garbage."""
    film, bad = tokenizer("A good film")["input_ids"], tokenizer(" bad!")["input_ids"]
    rows = [[EOS], [*film, EOS], [*film, *bad]]
    width = max(map(len, rows)) + 2
    tokens = torch.tensor([row + [EOS] * (width - len(row)) for row in rows])
    tokens[1, -1] = bad[0]
    seqs = only_responses(tokens, ragged_mask([len(row) for row in rows], width))
    assert seqs.texts(tokenizer) == ["", "A good film", "A good film bad!"]
    assert seqs.lengths.tolist() == list(map(len, rows))
    first = tokenizer.decode([1])
    assert seqs.texts(tokenizer, with_prompt=True) == [first + text for text in seqs.texts(tokenizer)]


def test_prompt_texts_leave_out_padding_on_the_left(tokenizer: PreTrainedTokenizerFast) -> None:
    film = tokenizer("It 's a film . ")["input_ids"]
    tokens = torch.tensor([[5, 5, *film, 7], [5, 5, 5, *film[1:], 7]])
    mask = torch.ones_like(tokens).bool()
    mask[0, :2] = mask[1, :3] = False
    seqs = Sequences.of(tokens, mask, mask[:, -1:], torch.zeros(2, 1))
    assert seqs.prompt_texts(tokenizer)[0] == "It 's a film . "


_TOKENIZER: list[PreTrainedTokenizerFast] = []


@pytest.fixture(autouse=True)
def remember_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Hypothesis does not mix with fixtures it could not reset; the tokenizer never changes."""
    _TOKENIZER[:] = [tokenizer]


@given(text=st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_decode_inverts_the_tokenizer(text: str) -> None:
    tokenizer = _TOKENIZER[0]
    ids = tokenizer(text)["input_ids"]
    tokens = torch.tensor([[*ids, EOS, 7]])
    if EOS in ids:  # the text spells a special token
        return
    assert only_responses(tokens, ragged_mask([len(ids) + 1], len(ids) + 2)).texts(tokenizer) == [text]


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 8])
def test_chunks_of_logits_change_nothing(rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fact 15: values and gradients with the logits of some rows in memory at a time equal those with all of them."""
    policy, reference = make_policy(critic=True), make_policy(seed=1)
    seqs = sample(policy, top_k=9)
    whole, whole_scored = policy.evaluate_responses(seqs), evaluate_both(policy, reference, seqs)
    sum(x.sum() for x in whole).backward()
    expected = [weight.grad.clone() for weight in policy.parameters()]
    policy.zero_grad()
    numbers_per_row = seqs.response_mask.shape[1] * policy.lm.config.vocab_size
    monkeypatch.setattr(utils, "CHUNK_FLOATS", rows_at_a_time * numbers_per_row)
    slices = policy.chunk(seqs)
    assert slices[0].stop == rows_at_a_time
    assert sorted(i for rows in slices for i in range(rows.start, rows.stop)) == list(range(8))
    chunked = policy.evaluate_responses(seqs)
    sum(x.sum() for x in chunked).backward()
    for a, b in zip([*whole, *whole_scored], [*chunked, *evaluate_both(policy, reference, seqs)], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for weight, grad in zip(policy.parameters(), expected, strict=True):
        assert torch.allclose(weight.grad, grad, atol=1e-4)
