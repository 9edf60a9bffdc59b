"""A second judge of sentiment that training never saw: a classifier, or naive Bayes over words and pairs of words.

Naive Bayes is fitted in seconds on the data set's own labels, on pieces about as long as a response. It shares no
weights, architecture or tokens with the reward, so a policy that exploits the reward's weaknesses does not fool it.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from config import EvalConfig, TrainConfig, UserError

import numpy as np
import torch

from data import load_labelled
from pretrain.tiny_world import resolve_name
from reward import SentimentReward, full_label
from runtime.fingerprints import texts_sha256
from runtime.terminal import progress
from training.run_record import reward_sha256

WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[!?]")
PIECE = 40  # words
PIECES = 20_000  # enough for the accuracy, and a matter of seconds


class Judge(NamedTuple):
    """A second judge: texts -> scores (n,), and a fingerprint of what it is made of."""

    score: Callable[[list[str]], np.ndarray]
    sha256: str


def second_judge(cfg: EvalConfig, run: TrainConfig) -> Judge | None:
    """The judge that --judge names, or one fitted on the data set's labels; None without either."""
    if cfg.judge == "none":
        return None
    if cfg.judge == "labels":
        return judge_of_labels(cfg, run)
    dtype = getattr(torch, run.dtype)
    model = SentimentReward(cfg.judge, run.target_label, device=run.device, dtype=dtype, setting="judge")
    return Judge(lambda texts: model(texts).cpu().numpy(), reward_sha256(model))


def judge_of_labels(cfg: EvalConfig, run: TrainConfig) -> Judge | None:
    """A judge fitted on the labels of the training split; None, with a note, where they do not tell enough."""
    try:
        texts, names = load_labelled(
            resolve_name(run.dataset, run.split),
            run.split,
            run.text_column,
            cfg.label_column,
            cfg.label_names,
            run.dataset_revision,
            run.dataset_config,
        )
    except UserError as error:
        if cfg.label_column != EvalConfig.label_column or cfg.label_names is not None:
            raise
        print(f"note: there is no second judge (see --judge): {error}")
        return None
    labelled = [(text, full_label(name)) for text, name in zip(texts, names, strict=True) if name is not None]
    is_target = [label == full_label(run.target_label) for _, label in labelled]
    if not 1 < sum(is_target) < len(is_target) - 1:
        labels = ", ".join(sorted({label for _, label in labelled})[:5]) or "none"
        print(
            f"note: column {cfg.label_column!r} of {run.dataset} does not separate {run.target_label} from other texts "
            f"(its labels: {labels}), so there is no second judge; see --label_column, --label_names and --judge"
        )
        return None
    judge = FittedJudge([text for text, _ in labelled], is_target)
    print(f"second judge: naive Bayes on the labels of {run.dataset}, right on {judge.accuracy:.0%} of held-out pieces")
    return Judge(judge.score, texts_sha256([f"{label} {text}" for text, label in labelled]))


# --- naive Bayes ----------------------------------------------------------------------------------------------------


class FittedJudge:
    """score = 2 P(positive) - 1 by naive Bayes on presence (Wang & Manning 2012), calibrated on held-out pieces."""

    def __init__(self, texts: Sequence[str], positive: Sequence[bool], seed: int = 0) -> None:
        """Fit on nine tenths of the texts (labels: is it positive?); accuracy is that on pieces of the last tenth."""
        # 1. set a tenth aside
        order = np.random.default_rng(seed).permutation(len(texts))
        n_held_out = max(1, len(order) // 10)
        train = _pieces(texts, positive, order[n_held_out:])
        held_out = _pieces(texts, positive, order[:n_held_out])
        # 2. count in how many pieces of each kind a feature occurs
        counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        for piece, label in progress(train, "second judge", "piece"):
            counts[label].update(features(piece))
        n_positive = sum(label for _, label in train)
        n_negative = len(train) - n_positive
        self.log_ratio = {}
        for feature in counts[True] | counts[False]:
            log_share_positive = np.log((counts[True][feature] + 1) / (n_positive + 2))
            log_share_negative = np.log((counts[False][feature] + 1) / (n_negative + 2))
            self.log_ratio[feature] = float(log_share_positive - log_share_negative)
        # 3. calibrate on what was set aside
        pieces = [piece for piece, _ in held_out]
        truth = np.array([label for _, label in held_out])
        evidence = np.array([self._evidence(piece) for piece in pieces])
        self.slope, self.offset = fit_line(evidence, truth.astype(float))
        self.accuracy = float(((self.score(pieces) > 0) == truth).mean())

    def score(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> scores (n,) in [-1, 1]."""
        evidence = np.array([self._evidence(text) for text in texts])
        return np.tanh((self.slope * evidence + self.offset) / 2)

    def _evidence(self, text: str) -> float:
        return math.fsum(self.log_ratio.get(f, 0.0) for f in features(text))  # exact: sets have no fixed order


def fit_line(x: np.ndarray, y: np.ndarray, ridge: float = 1e-3) -> tuple[float, float]:
    """Slope and offset of a logistic regression in one variable, by Newton's method.

    Naive Bayes alone is overconfident.
    """
    scale = x.std() or 1.0
    design, theta = np.stack([x / scale, np.ones_like(x)], 1), np.zeros(2)
    for _ in range(25):
        p = 1 / (1 + np.exp(-design @ theta))
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + ridge * len(x) * np.eye(2)
        theta -= np.linalg.solve(hessian, design.T @ (p - y) + ridge * len(x) * theta)
    return float(theta[0] / scale), float(theta[1])


def features(text: str) -> set[str]:
    """The words of a text and its pairs of neighbours."""
    words = WORD.findall(text.lower())
    return {*words, *map(" ".join, itertools.pairwise(words))}


def _pieces(texts: Sequence[str], positive: Sequence[bool], rows: np.ndarray) -> list[tuple[str, bool]]:
    """Some texts cut into pieces of PIECE words, each with the label of the whole; PIECES, and a few, at most."""
    pieces: list[tuple[str, bool]] = []
    for row in rows:
        words = texts[row].split()
        for i in range(0, max(1, len(words) - PIECE // 2), PIECE):
            pieces.append((" ".join(words[i : i + PIECE]), bool(positive[row])))
        if len(pieces) >= PIECES:
            break
    return pieces
