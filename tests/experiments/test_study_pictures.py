"""Tables and pictures of runs whose rewards have different units."""

import math
from pathlib import Path

import pandas as pd

from experiments.pictures import draw_study, panels
from experiments.study import markdown


def runs() -> pd.DataFrame:
    rows = [
        {
            "setting": name,
            "seed": seed,
            "episodes": 640.0,
            "score": unit * (1 + seed),
            "base_score": unit * 0.5,
            "positive": math.nan,
            "win_rate": 0.8,
            "kl": 2.0 + seed,
        }
        for name, unit in (("rm_name=a", 100.0), ("rm_name=b", -0.001))
        for seed in (0, 1)
    ]
    return pd.DataFrame(rows)


def steps() -> pd.DataFrame:
    rows = [
        {"setting": name, "seed": seed, "episodes": 64.0 * step, "score_mean": float(step)}
        for name in ("rm_name=a", "rm_name=b")
        for seed in (0, 1)
        for step in range(1, 4)
    ]
    return pd.DataFrame(rows)


def test_each_setting_stands_beside_its_own_base() -> None:
    """Columns that say nothing of such rewards are left out, and no row mixes the bases."""
    head, _, a, b = ([cell.strip() for cell in line.strip("|").split("|")] for line in markdown(runs()).splitlines())
    assert head == [
        "setting",
        "seeds",
        "episodes",
        "base's mean score",
        "mean score",
        "win-rate, %",
        "KL, nats",
        "sd of score",
    ]
    assert a == [
        "`rm_name=a`",
        "2",
        "640",
        "+50",
        "+150 (+100 to +200)",
        "80.0 (80.0 to 80.0)",
        "2.50 (2.00 to 3.00)",
        "70.7",
    ]
    assert b[3:5] == ["-0.0005", "-0.0015 (-0.002 to -0.001)"]


def test_rewards_of_different_units_get_a_panel_each(tmp_path: Path) -> None:
    drawn = [axis for axis in panels(runs(), steps()).axes if axis.get_visible()]
    assert [axis.get_title() for axis in drawn] == ["a\nwin-rate 80%, KL 2.5 nats", "b\nwin-rate 80%, KL 2.5 nats"]
    lines = {line.get_label(): line.get_ydata() for line in drawn[0].lines}
    assert list(lines["base, held-out prompts"]) == [50, 50]
    assert list(lines["policy, held-out prompts, each seed"]) == [100, 200]
    assert list(lines["batches while training"]) == [1, 2, 3]
    draw_study(runs(), steps(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
