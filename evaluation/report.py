"""The evaluation as one page: eval_report.html, a single file that needs no network.

It has the verdict and table, histograms, the reward-KL frontier, the curves of the run that made the policy, and a
browser of samples. The page itself is report_template.html, in the style of page.css; this module fills it in.
"""

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reward import score_title
from runtime.files import write_atomic
from runtime.pictures import blank_figure

FOLDER = Path(__file__).parent
GREY, BASE, POLICY, BEST = "#808890", "#8a94a0", "#3a86c8", "#e08a1e"  # readable on white and on black

PATH = ("kl_seq_exact", "score_mean")  # of eval.csv
CURVES = {  # of metrics.csv
    "score_mean": "",
    "kl_seq_exact": "KL, nats per response",
    "entropy": "entropy, nats per token",
}


def write_report(
    results: pd.DataFrame, summary: dict[str, Any], table: Sequence[Sequence[str]], run_dir: Path | None, path: Path
) -> None:
    """Write the page: results as in eval_results.csv, summary as in eval_summary.json, table rows of three texts.

    run_dir is the folder of the run that made the policy, if known.
    """
    title = score_title(summary["label"])
    figures = [("Scores", scores_figure(results, summary["label"]))]
    if "optimal_curve" in summary:
        figures.append(
            ("How far from the best possible", frontier_figure(summary, read_columns(run_dir, "eval.csv", PATH)))
        )
    metrics = read_columns(run_dir, "metrics.csv", ("step", *CURVES))
    if metrics is not None and len(metrics) > 1:
        figures.append(("The run", run_figure(metrics, title)))
    settings = {k: v for k, v in summary["settings"].items() if v is not None and k != "preset"}
    fields = {
        "n": str(summary["n"]),
        "verdict": html.escape(summary["verdict"]),
        "table": pd.DataFrame(table, columns=["", "policy", "base"]).to_html(index=False, border=0),
        "figures": "\n".join(f'<h2>{title}</h2>\n<div class="wide">{picture}</div>' for title, picture in figures),
        "settings": html.escape(", ".join(f"{name} {value}" for name, value in settings.items())),
        "scale": json.dumps(score_range(results, summary)),
        "label": summary["label"] or "above base's mean",
        "other": "others" if summary["label"] is None else f"not {summary['label']}",
        "rows": json.dumps([sample(row) for row in results.to_dict("records")]).replace("<", "\\u003c"),
    }
    write_page("report_template.html", fields, path)


def write_page(template: str, fields: dict[str, str], path: Path) -> None:
    """Write a page whose {{name}} are filled in from fields, and {{style}} from page.css."""
    fields = {**fields, "style": (FOLDER / "page.css").read_text(encoding="utf-8")}
    page = (FOLDER / template).read_text(encoding="utf-8")
    write_atomic(path, re.sub(r"\{\{(\w+)\}\}", lambda place: fields[place[1]], page))


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
    return {
        "low": rounded(scores.min()),
        "high": rounded(scores.max()),
        "middle": summary["base"]["score_mean"],
        "any": True,
    }


def read_columns(folder: Path | None, name: str, columns: Iterable[str]) -> pd.DataFrame | None:
    """Columns of a table of a run, if there is a run and they are numbers."""
    try:
        return None if folder is None else pd.read_csv(folder / name, usecols=list(columns), dtype=float)
    except (OSError, ValueError):
        return None


def scores_figure(results: pd.DataFrame, label: str | None) -> str:
    """Histograms of the scores, policy over base."""
    figure, (axis,) = new_figure(1)
    scores = results[["policy_score", "base_score"]].to_numpy()
    low, high = (-1, 1) if label is not None else (scores.min(), scores.max())
    bins = np.linspace(low, high if high > low else low + 1, 41).tolist()
    axis.hist(results["base_score"], bins, color=BASE, alpha=0.6, label="base")
    axis.hist(results["policy_score"], bins, color=POLICY, alpha=0.6, label="policy")
    axis.set_xlabel("score" if label is None else "score, -1 to 1")
    axis.set_ylabel("responses")
    return as_image(figure, "Histogram of scores")


def frontier_figure(summary: dict[str, Any], path: pd.DataFrame | None) -> str:
    """The optimal reward at each KL, best-of-n, the policy, and its path during training."""
    figure, (axis,) = new_figure(1)
    kl, reward = (np.array(summary["optimal_curve"][name]) for name in ("kl", "score_mean"))
    sure = kl <= summary["kl_certain"]
    axis.plot(kl[sure], reward[sure], color=BEST, label="best possible")
    if not sure.all():
        axis.plot(kl[~sure], reward[~sure], color=BEST, linestyle=":", label="the same, less certain")
    best = pd.DataFrame(summary["best_of_n"])
    axis.plot(best["kl"], best["score_mean"], "o-", color=GREY, markersize=4, linewidth=1, label="best of n")
    for n, x, y in best.itertuples(index=False):
        axis.annotate(f"{n:.0f}", (x, y), xytext=(3, -11), textcoords="offset points", color=GREY, fontsize=8)
    if path is not None:
        axis.plot(path["kl_seq_exact"], path["score_mean"], ".-", color=POLICY, alpha=0.6, label="during training")
    axis.plot(
        summary["kl_seq_exact"], summary["policy"]["score_mean"], "*", color=POLICY, markersize=14, label="policy"
    )
    axis.set_xlabel("KL to base, nats per response")
    axis.set_ylabel("mean score")
    return as_image(figure, "Reward against KL")


def run_figure(metrics: pd.DataFrame, score: str) -> str:
    """Scores, under their title, KL and entropy over the steps of the run."""
    figure, axes = new_figure(len(CURVES))
    for axis, (name, title) in zip(axes, CURVES.items(), strict=True):
        axis.plot(metrics["step"], metrics[name], color=POLICY)
        axis.set_title(title or score, fontsize=10)
        axis.set_xlabel("step")
    return as_image(figure, "Curves of the run")


def new_figure(panels: int, rows: int = 1, size: tuple[float, float] | None = None) -> tuple[Any, list[Any]]:
    """A figure of size inches, in colours that are readable on white and on black, and its axes in rows."""
    figure = blank_figure(*(size or (9, 3.6 if panels == 1 else 2.6)))
    axes = list(figure.subplots(rows, -(-panels // rows), squeeze=False).flat)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.tick_params(colors=GREY)
        axis.title.set_color(GREY)
        axis.xaxis.label.set_color(GREY)
        axis.yaxis.label.set_color(GREY)
        for spine in axis.spines.values():
            spine.set_color(GREY)
    return figure, axes


def as_image(figure: Any, what: str) -> str:
    """A figure as an image within the page, with legends where there is something to tell apart."""
    for axis in figure.axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, labelcolor=GREY, fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", transparent=True)
    encoded = base64.b64encode(drawn.getvalue()).decode()
    return f'<img alt="{what}" src="data:image/svg+xml;base64,{encoded}">'
