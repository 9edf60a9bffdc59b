"""The self-audit prints every fact, and refuses to train once a fact is broken."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run
from torch import Tensor

from model import GPT2WithValueHead, Sequences, sample_responses
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

    monkeypatch.setattr("training.audit.sample_responses", colder)


def break_reward_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_the_last_column(scores: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        rewards, kl = shape_rewards(scores, *others)
        return torch.zeros_like(rewards).index_fill(1, torch.tensor([-1]), 1) * scores[:, None], kl

    monkeypatch.setattr("training.audit.shape_rewards", in_the_last_column)


def break_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "training.audit.expected_scores", lambda scores, partial, mask: scores[:, None].expand(mask.shape)
    )


def break_critic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.init, "zeros_", lambda x: x)


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (break_positions, "padding|cross-entropy"), (break_shift, "cross-entropy"), (break_dropout, "cross-entropy"),
        (break_temperature, "the one scored"), (break_reward_place, "last real token"),
        (break_expectation, "last real token"), (break_critic, "critic"),
    ],
)  # fmt: skip
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
