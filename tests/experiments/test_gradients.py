"""How much of a gradient is signal: against closed forms, against PPO's own loss, and end to end."""

import math
from pathlib import Path
from types import SimpleNamespace

from config import TrainConfig, UserError

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import gradients
from experiments.gradients import REINFORCE, GradientsConfig, Observed, Products, advantages, main, policy_gradient
from model import GPT2WithValueHead, Sequences
from ppo import Batch, ppo_loss
from training import estimate

WEIGHTS = 100_000


def products(seed: int, batches: int, spread: float) -> tuple[Products, Products, torch.Tensor]:
    """Two ways: one that is right, and one at a known angle to it with half of its noise."""
    generator = torch.Generator().manual_seed(seed)
    true, other = torch.randn(2, WEIGHTS, generator=torch.Generator().manual_seed(10_000))
    biased = 0.6 * true + 0.3 * other
    here, there = Products(), Products()
    for _ in range(batches):
        noise, more = spread * torch.randn(2, WEIGHTS, generator=generator)
        before = here.total
        here.add(true + noise, true + noise, before)
        there.add(biased + 0.5 * noise + 0.5 * more, true + noise, before)  # noise that both have is no agreement
    return here, there, true


def test_signal_and_noise_are_separated() -> None:
    here, there, _ = products(0, 12, 3.0)
    found, unlike = here.figures(here, 10), there.figures(here, 10)
    assert found["signal_to_noise"] == pytest.approx(1 / 9, rel=0.03)
    assert found["responses"] == pytest.approx(10 * 9, rel=0.03)
    assert found["cosine"] == pytest.approx(1) == found["length"]
    assert unlike["length"] == pytest.approx(0.45**0.5, rel=0.03)
    assert unlike["cosine"] == pytest.approx(0.6 / 0.45**0.5, rel=0.03)
    assert unlike["signal_to_noise"] == pytest.approx(0.45 / (9 / 2), rel=0.03)


def test_every_pair_of_batches_counts_once() -> None:
    gradients = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    one = Products()
    for gradient in gradients:
        one.add(gradient, gradient, one.total)
    gram = (gradients @ gradients.T).numpy()
    assert one.signal()[0] == pytest.approx(gram[np.triu_indices(5, 1)].mean(), rel=1e-4)


def test_the_standard_error_is_the_spread_of_repetitions() -> None:
    estimates, errors = zip(*(products(seed, 8, 25.0)[0].signal() for seed in range(120)), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(estimates), rel=0.25)


def test_what_noise_hides_is_left_out() -> None:
    generator = torch.Generator().manual_seed(5)
    hidden, nothing = Products(), Products()
    for _ in range(6):
        gradient = torch.randn(50, generator=generator)
        hidden.add(gradient, gradient, hidden.total)
        nothing.add(torch.zeros(3), torch.zeros(3), nothing.total)
    assert math.isnan(hidden.figures(hidden, 1)["cosine"])
    assert math.isfinite(hidden.figures(hidden, 1)["signal_to_noise"])
    assert all(math.isnan(x) for x in nothing.figures(nothing, 1).values()), "a reward that is always the same"


def observed() -> Observed:
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(9, 6, dtype=torch.bool)
    mask[1, 3:] = mask[4, 1:] = False
    attention = torch.cat([torch.ones(9, 5, dtype=torch.bool), mask], 1)
    tokens = torch.randint(0, 250, (9, 11), generator=generator)
    partial = torch.where(mask & mask.roll(-1, 1), torch.rand(9, 6, generator=generator), math.nan)
    partial[:, -1] = math.nan
    return Observed(
        Sequences.of(tokens, attention, mask, torch.zeros(9, 6)), torch.rand(9, generator=generator), partial
    )


def test_reinforce_pays_all_tokens_what_the_response_scored_above_the_others() -> None:
    seen = observed()
    for row, others in enumerate(~torch.eye(9, dtype=torch.bool)):
        above = seen.scores[row] - seen.scores[others].mean()
        expected = torch.where(seen.seqs.response_mask[row], above, 0)
        assert torch.allclose(advantages(seen, REINFORCE)[row], expected, atol=1e-6)


