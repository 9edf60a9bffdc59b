"""The reward-KL frontier against enumerations and closed forms."""

import itertools

import numpy as np
import pytest

from evaluation.frontier import best_of_n, best_of_n_kl, exponential_tilt, frontier


def test_best_of_n_equals_enumeration() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 7))
    for n in (1, 2, 4, 7):
        expected = [np.mean([max(some) for some in itertools.combinations(row, n)]) for row in scores]
        np.testing.assert_allclose(best_of_n(scores, n), expected)


def test_best_of_n_kl_equals_the_integral() -> None:
    """With a continuous score the best of n has density n u^(n-1) in the base's quantile u."""
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    for n in (1, 2, 8):
        density = n * u ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx(np.mean(density * np.log(density)), abs=1e-4)


def test_frontier_equals_the_closed_form_on_a_language_of_six_sentences() -> None:
    rng = np.random.default_rng(2)
    base, score = rng.dirichlet(np.ones(6), 40), rng.uniform(-1, 1, (40, 6))
    draws = np.stack([s[rng.choice(6, 4000, p=p)] for p, s in zip(base, score, strict=True)])
    betas = np.array([10, 1, 0.5, 0.2])
    found = frontier(draws, betas)
    for k, beta in enumerate(betas):
        best = base * np.exp(score / beta)
        best /= best.sum(1, keepdims=True)
        assert found.reward[:, k].mean() == pytest.approx((best * score).sum(1).mean(), abs=0.01)
        assert found.kl[:, k].mean() == pytest.approx((best * np.log(best / base)).sum(1).mean(), abs=0.02)
    assert found.certain.all()
    assert (np.diff(found.kl.mean(0)) > 0).all()
    best = best_of_n(draws, 8).mean()  # with so few points of the curve, it is the better of the two somewhere
    assert found.optimal_reward(np.array([best_of_n_kl(8)]))[0] >= best
    assert frontier(draws, betas[:1]).optimal_reward(np.array([best_of_n_kl(8)]))[0] == pytest.approx(best)
    at = found.kl.mean(0)[1:2]
    assert found.optimal_reward(at)[0] == pytest.approx(found.reward.mean(0)[1])
    # prompts counted differently: the same as a frontier of these prompts alone
    few = frontier(draws[:5], betas)
    assert found.optimal_reward(np.array([0.1]), np.array([[1.0] * 5 + [0.0] * 35])) == few.optimal_reward(
        np.array([0.1])
    )


def test_exponential_tilt_has_the_mean_and_the_smallest_kl() -> None:
    two = np.array([-1.0, 1, 1, 1])  # with two scores, the mean decides the share of each
    times = np.array([[1.0, 1, 1, 1], [1, 0, 2, 1]])
    np.testing.assert_allclose(
        exponential_tilt(two, np.array([0.8, -0.4]), times), [[0.1, 0.3, 0.3, 0.3], [0.7, 0, 0.2, 0.1]], atol=1e-6
    )
    rng = np.random.default_rng(4)
    scores, even = rng.uniform(-1, 1, 50), np.ones((1, 50))
    found = exponential_tilt(scores, np.array([0.5]), even)[0]
    assert (found.sum(), found @ scores) == pytest.approx((1, 0.5))
    for _ in range(20):  # a move that changes neither sum nor mean can only lead away
        move = rng.normal(size=50)
        plane = np.linalg.qr(np.stack([np.ones(50), scores], 1))[0]
        other = found + 1e-3 * (move - plane @ (plane.T @ move))
        assert (other > 0).all()
        assert (other * np.log(other)).sum() > (found * np.log(found)).sum()
    assert exponential_tilt(scores, np.array([2.0]), even)[0] @ scores == pytest.approx(scores.max(), abs=0.05), (
        "out of reach"
    )


def test_frontier_of_few_samples_is_a_lower_bound() -> None:
    """With few draws the curve lies on or under the true one, and says where too few stand behind it."""
    rng = np.random.default_rng(3)
    found = frontier(rng.normal(size=(4000, 16)))
    kl, reward = found.kl.mean(0), found.reward.mean(0)
    true = np.sqrt(2 * kl)  # a normal score tilted by exp(r / beta) moves by sqrt(2 KL)
    assert (reward <= true + 0.01).all()
    assert not found.certain[-1]
    assert reward[found.certain] == pytest.approx(true[found.certain], abs=0.25)
