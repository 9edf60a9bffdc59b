"""Warnings: none for a healthy run, one for each thing that looks wrong."""

from config import TrainConfig

import pytest

from training.diagnostics import Diagnostics

HEALTHY = {
    "kl_seq": 2.0,
    "kl_seq_exact": 2.0,
    "ratio_max": 1.5,
    "clip_frac": 0.02,
    "entropy": 4.0,
    "distinct_rate": 1.0,
    "explained_var": 0.2,
    "positive_rate": 0.6,
    "skipped": 0,
    "updates": 8,
    "response_len": 40.0,
}


SICK = {
    "kl_seq": (-5.0, "--check"),
    "kl_seq_exact": (50.0, "--kl_coef"),
    "ratio_max": (40.0, "--lr"),
    "clip_frac": (0.5, "--ppo_epochs"),
    "entropy": (0.5, "--ent_coef"),
    "distinct_rate": (0.1, "samples.csv"),
    "explained_var": (-3.0, "--value_coef"),
    "skipped": (2, "--lr"),
}


def test_a_healthy_run_gets_no_warning() -> None:
    diagnostics = Diagnostics(TrainConfig())
    assert not any(diagnostics.warnings(HEALTHY) for _ in range(30))
    for reward_every, gae_lambda in ((0, 1.0), (1, 0.0)):
        assert not Diagnostics(TrainConfig(reward_every=reward_every, gae_lambda=gae_lambda)).warnings(HEALTHY)


@pytest.mark.parametrize(
    "asked",
    [
        TrainConfig(reward_every=0),
        TrainConfig(reward_every=0, gae_lambda=0.95),
        TrainConfig(reward_every=64),
        TrainConfig(batch_size=4, minibatch_size=4),
    ],
)
def test_a_score_that_reaches_no_early_token_is_warned_of(asked: TrainConfig) -> None:
    diagnostics = Diagnostics(asked)
    given = [text for _ in range(3) for text in diagnostics.warnings(HEALTHY)]
    assert len(given) == 1
    assert "--gae_lambda 1" in given[0]


@pytest.mark.parametrize("kl_in_loss", [False, True])
def test_short_responses_are_warned_of_and_a_passing_dip_is_not(kl_in_loss: bool) -> None:
    diagnostics = Diagnostics(TrainConfig(kl_in_loss=kl_in_loss))
    lengths = [40.0] * 10 + [10.0] * 3 + [40.0] * 10 + [28.5] * 20 + [27.0] * 20
    given = {
        step: text for step, n in enumerate(lengths) for text in diagnostics.warnings({**HEALTHY, "response_len": n})
    }
    assert list(given) == [46], "once four of ten are at 27"
    assert "28 tokens, 40 at the start" in given[46]
    assert "--kl_coef" in given[46]
    assert ("--kl_in_loss" in given[46]) == (not kl_in_loss)


@pytest.mark.parametrize("name", SICK)
def test_each_warning_is_given_once_and_names_the_setting_to_change(name: str) -> None:
    diagnostics = Diagnostics(TrainConfig())
    assert diagnostics.warnings(HEALTHY) == []
    value, remedy = SICK[name]
    given = [text for _ in range(30) for text in diagnostics.warnings({**HEALTHY, name: value})]
    assert len(given) == 1
    assert remedy in given[0]
    assert "\n" not in given[0]


def test_one_large_ratio_is_no_sign_and_three_are() -> None:
    """Adam's first steps are large; the first step of --preset tiny once warned every newcomer."""
    diagnostics = Diagnostics(TrainConfig())
    assert diagnostics.warnings({**HEALTHY, "ratio_max": 40.0}) == []
    assert not any(diagnostics.warnings(HEALTHY) for _ in range(20))
    given = [
        text for ratio in (40.0, 1.1, 40.0, 1.1, 40.0) for text in diagnostics.warnings({**HEALTHY, "ratio_max": ratio})
    ]
    assert len(given) == 1
    assert "--lr" in given[0]
