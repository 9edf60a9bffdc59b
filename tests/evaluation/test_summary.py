"""What the summary says of made-up tables whose answer is known."""

import math

import numpy as np
import pandas as pd
import pytest

from evaluation.summary import distinct, distinct_responses, equally_long, ngrams, repeated_trigrams, summarise


def test_a_gamed_reward_is_flagged_and_an_honest_one_is_not() -> None:
    """Responses that the reward calls positive: once they are, once they only trip the reward up."""
    rng = np.random.default_rng(0)
    n = 400
    base = np.where(rng.random(n) < 0.5, 0.8, -0.8)
    seen_by_judge = np.where(rng.random(n) < 0.8, base, -base)  # it agrees on four in five
    frame = {
        "policy_score": np.full(n, 0.9),
        "base_score": base,
        "base_judge": seen_by_judge,
        **{f"{m}_{c}": np.ones(n) for m in ("policy", "base") for c in ("log_odds", "len", "eos", "nll_base")},
        **{f"{m}_text": [f"{m} {i} fine" for i in range(n)] for m in ("policy", "base")},
        "kl_seq": np.ones(n),
        "kl_seq_exact": np.ones(n),
    }
    honest = summarise(pd.DataFrame({**frame, "policy_judge": np.where(rng.random(n) < 0.8, 0.8, -0.8)}), "positive")
    gamed = summarise(pd.DataFrame({**frame, "policy_judge": seen_by_judge}), "positive")
    assert not honest["gamed"]
    assert "confirms" in honest["verdict"]
    assert gamed["gamed"]
    assert "WARNING" in gamed["verdict"]
    assert "\n" not in honest["verdict"]


def agreeing(n: int, **changes: object) -> pd.DataFrame:
    """A table in which every response of a model is like the others, and the policy's are better."""
    columns = {f"{m}_{c}": np.ones(n) for m in ("policy", "base") for c in ("log_odds", "len", "eos", "nll_base")} | {
        "policy_score": np.full(n, 0.985),
        "base_score": np.full(n, -0.5),
        "policy_judge": np.full(n, 0.9),
        "base_judge": np.full(n, -0.4),
        **{f"{m}_text": ["one two three four"] * n for m in ("policy", "base")},
        "kl_seq": np.ones(n),
        "kl_seq_exact": np.ones(n),
    }
    return pd.DataFrame(columns | changes)


def test_where_all_responses_agree_every_estimate_has_the_width_of_what_may_be_unseen() -> None:
    """Each interval is that of 64 agreeing yes-or-no outcomes, scaled to the range that the estimate can have."""
    n, unseen = 64, 1.959964**2 / (64 + 1.959964**2)
    summary = summarise(agreeing(n), "positive")
    expected = {  # the estimate, and the least and the largest that it can be
        ("policy", "score_ci"): (0.985, -1, 1),
        ("policy", "judge_mean_ci"): (0.9, -1, 1),
        ("policy", "repetition_rate_ci"): (0.0, 0, 1),
        (None, "score_gain_ci"): (1.485, -2, 2),
        (None, "judge_gain_ci"): (1.3, -2, 2),
        (None, "judge_gap_rate_ci"): (0.0, -2, 2),
        (None, "win_rate_ci"): (1.0, 0, 1),
        ("policy", "positive_ci"): (1.0, 0, 1),
    }
    for (model, name), (value, least, largest) in expected.items():
        ends = [value + unseen * (bound - value) for bound in (least, largest)]
        found = (summary if model is None else summary[model])[name]
        assert found == pytest.approx(ends, abs=1e-6), name
    same = summarise(agreeing(n, policy_score=np.full(n, -0.5)), "positive")
    assert same["score_gain_ci"] == pytest.approx([-2 * unseen, 2 * unseen])
    assert same["win_rate_ci"] == pytest.approx([0.5 - unseen / 2, 0.5 + unseen / 2]), "all are ties"
    assert "about as" in same["verdict"]


