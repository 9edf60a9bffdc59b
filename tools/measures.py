"""What eval.py computes from its results: intervals by resampling prompts, diversity and repetition of texts.

Pure functions of arrays and strings. A word is what white space separates.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
GROUPS = 20
Z95 = 1.959964  # 97.5 % of the normal distribution
T19 = 2.093  # 97.5 % of Student's t with GROUPS - 1 degrees of freedom


def bootstrap_ci(
    values: np.ndarray, weights: np.ndarray | None = None, seed: int = 0, level: float = 0.95
) -> list[float]:
    """Percentile bootstrap interval [low, high] of sum(values) / sum(weights), resampling prompts (Efron 1979).

    values and weights (n,); without weights it is that of the mean.
    """
    times, values = resampled(len(values), seed), np.asarray(values, dtype=np.float32)
    weights = None if weights is None else np.asarray(weights, dtype=np.float32)
    with np.errstate(invalid="ignore"):  # a resample whose weights are all 0 says nothing
        means = times @ values / (len(values) if weights is None else times @ weights)
    return [float(x) for x in np.nanquantile(means, [(1 - level) / 2, (1 + level) / 2])]


@functools.lru_cache(maxsize=2)
def resampled(n: int, seed: int) -> np.ndarray:
    """How often each of n prompts occurs in each resample: (RESAMPLES, n) float32."""
    rng = np.random.default_rng(seed)
    times = np.empty((RESAMPLES, n), dtype=np.float32)
    for row in times:
        row[:] = np.bincount(rng.integers(n, size=n), minlength=n)
    return times


def wilson_ci(successes: np.ndarray) -> list[float]:
    """Interval of a share from n yes-or-no outcomes (Wilson 1927): honest where all of them agree, too."""
    n, p = len(successes), float(np.mean(successes))
    middle, spread = p + Z95**2 / (2 * n), Z95 * np.sqrt(p * (1 - p) / n + (Z95 / (2 * n)) ** 2)
    low, high = ((middle + sign * spread) / (1 + Z95**2 / n) for sign in (-1, 1))
    return [float(min(low, p)), float(max(high, p))]


def jackknife_ci(measure: Callable[[list[str]], float], texts: Sequence[str]) -> list[float]:
    """Interval of a share measured on a whole set of texts, from leaving out a twentieth at a time (Tukey 1958).

    For what counts distinct things, which a resample with its duplicates would misjudge.
    """
    groups = min(GROUPS, len(texts))
    if groups < 2:
        return [float("nan")] * 2
    left = [measure([text for i, text in enumerate(texts) if i % groups != g]) for g in range(groups)]
    spread = np.sqrt((groups - 1) / groups * ((np.array(left) - np.mean(left)) ** 2).sum())
    value = measure(list(texts))
    return [float(max(0, value - T19 * spread)), float(min(1, value + T19 * spread))]


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """All runs of n words."""
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def equally_long(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Two answers to each prompt, both cut to the words of the shorter: the more words, the fewer of them are new."""
    words = [(a.split(), b.split()) for a, b in zip(ours, theirs, strict=True)]
    cut = [[" ".join(pair[i][: min(map(len, pair))]) for pair in words] for i in (0, 1)]
    return cut[0], cut[1]


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of a set of texts (Li et al. 2016); NaN where there are none."""
    counts = Counter(gram for text in texts for gram in ngrams(text, n))
    return len(counts) / counts.total() if counts else float("nan")


def repeated_trigrams(text: str) -> tuple[int, int]:
    """How many trigrams of a text occurred earlier in it, and how many it has."""
    grams = ngrams(text, 3)
    return len(grams) - len(set(grams)), len(grams)


def distinct_responses(texts: Sequence[str]) -> float:
    """Share of texts that are the first of their kind."""
    return len(set(texts)) / len(texts)
