"""What an evaluation is made of: intervals that cover, diversity, the frontier against closed forms, a judge."""

import math

import numpy as np
import pytest

from evaluation.intervals import bootstrap_ci, jackknife_ci, wilson_ci
from evaluation.summary import distinct, distinct_responses

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


@pytest.mark.parametrize("n", [64, 128, 500])
@pytest.mark.parametrize("failing", [0.003, 0.012, 0.03])
def test_the_interval_of_a_mean_score_covers_where_nearly_all_responses_agree(n: int, failing: float) -> None:
    """All score +0.985 but a few, which score -0.9; the chance of each number of failures is the binomial's."""
    truth, covered = 0.985 - failing * 1.885, 0.0
    for fails in range(n + 1):
        log_chance = math.lgamma(n + 1) - math.lgamma(fails + 1) - math.lgamma(n - fails + 1)
        chance = math.exp(log_chance + fails * math.log(failing) + (n - fails) * math.log(1 - failing))
        if chance > 1e-6:
            low, high = bootstrap_ci(np.where(np.arange(n) < fails, -0.9, 0.985), bounds=(-1, 1))
            covered += chance * (low <= truth <= high)
    assert covered >= (0.93 if failing == 0.012 else 0.92), covered


def test_the_interval_of_scores_that_all_agree_is_wilsons_scaled_to_their_range() -> None:
    for n in (64, 500):
        low, high = bootstrap_ci(np.full(n, 1.0), bounds=(-1, 1))
        assert [low, high] == pytest.approx([2 * x - 1 for x in wilson_ci(np.ones(n))])
    assert bootstrap_ci(np.zeros(64), np.ones(64), bounds=(0, 1))[1] == pytest.approx(wilson_ci(np.zeros(64))[1])


def test_an_interval_that_is_wide_already_stays_as_it_is() -> None:
    rng = np.random.default_rng(3)
    for n in (64, 500):
        scores = np.tanh(rng.normal(size=n))
        assert bootstrap_ci(scores, bounds=(-1, 1)) == bootstrap_ci(scores)


def test_all_responses_different_or_alike_leaves_a_doubt() -> None:
    """Wilson's: 1 - 3.84 / (n + 3.84) for n different ones."""
    different = jackknife_ci(distinct_responses, [f"text {i}" for i in range(64)])
    assert different == pytest.approx([64 / (64 + 1.959964**2), 1.0])
    low, high = jackknife_ci(distinct_responses, ["the same"] * 64)
    assert low < 1 / 64 < 0.06 < high < 0.1
    some_alike = [f"text {i % 50}" for i in range(64)]
    low, high = jackknife_ci(distinct_responses, some_alike)
    left = [len({t for i, t in enumerate(some_alike) if i % 20 != g}) for g in range(20)]
    shares = np.array(left) / [sum(i % 20 != g for i in range(64)) for g in range(20)]
    half = 2.093 * math.sqrt(19 / 20 * ((shares - shares.mean()) ** 2).sum())
    assert [low, high] == pytest.approx([50 / 64 - half, 50 / 64 + half]), "a wide one stays as it is"


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
