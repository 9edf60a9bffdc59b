"""Tables of texts: a file of any format that is read, a folder, or a split of a data set on the hub, as a DataFrame.

The cells of .csv and .tsv are texts, as they stand in the file. A file that can be read in more than one way, or not
at all, is refused with the line that says so.
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields
from typing import Any, NamedTuple

from config import UserError

import pandas as pd

from runtime.hub import only_prepared, require_hub

COMPRESSIONS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
READ_ERRORS = (OSError, EOFError, ValueError, RuntimeError, LookupError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
SAVE_AS = "save it as .csv, .tsv, .json, .jsonl, .parquet or .txt, packed as .gz, .bz2, .xz or .zip if you like"
Columns = dict[str, list[Any]]  # of a data set by their names, a cell for each of some rows
LONGEST_FIELD = 2**31 - 1  # characters: the most that csv takes on every system


def file_format(name: str) -> tuple[str, str]:
    """Format and compression by the endings of a file's name, '' where it has none: B.CSV.gz -> .csv, .gz."""
    stem, ending = os.path.splitext(name.lower())
    compression = ending if ending in (*COMPRESSIONS, ".zip") else ""
    kind = os.path.splitext(stem)[1] if compression else ending
    return kind if kind in READERS else "", compression


def is_file(dataset: str) -> bool:
    """Whether a data set is one file, or a folder x.parquet of parts; where neither is there, the ending decides."""
    kind, compression = file_format(dataset)
    if os.path.isdir(dataset):
        return (kind, compression) == (".parquet", "")
    return os.path.exists(dataset) or bool(kind or compression)


def has_splits(dataset: str) -> bool:
    """Whether a data set has splits: files have none, nor has a single data set saved by save_to_disk."""
    return not is_file(dataset) and not os.path.isfile(os.path.join(dataset, "state.json"))


def split_names(dataset: str, revision: str | None = None, config: str | None = None) -> list[str]:
    """The names of a data set's splits; none where it has none, or where only loading it would tell."""
    if not has_splits(dataset):
        return []
    import datasets

    try:
        require_hub("dataset", dataset)
        saved = os.path.join(dataset, "dataset_dict.json")
        if os.path.isfile(saved):
            with open(saved, encoding="utf-8") as file:
                return list(json.load(file)["splits"])
        files = _plain_files(dataset, revision, config)
        return list(files or datasets.get_dataset_split_names(dataset, config, revision=revision))
    except Exception:  # whatever is wrong with it: loading a split will say so
        return []


def load_table(
    dataset: str, split: str, text_column: str, revision: str | None = None, config: str | None = None
) -> pd.DataFrame:
    """Read a file, or a split of a data set; the lines of .txt become the column `text_column`.

    Class ids with known names become the names, and those below 0 None.
    """
    if not dataset.isascii() and "\\udc" in ascii(dataset):
        raise UserError(f"dataset {dataset!a} has a name that is not UTF-8: rename it")
    if config is not None and not has_splits(dataset):
        raise UserError(f"dataset_config={config}: {dataset} has no configurations, so leave it out")
    if is_file(dataset):
        return read_file(dataset, text_column)
    return _load_split(dataset, split, text_column, revision, config)


def column_list(table: Iterable[Any], most: int = 20) -> str:
    """The columns of a table for a message, each with 40 characters at most."""
    names = [name if len(name) <= 40 else f"{name[:37]}..." for name in map(str, table)]
    listed = ", ".join(names[:most]) or "(none)"
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


# --- files ----------------------------------------------------------------------------------------------------------


