"""Files that are never half-written: atomic writes, tables that grow by whole rows, a lock on a folder."""

import csv
import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from config import UserError

import pandas as pd

WINDOWS = os.name == "nt"
WAITS = (0.1, 0.2, 0.4, 0.8, 1.6)  # seconds


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder, in the place of a file if there is one.

    Windows refuses while another program, such as a virus scanner, has it open: then this waits, 3 s in all.
    """
    for seconds in WAITS if WINDOWS else ():
        with suppress(PermissionError):
            source.replace(target)
            return
        time.sleep(seconds)
    source.replace(target)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file under a temporary name, flush it to disk and rename it into place."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    rename(partial, path)


def fsync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk; Windows flushes files only."""
    is_folder = path.is_dir()
    if is_folder and WINDOWS:
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows flushes what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move_into_place(fresh: Path, place: Path) -> None:
    """Put a new file or folder in the place of an old one, which is removed last."""
    old = place.with_name(f".{place.name}.old")
    remove(old)
    if place.exists():
        rename(place, old)
    rename(fresh, place)
    remove(old)


@contextmanager
def new_folder(out: Path, setting: str = "out") -> Iterator[Path]:
    """A hidden folder that is renamed to `out` when the block ends without an error, and removed otherwise.

    Raises UserError, beginning with `setting`, where it cannot be written, or where `out` exists by then.
    """
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    try:
        folder.mkdir(parents=True)
        yield folder
        rename(folder, out)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{setting}: {out} cannot be written ({reason}): name another folder") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for abandoned in out.parent.glob(f".{out.name}.*"):  # by processes that were killed; a living one is younger
            with suppress(OSError):
                if abandoned.stat().st_mtime < time.time() - 24 * 3600:
                    shutil.rmtree(abandoned, ignore_errors=True)


def sha256(path: Path) -> str:
    """The SHA-256 checksum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# --- tables ---------------------------------------------------------------------------------------------------------


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append one row to a CSV file in a single write, and wait until it is on disk; a new file gets a header.

    Raises UserError where the file has other columns.
    """
    size = path.stat().st_size if path.exists() else 0
    columns = pd.read_csv(path, nrows=0).columns.tolist() if size else list(row)
    if set(columns) != set(row):
        raise UserError(f"{path} has other columns than this version writes: resume with the version that wrote it")
    has_text = any(isinstance(value, str) for value in row.values())
    row = {name: spreadsheet_safe(value) if isinstance(value, str) else value for name, value in row.items()}
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            # a text may hold any character, a lone \r too
            writer = csv.DictWriter(
                file, columns, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC if has_text else csv.QUOTE_MINIMAL
            )
            if not size:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # such as a full disk: half a row must not stay
        with suppress(OSError):
            truncate(path, size)
        raise


def truncate(path: Path, length: int) -> None:
    """Cut a file back to the length it had when a checkpoint was saved; length 0 removes it."""
    if length == 0:
        path.unlink(missing_ok=True)
    elif not path.exists() or path.stat().st_size < length:
        raise UserError(
            f"{path} is shorter than when the checkpoint was saved: put it back, or resume from an older one"
        )
    else:
        os.truncate(path, length)


def spreadsheet_safe(text: str) -> str:
    """Put an apostrophe before a text that a spreadsheet would run as a formula; U+FFFD stands for NUL.

    Python 3.10 writes no table with a NUL in it.
    """
    text = text.replace("\0", "\ufffd")
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def read_table(path: Path, *columns: str) -> pd.DataFrame:
    """Read a CSV file that has at least these columns."""
    try:
        table = pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name a table that this tool wrote") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a table ({error}): remove it, or name another") from None
    if missing := [name for name in columns if name not in table]:
        raise UserError(f"{path} has no column {missing[0]!r}: name a table that this tool wrote")
    return table


def check_table_path(path: Path) -> None:
    """Make the folder of a table before hours are spent on its figures."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        taken = path.is_dir()
    except OSError as error:
        raise UserError(f"csv={str(path)!r} cannot be written ({error.strerror}): name another file") from None
    if taken:
        raise UserError(f"csv={str(path)!r} is a folder: name a file")


# --- one owner at a time --------------------------------------------------------------------------------------------


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone; where another process holds it, UserError names that one.

    The system releases the lock when its holder dies, however it dies; the file only names the holder.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(f"ckpt_dir={folder} is in use by {holder}: wait for it, or choose another folder") from None
        except OSError:  # a file system without locks
            pass
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
