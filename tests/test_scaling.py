"""The scaling model: its constants come back from figures made with known ones, and its limits are the obvious ones."""

import sys
from pathlib import Path

import pandas as pd
import pytest

from config import UserError
from tools.scaling import Model, ScalingConfig, main, measured

SHAPES = {"models": "x", "device": "cpu", "dtype": "float32", "epochs": 2, "minibatch": 8, "response": 50}


def figures(latency: float = 10.0) -> pd.DataFrame:
    rows = [
        {**SHAPES, "processes": 1, "batch": batch, "seconds_generate": 0.5 + 0.01 * batch, "weights": 1e6,
         "seconds_score": 0.02 * batch, "seconds_update": 0.1 + 0.1 * batch, "wire_gb_s": float("nan"),
         "wire_latency_us": float("nan")}
        for batch in (8, 16, 32)
    ]  # fmt: skip
    rows.append({**rows[-1], "processes": 2, "wire_gb_s": 1.0, "wire_latency_us": latency, "seconds_update": 1.7,
                 "seconds_generate": 0.66, "seconds_score": 0.32})  # fmt: skip
    table = pd.DataFrame(rows)
    return table.assign(seconds=table.seconds_generate + table.seconds_score + table.seconds_update)


def test_the_model_gives_back_what_it_was_fitted_to_and_adds_what_is_sent() -> None:
    model = Model(figures(), ScalingConfig())
    for batch in (8, 16, 32):
        assert model.seconds(1, batch) == pytest.approx({"computing": 0.6 + 0.13 * batch, "waiting": 0})
    took = model.seconds(2, 32)
    assert took["computing"] == pytest.approx(0.6 + 0.13 * 16)
    # 8 optimiser steps of 1.7 / 8 s hide 4 MB at 1 GB/s; the rollout is sent once: 32 x 50 x 60 bytes
    assert took["waiting"] == pytest.approx(32 * 50 * 60 / 1e9 + 2 * 10e-6)
    slow = Model(figures(), ScalingConfig(gb_s=0.01)).seconds(2, 32)
    assert slow["waiting"] == pytest.approx(8 * (0.4 + 2e-5 - 1.7 / 24) + 32 * 50 * 60 / 1e7 + 2e-5)


def test_strong_scaling_ends_where_the_fixed_time_is_all_that_is_left() -> None:
    table = Model(figures(latency=0.001), ScalingConfig()).table()
    assert table["strong: s per step"].iloc[-1] == pytest.approx(0.6, abs=0.15)
    assert table["weak: efficiency, %"].iloc[0] == table["strong: efficiency, %"].iloc[0] == 100
    assert table["strong: efficiency, %"].is_monotonic_decreasing


def test_measured_efficiency_by_hand() -> None:
    row = measured(figures()).query("processes == 2").iloc[0]
    assert row["rows each"] == 16
    assert row["weak efficiency, %"] == round(100 * (0.6 + 0.13 * 16) / 2.68)
    assert row["strong: times faster"] == pytest.approx((0.6 + 0.13 * 32) / 2.68, abs=0.01)


def test_wrong_input_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    for words in ([], [str(tmp_path / "nowhere.csv")], [str(tmp_path / "x.csv")]):
        with pytest.raises(UserError):
            main(words)
    figures().query("processes == 1").to_csv(tmp_path / "one.csv")
    with pytest.raises(UserError, match="gb_s"):
        main([str(tmp_path / "one.csv")])
    figures().to_csv(tmp_path / "two.csv")
    main([str(tmp_path / "two.csv"), "--gb_s", "5"])
    assert "1024" in capsys.readouterr().out
    assert sys.argv
