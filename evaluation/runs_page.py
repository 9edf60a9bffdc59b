"""Several runs on one page and in one picture: their curves, their points of score and KL, their settings that differ.

The page needs no network; runs_page.html is its frame. What a run is made of is read by tools.compare.
"""

import html
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from evaluation.pictures import (
    CURVES,
    EVALUATED,
    add_legends,
    as_image,
    draw_best_possible,
    draw_curve,
    draw_points,
    draw_seeds,
    label_plane,
    new_figure,
    place_of,
)
from evaluation.report import html_table, write_page
from evaluation.table import ANY_UNIT
from reward import score_title
from runtime.pictures import GREY, LINES, MARKERS, line_style, point_style

MISSING = "–"
BORDERS = dict(zip(LINES, ("solid", "dashed", "dotted"), strict=True))  # a line on the page
GLYPHS = dict(zip(MARKERS, "●■▲◆▼✚✖", strict=True))  # a marker on the page


@dataclass(frozen=True)
class ComparedRun:
    """A run: settings, metrics.csv, score and KL of eval.csv if there is one, and the summaries of its evaluations."""

    name: str
    settings: dict[str, Any]
    label: str | None
    metrics: pd.DataFrame
    path: pd.DataFrame | None
    evaluations: list[dict[str, Any]]


def write_runs(runs: Sequence[ComparedRun], notes: Sequence[str], page: Path) -> None:
    """Write the page, and the picture of the same name beside it (raises OSError)."""
    title = html.escape(f"{len(runs)} runs compared" if len(runs) > 1 else f"The run {runs[0].name}")
    fields = {
        "title": title,
        "notes": "\n".join(f'<p class="verdict">{html.escape(note)}</p>' for note in notes),
        "runs": runs_table(runs),
        "plane": plane_image(runs),
        "curves": "\n".join(curve_images(runs)),
        "settings": settings_table(runs),
    }
    write_page("runs_page.html", title, fields, page)
    picture(runs).savefig(page.with_suffix(".png"), dpi=120)


def groups_of(runs: Sequence[ComparedRun]) -> list[list[ComparedRun]]:
    """The runs of each setting, which differ in nothing but their seed; they have one colour, line and marker.

    A second run of the same seed, such as one of other code, is no further seed: it begins another group.
    """
    groups: dict[str, list[ComparedRun]] = {}
    of_this_seed: Counter[str] = Counter()
    for run in runs:
        setting = {name: value for name, value in run.settings.items() if name != "seed"}
        with_seed = json.dumps(run.settings, sort_keys=True)
        of_this_seed[with_seed] += 1
        groups.setdefault(json.dumps([setting, of_this_seed[with_seed]], sort_keys=True), []).append(run)
    return list(groups.values())


def score_of(runs: Sequence[ComparedRun]) -> str:
    """What the scores of these runs are called, all of them."""
    titles = {score_title(run.label) for run in runs}
    return titles.pop() if len(titles) == 1 else "score"


# --- tables ---------------------------------------------------------------------------------------------------------


