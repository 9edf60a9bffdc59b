"""Locks, temporary folders, and texts that spreadsheets would run."""

import os
import subprocess
import sys
from pathlib import Path

from config import UserError

import pytest

import train
from runtime.files import lock, new_folder, spreadsheet_safe


def test_texts_never_become_formulas() -> None:
    for text in ("=1+1", "+A1", "-2", "@sum", "\t=1", "\r=1"):
        assert spreadsheet_safe(text) == "'" + text
    for text in ("", " =1", "plain", "'quoted"):
        assert spreadsheet_safe(text) == text


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time\nfrom pathlib import Path\nfrom runtime.files import lock\n"
         f"with lock(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    time.sleep(60)"],
        stdout=subprocess.PIPE, cwd=Path(train.__file__).parent,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on"), lock(tmp_path):
        pass
    holder.kill()  # which leaves the file behind
    holder.wait()
    assert (tmp_path / ".lock").exists()
    with lock(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_new_folder_removes_what_killed_processes_left_a_day_ago(tmp_path: Path) -> None:
    old, young = tmp_path / ".world.00000000", tmp_path / ".world.11111111"
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (1, 1))
    with new_folder(tmp_path / "world"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".world.11111111", "world"]
