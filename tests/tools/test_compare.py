"""Runs side by side: what differs, whose evaluation is whose, and a page that is whole and safe."""

import html
import json
import re
import shutil
from pathlib import Path

from config import UserError

import pandas as pd
import pytest
from conftest import run_eval
from safetensors.torch import load_file, save_file

from evaluation.pictures import CURVES, new_figure
from evaluation.runs_page import differing, draw_plane, picture
from tools.compare import find_evaluations, main, read_run, what_to_mind


@pytest.fixture
def runs(finished_run: Path) -> list[Path]:
    """Two runs with tables, of which the second has another seed and step size."""
    about = json.loads((finished_run / "config.json").read_text()) | {"reward": {"label": "positive"}}
    (finished_run / "config.json").write_text(json.dumps(about))
    other = finished_run.parent / "b <2>"
    shutil.copytree(finished_run, other)
    (other / "config.json").write_text(json.dumps({**about, "seed": 7, "lr": 1e-3}))
    for folder, factor in ((finished_run, 0.1), (other, 0.2)):
        rows = [{"episodes": 8 * step, **dict.fromkeys(CURVES, factor * step)} for step in range(1, 11)]
        pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)
        pd.DataFrame({"step": [0, 9], "kl_seq_exact": [0.0, factor], "score_mean": [0.0, 0.5]}).to_csv(
            folder / "eval.csv", index=False
        )
    return [finished_run, other]


