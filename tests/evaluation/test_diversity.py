"""Diversity and repetition, counted by hand."""

import math

from evaluation.diversity import distinct, distinct_responses, equally_long, ngrams, repeated_trigrams


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
