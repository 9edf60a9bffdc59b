"""The time that a run on the CPU will take, against torch's own count of operations."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from config import TrainConfig

import pytest
import torch
from conftest import make_policy, make_rollout, run
from torch.utils.flop_counter import FlopCounterMode

from model import evaluate_both, sample_responses
from ppo import ppo_update
from reward import SentimentReward
from training import estimate
from training.estimate import duration, flops, note_slow_run, timed
from utils import uniforms


@pytest.mark.parametrize(
    ("seconds", "measured", "said"),
    [
        ([60.0] * 11, 0, ["observing will take another 10 minutes or so"]),
        ([1.0, 1.0, 90.0, 90.0, 90.0], 2, ["observing will take another 3 minutes or so"]),
        ([1.0] * 11, 0, []),
        ([3600.0], 0, []),
    ],
)
def test_work_says_how_long_it_will_take_once_a_unit_is_done(
    seconds: list[float],
    measured: int,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = [0.0]
    monkeypatch.setattr(estimate.time, "monotonic", lambda: clock[0])  # type: ignore[attr-defined]
    for one in timed(seconds, "observing", "batch", measured):
        clock[0] += one
    assert capsys.readouterr().out.splitlines() == said


CFG = TrainConfig(
    batch_size=8,
    minibatch_size=8,
    max_prompt_len=24,
    max_new_tokens=24,
    ppo_epochs=3,
    reward_every=0,
    device="cpu",
    dtype="float32",
)


def counted(work: Any) -> tuple[float, Any]:
    with FlopCounterMode(display=False) as counter:
        found = work()
    return counter.get_total_flops(), found


@pytest.mark.parametrize("kl_in_loss", [False, True])
def test_flops_are_those_that_torch_counts(kl_in_loss: bool, classifier_dir: Path) -> None:
    policy = make_policy(vocab=400, n_embd=64)
    reference = make_policy(vocab=400, n_embd=64, seed=1).requires_grad_(False)
    reward = SentimentReward(str(classifier_dir))
    models: Any = SimpleNamespace(policy=policy, reference=reference, reward=reward)
    expected = flops(models, replace(CFG, kl_in_loss=kl_in_loss))
    prompts = torch.randint(0, 400, (8, 24)), torch.ones(8, 24, dtype=torch.bool)
    generate, seqs = counted(lambda: sample_responses(policy, *prompts, uniforms(0, 1, 8, 24), eos_id=-1))
    both, _ = counted(lambda: evaluate_both(policy, reference, seqs))
    ids = torch.randint(0, reward.model.config.vocab_size, (8, 24))
    with torch.no_grad():
        judged, _ = counted(lambda: reward.model(input_ids=ids))
    rollout = make_rollout(policy, reference, seqs, torch.randn(8), 0.1, kl_in_loss=kl_in_loss)
    update, _ = counted(lambda: ppo_update(policy, torch.optim.SGD(policy.parameters()), rollout, CFG, 1))
    for name, found in (("generate", generate), ("score", both + judged), ("update", update)):
        assert 0.9 * expected[name] < found < 1.3 * expected[name], name


def test_unfinished_responses_are_read_as_well(classifier_dir: Path) -> None:
    models: Any = SimpleNamespace(
        policy=make_policy(), reference=make_policy(), reward=SentimentReward(str(classifier_dir))
    )
    judged, _ = counted(lambda: models.reward.model(input_ids=torch.ones(1, 1, dtype=torch.long)))
    cfg = TrainConfig(batch_size=8, minibatch_size=8, max_new_tokens=10, reward_every=4)
    whole = TrainConfig(batch_size=8, minibatch_size=8, max_new_tokens=10, reward_every=0)
    more = flops(models, cfg)["score"] - flops(models, whole)["score"]
    assert more == pytest.approx(8 * (4 + 8) * judged, rel=0.1)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (119, "119 s"), (150, "2 minutes"), (3 * 3600, "3 hours"), (1e6, "12 days")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_long_run_is_announced_and_a_short_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "flops", lambda *_: {"generate": 4e11, "update": 6e11})
    monkeypatch.setattr(estimate, "matmul_rate", lambda *_, **__: 1e11)
    models: Any = None
    note = note_slow_run(models, CFG, 200)
    assert note is not None
    assert note.startswith("without a GPU this will take about 67 minutes (200 steps of 20 s): for a first try take")
    assert "--preset tiny" in note
    assert note_slow_run(models, CFG, 80) is None
    assert note_slow_run(models, TrainConfig(device="cuda"), 200) is None
    monkeypatch.setattr(estimate, "matmul_rate", lambda *_, **__: pytest.fail("measured for nothing"))
    assert note_slow_run(models, CFG, 4) is None


def test_it_stands_before_the_first_step(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_pictures: None
) -> None:
    monkeypatch.setattr(estimate, "LONG", 0.0)
    run(flags, "--total_steps", "2")
    out = capsys.readouterr().out
    assert out.count("without a GPU this will take about") == 1
    assert out.index("without a GPU") < out.index("step 2\n")
