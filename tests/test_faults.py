"""Bad numbers, bad models, too little memory and bad input in bulk: one line, exit code 2 or 1, and nothing damaged.

FAULT_CASES=2000 in the environment makes the property tests as long as a night.
"""

import json
import math
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from config import TrainConfig, UserError

import pytest
import torch
from conftest import make_policy, make_rollout, run, run_script, same_weights, sample, weights_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ppo
import train
from data import load_examples
from ppo import Models, ppo_update
from reward import SentimentReward
from runtime.cli import parse_config
from training.memory import largest_micro_batch

CASES = int(os.environ.get("FAULT_CASES", "200"))


MANY = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("raise", ["RuntimeError", "no GPU today"]),
        (torch.zeros(3), ["torch.float32", "(3,)"]),
        (torch.zeros(8, 2), ["(8, 2)"]),
        (torch.zeros(8, dtype=torch.int64), ["torch.int64"]),
        ([0.0] * 8, ["list"]),
    ],
    ids=str,
)
def test_a_reward_that_fails_is_named_as_such(
    returned: Any,
    words: list[str],
    flags: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(self: Any, texts: list[str], prompts: list[str]) -> Any:
        if isinstance(returned, str):
            raise RuntimeError("no GPU today")
        return returned

    monkeypatch.setattr(train, "self_check", lambda *_, **__: None)
    monkeypatch.setattr(SentimentReward, "__call__", fail)
    with pytest.raises(SystemExit) as stop:
        run(flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: rm_name=")
    assert all(word in error for word in words), error


@pytest.mark.parametrize("where", ["loss", "gradient", "logits"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_number_that_is_not_finite_reaches_the_weights(
    where: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one minibatch of many: it is skipped and counted, the others are learnt from."""
    policy, reference = make_policy(), make_policy(seed=1)
    rollout = make_rollout(policy, reference, sample(policy), torch.randn(8), 0.1)
    cfg = TrainConfig(batch_size=8, minibatch_size=2, ppo_epochs=2, lr=1e-3)
    calls: list[int] = []
    loss, hidden = ppo.ppo_loss, policy.response_hidden

    def poisoned_loss(*args: Any) -> Any:
        calls.append(1)
        found, sums = loss(*args)
        bad = len(calls) == 3
        if bad and where == "gradient":
            found.register_hook(lambda grad: grad * value)
        return (found * value if bad and where == "loss" else found), sums

    def poisoned_hidden(seqs: Any) -> Tensor:
        calls.append(1)
        return hidden(seqs) * (value if len(calls) == 3 else 1)

    if where == "logits":
        monkeypatch.setattr(policy, "response_hidden", poisoned_hidden)
    else:
        monkeypatch.setattr(ppo, "ppo_loss", poisoned_loss)
    before = weights_of(policy)
    stats = ppo_update(policy, ppo.build_optimizer(policy, cfg), rollout, cfg, 1)
    assert (stats["skipped"], stats["updates"]) == (1, 7)
    assert all(weight.isfinite().all() for weight in policy.parameters())
    assert not same_weights(policy, before)
    assert math.isfinite(stats["policy_loss"])


@pytest.mark.parametrize("kl_in_loss", [False, True])
@pytest.mark.parametrize("fits", [1, 3, 8])
def test_micro_batches_are_as_large_as_memory_suffices_for(
    fits: int, kl_in_loss: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tried with responses of full length; the search leaves no trace on the policy."""
    policy = make_policy()
    before = weights_of(policy)
    models = Models(policy, make_policy(seed=1).requires_grad_(False), None, None)  # type: ignore[arg-type]
    cfg = TrainConfig(
        batch_size=8, minibatch_size=8, min_prompt_len=1, max_prompt_len=6, max_new_tokens=10, kl_in_loss=kl_in_loss
    )
    hidden, tried = policy.response_hidden, []

    def cramped(seqs: Any) -> Tensor:
        assert seqs.attention_mask.all()
        assert seqs.tokens.shape[1] == 16
        tried.append(len(seqs.tokens))
        if len(seqs.tokens) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(seqs)

    monkeypatch.setattr(policy, "response_hidden", cramped)
    assert largest_micro_batch(models, cfg, 8) == {1: 1, 3: 2, 8: 8}[fits]
    assert tried == {1: [8, 4, 2, 1], 3: [8, 4, 2], 8: [8]}[fits]
    assert same_weights(policy, before)
    assert all(weight.grad is None for weight in policy.parameters())
    fits = 0
    with pytest.raises(UserError, match="out of memory with a single response: lower max_prompt_len"):
        largest_micro_batch(models, cfg, 8)


RANGES = {f.name: f.metadata["within"] for f in fields(TrainConfig) if f.metadata["within"]}
NUMBERS = st.one_of(st.integers(-3, 300), st.floats(allow_nan=True, allow_infinity=True), st.text(max_size=4))


@MANY
@given(name=st.sampled_from(sorted(RANGES)), value=NUMBERS)
def test_any_value_of_any_setting_is_taken_or_refused_in_one_line(name: str, value: object) -> None:
    try:
        cfg = parse_config(TrainConfig, [f"--{name}={value}"])
    except UserError as error:
        assert name in str(error)  # noqa: PT017
    except SystemExit:
        pytest.fail("left without a word")
    else:
        taken = getattr(cfg, name)
        assert taken is None or RANGES[name].holds(taken)


FILES = st.binary(max_size=200) | st.lists(
    st.text(max_size=30) | st.sampled_from(["\x00", "🙂" * 5, "", " ", "NA", '"', "a" * 1_000_000, "\r", "\ufeff"]),
    max_size=6,
).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))


@MANY
@given(data=FILES, kind=st.sampled_from([".csv", ".tsv", ".jsonl", ".txt", ".parquet"]), header=st.booleans())
def test_any_data_file_is_read_or_refused_in_one_line(data: bytes, kind: str, header: bool, tmp_path: Path) -> None:
    path = tmp_path / f"data{kind}"
    if header and kind in (".csv", ".tsv"):
        data = b"text\n" + data
    if header and kind == ".jsonl":
        data = b"\n".join(json.dumps({"text": line.decode("utf-8", "replace")}).encode() for line in data.split(b"\n"))
    path.write_bytes(data)
    try:
        texts, _ = load_examples(str(path), "train", "text")
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert texts
        assert all(isinstance(text, str) and text.strip() for text in texts)
    assert path.read_bytes() == data


@settings(
    max_examples=max(10, CASES // 20),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(text=st.text(max_size=300))
def test_any_config_json_in_the_run_folder_is_no_traceback(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    sys.argv = ["train.py", "--resume", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        run_script(TrainConfig, lambda cfg: None)
    assert stop.value.code == 2
