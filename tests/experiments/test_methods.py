"""The comparison of methods: what is run, what is chosen, and what the table says."""

import json
import math
import shlex
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from config import EvalConfig, UserError

import numpy as np
import pandas as pd
import pytest

import eval as evaluation
from experiments import methods, runner
from experiments.methods import (
    BestGain,
    MethodsConfig,
    best_setting,
    in_order,
    job_of,
    main,
    markdown,
    markdown_of_search,
    of_method,
    shares,
)
from experiments.rivals import METHODS, find_method, train_by
from runtime.cli import parse_config
from tools import interpolate

ROOT = Path(__file__).parent.parent.parent


def test_settings_are_for_all_methods_or_for_one() -> None:
    cfg = MethodsConfig(lrs="1e-4,2e-4 dpo=1e-5", betas="rloo=0.1")
    assert of_method(cfg, "lrs", "rloo") == ["1e-4", "2e-4"]
    assert of_method(cfg, "lrs", "dpo") == ["1e-5"]
    assert of_method(cfg, "betas", "rloo") == ["0.1"]
    with pytest.raises(UserError, match="betas has nothing for dpo"):
        of_method(cfg, "betas", "dpo")
    with pytest.raises(UserError, match="trpo"):
        of_method(MethodsConfig(lrs="1 trpo=2"), "lrs", "rloo")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods=trpo"], "trpo"),
        (["--seeds=0,100"], "search_seed=100"),
        (["--frontier=0"], "frontier=0"),
        (["--choose_at=3"], "choose_at=3 is no column of the table: take 1, 2, 4"),
        (["--lrs=fast"], "lrs='fast'"),
        (["--evaluate=--split train"], "evaluate: split must be that of the runs"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(words)


def test_the_defaults_are_three_step_sizes_and_two_betas_for_every_method() -> None:
    cfg = MethodsConfig()
    for name, method in METHODS.items():
        assert len(of_method(cfg, "lrs", name)) == 3
        assert len(of_method(cfg, "betas", name)) == 2
        job = job_of(cfg, name, "1e-4", "0.06", 0)
        assert any(word.startswith("--responses=") for word in job.train) == (method.responses is None)
        assert job.train[-1] == "--resume"


def test_shares_are_read_off_the_curve_and_not_beyond_it() -> None:
    curve = pd.DataFrame(
        {
            "alpha": [0.1, 0.5, 1, 2],
            "kl": [0.01, 0.5, 1.5, 3],
            "score": [0, 1, 2, 3],
            "optimal_share": [None, 0.4, 0.6, 0.9],
        }
    )
    found = shares(curve)
    assert found["share_1"] == pytest.approx(0.5)
    assert found["share_2"] == pytest.approx(0.7)
    assert math.isnan(found["share_4"])
    assert json.loads(found["curve"])["kl"] == [0.01, 0.5, 1.5, 3]


def test_the_best_gain_is_read_off_a_table_of_the_same_prompts(tmp_path: Path) -> None:
    table = pd.DataFrame({"kl": [2.0, 1.0], "score": [0.7, 0.4], "base_score": 0.1, "optimal_share": [0.5, 0.6]})
    path = tmp_path / "curves.csv"
    table.to_csv(path, index=False)
    best = BestGain.read(str(path))
    assert best.gain == pytest.approx([0.5, 1.2]), "0.3 is 60 % of it, 0.6 is 50 %"
    curves = pd.DataFrame({"kl": [0.5, 1.5, 3.0], "score": 0.44, "base_score": 0.1})
    assert best.with_shares(curves).optimal_share.tolist() == pytest.approx([math.nan, 0.4, math.nan], nan_ok=True)
    assert json.loads(best.columns()["optimal_curve"]) == {"kl": [0, 1, 2], "score_mean": [0.1, 0.6, 1.3]}
    with pytest.raises(UserError, match=r"other prompts or another reward: base has 0\.100 there and 0\.200 here"):
        best.with_shares(curves.assign(base_score=0.2))
    table.assign(optimal_share=math.nan).to_csv(path, index=False)
    with pytest.raises(UserError, match="has no shares of the best gain"):
        BestGain.read(str(path))


def test_the_policy_as_trained_is_a_point_of_its_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, path = tmp_path / "best.csv", tmp_path / "curves.csv"
    pd.DataFrame({"kl": [0.5, 4.0], "score": 1.0, "base_score": 0.0, "optimal_share": 1.0}).to_csv(best, index=False)
    runs = ["a", "a", "b", "b"]
    measured = {"run": runs, "alpha": 2 * [0.5, 2.0], "kl": 2 * [1.0, 3.0], "score": 2 * [0.2, 0.6], "base_score": 0.0}
    pd.DataFrame({**measured, "optimal_share": math.nan}).to_csv(path, index=False)
    monkeypatch.setattr(methods, "run_once", lambda command, path: None)
    evaluated = {name: {"kl": 2.0, "score": score, "base_score": 0.0} for name, score in (("a", 0.5), ("b", 0.3))}
    for alphas, middle in (("0.5,2", {"a": 0.5, "b": 0.3}), ("0.5,1,2", {"a": 0.4, "b": 0.4})):
        curves = methods.interpolate(MethodsConfig(alphas=alphas, best_gain=str(best)), path, evaluated)
        for name, share in middle.items():
            assert shares(curves[curves.run == name].sort_values("kl"))["share_2"] == pytest.approx(share)


def test_the_best_setting_is_the_one_of_the_largest_share(tmp_path: Path) -> None:
    cfg = MethodsConfig(csv=str(tmp_path / "a.csv"))
    jobs = [job_of(cfg, "rloo", lr, "0.1", 100) for lr in ("1", "2", "3")]
    rows = {"setting": [job.setting for job in jobs], "seed": 100, "kl": [1.0, 5.0, 2.0]}
    for share, best in (([0.3, 0.4, 0.5], 2), ([0.3, np.nan, 0.2], 0), ([np.nan] * 3, 1)):
        pd.DataFrame({**rows, "share_2": share}).to_csv(cfg.csv, index=False)
        assert best_setting(cfg, jobs) == best
    pd.DataFrame({**rows, "kl": np.nan}).to_csv(cfg.csv, index=False)
    assert best_setting(cfg, jobs) is None


def test_with_one_setting_there_is_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(methods, "best_setting", lambda cfg, jobs: 1)
    monkeypatch.setattr(
        methods, "run_all", lambda cfg, name, role, jobs: calls.append((role, [job.setting for job in jobs])) or 0
    )
    methods.measure_method(MethodsConfig(lrs="1", betas="0.1", seeds="0,1"), "rloo")
    assert calls == [("measured", 2 * ["rloo lr=1 kl_coef=0.1"])]
    calls.clear()
    methods.measure_method(MethodsConfig(lrs="1,2", betas="0.1", seeds="0"), "rloo")
    both = ["rloo lr=1 kl_coef=0.1", "rloo lr=2 kl_coef=0.1"]
    assert calls == [("search", both), ("measured", both[1:])]


def call_here(command: Sequence[str], log: Path, threads: int) -> int:
    """What the runner does in a process of its own, here."""
    with log.open("a") as file, redirect_stdout(file):
        if command[1] == "eval.py":
            evaluation.main(parse_config(EvalConfig, command[2:]))
        elif command[2] == "tools.interpolate":
            interpolate.main(list(command[3:]))
        else:
            assert command[:3] == ["python", "-m", "experiments.rivals"]
            train_by(find_method(command[3]), list(command[4:]))
    return 0


def test_methods_are_searched_measured_kept_and_drawn(
    flags: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_pictures: None,
) -> None:
    del flags["ckpt_dir"], flags["lr"]
    words = [
        "--methods=rloo",
        "--lrs=1e-3,3e-3",
        "--betas=0.05",
        "--seeds=0",
        "--n_samples=20",
        "--alphas=0.5,1,2",
        "--frontier=4",
        f"--folder={tmp_path / 'runs'}",
        f"--csv={tmp_path / 'table.csv'}",
        f"--train={shlex.join(f'--{name}={value}' for name, value in {**flags, 'eval_every': '0'}.items())}",
        "--evaluate=--device cpu --judge none",
    ]
    monkeypatch.setattr(runner, "call", call_here)
    monkeypatch.setattr(methods, "call", call_here)
    main(words)
    printed = capsys.readouterr().out
    table = pd.read_csv(tmp_path / "table.csv")
    assert table.role.tolist() == ["search", "search", "measured"]
    assert table.seed.tolist() == [100, 100, 0]
    assert isinstance(table.optimal_curve.iloc[2], str), "of the first run that is measured, for the picture"
    assert (table.episodes == 24).all()
    assert table[["seconds_per_step", "memory_mb", "curve", "perplexity_ratio"]].notna().all(axis=None)
    for _, row in table.iterrows():
        curve = pd.DataFrame(json.loads(row.curve)).set_index("alpha")
        assert curve.kl[1] == pytest.approx(row.kl, rel=1e-2), "the curve's prompts are those of the evaluation"
        assert curve.score[1] == pytest.approx(row.score, abs=1e-3)
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert "| 24 | 72 |" in printed, "episodes of a run, and with its search"
    monkeypatch.setattr(runner, "call", None)
    monkeypatch.setattr(methods, "call", None)
    shutil.rmtree(tmp_path / "runs")  # as on another machine, which has the table alone
    main(words)
    again = capsys.readouterr().out
    assert again[again.index("| method |") :] == printed[printed.index("| method |") :], "nothing was left to do"


def test_the_page_has_the_tables_and_a_section_for_each_method() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "results").glob("methods_*.csv")):
        if not path.name.endswith("_steps.csv"):
            runs = in_order(pd.read_csv(path))
            assert markdown(runs) in page, path
            if (runs.role == "search").any():
                assert markdown_of_search(runs, "2") in page, path
    for name in METHODS:
        assert f"### {name}\n" in page
