"""A second judge of sentiment that training never saw: naive Bayes over words and pairs of words.

It is fitted in seconds on the data set's own labels, on pieces about as long as a response. It shares no weights,
architecture or tokens with the reward, so a policy that exploits the reward's weaknesses does not fool it.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from runtime.terminal import progress

WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[!?]")
PIECE = 40  # words
PIECES = 20_000  # enough for the accuracy, and a matter of seconds


class FittedJudge:
    """score = 2 P(positive) - 1 by naive Bayes on presence (Wang & Manning 2012), calibrated on held-out pieces."""

    def __init__(self, texts: Sequence[str], positive: Sequence[bool], seed: int = 0) -> None:
        """Fit on nine tenths of the texts (labels: is it positive?); accuracy is that on pieces of the last tenth."""
        order = np.random.default_rng(seed).permutation(len(texts))
        n_held = max(1, len(order) // 10)
        pieces, labels = _pieces([texts[i] for i in order[n_held:]], [positive[i] for i in order[n_held:]])
        counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        for piece, label in zip(progress(pieces, "second judge", "piece"), labels, strict=True):
            counts[label].update(features(piece))
        totals = {label: labels.count(label) + 2 for label in counts}
        self.log_ratio = {
            f: float(np.log((counts[True][f] + 1) / totals[True]) - np.log((counts[False][f] + 1) / totals[False]))
            for f in counts[True] | counts[False]
        }
        self.slope, self.offset = 1.0, 0.0
        held_out, truth = _pieces([texts[i] for i in order[:n_held]], [positive[i] for i in order[:n_held]])
        self._calibrate(np.array([self._evidence(x) for x in held_out]), np.array(truth, dtype=float))
        self.accuracy = float(((self.score(held_out) > 0) == np.array(truth)).mean())

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> scores (n,) in [-1, 1]."""
        evidence = np.array([self._evidence(text) for text in texts])
        return np.tanh((self.slope * evidence + self.offset) / 2)

    def _evidence(self, text: str) -> float:
        return math.fsum(self.log_ratio.get(f, 0.0) for f in features(text))  # exact: sets have no fixed order

    def _calibrate(self, x: np.ndarray, y: np.ndarray, ridge: float = 1e-3) -> None:
        """Logistic regression in one variable by Newton's method; naive Bayes alone is overconfident."""
        scale = x.std() or 1.0
        design, theta = np.stack([x / scale, np.ones_like(x)], 1), np.zeros(2)
        for _ in range(25):
            p = 1 / (1 + np.exp(-design @ theta))
            hessian = design.T @ (design * (p * (1 - p))[:, None]) + ridge * len(x) * np.eye(2)
            theta -= np.linalg.solve(hessian, design.T @ (p - y) + ridge * len(x) * theta)
        self.slope, self.offset = float(theta[0] / scale), float(theta[1])


def features(text: str) -> set[str]:
    """The words of a text and its pairs of neighbours."""
    words = WORD.findall(text.lower())
    return {*words, *map(" ".join, itertools.pairwise(words))}


def _pieces(texts: Sequence[str], positive: Sequence[bool]) -> tuple[list[str], list[bool]]:
    """Each text cut into pieces of PIECE words, with the label of the whole; PIECES at most."""
    pieces: list[str] = []
    labels: list[bool] = []
    for text, label in zip(texts, positive, strict=True):
        words = text.split()
        for i in range(0, max(1, len(words) - PIECE // 2), PIECE):
            pieces.append(" ".join(words[i : i + PIECE]))
            labels.append(bool(label))
        if len(pieces) >= PIECES:
            break
    return pieces, labels