def test_ways_differ_and_the_sums_agree() -> None:
    seen = observed()
    ways = {way: advantages(seen, way) for way in ((1, 0.0), (1, 1.0), (2, 0.0), (2, 1.0), (0, 0.0))}
    for one, other in (((1, 0.0), (2, 0.0)), ((1, 0.0), (1, 1.0)), ((2, 0.0), (0, 0.0))):
        assert not torch.allclose(ways[one], ways[other])
    for every in (1, 2):  # with lambda 1 the first token gets all payments, with 0 each its own
        assert torch.allclose(ways[every, 1.0][:, 0], ways[every, 0.0].sum(1), atol=1e-6)


@pytest.mark.parametrize("way", [REINFORCE, (1, 0.5)])
def test_the_gradient_is_that_of_ppos_loss(gpt2_dir: Path, way: tuple[int, float]) -> None:
    policy, seen = GPT2WithValueHead.from_pretrained(str(gpt2_dir)), observed()
    found = policy_gradient(policy, seen, way, TrainConfig(batch_size=9, minibatch_size=9, micro_batch_size=2))

    policy.zero_grad()
    new = policy.evaluate_responses(seen.seqs)
    batch = Batch(seen.seqs, new[0].detach(), new[1].detach(), advantages(seen, way), new[1].detach())
    ppo_loss(*new, batch, TrainConfig(value_coef=0.0), seen.seqs.response_mask.sum())[0].backward()
    expected = torch.cat([weight.grad.flatten() for weight in policy.lm.parameters() if weight.grad is not None])
    assert torch.allclose(found, expected, atol=1e-5)
    assert found.norm() > 0.01


def test_weights_count_as_they_do_for_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signal and noise of known gradients, of very unequal size, against the formula of the module's docstring."""
    batches = torch.randn(6, 40, generator=torch.Generator().manual_seed(4)) + 1
    batches = (batches * torch.logspace(-3, 1, 40)).double()
    ways = {REINFORCE: batches, (1, 0.5): batches.flip(1)}
    parts = SimpleNamespace(models=SimpleNamespace(policy=None))
    monkeypatch.setattr(gradients, "observe", lambda parts, run, batch: batch - 1)
    monkeypatch.setattr(gradients, "policy_gradient", lambda policy, batch, way, run: ways[way][batch])
    monkeypatch.setattr(gradients, "load_parts", lambda cfg: parts)
    monkeypatch.setattr(gradients, "resolve", lambda cfg: cfg)
    rows = gradients.measure(GradientsConfig(batches=4, pilot=2, reward_every="1", gae_lambda="0.5"))
    size = batches[:2].square().mean(0).sqrt()
    for row, way in zip(rows.to_dict("records"), ways, strict=True):
        scaled = (ways[way][2:] / (size + size.mean()).sqrt()).numpy()
        gram = scaled @ scaled.T
        signal = gram[np.triu_indices(4, 1)].mean()
        assert row["signal_to_noise"] == pytest.approx(signal / (gram.trace() / 4 - signal), rel=1e-6)


def test_table(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = " ".join(f"--{name}={value}" for name, value in flags.items())
    table = tmp_path / "deep" / "gradients.csv"
    monkeypatch.setattr(estimate, "SHORT", 0.0)
    main(
        [
            "--batches=3",
            "--pilot=1",
            "--reward_every=2,0",
            "--gae_lambda=0.5,1",
            f"--csv={table}",
            f"--train={words} --gamma=0.9 --reward_every=0",
        ]
    )
    rows = pd.read_csv(table).set_index(["reward_every", "gae_lambda"])
    assert list(rows.index) == [(0, 1), (2, 0.5), (2, 1), (0, 0.5)]
    assert rows.signal_to_noise.nunique() == 4
    assert (rows.batches == 3).all()
    assert (rows.batch == 8).all()
    said = capsys.readouterr().out
    assert "measuring gradients will take another" in said
    assert "signal_to_noise" in said


@pytest.mark.parametrize("wrong", [["--batches=2"], ["--reward_every=a"], ["--reward_every=-1"], ["--gae_lambda=7"]])
def test_wrong_input_is_refused_before_loading(wrong: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=wrong[0].partition("=")[0][2:]):
        main([f"--csv={tmp_path / 'a.csv'}", "--train=--policy_name=nowhere", *wrong])
    with pytest.raises(UserError, match="train="):
        main(["--train='--lr", f"--csv={tmp_path / 'a.csv'}"])
    with pytest.raises(UserError, match="csv="):
        main([f"--csv={tmp_path}"])
    with pytest.raises(UserError, match="batch_size=4 "):
        main(["--train=--policy_name=nowhere --batch_size=4 --minibatch_size=4"])
