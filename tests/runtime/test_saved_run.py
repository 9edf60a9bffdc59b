"""A run folder as later programs read it."""

import json
from dataclasses import asdict
from pathlib import Path

from config import TrainConfig, UserError

import pytest

from runtime.saved_run import SavedRun


def write_run(folder: Path, **record: object) -> SavedRun:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**asdict(TrainConfig()), **record}))
    return SavedRun(folder)


def test_what_a_run_says(tmp_path: Path) -> None:
    run = write_run(tmp_path, lr=1e-3, reward={"label": "positive", "sha256": "abc"}, fingerprints={"dataset": "d"})
    assert run.exists
    assert TrainConfig(**run.settings) == TrainConfig(lr=1e-3)
    assert run.label == "positive"
    assert run.fingerprints == {"rm_name": "abc", "dataset": "d"}
    assert run.policy == tmp_path / "policy_lm"


def test_a_folder_without_a_run_has_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for folder in (tmp_path, tmp_path / "none"):
        assert not SavedRun(folder).exists
        assert SavedRun(folder).settings == {}


@pytest.mark.parametrize("text", ['{"total_steps": 1', '["total_steps"]', '"total_steps"'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    run = SavedRun(tmp_path)
    assert run.exists
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        _ = run.record


def test_a_run_that_does_not_say_its_label(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not that of a run \(KeyError\)"):
        _ = write_run(tmp_path).label


@pytest.mark.parametrize("policy", ["policy_lm", "best/policy_lm", "best", ""])
def test_the_run_of_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    write_run(tmp_path / "run")
    for folder in ("policy_lm", "best/policy_lm"):
        (tmp_path / "run" / folder).mkdir(parents=True)
    assert SavedRun.of_policy(str(tmp_path / "run" / policy)) == SavedRun(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert SavedRun.of_policy(f"run/{policy}") == SavedRun(Path("run"))


def test_a_policy_in_no_run(tmp_path: Path) -> None:
    assert SavedRun.of_policy(str(tmp_path / "model")) is None
    assert SavedRun.of_policy("gpt2") is None
