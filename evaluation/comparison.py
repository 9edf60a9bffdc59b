"""Several runs on one page and in one picture: their curves, their points of score and KL, their settings that differ.

The page needs no network; comparison_template.html is its frame. What a run is made of is read by tools.compare.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation.report import GREY, PATH, as_image, new_figure, write_page
from evaluation.table import ANY_UNIT
from reward import score_title
from runtime.pictures import legend_line

COLOURS = ("#3a86c8", "#e08a1e", "#2a9d64", "#d0504a", "#9b6bd1", "#22a6b3", "#d565a8", "#9a8a28", "#7d868f", "#b0714a")
TWO_DIGITS = "{:+.2f}"  # of a label's probability
LINES = ("-", "--", ":")  # of the first ten runs, the next ten, and so on
CURVES = {  # column of metrics.csv -> title; the first one is that of the score
    "score_mean": "",
    "kl_seq_exact": "KL to base, nats per response",
    "entropy": "entropy, nats per token",
    "response_len": "response length, tokens",
    "explained_var": "value fit (explained variance, cut at −1)",
}


@dataclass(frozen=True)
class ComparedRun:
    """A run: settings, metrics.csv, score and KL of eval.csv if there is one, and what eval.py found, if it was run."""

    name: str
    settings: dict[str, Any]
    label: str | None
    metrics: pd.DataFrame
    path: pd.DataFrame | None
    evaluations: list[dict[str, Any]]


def write_comparison(runs: Sequence[ComparedRun], notes: Sequence[str], page: Path) -> None:
    """Write the page, and the picture of the same name beside it (raises OSError)."""
    title = f"{len(runs)} runs compared" if len(runs) > 1 else f"The run {runs[0].name}"
    fields = {
        "title": html.escape(title),
        "notes": "\n".join(f'<p class="verdict">{html.escape(note)}</p>' for note in notes),
        "runs": runs_table(runs),
        "plane": plane_image(runs),
        "curves": "\n".join(curve_images(runs)),
        "settings": settings_table(runs),
    }
    write_page("comparison_template.html", fields, page)
    picture(runs).savefig(page.with_suffix(".png"), dpi=120)


# --- tables ---------------------------------------------------------------------------------------------------------


def runs_table(runs: Sequence[ComparedRun]) -> str:
    """A row for each run and each of its evaluations."""
    head = [
        "run",
        "episodes",
        f"{_score(runs)}, training",
        "KL, training",
        f"{_score(runs)}, held-out",
        "KL, held-out",
        "win-rate, %",
    ]
    rows = []
    for i, run in enumerate(runs):
        mark = f'<span class="mark" style="background: {COLOURS[i % len(COLOURS)]}"></span>'
        name = f"{mark}{html.escape(run.name)}"
        end = run.metrics.tail(max(1, len(run.metrics) // 10))
        form = ANY_UNIT if run.label is None else TWO_DIGITS
        trained = [
            f"{run.metrics.episodes.iloc[-1]:,.0f}",
            form.format(end.score_mean.mean()),
            f"{end.kl_seq_exact.mean():.2f}",
        ]
        rows += [[name, *trained, *_evaluated(summary)] for summary in run.evaluations]
        if not run.evaluations:
            rows.append([name, *trained, "", "", ""])
    return pd.DataFrame(rows, columns=head).to_html(index=False, border=0, escape=False)


def _evaluated(summary: dict[str, Any]) -> list[str]:
    form = ANY_UNIT if summary["label"] is None else TWO_DIGITS
    ours = summary["policy"]
    return [
        _interval(form, ours["score_mean"], ours["score_ci"]),
        _interval("{:.2f}", summary["kl_seq_exact"], summary["kl_seq_exact_ci"]),
        _interval("{:.0f}", 100 * summary["win_rate"], [100 * end for end in summary["win_rate_ci"]]),
    ]


def _interval(form: str, value: float, ends: Sequence[float]) -> str:
    return f"{form.format(value)} [{', '.join(form.format(end) for end in ends)}]"


def _score(runs: Sequence[ComparedRun]) -> str:
    titles = {score_title(run.label) for run in runs}
    return titles.pop() if len(titles) == 1 else "score"


def settings_table(runs: Sequence[ComparedRun]) -> str:
    """The settings whose values differ, a row each and a column for each run."""
    rows = differing([run.settings for run in runs])
    if not rows:
        return "<p>None.</p>"
    table = pd.DataFrame([[name, *map(_shown, values)] for name, values in rows.items()])
    table.columns = pd.Index(["", *(run.name for run in runs)])
    return table.to_html(index=False, border=0)


def differing(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The values of the settings that are not the same everywhere; one that a run does not have is a difference."""
    names = dict.fromkeys(name for one in settings for name in one)
    values = {name: [one.get(name, _MISSING) for one in settings] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


_MISSING = "–"


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace("null", "none")


# --- pictures -------------------------------------------------------------------------------------------------------


def curve_images(runs: Sequence[ComparedRun]) -> list[str]:
    """The curves, an image for each column that all of them have."""
    found = []
    for column in CURVES:
        figure, (axis,) = new_figure(1, size=(4.2, 2.8))
        draw_curves(axis, runs, column)
        found.append(as_image(figure, axis.get_title()))
    return found


def draw_curves(axis: Any, runs: Sequence[ComparedRun], column: str) -> None:
    """Draw one column of metrics.csv of every run over episodes."""
    for run, style in zip(runs, _styles(runs), strict=True):
        values = run.metrics.set_index("episodes")[column]
        if column == "explained_var":
            values = values.clip(lower=-1)
        axis.plot(values, **style, alpha=0.4, linewidth=0.8)
        axis.plot(values.ewm(span=max(2, len(values) // 10)).mean(), **style, linewidth=1.8)
    axis.set_title(CURVES[column] or f"mean {_score(runs)}", fontsize=10)
    axis.set_xlabel("episodes")


def _styles(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    return [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // len(COLOURS) % len(LINES)]}
        for i in range(len(runs))
    ]


def plane_image(runs: Sequence[ComparedRun]) -> str:
    """Score against KL as an image, or why there is none."""
    if all(run.path is None and not run.evaluations for run in runs):
        return '<p class="soft">None of these runs has been evaluated: python eval.py --policy_path RUN/policy_lm</p>'
    figure, (axis,) = new_figure(1, size=(5.8, 3.9))
    draw_plane(axis, runs)
    return f'<div class="plane">{as_image(figure, "Reward against KL")}</div>'


def draw_plane(axis: Any, runs: Sequence[ComparedRun]) -> None:
    """Draw each run's path over its own held-out prompts, and eval.py's points with their 95 % intervals."""
    for run, style in zip(runs, _styles(runs), strict=True):
        if run.path is not None:
            axis.plot(run.path[PATH[0]], run.path[PATH[1]], **style, marker=".", alpha=0.45, linewidth=1)
        for summary in run.evaluations:
            point = summary["kl_seq_exact"], summary["policy"]["score_mean"]
            ends = summary["kl_seq_exact_ci"], summary["policy"]["score_ci"]
            x, y = (np.abs(np.array(end)[:, None] - value) for end, value in zip(ends, point, strict=True))
            axis.errorbar(*point, xerr=x, yerr=y, color=style["color"], marker="*", markersize=11, capsize=2)
    axis.plot([], [], ".-", color=GREY, alpha=0.6, label="evaluations while training")
    if any(run.evaluations for run in runs):
        axis.plot([], [], "*", color=GREY, markersize=9, label="eval.py, with 95 % intervals")
    draw_best_possible(axis, runs)
    axis.set_xlabel("KL to base, nats per response")
    axis.set_ylabel(f"mean {_score(runs)}")


def draw_best_possible(axis: Any, runs: Sequence[ComparedRun]) -> None:
    """Draw what is possible at each KL, where an evaluation with --frontier found it and all share a reward."""
    known = [one for run in runs for one in run.evaluations if "optimal_curve" in one]
    if known and len({run.settings.get("rm_name") for run in runs}) == 1:
        curve = max(known, key=lambda one: one["kl_certain"])["optimal_curve"]
        farthest = 1.3 * max(one["kl_seq_exact"] for run in runs for one in run.evaluations)
        near = np.array(curve["kl"]) <= farthest
        axis.plot(
            np.array(curve["kl"])[near],
            np.array(curve["score_mean"])[near],
            color=GREY,
            linestyle=":",
            label="possible, at least",
        )


def picture(runs: Sequence[ComparedRun]) -> Any:
    """All panels in one figure, with the runs' names below."""
    figure, axes = new_figure(6, rows=2, size=(13, 7))
    for axis, column in zip(axes, CURVES, strict=False):
        draw_curves(axis, runs, column)
    draw_plane(axes[-1], runs)
    axes[-1].set_title("reward against KL, held-out prompts", fontsize=10)
    axes[-1].legend(frameon=False, labelcolor=GREY, fontsize=8)
    lines = [legend_line(**style, label=run.name) for run, style in zip(runs, _styles(runs), strict=True)]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(4, len(lines)), fontsize=9, frameon=False)
    return figure
