"""What an evaluation is made of: intervals that cover, diversity, the frontier against closed forms, a judge."""

import math

import numpy as np
import pytest

from evaluation.diversity import distinct
from evaluation.intervals import bootstrap_ci, jackknife_ci, wilson_ci

TRIALS = 600  # 95 % +- 0.9 %


def test_bootstrap_intervals_cover_means_shares_and_ratios() -> None:
    """Coverage of intervals whose truth is known, between 93 and 97 %."""
    rng = np.random.default_rng(0)
    covered = {"score": 0, "win": 0, "ratio": 0}
    for trial in range(TRIALS):
        low, high = bootstrap_ci(np.tanh(rng.normal(size=300)), seed=trial % 2)
        covered["score"] += low <= 0 <= high
        low, high = bootstrap_ci((rng.random(300) < 0.7).astype(float), seed=trial % 2)
        covered["win"] += low <= 0.7 <= high
        lengths = rng.integers(5, 60, 300).astype(float)
        low, high = bootstrap_ci(lengths * 0.04 + rng.normal(size=300), lengths, seed=trial % 2)
        covered["ratio"] += low <= 0.04 <= high
    assert all(0.93 <= n / TRIALS <= 0.97 for n in covered.values()), covered


def test_bootstrap_of_a_constant_ratio_has_no_width() -> None:
    lengths = np.array([1.0, 5.0, 9.0])
    assert bootstrap_ci(3 * lengths, lengths) == pytest.approx([3.0, 3.0])


def test_wilson_intervals_cover_shares_also_near_one() -> None:
    """Exactly: over all outcomes of n = 300 yes-or-no trials, and never without width."""
    n, outcomes = 300, np.arange(301)
    intervals = [wilson_ci(np.arange(n) < k) for k in outcomes]
    log_choose = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in outcomes]
    for p in (0.5, 0.7, 0.9, 0.97):
        chance = np.exp(np.array(log_choose) + outcomes * math.log(p) + (n - outcomes) * math.log(1 - p))
        covered = sum(c for c, (low, high) in zip(chance, intervals, strict=True) if low <= p <= high)
        assert 0.93 <= covered <= 0.97, p
    assert intervals[n][0] == pytest.approx(n / (n + 1.959964**2))
    assert intervals[n][1] == 1
    assert intervals[0][0] == 0


def test_jackknife_intervals_cover_the_diversity_of_a_known_source_and_are_not_much_wider() -> None:
    """Responses of 5 words, evenly from 400: n = 100 responses have 400 (1 - (1 - 1/400)^500) different ones."""
    rng = np.random.default_rng(1)
    expected = 400 * (1 - (1 - 1 / 400) ** 500) / 500
    covered, found, widths = 0, [], []
    for _ in range(200):
        texts = [" ".join(map(str, row)) for row in rng.integers(0, 400, (100, 5))]
        low, high = jackknife_ci(lambda some: distinct(some, 1), texts)
        covered += low <= expected <= high
        found.append(distinct(texts, 1))
        widths.append(high - low)
    # 200 trials scatter by 1.5 % around 95 %; what is left out raises the measure a little, which the width allows for
    assert covered / 200 >= 0.92, covered
    assert 1 < np.mean(widths) / (2 * 1.96 * np.std(found)) < 1.7, "on the safe side"