def test_the_page_shows_what_differs_and_each_runs_figures(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, summary = run_eval(runs[0], runs[0])
    out = tmp_path / "new" / "both.html"
    main([*map(str, runs), "--out", str(out)])
    printed = capsys.readouterr().out
    assert f"{runs[1]} has no point of eval.py" in printed
    assert f"written: {out} and {out.with_suffix('.png')}" in printed
    page = out.read_text()
    first, second = (rows_of(table) for table in re.findall(r"<table.*?</table>", page, re.DOTALL))
    score, low = summary["policy"]["score_mean"], summary["policy"]["score_ci"][0]
    assert first[1][4].startswith(f"{score:+.2f} [{low:+.2f}, ")
    assert [row[:4] for row in first[1:]] == [
        [folder.name, "80", mean, mean[1:]] for folder, mean in zip(runs, ("+1.00", "+2.00"), strict=True)
    ]
    assert second == [["", "run", "b <2>"], ["seed", "0", "7"], ["lr", "5e-05", "0.001"]]
    assert "b &lt;2&gt;" in page
    assert "b <2>" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page), "one file, no network"
    assert page.count("<img") == len(CURVES) + 1
    assert "{{" not in page
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def rows_of(table: str) -> list[list[str]]:
    """The cells of a table of the page, as they are read."""
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    return [
        [html.unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in rows
    ]


def test_settings_are_those_whose_values_differ() -> None:
    one, other = {"lr": 1.0, "seed": 0, "old": None}, {"lr": 1.0, "seed": 1}
    assert differing([one, other]) == {"seed": [0, 1], "old": [None, "–"]}
    assert differing([one]) == {}


def test_points_are_at_the_figures_of_eval(runs: list[Path]) -> None:
    _, summary = run_eval(runs[0], runs[0], "--frontier", "4")
    found = [read_run(folder, found, folder.name) for folder, found in find_evaluations(runs, []).items()]
    _, (axis,) = new_figure(1)
    draw_plane(axis, found)
    drawn = {
        mark: [line.get_xydata().tolist() for line in axis.get_lines() if line.get_marker() == mark]
        for mark in ("o", ".")
    }
    assert drawn["o"][:2] == [[[summary["kl_seq_exact"], summary["policy"]["score_mean"]]], []], "one for the legend"
    assert drawn["."] == [[[0, 0], [0.1, 0.5]], [[0, 0], [0.2, 0.5]], []]
    assert "possible, at least" in axis.get_legend_handles_labels()[1]


def test_without_evaluations_the_picture_has_no_empty_plane(runs: list[Path]) -> None:
    (runs[1] / "eval.csv").unlink()
    figure = picture([read_run(runs[1], [], "b")])
    *curves, plane = figure.axes
    assert all(axis.axison for axis in curves)
    assert not plane.axison
    assert picture([read_run(runs[0], [], "a")]).axes[-1].axison


def test_a_summary_belongs_to_the_run_that_it_is_in_or_names(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    run_eval(runs[0], runs[0])
    within = runs[0] / "eval_summary.json"
    summary = json.loads(within.read_text())

    def seeds(*named: Path) -> list[list[int]]:
        return [[one["seed"] for one in found] for found in find_evaluations(runs, named).values()]

    def write(path: Path, seed: int, policy_path: str) -> Path:
        changed = {**summary, "seed": seed, "settings": {**summary["settings"], "policy_path": policy_path}}
        path.write_text(json.dumps(changed))
        return path

    assert seeds() == [[1234], []]
    write(within, 1, "somewhere/else/policy_lm")
    write(here / "eval_summary.json", 2, "../b <2>/best/policy_lm")
    write(tmp_path / "x_summary.json", 3, "run/policy_lm")
    apart = write(here / "y.json", 4, str(runs[1] / "policy_lm"))
    (tmp_path / "other_summary.json").write_text("[]")
    assert sorted(map(sorted, seeds())) == [[1, 3], [2]]
    assert seeds(apart) == [[], [4]]
    lost, wrong = write(here / "z.json", 5, "no/policy_lm"), tmp_path / "other_summary.json"
    for path, problem in ((lost, "is of none of these"), (wrong, "not a summary"), (here / "no", "not a summary")):
        with pytest.raises(UserError, match=problem):
            seeds(path)


def test_what_cannot_be_compared_is_said(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert what_to_mind([read_run(folder, [], folder.name) for folder in runs]) == []
    about = json.loads((runs[1] / "config.json").read_text())
    (runs[1] / "config.json").write_text(json.dumps({**about, "rm_name": "other", "top_k": 5}))
    main([*map(str, runs), "--out", str(tmp_path / "x.html")])
    printed = capsys.readouterr().out
    assert "note: these runs have different rewards" in printed
    assert "these runs decode differently" in (tmp_path / "x.html").read_text()


@pytest.mark.parametrize(
    ("harm", "words", "message"),
    [
        ("", ["--out", "x.png"], "must end in .html"),
        ("", ["nowhere"], "runs: nowhere is not the folder of a run"),
        ("metrics.csv", [], "metrics.csv does not exist"),
        ("empty", [], "has taken no step yet"),
        ("config.json", [], "config.json"),
        ("", ["--out", "/dev/null/x.html"], "cannot be written"),
    ],
)
def test_wrong_input_is_one_line(
    harm: str, words: list[str], message: str, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if harm == "empty":
        table = runs[1] / "metrics.csv"
        table.write_text(table.read_text().splitlines()[0] + "\n")
    elif harm == "config.json":
        (runs[1] / harm).write_text('{"total_steps": ')
    elif harm:
        (runs[1] / harm).unlink()
    with pytest.raises(UserError, match=message):
        main([*map(str, runs), *words] if words[:1] != ["nowhere"] else ["nowhere"])


def test_an_evaluation_of_an_earlier_policy_is_said(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    page = str(runs[0].parent / "x.html")
    run_eval(runs[0], runs[0])
    note = f"an evaluation of {runs[0]} is of a policy that it no longer has"
    main([str(runs[0]), "--out", page])
    assert note not in capsys.readouterr().out
    weights = load_file(runs[0] / "policy_lm" / "model.safetensors")
    weights["transformer.ln_f.bias"] += 1
    save_file(weights, runs[0] / "policy_lm" / "model.safetensors", {"format": "pt"})
    main([str(runs[0]), "--out", page])
    assert note in capsys.readouterr().out