def runs_table(runs: Sequence[ComparedRun]) -> str:
    """A row for each run and each of its evaluations, setting by setting."""
    score = score_of(runs)
    columns = [
        "run",
        "episodes",
        f"{score}, training",
        "KL, training",
        f"{score}, held-out",
        "KL, held-out",
        "win-rate, %",
    ]
    rows = []
    for number, run in ((number, run) for number, group in enumerate(groups_of(runs)) for run in group):
        end = run.metrics.tail(max(1, len(run.metrics) // 10))
        trained = [
            f"{page_mark(number)}{html.escape(run.name)}",
            f"{run.metrics.episodes.iloc[-1]:,.0f}",
            score_format(run.label).format(end.score_mean.mean()),
            f"{end.kl_seq_exact.mean():.2f}",
        ]
        evaluated = [evaluation_cells(summary) for summary in run.evaluations] or [["", "", ""]]
        rows += [[*trained, *cells] for cells in evaluated]
    return html_table(rows, columns, escape=False)


def page_mark(number: int) -> str:
    """Line and marker of a setting, beside the names of its runs."""
    line = line_style(number)
    border = f"border-bottom-style: {BORDERS[line['linestyle']]}"
    glyph = GLYPHS[point_style(number)["marker"]]
    return f'<span class="mark" data-marker="{glyph}" style="color: {line["color"]}; {border}"></span>'


def evaluation_cells(summary: dict[str, Any]) -> list[str]:
    """Score, KL and win-rate of an evaluation with their intervals."""
    ours = summary["policy"]
    win_rate, *ends = (100 * rate for rate in (summary["win_rate"], *summary["win_rate_ci"]))
    return [
        with_interval(score_format(summary["label"]), ours["score_mean"], ours["score_ci"]),
        with_interval("{:.2f}", summary["kl_seq_exact"], summary["kl_seq_exact_ci"]),
        with_interval("{:.0f}", win_rate, ends),
    ]


def score_format(label: str | None) -> str:
    """Two digits for a label's scores; those of any unit have four that count."""
    return ANY_UNIT if label is None else "{:+.2f}"


def with_interval(form: str, value: float, ends: Sequence[float]) -> str:
    """A figure with its interval in brackets."""
    return f"{form.format(value)} [{', '.join(form.format(end) for end in ends)}]"


def settings_table(runs: Sequence[ComparedRun]) -> str:
    """The settings whose values differ, a row each and a column for each run."""
    rows = differing([run.settings for run in runs])
    if not rows:
        return "<p>None.</p>"
    shown = [[name, *map(as_text, values)] for name, values in rows.items()]
    return html_table(shown, ["", *(run.name for run in runs)])


def differing(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The values of the settings that are not the same everywhere; one that a run does not have is a difference."""
    names = dict.fromkeys(name for one in settings for name in one)
    rows = {name: [one.get(name, MISSING) for one in settings] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def as_text(value: object) -> str:
    """The value of a setting as a user would write it."""
    return value if isinstance(value, str) else json.dumps(value).replace("null", "none")


# --- pictures -------------------------------------------------------------------------------------------------------


def curve_images(runs: Sequence[ComparedRun]) -> list[str]:
    """The curves, an image for each column."""
    images = []
    for column in CURVES:
        figure, (axis,) = new_figure(1, size=(4.2, 2.8))
        draw_curves(axis, runs, column)
        images.append(as_image(figure, axis.get_title()))
    return images


def draw_curves(axis: Any, runs: Sequence[ComparedRun], column: str) -> None:
    """Draw one column of metrics.csv of every setting."""
    score = f"mean {score_of(runs)}"
    for number, group in enumerate(groups_of(runs)):
        if len(group) == 1:
            draw_curve(axis, group[0].metrics, column, score, **line_style(number))
        else:
            draw_seeds(axis, [run.metrics for run in group], column, score, **line_style(number))


def plane_image(runs: Sequence[ComparedRun]) -> str:
    """Score against KL as an image, or why there is none."""
    if not were_evaluated(runs):
        return '<p class="soft">None of these runs has been evaluated: python eval.py --policy_path RUN/policy_lm</p>'
    figure, (axis,) = new_figure(1, size=(5.8, 3.9))
    draw_plane(axis, runs)
    return f'<div class="plane">{as_image(figure, "Reward against KL")}</div>'


def were_evaluated(runs: Sequence[ComparedRun]) -> bool:
    """Whether there is any point of score and KL on held-out prompts."""
    return any(run.path is not None or run.evaluations for run in runs)


def draw_plane(axis: Any, runs: Sequence[ComparedRun]) -> None:
    """Draw each run's path over its own held-out prompts, and eval.py's points with their 95 % intervals."""
    kl, score = EVALUATED
    for number, run in ((number, run) for number, group in enumerate(groups_of(runs)) for run in group):
        if run.path is not None:
            axis.plot(run.path[kl], run.path[score], **line_style(number), marker=".", alpha=0.6, linewidth=1)
        if run.evaluations:
            points = pd.DataFrame(map(place_of, run.evaluations))
            draw_points(axis, points, **point_style(number), markersize=8)
    axis.plot([], [], ".-", color=GREY, alpha=0.6, label="evaluations while training")
    if any(run.evaluations for run in runs):
        axis.errorbar([], [], [], [], "o", color=GREY, markersize=8, capsize=2, label="eval.py, with 95 % intervals")
    draw_most_certain(axis, runs)
    label_plane(axis, score_of(runs))


def draw_most_certain(axis: Any, runs: Sequence[ComparedRun]) -> None:
    """Draw what is possible at each KL, where an evaluation with --frontier found it and all share a reward."""
    evaluations = [one for run in runs for one in run.evaluations]
    with_frontier = [one for one in evaluations if "optimal_curve" in one]
    if with_frontier and len({run.settings.get("rm_name") for run in runs}) == 1:
        farthest = 1.3 * max(one["kl_seq_exact"] for one in evaluations)
        draw_best_possible(axis, max(with_frontier, key=lambda one: one["kl_certain"]), farthest)


def picture(runs: Sequence[ComparedRun]) -> Any:
    """All panels in one figure, with the names of each setting's runs below."""
    figure, (*axes, plane) = new_figure(len(CURVES) + 1, rows=2, size=(13, 7))
    for axis, column in zip(axes, CURVES, strict=True):
        draw_curves(axis, runs, column)
    if were_evaluated(runs):
        draw_plane(plane, runs)
        plane.set_title("reward against KL, held-out prompts", fontsize=10)
    else:
        plane.set_axis_off()
    add_legends(figure)
    groups = groups_of(runs)
    lines = [
        axes[0].plot([], [], **line_style(number) | point_style(number), label=", ".join(run.name for run in group))[0]
        for number, group in enumerate(groups)
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(4, len(lines)), fontsize=9, frameon=False)
    key = "batches while training: thin as measured, thick as a running mean"
    if any(len(group) > 1 for group in groups):
        key += "; of several seeds the mean, in a band from the lowest to the highest"
    figure.suptitle(key, fontsize=10, color=GREY)
    return figure
