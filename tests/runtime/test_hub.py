"""The hub: what cannot be reached or loaded is one line that names the setting."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from config import UserError

import pytest
from datasets.packaged_modules.generator.generator import Generator

import train
from data import load_examples
from runtime.hub import loading, refuse_missing_weights, require_hub

REPOSITORY = Path(train.__file__).parent


def test_train_without_a_hub_names_what_is_missing(flags: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for setting in ("policy_name", "rm_name", "dataset"):
        argv = [word for name, value in flags.items() if name != setting for word in (f"--{name}", value)]
        environment = {k: v for k, v in os.environ.items() if "OFFLINE" not in k}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run([sys.executable, "train.py", *argv], cwd=REPOSITORY, env=environment, text=True,
                              capture_output=True, timeout=100, check=False)  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1, done.stderr
        assert setting in done.stderr
        assert "--preset tiny" in done.stderr
        break_early = setting == "policy_name"  # one real process is enough; the others run below, in this one
        if break_early:
            break
    for setting, name in (("rm_name", "lvwerra/distilbert-imdb"), ("dataset", "stanfordnlp/imdb")):
        with pytest.raises(UserError, match=f"{setting}={name} .*--preset tiny"):
            require_hub(setting, name)


def test_loading_turns_any_failure_into_one_line(tmp_path: Path) -> None:
    name = str(tmp_path)
    for failure in (OSError("no\nsuch\nfile"), ValueError("x"), RuntimeError("y"), KeyError("z")):
        with pytest.raises(UserError) as caught, loading("rm_name", name, "a model"):
            raise failure
        message = str(caught.value)
        assert "rm_name" in message
        assert name in message
        assert "\n" not in message


def test_loading_lets_its_own_errors_and_interrupts_through(tmp_path: Path) -> None:
    name = str(tmp_path)
    with pytest.raises(UserError, match=r"^mine$"), loading("rm_name", name, "a model"):
        raise UserError("mine")
    with pytest.raises(KeyboardInterrupt), loading("rm_name", name, "a model"):
        raise KeyboardInterrupt


def test_refuse_missing_names_setting_and_weight() -> None:
    complete: dict[str, Any] = {
        "missing_keys": [],
        "unexpected_keys": ["extra.bias"],
        "mismatched_keys": [],
        "error_msgs": [],
    }
    refuse_missing_weights("rm_name", "some/model", complete, "a classifier")
    with pytest.raises(UserError, match="rm_name") as caught:
        refuse_missing_weights("rm_name", "some/model", {**complete, "missing_keys": ["head.weight"]}, "a classifier")
    assert "\n" not in str(caught.value)
    assert "some/model" in str(caught.value)


def test_require_hub_accepts_a_folder_and_refuses_what_cannot_be_had(tmp_path: Path) -> None:
    require_hub("policy_name", str(tmp_path))
    with pytest.raises(UserError, match="policy_name") as caught:
        require_hub("policy_name", "nobody-at-all/no-such-model")
    assert "\n" not in str(caught.value)
    assert "nobody-at-all/no-such-model" in str(caught.value)


def test_a_prepared_data_set_is_used_where_the_hub_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="neither a folder nor in the cache"):
        load_examples("some/MyReviews", "train", "text")
    about = {"dataset_name": "MyReviews", "repo_id": "some/MyReviews", "hash": "a" * 40, "cache_dir": str(tmp_path)}
    builder = Generator(generator=lambda: iter([{"text": "one"}]), **about)
    builder.download_and_prepare()
    folder = Path(builder.cache_dir).parents[1]
    folder.rename(folder.parent / "default")  # as the library calls that of a data set of the hub
    for revision in (None, "a" * 40):
        assert load_examples("some/MyReviews", "train", "text", revision=revision)[0] == ["one"]
    with pytest.raises(UserError, match=f"dataset_revision={'b' * 40} of some/MyReviews is not in the cache"):
        load_examples("some/MyReviews", "train", "text", revision="b" * 40)
