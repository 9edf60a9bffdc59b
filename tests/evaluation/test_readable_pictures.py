"""Pictures and pages can be read: by colour-blind readers, on white and on black, and whole."""

import itertools
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from evaluation import pictures
from evaluation.runs_page import ComparedRun, draw_curves, draw_plane, groups_of, page_mark
from runtime.pictures import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, line_style, point_style

CSS = (Path(pictures.__file__).parent / "page.css").read_text(encoding="utf-8")
LIGHT, DARK = (dict(re.findall(r"--(\w+): (#\w+|[\d.]+);", line)) for line in CSS.splitlines()[:2])
SHADE = re.search(r"\.token \{ background: rgb\((\d+) (\d+) (\d+) /", CSS)


def rgb(colour: str) -> list[float]:
    """The parts of a colour between 0 and 1; #rgb is short for #rrggbb."""
    digits = colour.removeprefix("#")
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    return [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]


def luminance(parts: list[float]) -> float:
    """Relative luminance as in WCAG 2.2."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: list[float], other: list[float]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [LIGHT, DARK], ids=["light", "dark"])
def test_texts_stand_out_from_what_is_behind_them(mode: dict[str, str]) -> None:
    back = rgb(mode["back"])
    for name in ("text", "soft", "good", "bad"):
        assert contrast(rgb(mode[name]), back) >= 4.5, name
    assert contrast(rgb(mode["text"]), rgb(mode["card"])) >= 4.5
    assert contrast(rgb(GREY), back) >= 4.5, "texts of pictures"
    shade, most = [int(x) / 255 for x in SHADE.groups()], float(mode["shade"])
    shaded = [most * x + (1 - most) * y for x, y in zip(shade, back, strict=True)]
    assert contrast(rgb(mode["text"]), shaded) >= 4.5, "a token of much KL"


def test_colours_are_those_of_okabe_and_ito() -> None:
    published = {(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0)}
    ours = {tuple(round(255 * x) for x in rgb(colour)) for colour in (BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE)}
    assert ours == published
    assert ORANGE not in {line_style(number)["color"] for number in range(20)}, "that of the best possible"


def test_no_two_of_many_series_look_alike_and_neighbours_differ_without_colours() -> None:
    lines = [tuple(line_style(number).values()) for number in range(15)]
    points = [tuple(point_style(number).values()) for number in range(35)]
    assert len(set(lines)) == 15
    assert len(set(points)) == 35
    for (_, one), (_, other) in itertools.chain(itertools.pairwise(lines), itertools.pairwise(points)):
        assert one != other
    assert len({page_mark(number) for number in range(105)}) == 105


def compared(name: str, seed: int, lr: float, height: float) -> ComparedRun:
    episodes = [64 * step for step in range(1, 11)]
    metrics = pd.DataFrame({"episodes": episodes, **dict.fromkeys(pictures.CURVES, [height] * 10)})
    path = pd.DataFrame({"kl_seq_exact": [0.0, 1.0], "score_mean": [0.0, height]})
    return ComparedRun(name, {"seed": seed, "lr": lr}, "positive", metrics, path, [])


def test_runs_of_one_setting_are_one_group() -> None:
    runs = [compared("a", 0, 0.1, 0.2), compared("b", 0, 0.2, 0.9), compared("c", 1, 0.1, 0.6)]
    assert [[run.name for run in group] for group in groups_of(runs)] == [["a", "c"], ["b"]]
    _, (curves, plane) = pictures.new_figure(2)
    draw_curves(curves, runs, "score_mean")
    mean, thin, thick = curves.lines
    assert mean.get_ydata() == pytest.approx([0.4] * 10)
    (band,) = [area.get_paths()[0].vertices[:, 1] for area in curves.collections]
    assert (band.min(), band.max()) == pytest.approx((0.2, 0.6))
    assert thin.get_color() == thick.get_color() != mean.get_color()
    draw_plane(plane, runs)
    styles = {tuple(line.get_ydata()): (line.get_color(), line.get_linestyle()) for line in plane.lines[:3]}
    assert styles[0.0, 0.2] == styles[0.0, 0.6] != styles[0.0, 0.9]


def test_a_second_run_of_the_same_seed_is_no_further_seed() -> None:
    """Such as the run of a planted bug beside the right one: a mean of the two would hide both."""
    runs = [compared(name, seed, 0.1, 0.5) for name, seed in (("right", 0), ("sick", 0), ("other seed", 1))]
    assert [[run.name for run in group] for group in groups_of(runs)] == [["right", "other seed"], ["sick"]]


def test_no_line_is_cut_off_where_a_later_panel_goes_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    new_figure = pictures.new_figure
    monkeypatch.setattr(pictures, "new_figure", lambda *a, **k: figures.append(new_figure(*a, **k)) or figures[-1])
    tables = {
        title: pd.DataFrame({"run": "a", "alpha": [0.5, 1.0], "kl": [1.0, end], "optimal_share": [0.3, end / 10]})
        for title, end in (("small", 2.0), ("large", 8.0))
    }
    pictures.shares_picture(tables, tmp_path / "x.png")
    for axis in figures[0][1]:
        assert axis.get_xlim()[0] == 0
        assert axis.get_xlim()[1] > 8
        assert axis.get_ylim()[1] > 80


def test_the_best_possible_is_one_line_that_is_dotted_where_it_is_uncertain() -> None:
    summary = {
        "optimal_curve": {"kl": [0.0, 0.5, 1.0, 1.5, 2.0], "score_mean": [0.0, 0.4, 0.7, 0.8, 0.9]},
        "best_of_n": {"n": [1, 2, 4], "kl": [0.0, 0.2, 0.7], "score_mean": [0.0, 0.2, 0.5]},
        "kl_certain": 1.2,
    }
    _, (axis,) = pictures.new_figure(1)
    pictures.draw_best_possible(axis, summary)
    solid, dotted, best_of_n = axis.lines
    assert solid.get_xdata().tolist() == [0, 0.5, 1]
    assert dotted.get_xdata().tolist() == [1, 1.5, 2]
    assert best_of_n.get_label() == "best of 1, 2, 4"
    _, (axis,) = pictures.new_figure(1)
    pictures.draw_best_possible(axis, {**summary, "kl_certain": math.inf})
    assert [line.get_linestyle() for line in axis.lines] == ["-", "-"]
