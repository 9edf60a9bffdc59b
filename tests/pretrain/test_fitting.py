"""Batches of about equal length."""

import random

from pretrain.fitting import length_batches


def test_length_batches_deal_every_row_once_within_the_budget() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 90) for _ in range(500)]
    batches = length_batches(lengths, 256, rng)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    widths = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    assert max(widths) <= 256
    assert sum(lengths) / sum(widths) > 0.9  # little padding


def test_length_batches_allow_a_row_beyond_the_budget() -> None:
    assert sorted(length_batches([5, 300], 64, random.Random(0))) == [[0], [1]]
