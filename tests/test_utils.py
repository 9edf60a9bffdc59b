"""The arithmetic against closed forms, enumerations and slow float64 references."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import utils
from runtime import device


def ragged_mask(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def test_uniforms_are_a_function_of_seed_and_step() -> None:
    u = utils.uniforms(3, 7, 40, 50)
    assert u.shape == (40, 50)
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.equal(u, utils.uniforms(3, 7, 40, 50))
    assert not torch.equal(u, utils.uniforms(4, 7, 40, 50))
    assert not torch.equal(u, utils.uniforms(3, 8, 40, 50))
    # seed and step must not merely be added up
    assert not torch.equal(utils.uniforms(1, 2, 4, 4), utils.uniforms(2, 1, 4, 4))


def test_uniforms_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    utils.uniforms(0, 1, 3, 3)
    utils.permutation(0, 1, 0, 9)
    assert torch.equal(before, torch.get_rng_state())


def test_uniforms_are_uniform() -> None:
    counts = torch.histc(utils.uniforms(0, 1, 1000, 100), 50, 0, 1)
    chi2 = ((counts - 2000) ** 2 / 2000).sum()
    # 49 degrees of freedom: mean 49, standard deviation 9.9; five of them is a p-value of about
    # 1e-5
    assert chi2 < 49 + 5 * 9.9


def test_permutation_is_fresh_in_every_epoch() -> None:
    orders = [utils.permutation(s, t, e, 30) for s in (0, 1) for t in (1, 2) for e in (0, 1)]
    assert all(torch.equal(order.sort().values, torch.arange(30)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    assert torch.equal(orders[0], utils.permutation(0, 1, 0, 30))


def test_position_ids_count_real_tokens_only() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 1, 1, 0, 0]]).bool()
    positions = utils.position_ids(mask)
    assert positions[mask].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 0, 1]
    # what padding gets is of no consequence, but must index the position table
    assert positions.min() >= 0
    assert positions.max() < 5


def test_masked_mean_ignores_what_is_masked() -> None:
    x = torch.tensor([[1.0, 2.0, 1e6], [6.0, -1e6, 1e6]])
    assert utils.masked_mean(x, ragged_mask([2, 1], 3)).item() == 3.0


def test_whiten_gives_mean_0_and_std_1_over_the_mask() -> None:
    x = torch.randn(5, 7) * 3 + 2
    mask = ragged_mask([7, 1, 3, 5, 2], 7)
    real = x[mask].double().numpy()
    expected = (real - real.mean()) / real.std()  # numpy's is the population's standard deviation
    white = utils.whiten(x.masked_fill(~mask, 1e4), mask)
    np.testing.assert_allclose(white[mask].numpy(), expected, atol=1e-5)  # float32 rounding
    assert (white[~mask] == 0).all()


def test_whiten_is_unmoved_by_padding_and_row_order() -> None:
    x, mask = torch.randn(4, 5), ragged_mask([5, 2, 1, 4], 5)
    white = utils.whiten(x, mask)
    wide = utils.whiten(torch.cat([x, torch.full((4, 9), 7.0)], 1), ragged_mask([5, 2, 1, 4], 14))
    assert torch.allclose(wide[:, :5], white, atol=1e-6)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(utils.whiten(x[order], mask[order]), white[order], atol=1e-6)


@pytest.mark.parametrize("length", [1, 4])
def test_whiten_of_equal_numbers_is_zero(length: int) -> None:
    white = utils.whiten(torch.full((1, 6), 2.5), ragged_mask([length], 6))
    assert torch.equal(white, torch.zeros(1, 6))


def test_explained_variance_equals_its_definition() -> None:
    returns, noise = torch.randn(6, 9), torch.randn(6, 9)
    mask = ragged_mask([9, 3, 1, 4, 8, 2], 9)
    values = 0.7 * returns + 0.3 * noise + 5
    r, v = returns[mask].double().numpy(), values[mask].double().numpy()
    expected = 1 - (r - v).var() / r.var()
    garbage = values.masked_fill(~mask, 1e4)
    assert utils.explained_variance(returns, garbage, mask) == pytest.approx(expected, abs=1e-5)
    garbage = returns.masked_fill(~mask, 1e4)
    assert utils.explained_variance(garbage, values, mask) == pytest.approx(expected, abs=1e-5)


def test_explained_variance_of_extreme_critics() -> None:
    returns, mask = torch.randn(4, 5), ragged_mask([5, 4, 3, 2], 5)
    assert utils.explained_variance(returns, returns, mask) == pytest.approx(1)
    # a constant is useless, whatever its height
    assert utils.explained_variance(returns, returns * 0 + 3, mask) == pytest.approx(0, abs=1e-6)
    assert utils.explained_variance(returns, -returns, mask) == pytest.approx(-3, abs=1e-5)
    assert math.isnan(utils.explained_variance(returns * 0 + 1, returns, mask))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.8), (9, 0.6), (99, 0.95)])
def test_warp_logits_equals_the_library(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(64, 40) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    warped = utils.warp_logits(logits, temperature, top_k, top_p)
    assert warped.dtype == torch.float32
    assert torch.equal(warped.isinf(), expected.isinf())
    assert torch.allclose(warped, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (1, 1.0, [2]),
        (2, 1.0, [2, 0]),
        (0, 0.4, [2]),
        (0, 0.55, [2, 0]),
        (0, 0.81, [2, 0, 3]),
        (0, 0.99, [2, 0, 3, 1]),
        # top-p acts on what top-k left: 0.5 / 0.8 = 0.625 of the probability, not 0.5
        (2, 0.6, [2]),
        (0, 1e-6, [2]),
    ],
)
def test_warp_logits_keeps_the_likeliest(top_k: int, top_p: float, kept: list[int]) -> None:
    probabilities = torch.tensor([0.3, 0.05, 0.5, 0.15])
    warped = utils.warp_logits(probabilities.log(), 1.0, top_k, top_p)
    assert sorted(kept) == (warped > -math.inf).nonzero()[:, 0].tolist()


def test_warp_logits_computes_in_float32_whatever_comes_in() -> None:
    logits = torch.randn(3, 4, 11).bfloat16()
    warped = utils.warp_logits(logits, 0.7)
    assert warped.dtype == torch.float32
    assert warped.shape == (3, 4, 11)
    assert torch.allclose(warped, logits.float() / 0.7, atol=1e-6)


def check_draws(logits: Tensor, u: Tensor) -> None:
    """Each u must lie in the interval of its token, computed in float64, up to float32 rounding of
    exp.
    """
    p = torch.softmax(logits.double(), -1)
    rows = torch.arange(len(logits))
    drawn, logprobs = utils.sample_tokens(logits, u)
    np.testing.assert_allclose(logprobs, p.log()[rows, drawn], atol=2e-5)
    assert drawn.dtype == torch.int64
    assert drawn.shape == u.shape
    high = p.cumsum(-1)[rows, drawn]
    low = high - p[rows, drawn]
    assert (p[rows, drawn] > 0).all()
    assert (low - 1e-7 <= u).all()
    assert (u <= high + 1e-7).all()


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 511, 512, 513, 50257])
def test_sample_tokens_inverts_the_cumulative_distribution(vocab: int) -> None:
    rows = 64
    u = torch.rand(rows, dtype=torch.float64)
    check_draws(torch.randn(rows, vocab) * 2, u)
    flat = torch.zeros(rows, vocab)
    check_draws(flat, u)
    # with equal probabilities the token is known in closed form
    assert torch.equal(utils.sample_tokens(flat, u)[0], (u * vocab).long())


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 1000, 50257])
def test_sample_tokens_never_draws_what_has_no_probability(vocab: int) -> None:
    edges = torch.tensor([0.0, 1 - 2**-53, 2**-53, 0.5], dtype=torch.float64)
    alive = sorted({0, 1 % vocab, vocab // 2, min(255, vocab - 1), min(256, vocab - 1), vocab - 1})
    for k in alive:  # the only possible token
        logits = torch.full((4, vocab), -math.inf)
        logits[:, k] = 5.0
        assert utils.sample_tokens(logits, edges)[0].tolist() == [k] * 4
    for first, last in itertools.pairwise(alive):  # the two ends of what is possible
        logits = torch.full((4, vocab), -math.inf)
        logits[:, [first, last]] = 0.0
        drawn = utils.sample_tokens(logits, edges)[0].tolist()
        assert drawn[:3] == [first, last, first]
        assert drawn[3] in (first, last)


def test_sample_tokens_at_the_ends_of_the_unit_interval() -> None:
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for vocab in (2, 255, 256, 257, 50257):
        logits = torch.randn(1, vocab).expand(2, -1).clone()
        assert utils.sample_tokens(logits, edges)[0].tolist() == [0, vocab - 1]
        if vocab == 2:
            continue
        logits[:, [0, vocab - 1]] = -math.inf  # zeros at either end are skipped
        assert utils.sample_tokens(logits, edges)[0].tolist() == [1, vocab - 2]
        logits[:, : vocab // 2] = -2000.0  # exp of this is 0 as well
        assert utils.sample_tokens(logits, edges)[0][0] == vocab // 2


@pytest.mark.parametrize("vocab", [20, 300, 50257])
def test_sample_tokens_without_float64_draws_in_proportion(monkeypatch: pytest.MonkeyPatch, vocab: int) -> None:
    """As on Apple's GPUs: evenly spaced uniforms give each token its share of the draws, to within rounding."""
    monkeypatch.setattr(device, "WITHOUT_FLOAT64", {"cpu"})
    n, logits = 2000, torch.randn(vocab) * 3
    drawn, _ = utils.sample_tokens(logits.expand(n, -1), (torch.arange(n) + 0.5) / n)
    share = torch.bincount(drawn, minlength=vocab) / n
    # rounding moves the two ends of a token's interval by a few 1e-7, and so past one uniform each at most
    assert (share - logits.double().softmax(0)).abs().max() < 1.5 / n
    one = torch.full((3, vocab), -math.inf).index_fill(1, torch.tensor([2, 5]), 0.0)
    drawn, logprobs = utils.sample_tokens(one, torch.tensor([0.0, 1 - 2**-24, 1.0]))  # 1: a uniform rounded up
    assert drawn.tolist() == [2, 5, 5]
    assert torch.allclose(logprobs.exp(), torch.tensor(0.5))


