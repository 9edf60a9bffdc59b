"""The scaling model: its constants come back from figures made with known ones, and its limits are the obvious ones."""

import sys
from pathlib import Path

import pandas as pd
import pytest

from config import UserError
from tools.scaling import Model, ScalingConfig, main, measured

SHAPES = {"models": "x", "device": "cpu", "dtype": "float32", "epochs": 2, "prompt": 9, "response": 50}


def learning(batch: float, minibatch: float, processes: int = 1) -> float:
    return 0.02 * 2 * batch / minibatch + 0.05 * 2 * batch / processes


def figures(latency: float = 10.0) -> pd.DataFrame:
    rows = [
        {**SHAPES, "processes": 1, "batch": batch, "minibatch": minibatch, "seconds_generate": 0.5 + 0.01 * batch,
         "seconds_score": 0.02 * batch, "seconds_update": learning(batch, minibatch), "weights": 1e6,
         "wire_gb_s": float("nan"), "wire_latency_us": float("nan")}
        for batch, minibatch in ((8, 8), (16, 8), (32, 8), (32, 4))
    ]  # fmt: skip
    rows.append({**rows[2], "processes": 2, "wire_gb_s": 1.0, "wire_latency_us": latency, "seconds_update": 1.7,
                 "seconds_generate": 0.66, "seconds_score": 0.32})  # fmt: skip
    table = pd.DataFrame(rows)
    return table.assign(seconds=table.seconds_generate + table.seconds_score + table.seconds_update)


def test_the_model_gives_back_what_it_was_fitted_to_and_adds_what_is_sent() -> None:
    model = Model(figures(), ScalingConfig())
    for batch, minibatch in ((8, 8), (16, 8), (32, 4), (64, 32)):
        alone = 0.5 + 0.03 * batch + learning(batch, minibatch)
        assert model.seconds(1, batch, minibatch) == pytest.approx({"computing": alone, "waiting": 0})
    took = model.seconds(2, 32, 8)
    assert took["computing"] == pytest.approx(0.5 + 0.03 * 16 + learning(32, 8, 2)), "steps are not shared out"
    # 8 optimiser steps hide 4 MB at 1 GB/s; the rollout is sent once, 32 x 50 x 60 bytes in 12 messages
    assert took["waiting"] == pytest.approx(32 * 50 * 60 / 1e9 + 2 * 12 * 10e-6)
    slow = Model(figures(), ScalingConfig(gb_s=0.01)).seconds(2, 32, 8)
    step = 0.4 + 2 * 3 * 10e-6 - learning(32, 8, 2) / 8 / 3
    assert slow["waiting"] == pytest.approx(8 * step + 32 * 50 * 60 / 1e7 + 2 * 12 * 10e-6)


def test_strong_scaling_ends_where_the_fixed_time_is_all_that_is_left() -> None:
    table = Model(figures(latency=0.0001), ScalingConfig()).table()
    fixed = 0.5 + 0.02 * 2 * 32 / 8
    assert table["strong: s per step"].iloc[-1] == pytest.approx(fixed, abs=0.1)
    assert table["weak: efficiency, %"].iloc[0] == table["strong: efficiency, %"].iloc[0] == 100
    assert table["strong: efficiency, %"].is_monotonic_decreasing
    assert table["weak: efficiency, %"].is_monotonic_decreasing


def test_measured_efficiency_by_hand() -> None:
    doubled = figures().assign(minibatch=[8, 8, 8, 4, 16])  # two processes with 16 rows in minibatches of 8 each
    row = measured(doubled).query("processes == 2").iloc[0]
    assert row["weak efficiency, %"] == round(100 * (0.5 + 0.03 * 16 + learning(16, 8)) / 2.68)
    row = measured(figures()).query("processes == 2").iloc[0]
    assert row["strong: times faster"] == pytest.approx((0.5 + 0.03 * 32 + learning(32, 8)) / 2.68, abs=0.01)


def test_wrong_input_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    for words in ([], [str(tmp_path / "nowhere.csv")], [str(tmp_path / "x.csv")]):
        with pytest.raises(UserError):
            main(words)
    figures().query("processes == 1").to_csv(tmp_path / "one.csv")
    with pytest.raises(UserError, match="gb_s"):
        main([str(tmp_path / "one.csv")])
    with pytest.raises(UserError, match="latency"):
        main([str(tmp_path / "one.csv"), "--gb_s", "5"])
    figures().query("minibatch == 8").to_csv(tmp_path / "few.csv")
    with pytest.raises(UserError, match="minibatch"):
        main([str(tmp_path / "few.csv")])
    figures().to_csv(tmp_path / "two.csv")
    main([str(tmp_path / "two.csv"), "--gb_s", "5"])
    assert "1024" in capsys.readouterr().out
    assert sys.argv
