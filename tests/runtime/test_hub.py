"""The hub: what cannot be reached or loaded is one line that names the setting."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from config import UserError

import pytest
from conftest import run
from datasets.packaged_modules.generator.generator import Generator

import train
from data import load_examples
from runtime.hub import load_gpt2, load_tokenizer, loading, refuse_missing_weights, require_hub

REPOSITORY = Path(train.__file__).parent


def test_train_without_a_hub_names_what_is_missing(flags: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for setting in ("policy_name", "rm_name", "dataset"):
        argv = [word for name, value in flags.items() if name != setting for word in (f"--{name}", value)]
        environment = {k: v for k, v in os.environ.items() if "OFFLINE" not in k}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "train.py", *argv],
            cwd=REPOSITORY,
            env=environment,
            text=True,
            capture_output=True,
            timeout=100,
            check=False,
        )
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
    long = ValueError("one of these is missing: \n(1) a file, \n(2) a class.\n" + "more words " * 99)
    for failure in (OSError("no\nsuch\nfile"), long, RuntimeError("y"), KeyError("z"), AssertionError()):
        with pytest.raises(UserError) as caught, loading("rm_name", name, "a model"):
            raise failure
        message = str(caught.value)
        assert "rm_name" in message
        assert name in message
        assert "\n" not in message
        assert message[-1] not in ":,"
        assert len(message) < len(name) + 400
        assert failure is not long or "(2) a class." in message


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


def test_a_folder_that_hides_a_model_of_the_hub_is_named(
    flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of the working directory that is called like the default policy, or like any model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "notes.txt").write_text("mine")
    for setting in ("policy_name", "ref_name", "rm_name"):
        with pytest.raises(SystemExit):
            run({**flags, setting: "gpt2"}, "--check")
        message = capsys.readouterr().err
        assert f"{setting}={tmp_path / 'gpt2'} is a folder without a model" in message
        assert "rename" in message


def test_a_tokenizer_that_needs_a_library_names_it(
    gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks for tiktoken where sentencepiece is missing; the file here is not even read."""
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "spiece.model").write_bytes(b"\x0a\x04abcd")
    monkeypatch.setattr("runtime.hub.is_sentencepiece_available", lambda: False)
    monkeypatch.setattr("transformers.utils.import_utils.is_tiktoken_available", lambda: False)
    with pytest.raises(UserError, match="pip install sentencepiece protobuf"):
        load_tokenizer("rm_name", str(tmp_path))
    for file in tmp_path.iterdir():
        file.unlink()
    (tmp_path / "config.json").write_text((gpt2_dir / "config.json").read_text())
    with pytest.raises(UserError, match="has no tokenizer: save it with the model"):
        load_tokenizer("policy_name", str(tmp_path))


def test_weights_of_another_shape_are_named(gpt2_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(gpt2_dir, tmp_path / "lm")
    config = json.loads((gpt2_dir / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config | {"n_positions": 64}))
    with pytest.raises(UserError, match=r"wpe.weight is \(128, 32\) instead of \(64, 32\)"):
        load_gpt2(str(tmp_path / "lm"), "policy_name")
