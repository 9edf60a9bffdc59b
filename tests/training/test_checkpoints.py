"""Checkpoints: damage of any kind is found, and the one before is used."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import exact, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.checkpoints import find_corruption, list_checkpoints, newest_intact, save_checkpoint

CASES = int(os.environ.get("FAULT_CASES", "200"))

pytestmark = pytest.mark.usefixtures("no_pictures")


MANY = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        model(torch.ones(4)).sum().backward()
        optimizer.step()
        save_checkpoint(folder, model, optimizer, {"step": step}, keep_last=2)
    return folder


@MANY
@given(
    file=st.sampled_from(["policy.safetensors", "optimizer.safetensors", "state.json"]),
    where=st.floats(0, 1, exclude_max=True),
    how=st.sampled_from(["cut", "flip", "insert"]),
    bit=st.integers(0, 7),
)
def test_any_damage_is_found(file: str, where: float, how: str, bit: int, two_checkpoints: Path) -> None:
    path = two_checkpoints / "step_000002" / file
    whole = path.read_bytes()
    at = int(where * len(whole))
    changed = bytearray(whole)
    if how == "flip":
        changed[at] ^= 1 << bit
    path.write_bytes({"cut": whole[:at], "flip": bytes(changed), "insert": whole[:at] + b"\x00" + whole[at:]}[how])
    try:
        good, wrong = newest_intact(two_checkpoints)
        if good == two_checkpoints / "step_000002":  # another kind of white space, say
            assert file == "state.json"
            assert json.loads(path.read_bytes()) == json.loads(whole)
        else:
            assert good == two_checkpoints / "step_000001"
            assert len(wrong) == 1
            assert "step_000002" in wrong[0]
    finally:
        path.write_bytes(whole)
    assert newest_intact(two_checkpoints) == (two_checkpoints / "step_000002", [])


@pytest.mark.parametrize("file", ["policy.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "missing", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    file: str, harm: str, flags: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(flags, "--total_steps", "4")
    expected = exact(folder)
    path = folder / "state" / "step_000004" / file
    data = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0x10
        path.write_bytes({"cut": bytes(data[:-7]), "flipped": bytes(data), "empty": b""}[harm])
    if file == "state.json" and harm == "flipped":
        path.write_bytes(b"\xff" + path.read_bytes())  # one bit in its middle may still be a number
    capsys.readouterr()
    run({"ckpt_dir": flags["ckpt_dir"]}, "--resume")
    out = capsys.readouterr().out
    assert "step_000004" in out
    assert "resuming after step 2" in out
    assert exact(folder) == expected
    assert find_corruption(folder / "state" / "step_000004") is None


def test_checkpoints_are_renamed_into_place_and_old_ones_removed_last(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, model, optimizer, {"step": step}, keep_last=2)
    assert [state.name for state in list_checkpoints(tmp_path)] == ["step_000002", "step_000003"]
    assert newest_intact(tmp_path) == (tmp_path / "step_000003", [])
    assert not (tmp_path / ".partial").exists()
    assert {path.suffix for path in (tmp_path / "step_000003").iterdir()} == {".json", ".safetensors"}
