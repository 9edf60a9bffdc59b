"""How much of a gradient is signal: against closed forms, against PPO's own loss, and end to end."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from config import TrainConfig, UserError
from model import GPT2WithValueHead, Sequences
from ppo import Batch, ppo_loss
from tools.gradients import Moments, main, policy_gradient, seen


def test_signal_and_noise_are_told_apart() -> None:
    """Gradients of known mean, spread and angle; the estimate is unbiased, so that many weights pin it down."""
    generator = torch.Generator().manual_seed(0)
    weights, batches, spread = 200_000, 8, 3.0
    true, other = torch.randn(2, weights, generator=generator)
    biased = 0.6 * true + 0.3 * other
    here, there = Moments(), Moments()
    for _ in range(batches):
        noise, more = spread * torch.randn(2, weights, generator=generator)
        here.add(true + noise, true + noise)
        there.add(biased + 0.5 * noise + 0.5 * more, true + noise)  # noise that both have is no agreement
    even = torch.ones(weights)
    found, unlike = here.figures(here, even, 10), there.figures(here, even, 10)
    assert found["signal_to_noise"] == pytest.approx(1 / spread**2, rel=0.03)
    assert found["responses"] == pytest.approx(10 * spread**2, rel=0.03)
    assert found["cosine"] == pytest.approx(1) == found["length"]
    assert unlike["length"] == pytest.approx(0.45**0.5, rel=0.03)
    assert unlike["cosine"] == pytest.approx(0.6 / 0.45**0.5, rel=0.03)
    assert unlike["signal_to_noise"] == pytest.approx(0.45 / (spread**2 / 2), rel=0.03)


def test_weights_count_as_told() -> None:
    generator = torch.Generator().manual_seed(1)
    one = Moments()
    for _ in range(6):
        one.add(*[torch.cat([1 + torch.randn(50_000, generator=generator), torch.randn(50_000)])] * 2)
    only_signal = torch.cat([torch.ones(50_000), torch.zeros(50_000)])
    assert one.figures(one, only_signal, 1)["signal_to_noise"] == pytest.approx(1, rel=0.05)


def test_nothing_but_noise_is_said_to_be_unknown() -> None:
    one = Moments()
    for sign in (1.0, -1.0):
        one.add(torch.tensor([sign, 0.0]), torch.tensor([sign, 0.0]))
    assert pd.isna(one.figures(one, torch.ones(2), 1)["cosine"])


def test_the_gradient_is_that_of_ppos_loss(gpt2_dir: Path) -> None:
    policy = GPT2WithValueHead.from_pretrained(str(gpt2_dir))
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 250, (5, 11), generator=generator)
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[1, 3:] = mask[4, 1:] = False
    attention = torch.cat([torch.ones(5, 5, dtype=torch.bool), mask], 1)
    seqs = Sequences(tokens, attention, mask, torch.zeros(5, 6))
    credit = torch.where(mask, torch.randn(5, 6, generator=generator), 0)
    found = policy_gradient(policy, seqs, credit, 2)

    policy.zero_grad()
    new = policy.evaluate_responses(seqs)
    batch = Batch(seqs, new[0].detach(), new[1].detach(), credit, new[1].detach())
    ppo_loss(*new, batch, TrainConfig(value_coef=0.0), mask.sum())[0].backward()
    expected = torch.cat([weight.grad.flatten() for weight in policy.lm.parameters() if weight.grad is not None])
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.norm() > 0.01


def test_coarser_scores_are_a_part_of_finer_ones() -> None:
    running = torch.arange(1.0, 8.0)[None]
    every_third = seen(running, 3)
    assert every_third is not None
    assert every_third[~every_third.isnan()].tolist() == [3, 6]
    assert torch.equal(seen(running, 1), running)  # type: ignore[arg-type]
    assert seen(running, 0) is None


def test_table(flags: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(f"--{name}={value}" for name, value in flags.items())
    table = tmp_path / "deep" / "gradients.csv"
    main(["--groups=3", "--reward_every=2,0", "--gae_lambda=0.5,1", f"--csv={table}", f"--train={words}"])
    rows = pd.read_csv(table)
    assert list(zip(rows.reward_every, rows.gae_lambda, strict=True)) == [(0, 1), (2, 0.5), (2, 1), (0, 0.5)]
    assert (rows.groups == 3).all()
    assert (rows.batch == 8).all()
    assert rows.signal_to_noise.notna().all()
    capsys.readouterr()
    main([f"--draw={table}"])
    assert "signal_to_noise" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--groups=1"], ["--reward_every=a"], ["--draw=none.csv"]])
def test_wrong_input_is_one_line(wrong: list[str], flags: dict[str, str]) -> None:
    with pytest.raises(UserError):
        main([f"--train={' '.join(f'--{name}={value}' for name, value in flags.items())}", *wrong])