def test_sample_tokens_is_unmoved_by_a_constant() -> None:
    logits = (torch.randn(200, 300) * 64).round() / 64  # still exact in float32 after the addition
    u = torch.rand(200, dtype=torch.float64)
    for shift in (4096, -4096):  # a softmax without its maximum taken off would over- or underflow
        assert torch.equal(utils.sample_tokens(logits, u)[0], utils.sample_tokens(logits + shift, u)[0])


KINDS = [(1.0, False), (0.7, False), (1.0, True), (1.6, True)]


def reference_distribution(hidden: Tensor, weight: Tensor, temperature: float, support: Tensor | None) -> Tensor:
    """Log of the sampled distribution (N, V), in float64 and by plain autograd."""
    logits = hidden @ weight.T / temperature
    if support is not None:
        logits = logits.masked_fill(~support, -math.inf)
    return torch.log_softmax(logits, -1)


def entropy_of(logp: Tensor) -> Tensor:
    return -torch.where(logp > -math.inf, logp.exp() * logp, 0).sum(-1)


def logprob_case(n: int, v: int, h: int, supported: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    hidden, weight, tokens = torch.randn(n, h), torch.randn(v, h) * 0.5, torch.randint(0, v, (n,))
    if not supported:
        return hidden, weight, tokens, None
    support = torch.rand(n, v) < 0.4
    support[torch.arange(n), tokens] = True
    support[0] = False
    support[0, tokens[0]] = True  # a single possible token: log-probability 0, entropy 0
    return hidden, weight, tokens, support


@pytest.mark.parametrize(("temperature", "supported"), KINDS)
def test_token_logprobs_equals_float64(temperature: float, supported: bool) -> None:
    hidden, weight, tokens, support = logprob_case(30, 43, 16, supported)
    logp = reference_distribution(hidden.double(), weight.double(), temperature, support)
    got, entropy, _ = utils.token_logprobs(hidden, weight, tokens, temperature, support)
    assert got.dtype == entropy.dtype == torch.float32
    # logits of up to about 10 in float32: 2^-24 relative, a few operations
    np.testing.assert_allclose(got, logp[torch.arange(30), tokens], atol=2e-5)
    np.testing.assert_allclose(entropy, entropy_of(logp), atol=2e-5)


def kl_of(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(p || q) by plain autograd; where p is 0 a token adds nothing."""
    possible = logp > -math.inf
    log_ratio = logp.masked_fill(~possible, 0) - ref_logp.masked_fill(~possible, 0)
    return torch.where(possible, logp.masked_fill(~possible, -math.inf).exp() * log_ratio, 0).sum(-1)


@pytest.mark.parametrize(("temperature", "supported"), KINDS)
@pytest.mark.parametrize("ask", ["logprobs", "entropy", "kl", "logprobs kl", "logprobs entropy", "logprobs entropy kl"])
def test_token_logprobs_and_their_gradient_equal_autograd(temperature: float, supported: bool, ask: str) -> None:
    hidden, weight, tokens, support = logprob_case(30, 43, 16, supported)
    ref_hidden, ref_weight = hidden + 0.3 * torch.randn(30, 16), weight + 0.1 * torch.randn(43, 16)
    weights = [torch.randn(30) for _ in range(3)]
    asked = [i for i, name in enumerate(("logprobs", "entropy", "kl")) if name in ask]

    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = reference_distribution(x, w, temperature, support)
    ref_logp = reference_distribution(ref_hidden.double(), ref_weight.double(), temperature, support)
    safe = logp.masked_fill(logp == -math.inf, 0)
    entropy = -(torch.where(logp > -math.inf, safe.exp() * safe, 0)).sum(-1)
    expected = logp[torch.arange(30), tokens], entropy, kl_of(logp, ref_logp)
    torch.stack([weights[i].double() @ expected[i] for i in asked]).sum().backward()

    x32, w32 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = utils.token_logprobs(
        x32, w32, tokens, temperature, support, "entropy" in ask, *((ref_hidden, ref_weight) if "kl" in ask else ())
    )
    for i in asked:  # logits of up to about 10 in float32: 2^-24 relative, a few operations
        np.testing.assert_allclose(found[i].detach(), expected[i].detach(), atol=2e-5)
    assert ("kl" in ask) == (found[2].abs().max().item() > 0.1)
    torch.stack([weights[i] @ found[i] for i in asked]).sum().backward()
    # gradients are of size 1 to 10 and sum up to 43 float32 terms
    np.testing.assert_allclose(x32.grad, x.grad, atol=5e-5)
    np.testing.assert_allclose(w32.grad, w.grad, atol=5e-5)


def test_token_logprobs_gradient_equals_finite_differences() -> None:
    hidden, weight, tokens, _ = logprob_case(6, 9, 5, False)
    x = hidden.clone().requires_grad_()
    logp, entropy, _ = utils.token_logprobs(x, weight, tokens, 0.8)
    (logp.sum() + 0.5 * entropy.sum()).backward()

    def f(h: Tensor) -> float:
        p = reference_distribution(h, weight.double(), 0.8, None)
        return float(p[torch.arange(6), tokens].sum() + 0.5 * entropy_of(p).sum())

    for i, j in [(0, 0), (2, 3), (5, 4)]:
        step = torch.zeros(6, 5, dtype=torch.float64)
        step[i, j] = 1e-5
        slope = (f(hidden.double() + step) - f(hidden.double() - step)) / 2e-5
        assert x.grad is not None
        assert x.grad[i, j].item() == pytest.approx(slope, abs=1e-4)


def test_token_logprobs_leaves_frozen_inputs_alone() -> None:
    hidden, weight, tokens, _ = logprob_case(5, 7, 4, False)
    x = hidden.clone().requires_grad_()
    utils.token_logprobs(x, weight, tokens)[0].sum().backward()
    w = weight.clone().requires_grad_()
    utils.token_logprobs(hidden, w, tokens)[0].sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    assert weight.grad is None


def test_token_logprobs_under_bfloat16_takes_the_log_softmax_in_float32() -> None:
    n, v, h = 20, 5000, 32
    hidden = torch.randn(n, h).bfloat16()
    weight = (torch.randn(v, h) * 0.1).bfloat16().float()  # float32, but nothing is lost in bfloat16
    tokens = torch.randint(0, v, (n,))
    logits = hidden.double() @ weight.double().T
    got, entropy, _ = utils.token_logprobs(hidden, weight, tokens)
    assert got.dtype == entropy.dtype == torch.float32
    # Rounding the logits themselves to bfloat16 costs 2^-9 of their size, at the token and in the
    # normaliser. A
    # log-softmax in bfloat16 would round numbers near -9 to multiples of 1/16.
    bound = 2 * 2**-9 * logits.abs().max().item() + 1e-4
    assert bound < 0.02
    exact = torch.log_softmax(logits, -1)
    assert (got - exact[torch.arange(n), tokens]).abs().max() < bound
    assert (entropy - entropy_of(exact)).abs().max() < bound


@pytest.mark.parametrize("chunk_rows", [7, 2000])
def test_token_logprobs_gradient_under_bfloat16_is_summed_in_float32(chunk_rows: int) -> None:
    """A sum over many chunks in bfloat16 would drop whatever is below 1/256 of what is there
    already.
    """
    n, v, h = 2000, 200, 16
    hidden = torch.randn(n, h).bfloat16()
    weight = (torch.randn(v, h) * 0.1).bfloat16().float()
    tokens = torch.randint(0, 20, (n,))
    exact = weight.double().requires_grad_()
    logp = reference_distribution(hidden.double(), exact, 1.0, None)
    logp[torch.arange(n), tokens].sum().backward()
    w = weight.clone().requires_grad_()
    for rows in torch.arange(n).split(chunk_rows):
        utils.token_logprobs(hidden[rows], w, tokens[rows])[0].sum().backward()
    assert w.grad is not None
    assert exact.grad is not None
    # one rounding to bfloat16 is 2^-9 = 0.2 % at most; a few of them stay below 1 %
    assert (w.grad - exact.grad).norm() < 0.01 * exact.grad.norm()


@pytest.mark.parametrize(("temperature", "supported"), KINDS)
def test_compare_policies_equals_enumeration(temperature: float, supported: bool) -> None:
    hidden, weight, tokens, support = logprob_case(30, 50, 16, supported)
    ref_hidden, ref_weight = torch.randn(30, 8), torch.randn(50, 8) * 0.7
    p = reference_distribution(hidden.double(), weight.double(), temperature, support)
    q = reference_distribution(ref_hidden.double(), ref_weight.double(), temperature, support)
    got = utils.compare_policies(hidden, weight, ref_hidden, ref_weight, tokens, temperature, support)
    rows = torch.arange(30)
    kl = torch.where(p > -math.inf, p.exp() * (p - q), 0).sum(-1)
    for result, expected in zip(got, [p[rows, tokens], q[rows, tokens], entropy_of(p), kl], strict=True):
        assert result.dtype == torch.float32
        np.testing.assert_allclose(result, expected, atol=5e-5)  # as above; KL is of size 5
    if supported:  # a single possible token cannot differ
        assert got[3][0].abs() < 1e-6


def test_compare_policies_of_equals_is_zero() -> None:
    hidden, weight, tokens, _ = logprob_case(9, 50, 16, False)
    logprobs, ref_logprobs, _, kl = utils.compare_policies(hidden, weight, hidden, weight, tokens)
    assert torch.equal(logprobs, ref_logprobs)
    assert kl.abs().max() < 1e-6


def test_compare_policies_agrees_with_the_mean_sampled_kl() -> None:
    """E[k1] = KL: the sampled log-ratio of all 50 tokens, weighed with their probabilities (fact
    10).
    """
    hidden, weight = torch.randn(1, 16), torch.randn(50, 16) * 0.5
    ref_hidden, ref_weight = torch.randn(1, 16), torch.randn(50, 16) * 0.5
    logp, ref_logp, _, kl = utils.compare_policies(
        hidden.expand(50, -1), weight, ref_hidden.expand(50, -1), ref_weight, torch.arange(50)
    )
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-5)
    k1 = (logp.exp() * (logp - ref_logp)).sum().item()
    assert k1 == pytest.approx(kl[0].item(), abs=1e-4)
    assert k1 > 0.1


def test_shape_rewards_of_hand_built_rows() -> None:
    """EOS first, in the middle, and absent."""
    kl = torch.tensor([[2.0, 0, 0], [1, -1, 0], [0, 2, -2]])
    mask = ragged_mask([1, 2, 3], 3)
    scores = torch.tensor([0.5, -1.0, 0.25])
    rewards = utils.shape_rewards(scores, kl, mask, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[0.3, 0, 0], [-0.1, -0.9, 0], [0, -0.2, 0.45]]))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_shape_rewards_sum_to_the_penalised_score(lengths: list[int], kl_coef: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    shape = (len(lengths), 9)
    mask = ragged_mask(lengths, 9)
    kl = torch.where(mask, torch.rand(shape, generator=random) - torch.rand(shape, generator=random), 0)
    scores = torch.rand(len(lengths), generator=random) * 2 - 1
    rewards = utils.shape_rewards(scores, kl, mask, kl_coef)
    for row, n in enumerate(lengths):
        total = scores[row] - kl_coef * kl[row, :n].sum()
        assert rewards[row].sum().item() == pytest.approx(total.item(), abs=1e-5)
        assert (rewards[row, n:] == 0).all()


def changes(scores: Tensor, partial: Tensor, mask: Tensor) -> Tensor:
    """What each token changed in the expected score: with lambda 0, and where the score is the only reward, GAE."""
    final = torch.zeros(mask.shape).scatter(1, mask.sum(1, keepdim=True) - 1, scores[:, None])
    after = torch.cat([utils.expected_scores(scores, partial, mask), torch.zeros(len(mask), 1)], 1)
    return torch.where(mask, final + after[:, 1:] - after[:, :-1], 0)


def test_the_expected_score_is_a_regression_on_the_partial_score() -> None:
    """One lookup after two of three tokens, against ordinary least squares; a response that ended has no say in it."""
    random = np.random.default_rng(0)
    final = random.uniform(-1, 1, 4000)
    seen = 0.5 * final + random.normal(0, 0.3, 4000)
    partial = torch.full((4001, 3), math.nan)
    partial[:-1, 1] = torch.tensor(seen)
    partial[-1, 1] = 50.0
    mask = torch.ones(4001, 3, dtype=torch.bool)
    mask[-1, 2] = False  # this one's second token is its last
    scores = torch.tensor([*final, 0.3]).float()
    paid = changes(scores, partial, mask)
    slope, offset = np.polyfit(seen, final, 1)
    mean = scores.mean().item()
    np.testing.assert_allclose(paid[:-1, 1], slope * seen + offset - mean, atol=3e-3)
    np.testing.assert_allclose(paid[:-1, 2], final - slope * seen - offset, atol=3e-3)
    assert paid[-1].tolist() == pytest.approx([0, 0.3 - mean, 0], abs=1e-3)
    assert (paid[:, 0] == 0).all()
    # what is still to come is not correlated with what has been seen
    assert abs(np.corrcoef(paid[:-1, 2], seen)[0, 1]) < 0.01
    assert (utils.expected_scores(scores, torch.full((4001, 3), math.nan), mask) == 0).all()
    expected = utils.expected_scores(scores, partial, mask)
    assert expected[:, 0].tolist() == pytest.approx(expected[:, 1].tolist()), (
        "before the first lookup: the others' mean"
    )
    assert (expected[~mask] == 0).all()


@pytest.mark.parametrize("relation", [0.4, 3.0, -1.0, 1.25, -0.05])
def test_predictions_leave_the_response_itself_out(relation: float) -> None:
    """Against a fit to the other 9 responses, one by one: ridge 1 on the slope, which stays between 0 and 1."""
    random = np.random.default_rng(1)
    seen = random.uniform(-1, 1, 10)
    final = relation * seen + random.normal(0, 0.2, 10)
    partial = torch.full((10, 2), math.nan)
    partial[:, 0] = torch.tensor(seen)
    paid = changes(torch.tensor(final).float(), partial, torch.ones(10, 2, dtype=torch.bool))
    slopes = []
    for i in range(10):
        x, y = np.delete(seen, i), np.delete(final, i)
        centred = x - x.mean()
        slopes.append((centred * (y - y.mean())).sum() / ((centred**2).sum() + 1))
        expected = y.mean() + np.clip(slopes[-1], 0, 1) * (seen[i] - x.mean())
        assert paid[i, 0] == pytest.approx(expected - y.mean(), abs=1e-5)
        assert paid[i].sum() == pytest.approx(final[i] - y.mean(), abs=1e-5)
    within = [0 < slope < 1 for slope in slopes]
    assert any(within) == (relation in (0.4, 1.25, -0.05))
    assert all(within) == (relation == 0.4), "near a limit the response itself decides whether it is reached"


def test_few_long_responses_are_paid_at_the_end() -> None:
    """Where nearly all have ended, or where what is seen is noise, the score is still paid at the end."""
    scores, mask = torch.linspace(-1, 1, 9), ragged_mask([4] * 8 + [12], 12)
    partial = torch.full((9, 12), math.nan)
    partial[8, 7] = -0.5
    assert (changes(scores, partial, mask)[:, :-1][8] == 0).all()
    random = np.random.default_rng(2)
    last, all_of_it = [], []
    for _ in range(300):
        final = torch.tensor(random.uniform(-1, 1, 8)).float()
        partial = torch.full((8, 20), math.nan)
        partial[:, 1::2] = torch.tensor(random.uniform(-1, 1, (8, 10))).float()
        paid = changes(final, partial, torch.ones(8, 20, dtype=torch.bool))
        last.append((paid[:, -1] * final).sum().item())
        all_of_it.append((paid.sum(1) * final).sum().item())
    assert sum(last) / sum(all_of_it) > 0.9


def test_uninformative_partial_scores_are_not_paid() -> None:
    """A partial score without relation to the final one, or one that points the wrong way, changes no expectation."""
    random = torch.Generator().manual_seed(0)
    scores, partial = torch.rand(5000, generator=random), torch.full((5000, 2), math.nan)
    mask = torch.ones(5000, 2, dtype=torch.bool)
    partial[:, 0] = torch.randn(5000, generator=random)
    assert changes(scores, partial, mask)[:, 0].abs().max() < 0.03
    partial[:, 0] = -scores
    assert changes(scores, partial, mask)[:, 0].abs().max() < 1e-6


def slow_gae(rewards: Any, values: Any, gamma: float, lam: float) -> list[float]:
    """The definition, O(R^2) in float64: A_t = sum_l (gamma lambda)^l delta_{t+l}, V after the end
    is 0.
    """
    n = len(rewards)
    after = [*list(values[1:]), 0.0]
    delta = [float(rewards[t]) + gamma * float(after[t]) - float(values[t]) for t in range(n)]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_compute_gae_equals_its_definition(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(lengths), 12, generator=random)
    values = torch.randn(len(lengths), 12, generator=random)
    mask = ragged_mask(lengths, 12)
    # rewards and values outside the mask are left as garbage on purpose
    advantages, returns = utils.compute_gae(rewards, values, mask, gamma, lam)
    for row, n in enumerate(lengths):
        expected = slow_gae(rewards[row, :n], values[row, :n], gamma, lam)
        np.testing.assert_allclose(advantages[row, :n], expected, atol=2e-5)
        np.testing.assert_allclose(returns[row, :n], np.array(expected) + values[row, :n].numpy(), atol=2e-5)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_compute_gae_at_lambda_1_returns_the_reward_to_go() -> None:
    rewards, values = torch.randn(3, 8), torch.randn(3, 8)
    _, returns = utils.compute_gae(rewards, values, ragged_mask([8, 8, 8], 8), 1.0, 1.0)
    to_go = rewards.double().numpy()[:, ::-1].cumsum(1)[:, ::-1]
    np.testing.assert_allclose(returns, to_go, atol=1e-5)


def test_compute_gae_at_lambda_0_is_the_td_error() -> None:
    rewards, values = torch.randn(1, 4), torch.randn(1, 4)
    advantages, _ = utils.compute_gae(rewards, values, ragged_mask([3], 4), 0.9, 0.0)
    r, v = rewards[0], values[0]
    expected = [r[0] + 0.9 * v[1] - v[0], r[1] + 0.9 * v[2] - v[1], r[2] - v[2], 0]
    np.testing.assert_allclose(advantages[0], expected, atol=1e-6)


def test_compute_gae_of_a_ragged_batch_equals_each_row_alone() -> None:
    rewards, values = torch.randn(4, 9), torch.randn(4, 9)
    lengths = [9, 1, 4, 6]
    advantages, returns = utils.compute_gae(rewards, values, ragged_mask(lengths, 9), 0.97, 0.9)
    for row, n in enumerate(lengths):
        alone = utils.compute_gae(rewards[row : row + 1, :n], values[row : row + 1, :n], ragged_mask([n], n), 0.97, 0.9)
        assert torch.allclose(advantages[row, :n], alone[0][0], atol=1e-6)
        assert torch.allclose(returns[row, :n], alone[1][0], atol=1e-6)


def test_token_logprobs_under_bfloat16_ignore_a_common_offset() -> None:
    """GPT-2's logits lie around -30 to -120, where bfloat16 tells only multiples of 1/4 to 1/2 apart."""
    hidden = torch.nn.functional.normalize(torch.randn(50, 64), dim=-1) + 1
    weight = torch.randn(200, 64)
    offset = weight - 100 / 64  # about -100 for every token, by the mean of hidden
    tokens = torch.randint(0, 200, (50,))
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    for matrix, name in ((weight, "plain"), (offset, "offset")):
        found, _, _ = utils.token_logprobs(hidden.bfloat16(), matrix, tokens)
        # three significant digits of logits of about 8: a few hundredths of a nat; the offset would cost up to 0.5
        assert (found - exact).abs().max() < 0.15, name
