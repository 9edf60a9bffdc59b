"""The self-check prints every fact, and refuses to train once a fact is broken."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run, save_classifier
from torch import Tensor

from model import GPT2WithValueHead, Sequences, sample_responses
from reward import Classifier
from utils import shape_rewards


def test_check_prints_a_line_per_fact_and_writes_nothing(
    flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(flags, "--check")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert all(line.startswith("ok ") for line in lines)
    assert not Path(flags["ckpt_dir"]).exists()


def break_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.position_ids", lambda mask: torch.arange(mask.shape[1]).expand(mask.shape))


def break_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GPT2WithValueHead.response_hidden
    monkeypatch.setattr(GPT2WithValueHead, "response_hidden", lambda self, seqs: right(self, seqs).roll(-1, 1))


def break_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GPT2WithValueHead.response_hidden
    monkeypatch.setattr(
        GPT2WithValueHead, "response_hidden", lambda self, seqs: torch.dropout(right(self, seqs), 0.3, True)
    )


def break_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    def colder(*args: Any, **named: Any) -> Sequences:
        return replace(sample_responses(*args, **{**named, "temperature": 0.5}), temperature=1.0)

    monkeypatch.setattr("training.self_check.sample_responses", colder)


def break_reward_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_the_last_column(scores: Tensor, *others: Any, **named: Any) -> Tensor:
        rewards = shape_rewards(scores, *others, **named)
        return torch.zeros_like(rewards).index_fill(1, torch.tensor([-1]), 1) * scores[:, None]

    monkeypatch.setattr("training.self_check.shape_rewards", in_the_last_column)


def break_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "training.self_check.expected_scores", lambda scores, partial, mask: scores[:, None].expand(mask.shape)
    )


def break_critic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.init, "zeros_", lambda x: x)


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (break_positions, "padding|cross-entropy"),
        (break_shift, "cross-entropy"),
        (break_dropout, "cross-entropy"),
        (break_temperature, "the one scored"),
        (break_reward_place, "last real token"),
        (break_expectation, "last real token"),
        (break_critic, "critic"),
    ],
)
def test_check_refuses_to_train_when_a_fact_fails(
    damage: Any, fact: str, flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(monkeypatch)
    with pytest.raises(SystemExit) as stop:
        run(flags)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "self-check failed" in err
    assert any(part in err for part in fact.split("|")), err
    assert not Path(flags["ckpt_dir"]).exists()


def damage_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A score is damped by the padding that the text would have, as in a model that sees its padding."""
    right = Classifier.logits

    def damped(self: Classifier, texts: Sequence[str]) -> Tensor:
        lengths = torch.tensor([float(len(text)) for text in texts])
        return right(self, texts) * (lengths + 9)[:, None] / (lengths.max() + 9)

    monkeypatch.setattr(Classifier, "logits", damped)
    monkeypatch.setattr(Classifier, "_sees_padding", lambda self: False)


@pytest.mark.parametrize("labels", [{0: "negative", 1: "positive"}, {0: "LABEL_0"}])
def test_check_refuses_a_reward_that_hangs_on_the_rest_of_the_batch(
    labels: dict[int, str],
    flags: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With labels, and with a single output."""
    folder = save_classifier(tmp_path / "rm", labels)
    run({**flags, "rm_name": str(folder)}, "--check")
    damage_scores(monkeypatch)
    with pytest.raises(SystemExit):
        run({**flags, "rm_name": str(folder)}, "--check")
    assert "--reward_batch_size 1" in capsys.readouterr().err


def test_check_allows_for_the_rounding_that_a_low_temperature_enlarges(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Log-probabilities off by 0.2 nats at temperature 1, as in bfloat16, are off by 2 at temperature 0.1."""
    noise = 0.2
    right = GPT2WithValueHead.evaluate_responses

    def rounded(self: GPT2WithValueHead, seqs: Sequences, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, values, entropy = right(self, seqs, *args)
        return torch.where(seqs.response_mask, logprobs + noise / seqs.temperature, 0), values, entropy

    monkeypatch.setattr(GPT2WithValueHead, "evaluate_responses", rounded)
    monkeypatch.setattr("training.self_check.SAME", 0.25)
    half = {**flags, "dtype": "bfloat16"}
    for temperature in ("1", "0.1"):
        run({**half, "temperature": temperature}, "--check")
    noise = 0.4
    for temperature in ("1", "0.1"):
        with pytest.raises(SystemExit):
            run({**half, "temperature": temperature}, "--check")
        assert "--dtype float32" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(flags, "--check")
    assert "--dtype" not in capsys.readouterr().err


def test_check_scores_a_text_as_long_as_the_classifier_should_take(
    flags: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model with fewer positions than its files say, as no table of embeddings shows."""
    monkeypatch.setattr("reward.longest_input", lambda model, tokenizer: 60)
    with pytest.raises(SystemExit) as stop:
        run(flags, "--check")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "rm_name=" in message
