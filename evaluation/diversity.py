"""Diversity and repetition of texts. A word is what white space separates."""

from collections import Counter
from collections.abc import Sequence


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """All runs of n words."""
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def equally_long(ours: Sequence[str], theirs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Cut both answers to each prompt to the length of the shorter one: in longer texts fewer words are new."""
    words = [(a.split(), b.split()) for a, b in zip(ours, theirs, strict=True)]
    cut = [[" ".join(pair[i][: min(map(len, pair))]) for pair in words] for i in (0, 1)]
    return cut[0], cut[1]


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of a set of texts (Li et al. 2016); NaN where there are none."""
    counts = Counter(gram for text in texts for gram in ngrams(text, n))
    return len(counts) / counts.total() if counts else float("nan")


def repeated_trigrams(text: str) -> tuple[int, int]:
    """How many trigrams of a text occur earlier in it, and how many it has."""
    grams = ngrams(text, 3)
    return len(grams) - len(set(grams)), len(grams)


def distinct_responses(texts: Sequence[str]) -> float:
    """Share of texts that are the first of their kind."""
    return len(set(texts)) / len(texts)