def read_file(name: str, text_column: str) -> pd.DataFrame:
    """Read a file of any format by its name."""
    kind, compression = file_format(name)
    if not os.path.exists(name):
        raise UserError(f"dataset {name} does not exist: check the path given to --dataset")
    try:
        if kind == ".parquet" and not compression:
            return _read_parquet(name)
        kind, data = _unpack(name, kind, compression)
        if not kind:
            raise UserError(f"dataset {name} has no ending that says how to read it: {SAVE_AS}")
        if not data.strip():
            raise UserError(f"dataset {name} is empty: choose another with --dataset")
        return READERS[kind](data, name, text_column)
    except READ_ERRORS as error:
        raise UserError(f"dataset {name} cannot be read as {kind}{compression}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """The whole message of an error in one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _unpack(name: str, kind: str, compression: str) -> tuple[str, bytes]:
    """The format and the content of a file; a .zip holds one file, whose name may tell the format."""
    if compression != ".zip":
        with COMPRESSIONS[compression](name, "rb") as file:
            return kind, file.read()
    with zipfile.ZipFile(name) as archive:
        members = [x for x in archive.namelist() if not x.endswith("/") and not x.startswith("__MACOSX/")]
        if len(members) != 1:
            raise ValueError(f"it holds {len(members)} files: unpack it, and name one of them or the folder")
        return file_format(members[0])[0] or kind, archive.read(members[0])


def _decode(data: bytes) -> str:
    """UTF-8 -> text, without a byte-order mark; ValueError names the line that is not UTF-8."""
    start = data[:200]
    zeros = max(start[::2].count(0), start[1::2].count(0))  # in UTF-16, every other byte of Latin letters is one
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or zeros > max(1, len(start) // 4):
        raise ValueError("it is UTF-16: save it as UTF-8")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\r|\n", data[: error.start])) + 1
        raise ValueError(
            f"it is not UTF-8: line {line} holds the byte 0x{data[error.start]:02x}, {error.start:,} bytes from the "
            "start of the file; save it as UTF-8"
        ) from None


def _read_lines(data: bytes, name: str, text_column: str) -> pd.DataFrame:
    """One text a line. Only line ends of files end a line, and not U+2028, say, which is part of a text."""
    lines = re.split(r"\r\n|\r|\n", _decode(data))
    return pd.DataFrame({text_column: [line for line in lines if line.strip()]}, dtype=object)


def _read_parquet(source: Any) -> pd.DataFrame:
    """A Parquet file or a folder of them, with the class names that datasets writes into it."""
    from pyarrow import parquet

    table = parquet.read_table(source)
    if b"huggingface" not in (table.schema.metadata or {}):
        return table.to_pandas(integer_object_nulls=True)
    import datasets

    features = datasets.Features.from_arrow_schema(table.schema)
    return _with_class_names(table.to_pandas(integer_object_nulls=True), features)


def _read_packed_parquet(data: bytes, name: str, text_column: str) -> pd.DataFrame:
    return _read_parquet(io.BytesIO(data))


def _with_class_names(table: pd.DataFrame, features: Any) -> pd.DataFrame:
    """Class ids as names, and None for those below 0 and for missing ones."""
    for column, feature in (features or {}).items():
        if type(feature).__name__ == "ClassLabel" and column in table:
            ids = [-1 if pd.isna(value) else int(value) for value in table[column]]
            table[column] = pd.Series([feature.names[i] if i >= 0 else None for i in ids], table.index, dtype=object)
    return table


# --- JSON -----------------------------------------------------------------------------------------------------------


def _read_json(data: bytes, name: str, text_column: str) -> pd.DataFrame:
    """An object per row, on lines of its own or in an array; or one object that holds whole columns."""
    text = _decode(data)
    decoder = json.JSONDecoder(strict=False)  # tabs may stand in a text as they are
    rows: list[Any] = []
    place = end_of_blanks(text, 0)
    while place < len(text):
        value, end = decoder.raw_decode(text, place)
        rows.append(value)
        place = end_of_blanks(text, end)
    if len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            example = f'{{"{text_column}": "..."}}'
            raise ValueError(f"its value {number} is no object: write each row as one, such as {example}")
    if len(rows) == 1 and rows[0] and all(isinstance(column, list | dict) for column in rows[0].values()):
        return pd.DataFrame(rows[0], dtype=object)
    return pd.DataFrame(rows, dtype=object)


def end_of_blanks(text: str, place: int) -> int:
    """The place of the first character from `place` on that is no white space."""
    blanks = re.compile(r"\s*").match(text, place)
    return blanks.end() if blanks else place


# --- CSV ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """The cells of a row of a CSV file, and the line at which it begins."""

    line: int
    cells: list[str]


def _read_csv(data: bytes, name: str, text_column: str) -> pd.DataFrame:
    r"""Quotation marks are doubled, as the standard has it; or written \" where only that gives whole rows."""
    text = _decode(data)
    try:
        return _frame(split_rows(text, ","))
    except ValueError as error:
        doubled = re.sub(r'\\(["\\])', lambda pair: '""' if pair[1] == '"' else pair[1], text)
        try:
            table = _frame(split_rows(doubled, ","))
        except ValueError:
            raise error from None
        print(f'note: in {name}, \\" is read as a quotation mark')
        return table


def _read_tsv(data: bytes, name: str, text_column: str) -> pd.DataFrame:
    """Quotation marks around a cell are left out, unless the file can only be read with all of them left in.

    Raises ValueError where both can be, and give different rows.
    """
    text = _decode(data)
    literal: list[Row] = []  # the rows with all quotation marks left in, where it can be read so
    with suppress(ValueError):
        literal = split_rows(text, "\t", quoted=False)
    try:
        rows = split_rows(text, "\t")
    except ValueError:
        if not literal:
            raise
        print(f"note: in {name}, quotation marks are read as part of the texts")
        return _frame(literal)
    doubtful = {row.line for row in literal} ^ {row.line for row in rows}
    if literal and doubtful:
        raise ValueError(
            f"line {min(doubtful)} may be a row or, by the quotation marks around it, part of the text before it: save "
            "it as .jsonl"
        )
    return _frame(rows)


def _frame(rows: list[Row]) -> pd.DataFrame:
    """Rows as a table whose columns the first row names; ValueError where two names are the same."""
    header = [cell.strip() or f"Unnamed: {i}" for i, cell in enumerate(rows[0].cells)]
    for i, name in enumerate(header):
        if name in header[:i]:
            raise ValueError(f"two of its columns are called {name!r}: rename one")
    return pd.DataFrame([row.cells for row in rows[1:]], columns=header, dtype=object)


def split_rows(text: str, separator: str, quoted: bool = True) -> list[Row]:
    """The header and the rows of a CSV text, without blank rows; all have as many cells as the header.

    ValueError names the first line that does not. One separator more at the end of every row than in the header is no
    cell.
    """
    csv.field_size_limit(LONGEST_FIELD)
    quoting: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    rows: list[Row] = []
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append(Row(line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f'in the row of line {line}, {error}; a quotation mark inside quotation marks is written twice, ""'
        ) from None
    if not rows:
        raise ValueError("it holds blank rows only")
    header, *others = rows
    width = len(header.cells)
    if all(len(row.cells) == width + 1 and not row.cells[-1] for row in others):
        rows = [header, *(Row(row.line, row.cells[:-1]) for row in others)]
    for row in rows:
        if len(row.cells) != width:
            mark = "tab" if separator == "\t" else "comma"
            raise ValueError(
                f"the row of line {row.line} has {len(row.cells)} and the header {width} of the cells between {mark}s: "
                f"put quotation marks around texts that hold a {mark}, or save it as .jsonl"
            )
    return rows


READERS: dict[str, Callable[[bytes, str, str], pd.DataFrame]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".txt": _read_lines,
    ".parquet": _read_packed_parquet,
}


# --- data sets ------------------------------------------------------------------------------------------------------


def _load_split(name: str, split: str, text_column: str, revision: str | None, config: str | None) -> pd.DataFrame:
    import datasets  # 1 s to import, and not needed for files

    require_hub("dataset", name)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        if any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json")):
            table = _saved_split(datasets.load_from_disk(name), name, split)
        elif files := _plain_files(name, revision, config):
            return _read_plain(files, name, split, text_column)
        else:
            table = datasets.load_dataset(name, config, split=split, revision=revision)
            if revision and only_prepared(name) and not any(revision in x["filename"] for x in table.cache_files):
                raise UserError(f"dataset_revision={revision} of {name} is not in the cache: connect, or leave it out")
        whole = table.with_format("arrow")[:]  # whole numbers stay whole beside a missing one
        return _with_class_names(whole.to_pandas(integer_object_nulls=True), table.features)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # the library lets through what its readers raise, of any type
        raise UserError(_cannot_load(error, name, split)) from None


def _saved_split(saved: Any, name: str, split: str) -> Any:
    """The split of what save_to_disk wrote, or all of it where it has no splits."""
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise UserError(f"split={split!r} is not in dataset {name}: choose {', '.join(saved)}")
    return saved[split]


def _plain_files(name: str, revision: str | None, config: str | None) -> dict[str, list[str]]:
    """The files of each split of a folder of CSV, JSON or text files, which are read as single files are.

    There are none where its README.md says how to read them: then the library does as it says.
    """
    if not os.path.isdir(name):
        return {}
    import datasets

    builder = datasets.load_dataset_builder(name, config, revision=revision)
    options = builder.config
    default = type(options)()
    changed = {f.name for f in fields(options) if getattr(options, f.name) != getattr(default, f.name)}
    declared = changed - {"name", "version", "data_dir", "data_files", "description", "sep"}
    if declared or builder.info.features is not None or getattr(options, "sep", ",") not in (",", "\t"):
        return {}
    files = {str(part): [str(file) for file in names] for part, names in (options.data_files or {}).items()}
    for file in itertools.chain.from_iterable(files.values()):
        kind, compression = file_format(file)
        if kind in ("", ".parquet") or compression == ".zip":
            return {}
    return files


def _read_plain(files: dict[str, list[str]], name: str, split: str, text_column: str) -> pd.DataFrame:
    """A split of a folder's files, or what the library would make of train[:10%]+test (ValueError for others)."""
    import datasets

    tables = {part: _concatenated(files[part], name, text_column) for part in files if part in split}
    lengths = {part: len(tables.get(part, [])) for part in files}
    slices = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return pd.concat([tables[x.splitname][x.from_ : x.to] for x in slices], ignore_index=True)


def _concatenated(files: list[str], name: str, text_column: str) -> pd.DataFrame:
    """The rows of several files, which have the same columns."""
    tables = [read_file(file, text_column) for file in files]
    for file, table in zip(files, tables, strict=True):
        if set(table) != set(tables[0]) and file_format(file)[0] in (".csv", ".tsv"):
            raise UserError(
                f"dataset {name} has files of different columns: {os.path.basename(files[0])} has "
                f"{column_list(tables[0])}, and {os.path.basename(file)} has {column_list(table)}; name one of them"
            )
    return pd.concat(tables, ignore_index=True)


def _cannot_load(error: Exception, name: str, split: str) -> str:
    """Why the library cannot load a data set, with what to change, in one line."""
    words = reason(error)
    if words == "An error occurred while generating the dataset" and isinstance(error.__cause__, Exception):
        words = reason(error.__cause__)
    if "scripts are no longer supported" in words:
        return (
            f"dataset {name} is a loading script, which is never run: {SAVE_AS}; for one on the hub, try "
            "--dataset_revision refs/convert/parquet"
        )
    if "Config name is missing" in words or "BuilderConfig" in words:
        return f"dataset {name} needs --dataset_config with the name of a configuration: {words}"
    if "split" in words.lower():
        return f"split={split!r} of dataset {name} cannot be loaded, choose another with --split: {words}"
    return f"dataset {name} cannot be loaded, check what is in it: {words}"
