"""How programs end: one line and exit code 2 for wrong input, tracebacks for bugs only."""

import subprocess
import sys

from config import TrainConfig, UserError

import pytest
from conftest import run_script

import train


def test_run_cli_ends_with_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(cfg: TrainConfig) -> None:
        raise UserError("dataset x does not exist: check --dataset")

    for argv, word in (([], "dataset x"), (["--lr", "-1"], "lr"), (["--nope"], "nope")):
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        with pytest.raises(SystemExit) as caught:
            run_script(TrainConfig, main)
        assert caught.value.code == 2
        err = capsys.readouterr().err
        assert word in err
        assert err.strip().count("\n") == 0
        assert "Traceback" not in err


def test_run_cli_hands_on_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainConfig] = []
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "5"])
    run_script(TrainConfig, seen.append)
    assert seen == [TrainConfig(seed=5)]


def test_run_cli_lets_other_errors_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is no wrong input: its traceback must be seen."""

    def main(cfg: TrainConfig) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ZeroDivisionError):
        run_script(TrainConfig, main)


def test_a_closed_pipe_is_no_traceback(flags: dict[str, str]) -> None:
    """python train.py | head -1"""
    words = " ".join(f"--{name}={value}" for name, value in flags.items())
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -u {train.__file__} {words} | head -1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
