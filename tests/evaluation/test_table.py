"""The table of eval.py: it fits a terminal, and its titles are the same wherever they stand."""

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import run_eval

from evaluation.summary import summarise
from evaluation.table import GROUPS, table, table_groups

N = 40


def results(scale: float = 1.0) -> pd.DataFrame:
    """A table with everything that eval.py may measure: a second judge, human texts and draws of base."""
    rng = np.random.default_rng(0)
    frame: dict[str, Any] = {"kl_seq": rng.uniform(5, 30, N), "kl_seq_exact": rng.uniform(10, 20, N)}
    frame["human_len"] = np.full(N, 9)
    for name, shift in (("policy", 0.4), ("base", -0.4)):
        frame |= {
            f"{name}_score": scale * (shift + rng.uniform(-0.5, 0.5, N)),
            f"{name}_log_odds": 10 * shift + rng.normal(size=N),
            f"{name}_judge": rng.uniform(-0.9, 0.9, N),
            f"{name}_len": rng.integers(100, 200, N),
            f"{name}_eos": rng.integers(0, 2, N),
            f"{name}_nll_base": rng.uniform(300, 400, N),
            f"human_nll_{name}": rng.uniform(25, 35, N),
            f"{name}_text": [f"{name} film {i} was a film {i} was fine" for i in range(N)],
        }
    frame["base_draws"] = [" ".join(map(str, row)) for row in scale * rng.uniform(-0.9, 0.5, (N, 8))]
    return pd.DataFrame(frame)


def test_every_estimate_has_one_row_and_a_title_of_its_own() -> None:
    summary = summarise(results(), "positive")
    measured = {
        key
        for estimates in (summary, summary["policy"])
        for key in estimates
        if {f"{key}_ci", f"{key.removesuffix('_mean').removesuffix('_rate')}_ci"} & estimates.keys()
    }
    keys = [key for figures in GROUPS.values() for key in figures]
    assert sorted(keys) == sorted(measured - {"sentiment_mean"})
    titles = [row.title for rows in table_groups(summary).values() for row in rows]
    assert len(set(titles)) == len(titles) == len(keys)
    assert all(title == title.strip() and "the same" not in title for title in titles)


@pytest.mark.parametrize(
    ("label", "scale"), [("positive", 1.0), (None, 1.0), (None, 1e7), (None, 1e-7), ("gratuitously exuberant", 1.0)]
)
def test_no_line_is_longer_than_80_columns_and_every_figure_is_whole(label: str | None, scale: float) -> None:
    summary = summarise(results(scale), label)
    lines = table(summary).splitlines()
    assert max(map(len, lines)) <= 80
    assert [group for group in GROUPS if any(line.split(" ")[0] == group.split(" ")[0] for line in lines)] == [*GROUPS]
    for rows in table_groups(summary).values():
        for row in rows:
            at = next(i for i, line in enumerate(lines) if line.startswith(row.title))
            shown = "\n".join(lines[at : at + 3])
            assert row.policy in shown
            assert row.base in shown
            ends = {line.find(row.policy) + len(row.policy) for line in lines[at : at + 3] if row.policy in line}
            assert 56 in ends, "the policy's column"


def test_usual_figures_are_on_one_line_with_their_title() -> None:
    summary = summarise(results(), "positive")
    text = table(summary)
    rows = sum(len(rows) for rows in table_groups(summary).values())
    assert len(text.split("\n\nThe policy")[0].splitlines()) == 1 + rows + 2 * len(GROUPS)


def test_terminal_report_and_model_card_have_the_same_rows(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, summary = run_eval(finished_run, tmp_path, "--frontier", "4")
    said = capsys.readouterr().out
    groups = table_groups(summary)
    page = (tmp_path / "eval_report.html").read_text()
    card = (finished_run / "policy_lm" / "README.md").read_text()
    in_page = {
        tuple(html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL))
        for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)
    }
    for group, rows in groups.items():
        assert (group, "policy", "base") in in_page
        assert f"| {group} | policy | base |" in card
        for row in rows:
            assert row in in_page
            assert f"| {' | '.join(row)} |" in card
            assert row.title in said
            assert row.policy in said
