"""Locks, temporary folders, and texts that spreadsheets would run."""

import os
import subprocess
import sys
from pathlib import Path

from config import UserError

import pytest

import train
from runtime.files import append_row, fsync, lock, new_folder, spreadsheet_safe, write_atomic


def test_texts_never_become_formulas() -> None:
    for text in ("=1+1", "+A1", "-2", "@sum", "\t=1", "\r=1"):
        assert spreadsheet_safe(text) == "'" + text
    for text in ("", " =1", "plain", "'quoted"):
        assert spreadsheet_safe(text) == text
    assert spreadsheet_safe("=\0x") == "'=\ufffdx"


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\nfrom pathlib import Path\nfrom runtime.files import lock\n"
            f"with lock(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        cwd=Path(train.__file__).parent,
    )
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


def test_a_row_goes_under_the_columns_that_a_table_has(tmp_path: Path) -> None:
    """Whatever the order of its names; a resumed run of another version may have other columns, and is refused."""
    table = tmp_path / "metrics.csv"
    append_row(table, {"step": 1, "lr": 0.5})
    append_row(table, {"lr": 0.25, "step": 2})
    assert table.read_text() == "step,lr\n1,0.5\n2,0.25\n"
    for row in ({"step": 3}, {"step": 3, "lr": 0.1, "loss": 1.0}):
        with pytest.raises(UserError, match="other columns"):
            append_row(table, row)
    assert table.read_text().count("\n") == 3


def test_append_row_leaves_no_half_row_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "metrics.csv"
    append_row(table, {"step": 1})
    before = table.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        append_row(table, {"step": 2})
    assert table.read_bytes() == before


def test_a_file_that_another_program_has_open_is_replaced_once_it_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Windows has it: until then it refuses. Elsewhere a refusal is final, and comes at once."""
    refusals = iter([PermissionError("in use")] * 2)
    replace, waited = Path.replace, []

    def refuse(source: Path, target: Path) -> Path:
        if error := next(refusals, None):
            raise error
        return replace(source, target)

    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError):
        write_atomic(tmp_path / "a.csv", "new")
    monkeypatch.setattr("runtime.files.WINDOWS", True)
    write_atomic(tmp_path / "a.csv", "new")
    assert (tmp_path / "a.csv").read_text() == "new"
    assert len(waited) == 1
    refusals = iter([PermissionError("in use")] * 99)
    with pytest.raises(PermissionError):
        write_atomic(tmp_path / "a.csv", "newer")
    assert sum(waited) < 5


def test_only_files_are_flushed_where_folders_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr("os.fsync", flushed.append)
    (tmp_path / "file").write_text("x")
    for windows, expected in ((False, 2), (True, 1)):
        monkeypatch.setattr("runtime.files.WINDOWS", windows)
        for path in (tmp_path, tmp_path / "file"):
            fsync(path)
        assert len(flushed) == expected
        flushed.clear()