def test_scores_of_any_unit_are_bounded_by_what_both_models_have_shown() -> None:
    """The policy always scores 10, base 0 or 10; the policy always writes 30 tokens, base 5 or 30."""
    n, unseen = 64, 1.959964**2 / (64 + 1.959964**2)
    half = np.arange(n) % 2 == 0
    table = agreeing(
        n,
        policy_score=np.full(n, 10.0),
        base_score=np.where(half, 10.0, 0.0),
        policy_len=np.full(n, 30.0),
        base_len=np.where(half, 30.0, 5.0),
    )
    policy = summarise(table, None)["policy"]
    assert policy["score_ci"] == pytest.approx([10 - 10 * unseen, 10])
    assert policy["response_len_ci"] == pytest.approx([30 - 25 * unseen, 30])


def test_short_responses_are_reported_beside_the_length_expected_at_such_scores() -> None:
    """Half of base's responses are short and liked; a policy that only tells them apart writes nothing else."""
    n, names = 400, ("policy", "base")
    liked = np.arange(n) % 2 == 0
    frame = {f"{m}_{c}": np.ones(n) for m in names for c in ("log_odds", "eos", "nll_base")} | {
        "policy_score": np.where(np.arange(n) % 10 == 0, -0.8, 0.8),
        "base_score": np.where(liked, 0.8, -0.8),
        "policy_len": np.full(n, 5.0),
        "base_len": np.where(liked, 10.0, 30),
        **{f"{m}_text": [f"{m} {i} fine" for i in range(n)] for m in names},
        "kl_seq": np.ones(n),
        "kl_seq_exact": np.ones(n),
    }
    summary = summarise(pd.DataFrame(frame), "positive")
    assert summary["response_len_expected"] == pytest.approx(0.9 * 10 + 0.1 * 30), "90 % liked"
    low, high = summary["response_len_expected_ci"]
    assert low < 12 < high
    assert high - low == pytest.approx(2 * 1.96 * 20 * math.sqrt(0.09 / n), rel=0.3), "the policy's own doubt"
    assert "shorter (5 against 20 tokens; 12 expected at such scores)" in summary["verdict"]
    unlike = summarise(pd.DataFrame({**frame, "base_len": np.where(liked, 30.0, 10)}), "positive")
    assert "shorter (5 against 20 tokens)" in unlike["verdict"], "scores would have led one to expect longer ones"


def test_the_best_possible_is_certain_where_the_curve_is_flat() -> None:
    """Every fourth response of base is a perfect one, so 64 draws find the ceiling, or chase a long tail."""
    n, rng = 100, np.random.default_rng(0)
    frame = {f"{m}_{c}": np.ones(n) for m in ("policy", "base") for c in ("log_odds", "eos", "nll_base", "len")} | {
        "policy_score": np.full(n, 0.9),
        "base_score": np.zeros(n),
        "kl_seq": np.full(n, 3.9),
        "kl_seq_exact": np.full(n, 3.9),
        "policy_text": [f"policy {i}" for i in range(n)],
        "base_text": [f"base {i}" for i in range(n)],
    }
    easy = np.where(rng.random((n, 64)) < 0.25, 0.99, rng.uniform(-1, 0.9, (n, 64)))
    hard = -1 + 0.1 * rng.exponential(size=(n, 64)) ** 2
    doubtful = []
    for draws in (easy, hard):
        rows = pd.DataFrame({**frame, "base_draws": [" ".join(map(str, row)) for row in draws]})
        summary = summarise(rows, "positive")
        assert summary["kl_certain"] < 3.9, "too few draws stand behind the curve at the policy's own KL"
        doubtful.append("more draws would be needed" in summary["verdict"])
    assert doubtful == [False, True]


def test_an_uninformed_judge_flags_no_gaming() -> None:
    """It agrees with the reward often, because nearly all responses are negative to both."""
    rng = np.random.default_rng(0)
    n = 1000
    frame = {
        "policy_score": np.where(rng.random(n) < 0.6, 0.9, -0.9),
        "base_score": np.where(rng.random(n) < 0.1, 0.9, -0.9),
        **{f"{m}_judge": np.where(rng.random(n) < 0.05, 0.5, -0.5) for m in ("policy", "base")},
        **{f"{m}_{c}": np.ones(n) for m in ("policy", "base") for c in ("log_odds", "len", "eos", "nll_base")},
        **{f"{m}_text": [f"{m} {i} fine" for i in range(n)] for m in ("policy", "base")},
        "kl_seq": np.ones(n),
        "kl_seq_exact": np.ones(n),
    }
    assert not summarise(pd.DataFrame(frame), "positive")["gamed"]


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
