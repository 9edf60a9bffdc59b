"""Estimators of KL against autograd of the enumerated KL, and the table of docs/pitfalls.md."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments.kl_estimators import ESTIMATORS, Language, main, markdown, measure

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def language() -> Language:
    return Language(seed=0)


@pytest.fixture(scope="module")
def table(language: Language) -> pd.DataFrame:
    return measure(language).set_index(["estimator", "place"])


def gradient_of_kl(language: Language, forward: bool) -> torch.Tensor:
    """By autograd: of KL(pi || ref) over responses, or of KL(ref || pi) at each prefix that pi reaches."""
    logits = language.logits.clone().requires_grad_()
    logprobs, x = language.log_ratios(logits)
    if not forward:
        (logprobs.sum(1).exp() * x.sum(1)).sum().backward()
    else:
        p, q = torch.log_softmax(logits, -1), torch.log_softmax(language.ref_logits, -1)
        token_kl = (q.exp() * (q - p)).sum(1)
        (logprobs.sum(1).exp().detach() @ token_kl[language.states].sum(1)).backward()
    assert logits.grad is not None
    return logits.grad.flatten()


def test_the_figures_are_those_of_autograd(language: Language, table: pd.DataFrame) -> None:
    """The mean gradient of each estimator, differentiated over all responses, lies as far from the true one as told."""
    true = gradient_of_kl(language, forward=False)
    for name, place in table.index:
        if name not in ESTIMATORS:
            continue
        logits = language.logits.clone().requires_grad_()
        logprobs, x = language.log_ratios(logits)
        values = ESTIMATORS[name](x).sum(1)
        chance = logprobs.sum(1).exp()
        (chance @ values.detach() if place == "reward" else chance.detach() @ values).backward()
        assert logits.grad is not None
        bias = (logits.grad.flatten() - true).norm() / true.norm()
        assert table.bias[name, place] == pytest.approx(bias.item(), abs=1e-6)
    assert table.kl.iloc[0] == pytest.approx(table["mean"]["k1", "reward"])
    assert table["mean"]["k3", "reward"] == pytest.approx(table.kl.iloc[0])


def test_k1_in_the_reward_is_right_and_k1_in_the_loss_is_noise(table: pd.DataFrame) -> None:
    assert table.bias["k1", "reward"] < 1e-9
    assert table.bias["k1 upside down", "reward"] == pytest.approx(2)
    assert table.bias["k1", "loss"] == pytest.approx(1)
    assert table.noise["k1", "loss"] > 1


def test_k3_in_the_loss_pulls_by_the_other_kl(language: Language, table: pd.DataFrame) -> None:
    true, other = (gradient_of_kl(language, forward) for forward in (False, True))
    assert table.bias["k3", "loss"] == pytest.approx(((other - true).norm() / true.norm()).item(), abs=1e-6)


def test_the_exact_kl_has_k2s_gradient_without_its_noise(table: pd.DataFrame) -> None:
    exact, k2 = table.loc["exact, token by token", "loss"], table.loc["k2", "loss"]
    assert exact.bias == pytest.approx(k2.bias)
    assert exact.noise < k2.noise / 2


def test_the_page_has_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--csv", str(tmp_path / "a.csv")])
    assert (tmp_path / "a.csv").read_text() == (ROOT / "results" / "kl_estimators.csv").read_text()
    printed = capsys.readouterr().out.strip()
    assert printed == markdown(pd.read_csv(tmp_path / "a.csv"))
    assert printed in (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
