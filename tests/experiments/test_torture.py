"""Runs killed at random moments lose nothing, and the harness would see it if they did."""

import json
import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from conftest import TIMINGS, forked, run

from experiments.torture import TortureConfig, remains, torture


class Forked:
    """What the torture wants of a process, without loading torch anew each time."""

    def __init__(self, flags: list[str], folder: Path) -> None:
        settings = dict(flag.removeprefix("--").split("=") for flag in flags)
        self.process = forked(partial(run, {**settings, "ckpt_dir": str(folder)}, "--resume"), Path(os.devnull))

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("train.py", timeout or 0)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


def test_killed_at_random_moments_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.torture.start", Forked)
    forked(int, Path(os.devnull)).join()  # the first waits for imports
    assert torture(TortureConfig(kills=4, steps=6), tmp_path) == []
    assert re.match(r"4 kills in [1-9]\d* runs", capsys.readouterr().out)


def test_torture_sees_a_difference(tmp_path: Path, flags: dict[str, str]) -> None:
    """The harness itself: it sees one changed bit and one lost row."""
    folder = run(flags)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert remains(copy) == remains(folder)
    table = pd.read_csv(copy / "metrics.csv")
    table.assign(**dict.fromkeys(TIMINGS, 1.0)).to_csv(copy / "metrics.csv", index=False)
    assert json.dumps(sorted(remains(copy))) == json.dumps(sorted(remains(folder)))
    table.iloc[:-1].to_csv(copy / "metrics.csv", index=False)
    assert remains(copy) != remains(folder)
