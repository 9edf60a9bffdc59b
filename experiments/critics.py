"""How well can a critic foresee the score? Linear critics on what is known before each token, compared.

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

from config import TrainConfig, UserError, opt

import pandas as pd
import torch
from torch import Tensor

from experiments.gradients import Observed, observe
from model import GPT2WithValueHead
from runtime.cli import numbers, parse_config, parse_flags, run, words
from runtime.device import keep_freed_memory
from runtime.files import check_table_path, write_atomic
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
class Known:
    """What is known before each of n real tokens: features by name (n, …), position and final score (n,)."""

    features: dict[str, Tensor]
    position: Tensor
    score: Tensor


def main(argv: Sequence[str] | None = None) -> None:
    """Fit and measure every critic, and write the table (raises UserError)."""
    cfg = parse_flags(CriticsConfig, argv, __doc__)
    if min(cfg.fit, cfg.test) < 1 or not 0 <= cfg.ridge < math.inf:
        raise UserError("fit and test must be at least 1, and ridge at least 0")
    tokens = numbers("tokens", cfg.tokens, int)
    check_table_path(Path(cfg.csv))
    quiet_libraries()
    run_cfg = resolve(
        parse_config(TrainConfig, [*words("train", cfg.train), "--eval_every=0", "--gamma=1", "--reward_every=1"])
    )
    parts = load_parts(run_cfg)
    keep_freed_memory()
    policy, batches = parts.models.policy, list[Known]()
    for batch in timed(range(1, cfg.fit + cfg.test + 1), "observing responses", "batch"):
        observed = observe(parts, run_cfg, batch)
        batches.append(look(policy, observed, run_cfg.max_new_tokens))
    fit, test = gather(batches[: cfg.fit]), gather(batches[cfg.fit :])
    rows = [{"critic": name, **explained(fit, test, chosen, cfg.ridge, tokens)} for name, chosen in CRITICS.items()]
    table = pd.DataFrame(rows).assign(train=cfg.train)
    write_atomic(Path(cfg.csv), table.to_csv(index=False, float_format="%.3f", lineterminator="\n"))
    print(table.drop(columns="train").to_string(index=False, float_format="%.2f"))


@torch.no_grad()
def look(policy: GPT2WithValueHead, observed: Observed, width: int) -> Known:
    """The features before each real token of responses of up to `width` tokens."""
    seqs, scores = observed.seqs, observed.scores
    mask, real = seqs.attention_mask[:, :-1], seqs.response_mask
    layers = policy.lm.transformer(
        input_ids=seqs.tokens[:, :-1],
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
        output_hidden_states=True,
    ).hidden_states
    last, middle = (layers[i][:, seqs.prompt_len - 1 :] for i in (-1, len(layers) // 2))
    places = torch.arange(real.shape[1], device=real.device)
    before = torch.cat([torch.zeros_like(scores)[:, None], observed.partial_scores[:, :-1].nan_to_num(0.0)], 1)
    features = {
        "partial": before[..., None] * torch.eye(width, device=real.device)[places],  # a slope for each position
        "last": last,
        "middle": middle,
        "mean": last.cumsum(1) / (1 + places[:, None]),
    }
    position, score = places.expand_as(real), scores[:, None].expand_as(real)
    return Known({name: x[real] for name, x in features.items()}, position[real], score[real])


def gather(batches: Sequence[Known]) -> Known:
    """Several batches as one."""
    features = {name: torch.cat([batch.features[name] for batch in batches]) for name in batches[0].features}
    return Known(features, *(torch.cat([getattr(batch, name) for batch in batches]) for name in ("position", "score")))


def explained(fit: Known, test: Known, chosen: Sequence[str], ridge: float, tokens: Sequence[int]) -> dict[str, float]:
    """The share of the final score's variance that a critic on the chosen features explains, in all and by token."""
    width = int(fit.position.max()) + 1
    scale = torch.cat([fit.features[name] for name in chosen], 1).double().std(0).clamp(min=1e-6)

    def design(known: Known) -> Tensor:
        scaled = torch.cat([known.features[name] for name in chosen], 1).double() / scale
        place = torch.nn.functional.one_hot(known.position.clamp(max=width - 1), width).double()
        return torch.cat([scaled, place], 1)

    x, y = design(fit), fit.score.double()
    penalty = torch.cat([torch.full_like(scale, ridge), torch.ones(width, device=scale.device)])
    weights = torch.linalg.solve(x.T @ x + penalty.diag(), x.T @ y)
    target = test.score.double()
    error = target - design(test) @ weights
    at = {"all tokens": torch.ones_like(target, dtype=torch.bool)}
    at |= {f"before token {t}": test.position == t - 1 for t in tokens}
    return {
        name: float(1 - error[rows].var() / target[rows].var()) if rows.sum() > 1 else math.nan
        for name, rows in at.items()
    }


if __name__ == "__main__":
    sys.exit(run(main))
