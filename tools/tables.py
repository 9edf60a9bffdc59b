"""Tables of the tools: read again, and room made for new ones."""

from pathlib import Path

from config import UserError  # isort: skip  (before torch: see there)

import pandas as pd


def read_table(path: Path, *columns: str) -> pd.DataFrame:
    """A CSV file that has at least these columns (raises UserError)."""
    try:
        table = pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name a table that this tool wrote") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a table ({error}): remove it, or name another") from None
    if missing := [name for name in columns if name not in table]:
        raise UserError(f"{path} has no column {missing[0]!r}: name a table that this tool wrote")
    return table


def ready_for_table(path: Path) -> None:
    """Make the folder that a table will be written into, before hours are spent on it (raises UserError)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        taken = path.is_dir()
    except OSError as error:
        raise UserError(f"csv={str(path)!r} cannot be written ({error.strerror}): name another file") from None
    if taken:
        raise UserError(f"csv={str(path)!r} is a folder: name a file")
