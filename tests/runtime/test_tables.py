"""Tables: what is read is what was written, in every format, or the file is refused with the line that says why."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

from config import UserError

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.tables import file_format, has_splits, is_file, load_table

ODD = ['"', '""', '\\"', "\\", ",", "\t", "\n", "\r", "\r\n", "\x0c", "\x85", "\u2028", "NA", "1", "🎬", "\ufeff", " "]
CELLS = st.lists(st.sampled_from([*ODD, "film", "bad"]), max_size=6).map("".join)
ROWS = st.lists(st.tuples(CELLS, CELLS.filter(str.strip)), min_size=1, max_size=6)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])
PROPERTY = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read(path: Path | str, split: str = "train", **kw: str) -> list[list[object]]:
    """The columns and rows of a data set."""
    table = load_table(str(path), split, "text", **kw)
    return [list(table), *(list(row) for row in table.itertuples(index=False))]


def refused(path: Path | str, split: str = "train", **kw: str) -> str:
    with pytest.raises(UserError) as caught:
        load_table(str(path), split, "text", **kw)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_csv(rows: list[list[str]], **options: object) -> str:
    file = io.StringIO(newline="")
    csv.writer(file, **options).writerows(rows)  # type: ignore[arg-type]
    return file.getvalue()


# --- what is read is what was written -------------------------------------------------------------------------------


@PROPERTY
@given(
    rows=ROWS, ends=st.sampled_from(["\n", "\r\n", "\r"]), bom=st.booleans(), every=st.booleans(), comma=st.booleans()
)
def test_a_csv_file_is_read_as_it_was_written(
    rows: list[tuple[str, str]], ends: str, bom: bool, every: bool, comma: bool, tmp_path: Path
) -> None:
    table = [["text", "other"], *map(list, rows)]
    quoting = csv.QUOTE_ALL if every or any("\r" in cell for row in rows for cell in row) else csv.QUOTE_MINIMAL
    lines = [
        as_csv([row], quoting=quoting, lineterminator="," * (comma and i > 0) + ends) for i, row in enumerate(table)
    ]
    assert read(write(tmp_path / "a.csv", "\ufeff" * bom + "".join(lines))) == table


@PROPERTY
@given(rows=ROWS)
def test_a_quoted_tsv_file_is_read_as_it_was_written_or_refused(rows: list[tuple[str, str]], tmp_path: Path) -> None:
    table = [["text", "other"], *map(list, rows)]
    path = write(tmp_path / "a.tsv", as_csv(table, delimiter="\t", quoting=csv.QUOTE_ALL))
    try:
        assert read(path) == table
    except UserError as error:  # where it is rows of two cells without the quotation marks, too
        assert "may be a row or" in str(error)  # noqa: PT017
        assert any("\t" in cell for row in rows for cell in row)


@PROPERTY
@given(rows=ROWS, ends=st.sampled_from(["\n", "\r\n"]))
def test_a_tsv_file_without_quoting_keeps_all_rows(rows: list[tuple[str, str]], ends: str, tmp_path: Path) -> None:
    """Only quotation marks around a whole cell are left out."""
    table = [[cell.translate(dict.fromkeys(map(ord, "\t\r\n"), " ")) + "x" for cell in row] for row in rows]
    path = write(tmp_path / "a.tsv", "".join("\t".join(row) + ends for row in [["text", "other"], *table]))
    try:
        assert read(path) == [["text", "other"], *table]
    except UserError as error:
        assert "may be a row or" in str(error)  # noqa: PT017


@PROPERTY
@given(rows=ROWS, form=st.sampled_from(["lines", "array", "indented", "columns", "index"]), bom=st.booleans())
def test_json_of_every_form_is_read_as_it_was_written(
    rows: list[tuple[str, str]], form: str, bom: bool, tmp_path: Path
) -> None:
    objects = [{"text": a, "other": b, "number": i} for i, (a, b) in enumerate(rows)]
    written = {
        "lines": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in objects),
        "array": json.dumps(objects),
        "indented": "\n".join(json.dumps(row, indent=2) for row in objects),
        "columns": json.dumps({name: [row[name] for row in objects] for name in objects[0]}),
        "index": json.dumps({name: {str(i): row[name] for i, row in enumerate(objects)} for name in objects[0]}),
    }[form]
    found = read(write(tmp_path / "a.json", "\ufeff" * bom + written))
    assert found == [["text", "other", "number"], *(list(row.values()) for row in objects)]


@PROPERTY
@given(lines=st.lists(CELLS, min_size=1, max_size=6), ends=ENDS, bom=st.booleans())
def test_a_text_ends_at_the_end_of_its_line_and_nowhere_else(
    lines: list[str], ends: str, bom: bool, tmp_path: Path
) -> None:
    texts = [line.replace("\r", "").replace("\n", "") + "x" for line in lines]
    assert read(write(tmp_path / "a.txt", "\ufeff" * bom + ends.join(texts))) == [["text"], *([text] for text in texts)]


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def pack(data: bytes, ending: str) -> bytes:
    if ending in PACKERS:
        return PACKERS[ending](data)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("__MACOSX/._reviews.csv", b"\0")
        archive.writestr("reviews/reviews.csv", data)
    return file.getvalue()


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zip", ".GZ"])
def test_packed_files_and_endings_in_capitals_are_read(ending: str, tmp_path: Path) -> None:
    data = b"text\nNA\n"
    assert read(write(tmp_path / f"a.CSV{ending}", pack(data, ending.lower()))) == [["text"], ["NA"]]
    table = pd.DataFrame({"text": ["a"]}).to_parquet()
    if ending != ".zip":
        assert read(write(tmp_path / f"a.parquet{ending}", pack(table, ending.lower()))) == [["text"], ["a"]]


def test_the_file_in_a_zip_says_its_format(tmp_path: Path) -> None:
    assert read(write(tmp_path / "reviews.zip", pack(b"text\nNA\n", ".zip"))) == [["text"], ["NA"]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.csv", (".csv", "")),
        ("dir.csv/B.TSV.GZ", (".tsv", ".gz")),
        ("a.b.jsonl.xz", (".jsonl", ".xz")),
        ("reviews.zip", ("", ".zip")),
        ("reviews", ("", "")),
        ("stanfordnlp/imdb", ("", "")),
        ("a.xlsx", ("", "")),
    ],
)
def test_formats_are_known_by_their_endings(name: str, expected: tuple[str, str]) -> None:
    assert file_format(name) == expected


# --- quotation marks and separators ---------------------------------------------------------------------------------


def test_quotation_marks_with_a_backslash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"She said \\"no, never\\" at \\n C:\\\\",1\n"x",0\n')
    assert read(path)[1:] == [['She said "no, never" at \\n C:\\', "1"], ["x", "0"]]
    assert capsys.readouterr().out == f'note: in {path}, \\" is read as a quotation mark\n'


def test_lone_quotation_marks_of_a_tsv_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"Great" film\t1\n"the\t0\nend"\t1\n')
    assert read(path)[1:] == [['"Great" film', "1"], ['"the', "0"], ['end"', "1"]]
    assert capsys.readouterr().out == f"note: in {path}, quotation marks are read as part of the texts\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.tsv", 'text\tlabel\n"Great\t1\nfilm"\t0\n', "line 3 may be a row or"),
        ("a.csv", 'text,label\nfine,1\n"Great,1\nbad,0\n', "row of line 3"),
        ("a.csv", 'text,label\n"A "great" film",1\n', "row of line 2"),
        ("a.csv", "text,label\nfine,1\nI like it, really,1\n", "row of line 3 has 3 and the header 2"),
        ("a.csv", "text,label\nfine,1\n\nfine,1,\n", "row of line 4 has 3"),
        ("a.csv", "text,label\nfine,1,\nfine,1\n", "row of line 2 has 3"),
        ("a.csv", 'text,label\n"two\nlines",1\nfine\n', "row of line 4 has 1"),
        ("a.csv", "text,label\n1,fine,1\n2,bad,0\n", "row of line 2 has 3"),
        ("a.csv", "text,text\nfine,1\n", "two of its columns are called 'text'"),
        ("a.json", '["fine", "bad"]', "value 1 is no object"),
        ("a.jsonl", '{"text": "fine"}\n["bad"]', "value 2 is no object"),
        ("a.jsonl", '{"text": "fine"}\n{"text" "bad"}', "line 2"),
        ("a.json", '{"text": ["a", "b"], "label": [1]}', "same length"),
        ("a.json", "[" * 100_000, "recursion"),
        ("reviews", "text\nfine\n", ".jsonl"),
        ("a.xlsx", "PK", ".csv"),
        ("a.csv.gz", "text\nfine\n", "gzip"),
        ("a.csv.xz", "text\nfine\n", ".csv.xz"),
        ("a.csv.zip", "PK\x03\x04", "zip"),
        ("a.csv.gz", gzip.compress(random.Random(0).randbytes(999))[:-9], "end-of-stream"),
    ],
)
def test_what_cannot_be_read_for_certain_is_refused(
    name: str, content: str | bytes, words: str, tmp_path: Path
) -> None:
    assert words in refused(write(tmp_path / name, content))


def test_a_zip_of_several_files_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.csv.zip", "w") as archive:
        archive.writestr("a.csv", "text\na\n")
        archive.writestr("b.csv", "text\nb\n")
    assert "holds 2 files: unpack it" in refused(tmp_path / "a.csv.zip")


# --- encodings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["", "é" * 50_000 + "\r\n" + "fine\n", "\ufeff"])
def test_the_place_that_is_not_utf8_is_named(before: str, tmp_path: Path) -> None:
    place = f"line {before.count(chr(10)) + 1} holds the byte 0xef, {len(before.encode()) + 2:,} bytes from the start"
    assert place in refused(write(tmp_path / "a.txt", before.encode() + b"na\xefve\n"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl"])
def test_utf16_is_called_so(encoding: str, kind: str, tmp_path: Path) -> None:
    assert "it is UTF-16" in refused(write(tmp_path / f"a.{kind}", "text\nfine films\n".encode(encoding)))


def test_a_name_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(UserError, match=r"'caf\\udce9\.csv' has a name that is not UTF-8"):
        load_table("caf\udce9.csv", "train", "text")


# --- folders and data sets ------------------------------------------------------------------------------------------


def test_a_folder_of_parquet_parts_is_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "x.parquet"
    for i in range(2):
        write(folder / f"part-{i}.snappy.parquet", pd.DataFrame({"text": [f"text {i}"]}).to_parquet())
    write(folder / "_SUCCESS", b"")
    write(folder / ".part-0.parquet.crc", b"x")
    assert is_file(str(folder))
    assert read(folder, "test") == [["text"], ["text 0"], ["text 1"]]


def test_class_names_in_a_parquet_file_are_used(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    data = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, None]}, features=features)
    data.to_parquet(str(tmp_path / "a.parquet"))
    assert read(tmp_path / "a.parquet")[1:] == [["a", "pos"], ["b", "neg"], ["c", None]]


def test_files_of_a_folder_are_read_like_files(tmp_path: Path) -> None:
    write(tmp_path / "csv" / "train-1.csv", "text,label\nNA,1,\n")
    write(tmp_path / "csv" / "train-2.csv.gz", gzip.compress(b"text,label\n\x0c None,0\n"))
    write(tmp_path / "csv" / "test.csv", "\ufefftext,label\nseen,1\n")
    assert read(tmp_path / "csv") == [["text", "label"], ["NA", "1"], ["\x0c None", "0"]]
    assert read(tmp_path / "csv", "test") == [["text", "label"], ["seen", "1"]]
    assert read(tmp_path / "csv", "train[50%:]+test") == [["text", "label"], ["\x0c None", "0"], ["seen", "1"]]
    message = refused(tmp_path / "csv", "validation")
    assert "another with --split" in message
    assert "['train', 'test']" in message
    write(tmp_path / "json" / "train.jsonl", '{"text": "a"}\n{"text": 5}')
    assert read(tmp_path / "json") == [["text"], ["a"], [5]]
    write(tmp_path / "text" / "train.txt", "a\x0cb\u2028c\n")
    assert read(tmp_path / "text") == [["text"], ["a\x0cb\u2028c"]]
    write(tmp_path / "shifted" / "train.csv", "text,label\nfine,1,\nfine,1\n")
    with pytest.raises(UserError, match=r"train\.csv cannot be read .* row of line 2 has 3"):
        read(tmp_path / "shifted")


def test_a_folder_is_read_as_its_card_says(tmp_path: Path) -> None:
    write(
        tmp_path / "README.md",
        '---\nconfigs:\n- config_name: a\n  data_files: a.csv\n  sep: "|"\n'
        "- config_name: b\n  data_files: b.csv\n---\n",
    )
    write(tmp_path / "a.csv", "text|label\nof a|1\n")
    write(tmp_path / "b.csv", "text,label\nof b,0\n")
    assert read(tmp_path, config="a")[1][0] == "of a"
    assert read(tmp_path, config="b")[1][0] == "of b"
    message = refused(tmp_path)
    assert "--dataset_config" in message
    assert "['a', 'b']" in message
    assert "--dataset_config" in refused(tmp_path, config="c")


def test_a_configuration_of_what_has_none_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\nfine\n")
    assert read(path) == [["text"], ["fine"]]
    assert "dataset_config=b" in refused(path, config="b")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"scripted.py": b"x = 1\n"}, "--dataset_revision refs/convert/parquet"),
        ({"train.zip": b"PK\x03\x04 broken"}, "not a zip file"),
        ({"a.csv": b"text,label\nx,1\n", "b.csv": b"text,y\nx,1\n"}, "a.csv has text, label, and b.csv has text, y"),
        ({"a.parquet": b"PAR1 broken"}, "arquet"),
        ({"README.md": b"# nothing"}, "data files"),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_line(files: dict[str, bytes], words: str, tmp_path: Path) -> None:
    for name, content in files.items():
        write(tmp_path / "scripted" / name, content)
    assert words in refused(tmp_path / "scripted")


def test_parquet_files_of_different_columns_name_the_cause(tmp_path: Path) -> None:
    for column in ("label", "stars"):
        write(tmp_path / f"{column}.parquet", pd.DataFrame({"text": ["a"], column: [1]}).to_parquet())
    message = refused(tmp_path)
    assert "label" in message
    assert "stars" in message


def test_only_data_sets_have_splits(tmp_path: Path) -> None:
    data = Dataset.from_dict({"text": ["a"]})
    data.save_to_disk(tmp_path / "whole")
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "split")
    write(tmp_path / "x.csv" / "train.csv", "text\na\n")
    expected = {"whole": False, "split": True, "x.csv": True, "gone.csv": False}
    assert {name: has_splits(str(tmp_path / name)) for name in expected} == expected
    assert has_splits("stanfordnlp/imdb")
    assert has_splits("tiny:reviews")
    assert read(tmp_path / "whole", "test") == [["text"], ["a"]]
    assert read(tmp_path / "x.csv") == [["text"], ["a"]]
