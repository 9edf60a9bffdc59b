"""The reward-KL frontier: the reward that any policy could reach at a given KL to the base, from base samples.

scores (P, N) are those of N responses of the base to each of P prompts. KL in nats per response.
"""

from dataclasses import dataclass
from math import lgamma, log

import numpy as np

BETAS = np.geomspace(30, 0.01, 120)
MIN_EFFECTIVE = 5.0  # samples: with fewer behind it, a point of the curve is not reliable


@dataclass(frozen=True)
class Frontier:
    """The optimal policies ref * exp(r / beta) for falling beta: kl, reward, effective sample size, each (P, K).

    best_of is the expected score of the best of 1, 2, 4, … responses, (P, S); the first of them is that of the base.
    """

    kl: np.ndarray
    reward: np.ndarray
    effective: np.ndarray
    best_of: np.ndarray

    @property
    def certain(self) -> np.ndarray:
        """At which beta (K,) the curve rests on enough samples, on average over prompts."""
        return self.effective.mean(0) >= MIN_EFFECTIVE

    def optimal_reward(self, kl: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
        """Highest mean reward shown possible at mean KL of kl (S,), each prompt weighted by its counts (S, P).

        The curve and best-of-n can both be reached, and so can mixtures of two neighbours on either. The result is
        the higher of the two; beyond their ends they are flat.
        """
        counts = np.ones((len(kl), len(self.best_of))) if counts is None else counts
        weights = counts / counts.sum(1, keepdims=True)
        best_of = weights @ self.best_of
        kls = np.hstack([np.zeros((len(kl), 1)), weights @ self.kl])  # the curve starts at the base itself
        rewards = np.hstack([best_of[:, :1], weights @ self.reward])
        best_kl = [best_of_n_kl(2**i) for i in range(self.best_of.shape[1])]
        return np.array(
            [
                max(np.interp(x, k, r), np.interp(x, best_kl, b))
                for x, k, r, b in zip(kl, kls, rewards, best_of, strict=True)
            ]
        )


def frontier(scores: np.ndarray, betas: np.ndarray = BETAS) -> Frontier:
    """The optimal reward-KL curve by self-normalised weights, prompt by prompt (Korbak et al. 2022, eq. 2).

    Sampling N responses of the base and keeping one by these weights reaches at least this reward at no more than this
    KL. So the curve can be reached, and the true optimum lies on it or above.
    """
    kl, reward, effective = (np.empty((len(scores), len(betas))) for _ in range(3))
    for k, beta in enumerate(betas):
        weights = np.exp((scores - scores.max(1, keepdims=True)) / beta)
        weights /= weights.sum(1, keepdims=True)
        reward[:, k] = (weights * scores).sum(1)
        kl[:, k] = (weights * np.log(np.maximum(weights, 1e-300) * scores.shape[1])).sum(1)
        effective[:, k] = 1 / (weights**2).sum(1)
    best_of = np.stack([best_of_n(scores, 2**i) for i in range(scores.shape[1].bit_length())], 1)
    return Frontier(kl, reward, effective, best_of)


def exponential_tilt(scores: np.ndarray, means: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Weights (S, P), proportional to counts * exp(score / beta), under which the mean of scores (P,) is means (S,).

    Of all weights with that mean these are the nearest to `counts` in KL (Csiszar 1975). |beta| is at least 1/50, also
    where a mean lies beyond all scores.
    """
    low, high = np.full(len(counts), -50.0), np.full(len(counts), 50.0)
    for _ in range(45):
        middle = (low + high) / 2
        exponents = middle[:, None] * scores
        weights = counts * np.exp(exponents - exponents.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        short = weights @ scores < means
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return weights


def best_of_n(scores: np.ndarray, n: int) -> np.ndarray:
    """Expected best score (P,) among n of the N responses, over all ways of choosing them."""
    total = scores.shape[1]
    chance = [_choose(k, n - 1) - _choose(total, n) for k in range(total)]  # log: the k-th smallest is the best
    return np.sort(scores, 1) @ np.exp(chance)


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n to the base: log n - (n - 1) / n, exact without ties and a bound with them (Beirami 2024)."""
    return log(n) - (n - 1) / n


def _choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) if 0 <= k <= n else -np.inf
