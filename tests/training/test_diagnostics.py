"""training/diagnostics"""

from config import TrainConfig

import pytest

from training.diagnostics import Diagnostics

HEALTHY = {
    "kl_seq": 2.0, "kl_seq_exact": 2.0, "ratio_max": 1.5, "clip_frac": 0.02, "entropy": 4.0, "distinct_rate": 1.0,
    "explained_var": 0.2, "positive_rate": 0.6, "skipped": 0, "updates": 8,
    "micro_batch_size": 16, "response_len": 40.0,
}  # fmt: skip


SICK = {
    "kl_seq": (-5.0, "--check"), "kl_seq_exact": (50.0, "--kl_coef"), "ratio_max": (40.0, "--lr"),
    "clip_frac": (0.5, "--ppo_epochs"), "entropy": (0.5, "--ent_coef"), "distinct_rate": (0.1, "samples.csv"),
    "explained_var": (-3.0, "--value_coef"), "skipped": (2, "--lr"),
    "micro_batch_size": (4, "--micro_batch_size 4"),
}  # fmt: skip


def test_doctor_has_nothing_to_say_of_a_healthy_run() -> None:
    doctor = Diagnostics(TrainConfig(micro_batch_size=16))
    assert not any(doctor.warnings(HEALTHY) for _ in range(30))
    for reward_every, gae_lambda in ((0, 1.0), (1, 0.0)):
        assert not Diagnostics(TrainConfig(reward_every=reward_every, gae_lambda=gae_lambda)).warnings(HEALTHY)


@pytest.mark.parametrize(
    "asked",
    [
        TrainConfig(reward_every=0), TrainConfig(reward_every=0, gae_lambda=0.95), TrainConfig(reward_every=64),
        TrainConfig(batch_size=4, minibatch_size=4),
    ],
)  # fmt: skip
def test_doctor_sees_a_score_that_reaches_no_one(asked: TrainConfig) -> None:
    doctor = Diagnostics(asked)
    told = [text for _ in range(3) for text in doctor.warnings(HEALTHY)]
    assert len(told) == 1
    assert "--gae_lambda 1" in told[0]


def test_doctor_sees_responses_grow_short_and_no_passing_dip() -> None:
    doctor = Diagnostics(TrainConfig())
    lengths = [40.0] * 10 + [10.0] * 3 + [40.0] * 10 + [28.5] * 20 + [27.0] * 20
    told = {step: text for step, n in enumerate(lengths) for text in doctor.warnings({**HEALTHY, "response_len": n})}
    assert list(told) == [46], "once four of ten are at 27"
    assert "28 tokens where they began with 40" in told[46]
    assert "--kl_coef" in told[46]


@pytest.mark.parametrize("name", SICK)
def test_doctor_tells_each_finding_once_with_the_setting_to_change(name: str) -> None:
    doctor = Diagnostics(TrainConfig(micro_batch_size=16))
    assert doctor.warnings(HEALTHY) == []
    value, remedy = SICK[name]
    told = [text for _ in range(30) for text in doctor.warnings({**HEALTHY, name: value})]
    assert len(told) == 1
    assert remedy in told[0]
    assert "\n" not in told[0]
