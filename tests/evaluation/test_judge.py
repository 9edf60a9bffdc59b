"""The second judge: it learns labels, and nothing from random ones."""

import numpy as np
import pytest

from evaluation.judge import FittedJudge

GOOD, BAD = ("superb", "lovely", "moving"), ("dull", "awful", "clumsy")


def reviews(n: int, seed: int) -> tuple[list[str], list[bool]]:
    rng = np.random.default_rng(seed)
    labels = [bool(x) for x in rng.random(n) < 0.5]
    neutral = [f"w{i}" for i in range(50)]
    return [" ".join([*rng.choice(neutral, 20), *rng.choice(GOOD if y else BAD, 2)]) for y in labels], labels


def test_judge_learns_labels_and_nothing_from_random_ones() -> None:
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
