"""docs/one_step.md: every number on the page, computed with the project's own functions."""

import re
from pathlib import Path

from config import TrainConfig

import pytest
import torch
from conftest import run
from torch import Tensor, tensor

from model import Sequences
from ppo import Batch, Rollout, ppo_loss
from runtime.saved_run import SavedRun
from utils import compute_gae, explained_variance, inverse_std, masked_mean, shape_rewards, whiten

PAGE = (Path(__file__).parent.parent / "docs" / "one_step.md").read_text(encoding="utf-8")
CFG = TrainConfig(kl_coef=0.06, gae_lambda=0.95, value_coef=0.1)
MASK = tensor([[True, True, True], [True, True, False]])
LOGPROBS = tensor([[-1.0, -2.0, -0.5], [-1.6, -0.9, 0.0]])
REF_LOGPROBS = tensor([[-1.2, -1.5, -0.5], [-1.8, -0.3, 0.0]])
VALUES = tensor([[0.1, 0.3, 0.5], [0.1, -0.2, 0.0]])
SCORES = tensor([0.8, -0.4])
NEW_LOGPROBS = tensor([[-0.7, -1.9, -0.8], [-1.9, -0.8, 0.0]])
NEW_VALUES = tensor([[0.2, 0.6, 0.6], [0.0, -0.3, 0.0]])
TOKENS = ["A1 ` a`", "A2 ` joy`", "A3 end", "B1 ` dull`", "B2 end"]

SEQUENCES = Sequences.of(torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6).bool(), MASK, LOGPROBS)
ZEROS = torch.zeros(2, 3)
ROLLOUT = Rollout(SEQUENCES, LOGPROBS, REF_LOGPROBS, VALUES, ZEROS, ZEROS, ZEROS * torch.nan, SCORES, CFG.kl_coef)
KL = ROLLOUT.kl
REWARDS = shape_rewards(SCORES, KL, MASK, CFG.kl_coef)
ADVANTAGES, RETURNS = compute_gae(REWARDS, VALUES, MASK, CFG.gamma, CFG.gae_lambda)
DELTAS, _ = compute_gae(REWARDS, VALUES, MASK, CFG.gamma, gae_lambda=0.0)
WHITENED = whiten(ADVANTAGES, MASK)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table(*columns: tuple[str, Tensor]) -> list[str]:
    """A line of the page for each token: the form of each column, and its numbers (B, R)."""
    numbers = [[format(float(x) + 0.0, form) for x in column[MASK]] for form, column in columns]
    return [row(token, *cells) for token, *cells in zip(TOKENS, *numbers, strict=True)]


def test_what_was_observed_rewards_and_advantages() -> None:
    signed = "+.3f"
    lines = [
        *table((".3f", LOGPROBS), (".3f", REF_LOGPROBS), (signed, KL), (signed, VALUES)),
        *table((signed, REWARDS)),
        *table((signed, DELTAS), (signed, ADVANTAGES), (signed, RETURNS), (signed, WHITENED)),
    ]
    for line in lines:
        assert line in PAGE
    deviation = 1 / inverse_std(ADVANTAGES, MASK)
    assert (
        f"their mean ({masked_mean(ADVANTAGES, MASK):.3f}), divided by their standard deviation ({deviation:.3f})"
        in PAGE
    )


def test_the_loss_and_its_gradient() -> None:
    new_logprobs = NEW_LOGPROBS.clone().requires_grad_()
    batch = Batch(SEQUENCES, LOGPROBS, VALUES, WHITENED, RETURNS)
    loss, sums = ppo_loss(new_logprobs, NEW_VALUES, ZEROS, batch, CFG, MASK.sum())
    loss.backward()
    ratio = (NEW_LOGPROBS - LOGPROBS).exp()
    clipped = ratio.clamp(0.8, 1.2)
    token_loss = torch.maximum(-WHITENED * ratio, -WHITENED * clipped)
    clipped_values = VALUES + (NEW_VALUES - VALUES).clamp(-0.2, 0.2)
    value_loss = torch.maximum((NEW_VALUES - RETURNS) ** 2, (clipped_values - RETURNS) ** 2) / 2
    lines = [
        *table(
            (".3f", NEW_LOGPROBS), (".3f", ratio), (".3f", clipped), ("+.3f", token_loss), ("+.3f", new_logprobs.grad)
        ),
        *table(("+.3f", NEW_VALUES), ("+.3f", clipped_values), ("+.3f", RETURNS), (".3f", value_loss)),
    ]
    for line in lines:
        assert line in PAGE
    # what is written out on the page is what the code sums
    assert token_loss[MASK].sum().item() == pytest.approx(float(sums["policy_loss"]))
    assert value_loss[MASK].sum().item() == pytest.approx(float(sums["value_loss"]))
    total = f"{sums['policy_loss']:.3f} / 5 + 0.1 · {sums['value_loss']:.3f} / 5 = {loss:.3f}."
    assert total in PAGE


def test_the_columns_of_metrics_csv() -> None:
    batch = Batch(SEQUENCES, LOGPROBS, VALUES, WHITENED, RETURNS)
    _, sums = ppo_loss(NEW_LOGPROBS, NEW_VALUES, ZEROS, batch, CFG, MASK.sum())
    rewards_to_go = compute_gae(REWARDS, VALUES, MASK, CFG.gamma, gae_lambda=1.0)[1]
    values = ROLLOUT.metrics()
    values |= {name: float(x / 5) for name, x in sums.items()}
    values |= {"ratio_max": float(sums["ratio_max"]), "explained_var": explained_variance(rewards_to_go, VALUES, MASK)}
    section = PAGE.split("## 6.")[1].split("## The same")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", section, re.MULTILINE)
    assert len(rows) == 12
    for name, value in rows:
        assert value.lstrip("+") == f"{values[name]:.3f}", name


def test_the_functions_that_the_page_names_exist() -> None:
    names = set(re.findall(r"`(ppo|model|utils)\.(\w+)`", PAGE))
    assert len(names) == 8
    for module, function in names:
        assert hasattr(__import__(module), function)


def test_the_script_runs_on_a_run(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(flags)
    monkeypatch.chdir(folder.parent)
    script = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0].replace('Path("ckpts")', f"Path({folder.name!r})")
    capsys.readouterr()
    exec(script, {})
    out = capsys.readouterr().out
    assert SavedRun(Path(folder.name)).exists
    assert re.search(r"log pi -\d\.\d{3}  kl [+-]\d\.\d{3}  value [+-]", out)
    assert "'score_mean'" in out
    assert "'policy_loss'" in out
