"""Bad numbers, bad models, too little memory and bad input in bulk: one line, exit code 2 or 1, and nothing damaged.

FAULT_CASES=2000 in the environment makes the property tests as long as a night.
"""

import copy
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_policy, run, same_weights, sample, weights_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ppo
import train
from config import RANGES, TrainConfig, UserError, parse_config, run_cli
from data import load_examples
from ppo import make_rollout, ppo_update
from reward import SentimentReward
from tools import run_folder
from tools.states import newest_good, save_state
from utils import spreadsheet_safe

CASES = int(os.environ.get("FAULT_CASES", "200"))
STEPS = 120 if CASES <= 200 else 500
MANY = settings(
    max_examples=CASES, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


# ---- bad models


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
    returned: Any, words: list[str], flags: dict[str, str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(self: Any, texts: list[str]) -> Any:
        if isinstance(returned, str):
            raise RuntimeError("no GPU today")
        return returned

    monkeypatch.setattr(train, "audit", lambda *_, **__: None)
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


@pytest.mark.parametrize("fits", [1, 3, 8])
def test_too_little_memory_halves_the_micro_batch_and_changes_nothing(
    fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy()
    twin = copy.deepcopy(policy)
    rollout = make_rollout(policy, make_policy(seed=1), sample(policy), torch.randn(8), 0.1)
    cfg = TrainConfig(batch_size=8, minibatch_size=8, ppo_epochs=2, lr=0.02)
    hidden = policy.response_hidden

    def cramped(seqs: Any) -> Tensor:
        if len(seqs.tokens) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(seqs)

    monkeypatch.setattr(policy, "response_hidden", cramped)
    stats = ppo_update(policy, torch.optim.SGD(policy.parameters()), rollout, cfg, 1)
    expected = ppo_update(twin, torch.optim.SGD(twin.parameters()), rollout, cfg, 1)
    assert stats["micro_batch_size"] == {1: 1, 3: 2, 8: 8}[fits]
    assert stats["policy_loss"] == pytest.approx(expected["policy_loss"], abs=1e-6)
    for a, b in zip(policy.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        ppo_update(policy, torch.optim.SGD(policy.parameters()), rollout, cfg, 1)


def test_texts_cannot_become_formulas() -> None:
    for text in ("=1+1", "+A1", "-2", "@sum", "\t=1", "\r=1"):
        assert spreadsheet_safe(text) == "'" + text
    for text in ("", " =1", "plain", "'quoted"):
        assert spreadsheet_safe(text) == text


def test_memory_does_not_grow(flags: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident memory at the end against that after 50 small steps: within 5 %."""
    seen: list[int] = []
    log = run_folder.RunFolder.log

    def note(self: Any, row: dict[str, Any]) -> None:
        log(self, row)
        if row["step"] in (50, STEPS):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append(pages)

    monkeypatch.setattr(run_folder.RunFolder, "log", note)
    monkeypatch.setattr(run_folder, "plot_curves", lambda *_: None)
    run({**flags, "save_every": "60", "sample_every": "60", "total_steps": str(STEPS), "eval_every": "0"})
    assert seen[1] < 1.05 * seen[0]


# ---- bad input in bulk

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
        assert RANGES[name][1](getattr(cfg, name)) if getattr(cfg, name, None) is not None else True


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


@pytest.fixture(scope="module")
def two_states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        model(torch.ones(4)).sum().backward()
        optimizer.step()
        save_state(folder, model, optimizer, {"step": step}, keep_last=2)
    return folder


@MANY
@given(
    file=st.sampled_from(["policy.safetensors", "optimizer.safetensors", "state.json"]),
    where=st.floats(0, 1, exclude_max=True), how=st.sampled_from(["cut", "flip", "insert"]), bit=st.integers(0, 7),
)  # fmt: skip
def test_any_damage_to_a_state_is_found(file: str, where: float, how: str, bit: int, two_states: Path) -> None:
    path = two_states / "step_000002" / file
    whole = path.read_bytes()
    at = int(where * len(whole))
    changed = bytearray(whole)
    if how == "flip":
        changed[at] ^= 1 << bit
    path.write_bytes({"cut": whole[:at], "flip": bytes(changed), "insert": whole[:at] + b"\x00" + whole[at:]}[how])
    try:
        good, wrong = newest_good(two_states)
        if good == two_states / "step_000002":  # another kind of white space, say
            assert file == "state.json"
            assert json.loads(path.read_bytes()) == json.loads(whole)
        else:
            assert good == two_states / "step_000001"
            assert len(wrong) == 1
            assert "step_000002" in wrong[0]
    finally:
        path.write_bytes(whole)
    assert newest_good(two_states) == (two_states / "step_000002", [])


@settings(max_examples=max(10, CASES // 20), deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
@given(text=st.text(max_size=300))
def test_any_config_json_in_the_run_folder_is_no_traceback(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    sys.argv = ["train.py", "--resume", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        run_cli(TrainConfig, lambda cfg: None)
    assert stop.value.code == 2
