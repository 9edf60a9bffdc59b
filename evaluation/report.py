"""The evaluation as one page: eval_report.html, a single file that needs no network.

It has the verdict and table, histograms, the reward-KL frontier, the curves of the run that made the policy, and a
browser of samples. The page itself is report.html within page.html; this module fills it in.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation.pictures import (
    EVALUATED,
    POLICY,
    as_image,
    draw_best_possible,
    draw_curve,
    draw_points,
    label_plane,
    new_figure,
    place_of,
    read_columns,
)
from reward import score_title
from runtime.files import write_atomic
from runtime.pictures import GREY
from runtime.saved_run import SavedRun

FOLDER = Path(__file__).parent
CURVES = ("score_mean", "kl_seq_exact", "entropy")


def write_report(
    results: pd.DataFrame,
    summary: dict[str, Any],
    groups: Mapping[str, Sequence[Sequence[str]]],
    home: SavedRun | None,
    path: Path,
) -> None:
    """Write the page: results as in eval_results.csv, summary as in eval_summary.json, groups of the printed table.

    A row of a group is three texts. home is the run that made the policy, if known.
    """
    images = {
        "Scores": scores_image(results, summary["label"]),
        "How far from the best possible": frontier_image(summary, home),
        "The run": curves_image(home, score_title(summary["label"])),
    }
    settings = {k: v for k, v in summary["settings"].items() if v is not None and k != "preset"}
    fields = {
        "n": str(summary["n"]),
        "verdict": html.escape(summary["verdict"]),
        "table": "\n".join(html_table(rows, [group, "policy", "base"]) for group, rows in groups.items()),
        "figures": "\n".join(f'<h2>{title}</h2>\n<div class="wide">{x}</div>' for title, x in images.items() if x),
        "settings": html.escape(", ".join(f"{name} {value}" for name, value in settings.items())),
        "scale": json.dumps(score_range(results, summary)),
        "label": summary["label"] or "above base's mean",
        "other": "others" if summary["label"] is None else f"not {summary['label']}",
        "rows": json.dumps([sample(row) for row in results.to_dict("records")]).replace("<", "\\u003c"),
    }
    write_page("report.html", "Policy against base", fields, path)


def write_page(body: str, title: str, fields: dict[str, str], path: Path) -> None:
    """Write page.html with a body, in the style of page.css; {{name}} in the body are filled in from fields."""
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    write_atomic(path, filled("page.html", {"title": title, "style": style, "body": filled(body, fields)}))


def filled(template: str, fields: dict[str, str]) -> str:
    """A template whose {{name}} are filled in."""
    text = (FOLDER / template).read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: fields[place[1]], text)


def html_table(rows: Sequence[Sequence[str]], columns: Sequence[str], escape: bool = True) -> str:
    """Rows of texts as a table of a page."""
    return pd.DataFrame(rows, columns=pd.Index(columns)).to_html(index=False, border=0, escape=escape)


# --- samples --------------------------------------------------------------------------------------------------------


def sample(row: dict[str, Any]) -> dict[str, Any]:
    """The part of a row that the page shows."""
    return {
        "prompt": row["prompt"],
        "b": row["base_text"],
        "t": row["policy_text"],
        "p": json.loads(row["policy_tokens"]),
        "bs": rounded(row["base_score"]),
        "ps": rounded(row["policy_score"]),
        "kl": round(row["kl_seq_exact"], 3),
    }


def rounded(score: float) -> float:
    """Four digits behind the point, and six in all."""
    return round(score, 4) if abs(score) <= 1 else float(f"{score:.6g}")


def score_range(results: pd.DataFrame, summary: dict[str, Any]) -> dict[str, float | bool]:
    """The ends of all scores, and the middle that divides good from bad."""
    if summary["label"] is not None:
        return {"low": -1, "high": 1, "middle": 0, "any": False}
    scores = results[["policy_score", "base_score"]].to_numpy()
    middle = summary["base"]["score_mean"]
    return {"low": rounded(scores.min()), "high": rounded(scores.max()), "middle": middle, "any": True}


# --- images ---------------------------------------------------------------------------------------------------------


def scores_image(results: pd.DataFrame, label: str | None) -> str:
    """Histograms of the scores, policy over base."""
    figure, (axis,) = new_figure(1)
    scores = results[["policy_score", "base_score"]].to_numpy()
    low, high = (-1, 1) if label is not None else (scores.min(), scores.max())
    bins = np.linspace(low, high if high > low else low + 1, 41).tolist()
    for name, colour, hatch in (("base", GREY, "///"), ("policy", POLICY, "")):
        axis.hist(results[f"{name}_score"], bins, color=colour, edgecolor=colour, alpha=0.6, hatch=hatch, label=name)
    axis.set(xlabel="score" if label is None else "score, -1 to 1", ylabel="responses")
    return as_image(figure, "Histogram of scores")


def frontier_image(summary: dict[str, Any], home: SavedRun | None) -> str:
    """The optimal reward at each KL, best-of-n, the policy, and its path during training; empty without --frontier."""
    if "optimal_curve" not in summary:
        return ""
    figure, (axis,) = new_figure(1)
    draw_best_possible(axis, summary)
    path = read_columns(home, "eval.csv", EVALUATED)
    if path is not None:
        axis.plot(path["kl_seq_exact"], path["score_mean"], ".-", color=POLICY, alpha=0.6, label="during training")
    draw_points(axis, pd.DataFrame([place_of(summary)]), color=POLICY, marker="*", markersize=11, label="policy")
    label_plane(axis, score_title(summary["label"]))
    return as_image(figure, "Reward against KL")


def curves_image(home: SavedRun | None, score: str) -> str:
    """Scores, under their title, KL and entropy over the run; empty where it has no such table."""
    metrics = read_columns(home, "metrics.csv", ("episodes", *CURVES))
    if metrics is None or len(metrics) < 2:
        return ""
    figure, axes = new_figure(len(CURVES), size=(9, 2.6))
    for axis, column in zip(axes, CURVES, strict=True):
        draw_curve(axis, metrics, column, score, color=POLICY)
    return as_image(figure, "Curves of the run")
