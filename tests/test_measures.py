"""What an evaluation is made of: intervals that cover, diversity, the frontier against closed forms, a judge."""

import itertools
import math

import numpy as np
import pytest

from config import TrainConfig
from tools.doctor import Doctor
from tools.frontier import best_of_n, best_of_n_kl, frontier, tilted
from tools.judge import FittedJudge
from tools.measures import (
    bootstrap_ci,
    distinct,
    distinct_responses,
    equally_long,
    jackknife_ci,
    ngrams,
    repeated_trigrams,
    wilson_ci,
)

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


def test_diversity_and_repetition_by_hand() -> None:
    assert ngrams("a b c d", 3) == [("a", "b", "c"), ("b", "c", "d")]
    assert ngrams("a", 2) == []
    assert distinct(["a b a", "a c"], 1) == 3 / 5
    assert distinct(["a b a", "a b"], 2) == 2 / 3
    assert math.isnan(distinct(["", "a"], 2))
    assert equally_long(["a b c", "d"], ["x  y", "u v w"]) == (["a b", "d"], ["x y", "u"])
    assert repeated_trigrams("x y z x y z x") == (2, 5)
    assert repeated_trigrams("x y") == (0, 0)
    assert distinct_responses(["a", "b", "a", "a"]) == 0.5


# ---- the frontier


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


def test_answers_are_tilted_to_a_mean_by_the_weights_nearest_to_their_own() -> None:
    two = np.array([-1.0, 1, 1, 1])  # with two scores, the mean decides the share of each
    times = np.array([[1.0, 1, 1, 1], [1, 0, 2, 1]])
    np.testing.assert_allclose(
        tilted(two, np.array([0.8, -0.4]), times), [[0.1, 0.3, 0.3, 0.3], [0.7, 0, 0.2, 0.1]], atol=1e-6
    )
    rng = np.random.default_rng(4)
    scores, even = rng.uniform(-1, 1, 50), np.ones((1, 50))
    found = tilted(scores, np.array([0.5]), even)[0]
    assert (found.sum(), found @ scores) == pytest.approx((1, 0.5))
    for _ in range(20):  # a move that changes neither sum nor mean can only lead away
        move = rng.normal(size=50)
        plane = np.linalg.qr(np.stack([np.ones(50), scores], 1))[0]
        other = found + 1e-3 * (move - plane @ (plane.T @ move))
        assert (other > 0).all()
        assert (other * np.log(other)).sum() > (found * np.log(found)).sum()
    assert tilted(scores, np.array([2.0]), even)[0] @ scores == pytest.approx(scores.max(), abs=0.05), "out of reach"


def test_frontier_of_few_samples_promises_no_more_than_the_truth() -> None:
    """With few draws the curve lies on or under the true one, and says where too few stand behind it."""
    rng = np.random.default_rng(3)
    found = frontier(rng.normal(size=(4000, 16)))
    kl, reward = found.kl.mean(0), found.reward.mean(0)
    true = np.sqrt(2 * kl)  # a normal score tilted by exp(r / beta) moves by sqrt(2 KL)
    assert (reward <= true + 0.01).all()
    assert not found.certain[-1]
    assert reward[found.certain] == pytest.approx(true[found.certain], abs=0.25)


# ---- the second judge

GOOD, BAD = ("superb", "lovely", "moving"), ("dull", "awful", "clumsy")


def reviews(n: int, seed: int) -> tuple[list[str], list[bool]]:
    rng = np.random.default_rng(seed)
    labels = [bool(x) for x in rng.random(n) < 0.5]
    neutral = [f"w{i}" for i in range(50)]
    return [" ".join([*rng.choice(neutral, 20), *rng.choice(GOOD if y else BAD, 2)]) for y in labels], labels


def test_judge_learns_the_labels_and_knows_nothing_of_random_ones() -> None:
    texts, labels = reviews(600, 0)
    judge = FittedJudge(texts, labels)
    assert judge.accuracy > 0.95
    fresh, truth = reviews(200, 1)
    scores = judge.score(fresh)
    assert ((scores > 0) == truth).mean() > 0.95
    assert (np.abs(scores) <= 1).all()
    assert judge.score(["w1 w2 unheard-of", ""]) == pytest.approx([0, 0], abs=0.5)
    random = [bool(x) for x in np.random.default_rng(5).random(600) < 0.5]
    lost = FittedJudge(texts, random)
    assert lost.accuracy < 0.75
    assert np.abs(lost.score(fresh)).mean() < 0.4, "unsure where it is often wrong"


# ---- the doctor

HEALTHY = {
    "kl_seq": 2.0, "kl_seq_exact": 2.0, "ratio_max": 1.5, "clip_frac": 0.02, "entropy": 4.0, "distinct_rate": 1.0,
    "explained_var": 0.2, "positive_rate": 0.6, "skipped": 0, "updates": 8,
    "micro_batch_size": 16, "response_len": 40.0,
}  # fmt: skip
SICK = {
    "kl_seq": (-5.0, "--check"), "kl_seq_exact": (50.0, "--kl_coef"), "ratio_max": (40.0, "--lr"),
    "clip_frac": (0.5, "--ppo_epochs"), "entropy": (0.5, "--ent_coef"), "distinct_rate": (0.1, "samples.csv"),
    "explained_var": (-3.0, "--value_coef"), "skipped": (2, "--lr"),
    "micro_batch_size": (4, "--micro_batch_size 4"),
}  # fmt: skip


def test_doctor_has_nothing_to_say_of_a_healthy_run() -> None:
    doctor = Doctor(TrainConfig(micro_batch_size=16))
    assert not any(doctor.look(HEALTHY) for _ in range(30))
    for reward_every, gae_lambda in ((0, 1.0), (1, 0.0)):
        assert not Doctor(TrainConfig(reward_every=reward_every, gae_lambda=gae_lambda)).look(HEALTHY)


@pytest.mark.parametrize(
    "asked",
    [
        TrainConfig(reward_every=0), TrainConfig(reward_every=0, gae_lambda=0.95), TrainConfig(reward_every=64),
        TrainConfig(batch_size=4, minibatch_size=4),
    ],
)  # fmt: skip
def test_doctor_sees_a_score_that_reaches_no_one(asked: TrainConfig) -> None:
    doctor = Doctor(asked)
    told = [text for _ in range(3) for text in doctor.look(HEALTHY)]
    assert len(told) == 1
    assert "--gae_lambda 1" in told[0]


def test_doctor_sees_responses_grow_short_and_no_passing_dip() -> None:
    doctor = Doctor(TrainConfig())
    lengths = [40.0] * 10 + [10.0] * 3 + [40.0] * 10 + [28.5] * 20 + [27.0] * 20
    told = {step: text for step, n in enumerate(lengths) for text in doctor.look({**HEALTHY, "response_len": n})}
    assert list(told) == [46], "once four of ten are at 27"
    assert "28 tokens where they began with 40" in told[46]
    assert "--kl_coef" in told[46]


@pytest.mark.parametrize("name", SICK)
def test_doctor_tells_each_finding_once_with_the_setting_to_change(name: str) -> None:
    doctor = Doctor(TrainConfig(micro_batch_size=16))
    assert doctor.look(HEALTHY) == []
    value, remedy = SICK[name]
    told = [text for _ in range(30) for text in doctor.look({**HEALTHY, name: value})]
    assert len(told) == 1
    assert remedy in told[0]
    assert "\n" not in told[0]
