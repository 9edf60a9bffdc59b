"""Which estimator of KL belongs where: bias and noise of k1, k2 and k3 in the reward and in the loss, by enumeration.

    python -m experiments.kl_estimators --csv results/kl_estimators.csv

A language of VOCABULARY tokens and responses of LENGTH tokens is small enough to sum over all of it, so every figure is
exact. Policy and reference are tables of logits, a row for each prefix. With x = log pi - log ref of a sampled token,
the estimators of Schulman 2020 are k1 = x, k2 = x^2 / 2 and k3 = exp(-x) - 1 + x. In the reward an estimator is a
number: its gradient is its sum over the response times grad log pi(y). In the loss it is differentiated itself.
"""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from config import opt

import pandas as pd
import torch
from torch import Tensor

from experiments.runner import markdown_row, write_table
from runtime.cli import parse_flags, run

VOCABULARY, LENGTH = 6, 4
APART = 0.7  # standard deviation of the policy's logits less the reference's
Estimator = Callable[[Tensor], Tensor]
ESTIMATORS: dict[str, Estimator] = {
    "k1": lambda x: x,
    "k2": lambda x: x**2 / 2,
    "k3": lambda x: (-x).exp() - 1 + x,
    "k1 upside down": lambda x: -x,
    "k3 upside down": lambda x: x.exp() - 1 - x,
}
EXACT = "exact, token by token"


@dataclass(frozen=True, kw_only=True)
class EstimatorsConfig:
    """Settings of `python -m experiments.kl_estimators`."""

    seed: int = opt(0, "Seed of the logits.")
    csv: str | None = opt(None, "Table to write (default: only print).", path="written")


def main(argv: list[str] | None = None) -> None:
    """Print the table, and write it."""
    cfg = parse_flags(EstimatorsConfig, argv, __doc__)
    table = measure(Language(cfg.seed))
    print(markdown(table))
    if cfg.csv:
        write_table(Path(cfg.csv), table)


class Language:
    """All responses (N,) with their probabilities, the log ratios x (N, LENGTH), and grad log pi of every token."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        prefixes = [y for n in range(LENGTH) for y in itertools.product(range(VOCABULARY), repeat=n)]
        number = {prefix: i for i, prefix in enumerate(prefixes)}
        responses = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
        self.states = torch.tensor([[number[y[:t]] for t in range(LENGTH)] for y in responses])
        self.tokens = torch.tensor(responses)
        shape = (len(prefixes), VOCABULARY)
        self.ref_logits = torch.randn(shape, generator=random, dtype=torch.float64)
        self.logits = self.ref_logits + APART * torch.randn(shape, generator=random, dtype=torch.float64)

    def log_ratios(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (N, LENGTH) under a policy of these logits, and x (N, LENGTH)."""
        logprobs = torch.log_softmax(logits, -1)[self.states, self.tokens]
        return logprobs, logprobs - torch.log_softmax(self.ref_logits, -1)[self.states, self.tokens]

    def scores(self) -> Tensor:
        """Grad log pi of every token, in the logits of its prefix: (N, LENGTH, VOCABULARY)."""
        chosen = torch.nn.functional.one_hot(self.tokens, VOCABULARY).double()
        return chosen - torch.softmax(self.logits, -1)[self.states]

    def place(self, gradients: Tensor) -> Tensor:
        """Gradients (N, LENGTH, VOCABULARY), each in the logits of its prefix, as gradients of all logits (N, D)."""
        whole = torch.zeros(len(gradients), *self.logits.shape, dtype=torch.float64)
        rows = torch.arange(len(gradients))[:, None].expand_as(self.states)
        return whole.index_put((rows, self.states), gradients, accumulate=True).flatten(1)


def measure(language: Language) -> pd.DataFrame:
    """A row for each estimator and place: its mean and deviation, and bias and noise of its gradient.

    The gradient's bias is |mean - true| / |true|, its noise the root of the total variance / |true|, of one response.
    """
    logprobs, x = language.log_ratios(language.logits)
    chance = logprobs.sum(1).exp()
    scores = language.scores()
    of_response = language.place(scores)
    kl = float(chance @ x.sum(1))
    true = chance @ ((x.sum(1) - kl)[:, None] * of_response)

    def row(name: str, place: str, values: Tensor, gradients: Tensor) -> dict[str, object]:
        mean = float(chance @ values)
        average = chance @ gradients
        variance = chance @ (gradients - average).square().sum(1)
        return {
            "estimator": name,
            "place": place,
            "kl": kl,
            "mean": mean,
            "deviation": float(chance @ (values - mean).square()) ** 0.5,
            "cosine": float(torch.cosine_similarity(average, true, 0)) if average.norm() > 1e-9 else float("nan"),
            "bias": float((average - true).norm() / true.norm()),
            "noise": float(variance.sqrt() / true.norm()),
        }

    rows = []
    for name, estimator in ESTIMATORS.items():
        values = estimator(x).sum(1)
        centred = (values - chance @ values)[:, None]  # a baseline: it changes no mean
        rows.append(row(name, "reward", values, centred * of_response))
    slopes: dict[str, Estimator] = {"k1": torch.ones_like, "k2": lambda x: x, "k3": lambda x: 1 - (-x).exp()}
    for name, slope in slopes.items():
        gradients = language.place(slope(x)[..., None] * scores)
        rows.append(row(name, "loss", ESTIMATORS[name](x).sum(1), gradients))
    # the exact KL of each token's distribution: d KL / d z_j = p_j (log p_j - log q_j - KL)
    p = torch.softmax(language.logits, -1)
    log_ratio = torch.log_softmax(language.logits, -1) - torch.log_softmax(language.ref_logits, -1)
    exact = (p * log_ratio).sum(1)
    gradients = language.place((p * (log_ratio - exact[:, None]))[language.states])
    rows.append(row(EXACT, "loss", exact[language.states].sum(1), gradients))
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """The table as docs/pitfalls.md has it."""
    lines = [
        markdown_row("estimator", "in the", "mean", "deviation", "gradient: cosine", "bias, %", "noise"),
        markdown_row(*["---"] * 7),
    ]
    for row in table.to_dict("records"):
        cosine = "no direction" if math.isnan(row["cosine"]) else f"{row['cosine']:+.2f}"
        figures = [f"{row['mean']:+.2f}", f"{row['deviation']:.2f}", cosine, f"{100 * row['bias']:.0f}"]
        lines.append(markdown_row(row["estimator"], row["place"], *figures, f"{row['noise']:.1f}"))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
