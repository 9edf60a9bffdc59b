"""How well can a critic foresee the score? Linear critics on what there is before each token, compared.

    python -m experiments.critics --csv critics.csv --train "--policy_name gpt2"

Each critic is a ridge regression of the final score on its features and the position, fitted in closed form to some
batches of the policy's responses and measured on others. So a number is what such a critic has at best after fit * 64
responses, however it is trained. A column says how much of the score's variance it explains before token 1, 16, ….
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from config import UserError, opt

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.gradients import Observed, observe, observed_settings
from experiments.runner import write_table
from model import GPT2WithValueHead
from runtime.cli import numbers, parse_flags, run
from runtime.device import keep_freed_memory
from runtime.files import check_table_path
from runtime.hub import quiet_libraries
from training.estimate import timed
from training.parts import load_parts, resolve
from utils import position_ids

CRITICS = {
    "partial score": ["partial"],
    "last hidden state": ["last"],
    "hidden state of the middle layer": ["middle"],
    "mean of the last hidden states so far": ["mean"],
    "last hidden state and that mean": ["last", "mean"],
    "partial score and last hidden state": ["partial", "last"],
}


@dataclass(frozen=True, kw_only=True)
class CriticsConfig:
    """Settings of `python -m experiments.critics`."""

    train: str = opt("", "Flags of train.py: models, data, lengths, batch_size.")
    fit: int = opt(16, "Batches to fit the critics to.")
    test: int = opt(8, "Batches to measure them on.")
    ridge: float = opt(300.0, "Penalty on the weights of features scaled to deviation 1.")
    tokens: str = opt("1,16,32,48", "Tokens before which the explained variance is shown as well.")
    csv: str = opt("critics.csv", "Table to write.", path="written")


@dataclass(frozen=True, eq=False)
class Examples:
    """What a critic sees before each of n real tokens, and what it must foresee.

    features by name (n, …), position of the token in the response (n,), final score (n,).
    """

    features: dict[str, Tensor]
    position: Tensor
    score: Tensor

    def design(self, names: Sequence[str], scale: Tensor, width: int) -> Tensor:
        """The chosen features, divided by scale, beside a constant for each of `width` positions: (n, …), float64."""
        chosen = torch.cat([self.features[name] for name in names], 1).double() / scale
        place = F.one_hot(self.position.clamp(max=width - 1), width).double()
        return torch.cat([chosen, place], 1)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit and measure every critic, and write the table."""
    cfg = parse_flags(CriticsConfig, argv, __doc__)
    if min(cfg.fit, cfg.test) < 1 or not 0 <= cfg.ridge < math.inf:
        raise UserError("fit and test must be at least 1, and ridge at least 0")
    tokens = numbers("tokens", cfg.tokens, int)
    check_table_path(Path(cfg.csv))
    quiet_libraries()
    run_cfg = resolve(observed_settings(cfg.train))
    parts = load_parts(run_cfg)
    keep_freed_memory()
    batches = []
    for batch in timed(range(1, cfg.fit + cfg.test + 1), "observing responses", "batch"):
        observed = observe(parts, run_cfg, batch)
        batches.append(examples(parts.models.policy, observed, run_cfg.max_new_tokens))
    fit, test = join(batches[: cfg.fit]), join(batches[cfg.fit :])
    rows = [{"critic": name, **explained(fit, test, features, cfg.ridge, tokens)} for name, features in CRITICS.items()]
    table = pd.DataFrame(rows)
    write_table(Path(cfg.csv), table.assign(train=cfg.train), "%.3f")
    print(table.to_string(index=False, float_format="%.2f"))


@torch.no_grad()
def examples(policy: GPT2WithValueHead, observed: Observed, width: int) -> Examples:
    """The features before each real token of responses of up to `width` tokens."""
    seqs, real = observed.seqs, observed.seqs.response_mask
    mask = seqs.attention_mask[:, :-1]
    layers = policy.lm.transformer(
        input_ids=seqs.tokens[:, :-1],
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
        output_hidden_states=True,
    ).hidden_states
    last = layers[-1][:, seqs.prompt_len - 1 :]
    middle = layers[len(layers) // 2][:, seqs.prompt_len - 1 :]
    places = torch.arange(real.shape[1], device=real.device)
    partial = F.pad(observed.partial_scores[:, :-1].nan_to_num(0.0), (1, 0))  # of what is there before each token
    features = {
        "partial": partial[..., None] * torch.eye(width, device=real.device)[places],  # a slope for each position
        "last": last,
        "middle": middle,
        "mean": last.cumsum(1) / (1 + places[:, None]),
    }
    of_real_tokens = {name: x[real] for name, x in features.items()}
    return Examples(of_real_tokens, places.expand_as(real)[real], observed.scores[:, None].expand_as(real)[real])


def join(batches: Sequence[Examples]) -> Examples:
    """Several batches as one."""
    names = batches[0].features
    return Examples(
        {name: torch.cat([batch.features[name] for batch in batches]) for name in names},
        torch.cat([batch.position for batch in batches]),
        torch.cat([batch.score for batch in batches]),
    )


def explained(
    fit: Examples, test: Examples, names: Sequence[str], ridge: float, tokens: Sequence[int]
) -> dict[str, float]:
    """The share of the final score's variance that a critic on the named features explains, in all and by token."""
    # 1. ridge regression in closed form
    width = int(fit.position.max()) + 1
    scale = torch.cat([fit.features[name] for name in names], 1).double().std(0).clamp(min=1e-6)
    penalty = torch.cat([torch.full_like(scale, ridge), torch.ones(width, device=scale.device)])
    x = fit.design(names, scale, width)
    weights = torch.linalg.solve(x.T @ x + penalty.diag(), x.T @ fit.score.double())
    # 2. its errors on other responses
    target = test.score.double()
    error = target - test.design(names, scale, width) @ weights
    rows = {"all tokens": torch.ones_like(target, dtype=torch.bool)}
    for token in tokens:
        rows[f"before token {token}"] = test.position == token - 1
    shares = {}
    for name, chosen in rows.items():
        is_defined = chosen.sum() > 1
        shares[name] = float(1 - error[chosen].var() / target[chosen].var()) if is_defined else math.nan
    return shares


if __name__ == "__main__":
    sys.exit(run(main))
