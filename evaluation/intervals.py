"""95 % intervals: bootstrap for means and ratios, Wilson for shares, jackknife for counts of distinct things.

None of them is without width only because all values seen agree, unless nothing else is possible.

Written by hand in numpy: one dependency less is worth more than the few lines, and tests check the coverage.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
GROUPS = 20
Z95 = 1.959964  # 97.5 % of the normal distribution
CENTRAL = (0.025, 0.975)
T19 = 2.093  # 97.5 % of Student's t with GROUPS - 1 degrees of freedom


def bootstrap_ci(
    values: np.ndarray, weights: np.ndarray | None = None, seed: int = 0, bounds: Sequence[float] | None = None
) -> list[float]:
    """Percentile bootstrap interval [low, high] of sum(values) / sum(weights), resampling prompts (Efron 1979).

    values and weights (n,); without weights it is that of the mean. bounds are the least and the largest that a value,
    or a value / weight, can be; the interval allows for such values where few or none of them were seen.
    """
    counts = resample_counts(len(values), seed)
    values = np.asarray(values, dtype=np.float32)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float32)
    with np.errstate(invalid="ignore"):  # a resample whose weights are all 0 has no mean
        means = counts @ values / (counts @ weights)
    interval = [float(x) for x in np.nanquantile(means, CENTRAL)]
    if bounds is None:
        return interval
    return allow_for_unseen(interval, float(values.sum() / weights.sum()), len(values), bounds)


def allow_for_unseen(interval: Sequence[float], mean: float, n: int, bounds: Sequence[float]) -> list[float]:
    """Widen an interval so that it holds what the mean of n values would be with a few more at either end of bounds.

    Resampling values that nearly all agree cannot tell how many others there may be: with none of them among 64, one
    in 20 may be different. The share allowed for is that of Wilson's interval where none was seen, Z95**2 / (n +
    Z95**2). An interval that is wide already stays as it is.
    """
    share = Z95**2 / (n + Z95**2)
    low, high = (mean + share * (bound - mean) for bound in bounds)
    return [min(interval[0], low), max(interval[1], high)]


@functools.lru_cache(maxsize=2)
def resample_counts(n: int, seed: int) -> np.ndarray:
    """How often each of n prompts occurs in each resample: (RESAMPLES, n) float32."""
    rng = np.random.default_rng(seed)
    counts = np.empty((RESAMPLES, n), dtype=np.float32)
    for row in counts:
        row[:] = np.bincount(rng.integers(n, size=n), minlength=n)
    return counts


def wilson_ci(successes: np.ndarray) -> list[float]:
    """Interval of a share from n yes-or-no outcomes (Wilson 1927); it holds even where all of them agree."""
    n, p = len(successes), float(np.mean(successes))
    middle, spread = p + Z95**2 / (2 * n), Z95 * np.sqrt(p * (1 - p) / n + (Z95 / (2 * n)) ** 2)
    low, high = ((middle + sign * spread) / (1 + Z95**2 / n) for sign in (-1, 1))
    return [float(min(low, p)), float(max(high, p))]


def jackknife_ci(measure: Callable[[list[str]], float], texts: Sequence[str]) -> list[float]:
    """Interval of a share measured on a whole set of texts, from leaving out a twentieth at a time (Tukey 1958).

    For counts of distinct things, which a bootstrap with its duplicates would underestimate. It has a width also where
    all texts are different or all are alike.
    """
    groups = min(GROUPS, len(texts))
    if groups < 2:
        return [float("nan")] * 2
    left = [measure([text for i, text in enumerate(texts) if i % groups != g]) for g in range(groups)]
    spread = np.sqrt((groups - 1) / groups * ((np.array(left) - np.mean(left)) ** 2).sum())
    value = measure(list(texts))
    interval = [float(max(0, value - T19 * spread)), float(min(1, value + T19 * spread))]
    if spread < 1 / len(texts):  # no text makes a difference that is worth one
        return allow_for_unseen(interval, value, len(texts), (0.0, 1.0))
    return interval
