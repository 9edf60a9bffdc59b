"""What is written to a terminal: colours only where they may be, no text lost, no line too long, no foreign escapes."""

import io
import re
import sys
from pathlib import Path

import pytest
from conftest import MAKING, write_labelled_csv
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import data
from evaluation.judge import FittedJudge
from pretrain.tiny_reviews import generate_reviews
from runtime import terminal
from runtime.terminal import SHADES, can_shade, cells, paint, side_by_side, wrap
from tools.make_models import main as make_models

ROOT = Path(terminal.__file__).parent.parent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "shades"),
    [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_colours_are_for_terminals_that_have_and_want_them(
    variables: dict[str, str], shades: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert can_shade(Terminal()) is shades
    assert not can_shade(io.StringIO()), "a pipe or a file"


@given(st.text(alphabet="ab é\n", max_size=60), st.integers(1, 12))
def test_wrapping_loses_nothing_but_blanks_and_keeps_the_width(text: str, width: int) -> None:
    lines = wrap(cells([(text, 0.0)]), width)
    assert all(len(line) <= width for line in lines)
    joined = "".join(char for line in lines for char, _ in line)
    assert joined.replace(" ", "") == "".join(text.split())
    assert not any(line and line[0][0] == " " for line in lines)


def test_words_stay_whole_where_they_fit_and_empty_lines_stay() -> None:
    lines = wrap(cells([("one two three\n\nabcdefghijkl", 0.0)]), 8)
    assert ["".join(char for char, _ in line) for line in lines] == ["one two", "three", "", "abcdefgh", "ijkl"]


def test_shades_follow_the_numbers_and_are_off_where_asked() -> None:
    pieces = [("a", 0.0), ("b", 0.06), ("c", 0.06), ("d", 9.0)]
    levels = [colour for _, colour in SHADES]
    assert paint(cells(pieces), True) == (f"a\x1b[30;48;5;{levels[0]}mbc\x1b[0m\x1b[30;48;5;{levels[-1]}md\x1b[0m")
    assert paint(cells(pieces), False) == "abcd"


def test_texts_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in paint(cells([("\x1b[2J\x07\r\x9b1m", 0.0)]), False)


def test_columns_stand_beside_each_other_or_below_where_it_is_narrow() -> None:
    columns = [("left", cells([("one two three", 0.0)])), ("right", cells([("four", 3.0)]))]
    wide = side_by_side(columns, 80, False).splitlines()
    assert re.fullmatch(r"left +right", wide[0])
    assert re.fullmatch(r"one two three +four", wide[1])
    assert side_by_side(columns, 30, False).splitlines() == ["left", "one two three", "right", "four"]
    plain = re.sub(r"\x1b\[[\d;]*m", "", side_by_side(columns, 80, True))
    assert plain.splitlines() == wide, "shading moves nothing"


def test_a_bar_shows_over_long_work_only_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(terminal.progress(range(5), "counting", "number")) == list(range(5))
    assert "counting" not in sys.stderr.getvalue()  # type: ignore[attr-defined]
    monkeypatch.setattr(terminal, "PATIENCE", 0.0)
    assert list(terminal.progress(range(5), "counting", "number")) == list(range(5))
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "counting" in shown
    assert "/5" in shown
    assert shown.endswith("\r"), "it leaves nothing behind"


@pytest.mark.parametrize("seconds", [0.01, 7.0, 100.0])
def test_a_log_has_a_line_every_half_minute_and_one_at_the_end(
    seconds: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 steps of so many seconds each, by a clock of our own."""
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])  # type: ignore[attr-defined]
    with terminal.progress_bar(title="training", unit="step", total=200) as bar:
        for step in range(200):
            clock[0] += seconds
            bar.set_postfix_str(f"score {step}")
            bar.update()
    shown = capsys.readouterr().err
    lines = shown.splitlines()
    assert "\r" not in shown
    assert len(lines) <= 1 + min(200, 200 * seconds / 30)
    assert lines[-1].startswith("training: 100%")
    assert "200/200" in lines[-1]
    assert lines[-1].endswith("score 199]")
    if seconds == 7:
        assert " 5/200 [00:35<" in lines[0]
        assert "7.00s/step" in lines[0]


def test_a_log_has_nothing_of_a_bar_that_leaves_nothing_unless_it_takes_long(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert list(terminal.progress(iter("abc"), "counting", "letter")) == list("abc")
    assert capsys.readouterr().err == ""
    with terminal.progress_bar(range(3), "evaluating", "batch") as bar:  # as eval.py has it
        assert list(bar) == [0, 1, 2]
    assert capsys.readouterr().err.count("evaluating: 100%") == 1
    assert terminal.progress_bar(range(3)).total == 3
    assert terminal.progress_bar(x for x in "abc").total is None


def test_every_bar_is_one_of_these() -> None:
    """tqdm itself would fill a log."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]:
        if path.parent.name != "tests" and path.name != "terminal.py":
            calls = re.findall(r"\bt(?:qdm|range)\((?!\))", path.read_text(encoding="utf-8"))
            assert not calls, path


def test_all_long_work_before_training_has_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    reviews = write_labelled_csv(tmp_path / "reviews.csv", ["good", "bad"])
    make_models(["--dataset", str(reviews), "--out", str(tmp_path / "models"), *MAKING])
    texts, labels = generate_reviews(40, seed=0)
    FittedJudge(texts, [bool(label) for label in labels])
    shown = capsys.readouterr().err
    for title in ("tokenizer", "tokenizing", "language model", "classifier", "measuring", "second judge"):
        assert f"{title}:" in shown, title


def test_texts_are_tokenized_alike_in_portions(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{i} a film" * (i % 4) for i in range(23)]
    whole = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for portion in (1, 7, 1000):
        monkeypatch.setattr(data, "AT_A_TIME", portion)
        assert data.tokenize(tokenizer, texts) == whole
    assert data.tokenize(tokenizer, []) == []
