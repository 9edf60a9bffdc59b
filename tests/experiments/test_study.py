"""The study tool: crosses settings with seeds, keeps what is done, evaluates another program's policy alike."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from config import EvalConfig, UserError

import numpy as np
import pandas as pd
import pytest

from evaluation.summary import summarise
from experiments.runner import ROOT, figures, read_runs, succeeded
from experiments.study import StudyConfig, main, markdown, settings
from runtime.cli import parse_config

SUMMARY = {
    "n": 20,
    "label": "positive",
    "judge_label": "positive",
    "win_rate": 0.7,
    "score_gain": 0.5,
    "kl_seq_exact": 2.0,
    "judge_gain": 0.4,
    "optimal_share_rate": 0.6,
    "policy": {
        "score_mean": 0.6,
        "positive_rate": 0.8,
        "perplexity": 110.0,
        "distinct_2": 0.7,
        "distinct_rate": 1.0,
        "response_len": 40.0,
    },
    "base": {
        "score_mean": 0.1,
        "positive_rate": 0.5,
        "perplexity": 100.0,
        "distinct_2": 0.8,
        "distinct_rate": 1.0,
        "response_len": 50.0,
    },
    "best_of_n": [{"n": 1, "kl": 0, "score_mean": 0.1}, {"n": 2, "kl": 0.2, "score_mean": 0.4}],
    "optimal_curve": {"kl": [0, 1], "score_mean": [0.1, 0.9]},
}


METRICS = "step,episodes,score_mean,kl_seq,seconds_update,lr\n1,64,0.1,0.0,2.0,1e-5\n2,128,0.2,0.5,2.0,1e-5\n"


def test_a_grid_is_every_combination() -> None:
    assert settings(StudyConfig(grid="lr=1e-5,2e-5 kl_coef=0.1")) == [
        ("--lr=1e-5", "--kl_coef=0.1"),
        ("--lr=2e-5", "--kl_coef=0.1"),
    ]
    assert settings(StudyConfig()) == [()]
    assert settings(StudyConfig(grid="dataset='my reviews',b")) == [("--dataset=my reviews",), ("--dataset=b",)]
    for wrong in ("lr", "lr='1"):
        with pytest.raises(UserError, match="grid="):
            settings(StudyConfig(grid=wrong))


def test_figures_are_ratios_to_the_base(tmp_path: Path) -> None:
    found = figures(SUMMARY, tmp_path)
    assert found["perplexity_ratio"] == pytest.approx(1.1)
    assert found["distinct_2_ratio"] == pytest.approx(0.875)
    assert found["length_ratio"] == pytest.approx(0.8)


def test_runs_are_trained_evaluated_kept_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def pretend(words: list[str], **_: Any) -> "subprocess.CompletedProcess[bytes]":
        commands.append(words)
        if words[1].endswith("train.py"):
            folder = Path(next(w for w in words if w.startswith("--ckpt_dir=")).partition("=")[2])
            (folder / "metrics.csv").write_text(METRICS)
        if words[1].endswith("eval.py"):
            out = Path(next(w for w in words if w.startswith("--out_csv=")).partition("=")[2])
            out.with_name("eval_summary.json").write_text(json.dumps(SUMMARY))
        return subprocess.CompletedProcess(words, 3 if "--lr=9" in words else 0)

    monkeypatch.setattr(subprocess, "run", pretend)
    words = ["--grid=lr=1,9", "--seeds=0,1", f"--folder={tmp_path / 'runs'}", f"--csv={tmp_path / 'a.csv'}", "--jobs=2"]
    with pytest.raises(UserError, match="2 of 4 runs failed"):
        main(words)
    table = pd.read_csv(tmp_path / "a.csv")
    assert sorted(zip(table.setting, table.seed, strict=True)) == [("lr=1", 0), ("lr=1", 1), ("lr=9", 0), ("lr=9", 1)]
    assert table[table.setting == "lr=9"].failed.str.contains("code 3").all()
    assert all("--resume" in c for c in commands if c[1].endswith("train.py"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    steps = pd.read_csv(tmp_path / "a_steps.csv")
    assert steps[steps.setting == "lr=1"].seed.tolist() == [0, 0, 1, 1]
    assert steps.score_mean.tolist()[:2] == [0.1, 0.2]
    assert "seconds_update" not in steps, "the machine's, not the method's"
    rows = markdown(read_runs(tmp_path / "a.csv")[0]).splitlines()
    assert [row.split(" | ")[:2] for row in rows[2:]] == [["| base", ""], ["| `lr=1`", "2"]], "not what failed"
    commands.clear()
    with pytest.raises(UserError, match=r"judged\.txt names another command"):
        main([*words, "--evaluate=--n_samples=7"])
    assert [c for c in commands if "--lr=1" in c] == []
    with pytest.raises(UserError, match="2 of 4 runs failed"):
        main(words)
    assert [c for c in commands if "--lr=1" in c] == [], "what is done is not done again"
    assert len(pd.read_csv(tmp_path / "a_steps.csv")) == len(steps), "nor kept twice"
    main(["--peer=python other.py --seed {seed} --out {folder}/policy_lm", "--peer_name=other", *words[1:]])
    assert pd.read_csv(tmp_path / "a.csv").query("setting == 'other'").command.str.contains("other.py").all()
    shutil.rmtree(tmp_path / "runs")
    main([f"--draw={tmp_path / 'a.csv'}"])


def test_the_table_has_means_of_several_seeds_and_intervals_of_one() -> None:
    one = figures(SUMMARY | {"win_rate_ci": [0.65, 0.75], "optimal_share_rate_ci": [0.5, 0.7]}, Path("none"))
    runs = [
        {**one, "setting": "x", "seed": 0, "episodes": 2560.0},
        {**one, "setting": "y", "seed": 0},
        {**one, "setting": "y", "seed": 1, "score": 0.8},
    ]
    base, x, y = (row.split(" | ") for row in markdown(pd.DataFrame(runs)).splitlines()[2:])
    assert base[:5] == ["| base", "", "", "50.0", "+0.10"]
    assert x[:6] == ["| `x`", "1", "2,560", "80.0", "+0.60", "70.0 [65.0, 75.0]"]
    assert x[7] == "60 [50, 70]"
    assert y[:5] == ["| `y`", "2", "", "80.0 (80.0 to 80.0)", "+0.70 (+0.60 to +0.80)"]
    assert y[-1] == "0.141 |", "divided by n - 1"
    others = pd.DataFrame([*runs, {**one, "setting": "z", "seed": 0, "base_positive": 0.4}])
    assert markdown(others).count("| base |") == 2
    assert markdown(succeeded(pd.DataFrame([{"setting": "x", "seed": 0, "failed": "code 2"}]))).count("\n") == 1


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_docs_and_readme_say_what_the_tables_say() -> None:
    """The docs quote the tables whole; each row of the README's table has some of their columns."""
    rewards = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert all(markdown(pd.read_csv(ROOT / "results" / f"{name}.csv")) in rewards for name in ("rewards", "credit"))
    docs = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    tables = {
        name: markdown(pd.read_csv(ROOT / "results" / f"{name}.csv")).splitlines()
        for name in ("study_tiny", "study_imdb")
    }
    docs += (Path(__file__).parents[2] / "docs" / "lab_notes.md").read_text(encoding="utf-8").splitlines()
    assert all(line in docs for lines in tables.values() for line in lines)
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(readme) if line.startswith("| data | setting |"))
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), readme[start + 2 :]))
    assert 4 <= len(rows) <= 8
    for row in rows:
        data, setting, *shown = cells(row)
        head, *body = map(cells, tables[{"tiny world": "study_tiny", "film reviews": "study_imdb"}[data]])
        whole = dict(zip(head, next(line for line in body if line[0] == setting), strict=True))
        assert shown == [whole[name] for name in cells(readme[start])[2:]], row
    for preset in pd.read_csv(ROOT / "results" / "presets.csv").to_dict("records"):
        line = next(line for line in docs if f"`--{preset['setting'].replace('=', ' ')}`" in line and "→" in line)
        low, high = (100 * end for end in json.loads(preset["positive_ci"]))
        for quoted in (
            f"{100 * preset['base_positive']:.1f} → {100 * preset['positive']:.1f} [{low:.1f}, {high:.1f}]",
            f"{preset['base_score']:+.2f} → {preset['score']:+.2f} [",
            f"at {preset['kl']:.2f} nats",
        ):
            assert quoted in line, preset["setting"]


def test_docs_quote_our_curve_beside_that_of_abc() -> None:
    """Both rows of --preset abc: the steps near a KL, and the trained policies moved to it, with their spread."""
    docs = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    row_of = {row[0]: row[1:] for row in map(cells, docs) if row[0].startswith("here, ")}
    curves = [points.sort_values("kl") for _, points in pd.read_csv(ROOT / "results" / "abc.csv").groupby("run")]
    steps = pd.read_csv(ROOT / "results" / "abc_steps.csv")
    mean_of_seeds = steps.groupby("step").mean()
    count, *quoted = row_of["here, moved to this KL"]
    assert int(count) == len(curves) == steps.seed.nunique()
    for kl, text in zip((0, 2, 4, 8, 12), quoted, strict=True):
        ends = sorted(np.interp(kl, [0, *curve.kl], [curve.base_score.iloc[0], *curve.score]) for curve in curves)
        spread = f" ({ends[0]:.1f} to {ends[-1]:.1f})" if kl else ""
        measured = all(curve.kl.max() >= kl for curve in curves)
        assert text == (f"{np.mean(ends):.1f}{spread}" if measured else ""), kl
    for kl, text in zip((0, 2, 4, 8, 12), row_of["here, in training"][1:], strict=True):
        near = mean_of_seeds[(mean_of_seeds.kl_seq - kl).abs() <= (1 if kl else 0)]
        scores = near.score_mean if kl else mean_of_seeds.score_mean[:1]
        assert text == (f"{scores.mean():.1f}" if len(scores) else ""), kl


def test_base_responses_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run against the same base gets the share that an evaluation with draws of its own would have found."""
    results = {seed: made_results(seed) for seed in (0, 1, 2, 3)}
    results[2].loc[0, "prompt"] = "another one"
    results[3]["base_score"] += 0.1  # another reward
    drawn: list[Path] = []

    def pretend(words: list[str], **_: Any) -> "subprocess.CompletedProcess[bytes]":
        seed = int(next(w for w in words if "_seed" in w).partition("_seed")[2][0])
        if words[1].endswith("eval.py") and seed != 1:
            asked = parse_config(EvalConfig, words[2:])
            out = Path(asked.out_csv)
            if with_draws := asked.frontier > 0:
                assert asked.frontier == int(frontier)
                drawn.append(out)
            if seed == 2 and with_draws:
                return subprocess.CompletedProcess(words, 1)
            table = results[seed] if with_draws else results[seed].drop(columns="base_draws")
            table.to_csv(out, index=False)
            found = summarise(table, "positive")
            out.with_name("eval_summary.json").write_text(json.dumps({**SUMMARY, "optimal_share_rate": None, **found}))
        return subprocess.CompletedProcess(words, 2 if seed == 1 else 0)

    monkeypatch.setattr(subprocess, "run", pretend)
    frontier = "0"

    def run(seeds: str, failing: str) -> None:
        drawn.clear()
        with pytest.raises(UserError, match=failing):
            main(
                [
                    f"--seeds={seeds}",
                    f"--frontier={frontier}",
                    f"--folder={tmp_path / 'runs'}",
                    f"--csv={tmp_path / 'a.csv'}",
                    "--evaluate=--n_samples 30 --frontier 0",
                ]
            )

    run("1,0", "1 of 2 runs failed")
    assert drawn == []
    assert pd.read_csv(tmp_path / "a.csv").optimal_share.isna().all()
    results[4] = made_results(4)
    frontier = "4"
    run("1,0,4,2,3", "1 of 5 runs failed")
    assert [path.parent.name[-1] for path in drawn] == ["0", "2", "3"], "once for each base"
    share = pd.read_csv(tmp_path / "a.csv").set_index("seed").optimal_share
    for seed in (0, 4, 3):
        assert share[seed] == pytest.approx(summarise(results[seed], "positive")["optimal_share_rate"], rel=1e-4)
    assert share.nunique() == 3
    assert share[[1, 2]].isna().all(), "one run failed, another could not be drawn for"
    run("1,0,4,2,3", "1 of 5 runs failed")
    assert [path.parent.name[-1] for path in drawn] == ["2"], "what is there is not drawn again"
    for table in results.values():
        table["base_draws"] += " 0.5 0.9"
    frontier = "6"
    run("1,0,4,2,3", "1 of 5 runs failed")
    assert [path.parent.name[-1] for path in drawn] == ["0", "2", "3"], "but more are"
    more = pd.read_csv(tmp_path / "a.csv").set_index("seed").optimal_share
    for seed in (0, 4, 3):
        assert more[seed] == pytest.approx(summarise(results[seed], "positive")["optimal_share_rate"], rel=1e-4)


def made_results(seed: int) -> pd.DataFrame:
    """An evaluation of 30 prompts as eval.py keeps it; the base is the same for every seed."""
    base, policy = np.random.default_rng(7), np.random.default_rng(100 + seed)
    draws = base.uniform(-1, 1, (30, 4))
    table = {"prompt": [f"prompt {i}" for i in range(30)], "base_draws": [" ".join(map(str, row)) for row in draws]}
    for name, scores in (("base", base.uniform(-1, 1, 30)), ("policy", policy.uniform(-0.2, 1, 30))):
        table |= {
            f"{name}_text": [f"some words of {name} {i}" for i in range(30)],
            f"{name}_score": scores,
            f"{name}_log_odds": scores,
            f"{name}_len": [5] * 30,
            f"{name}_eos": [1] * 30,
            f"{name}_nll_base": [9.0] * 30,
            f"{name}_nll_policy": [9.0] * 30,
        }
    return pd.DataFrame(table).assign(kl_seq=0.5, kl_seq_exact=0.5)


def test_a_run_that_fails_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the README's command runs where its models are not, on the table that came with the project."""
    monkeypatch.setattr(subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 2))
    table = tmp_path / "a.csv"
    table.write_bytes((ROOT / "results" / "study_tiny.csv").read_bytes())
    before = table.read_text()
    with pytest.raises(UserError, match="1 of 1 runs failed"):
        main([f"--folder={tmp_path / 'runs'}", f"--csv={table}"])
    assert table.read_text() == before
    with pytest.raises(UserError, match="1 of 1 runs failed"):
        main([f"--folder={tmp_path / 'runs'}", f"--csv={table}", "--seeds=99"])
    assert pd.read_csv(table).set_index("seed").failed[99] == f"code 2, see {tmp_path / 'runs'}/defaults_seed99/log.txt"


def test_a_program_with_tables_of_its_own_is_evaluated_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(words: list[str], **_: Any) -> "subprocess.CompletedProcess[bytes]":
        folder = tmp_path / "runs" / "peer_seed0"
        (folder / "metrics.csv").write_text(next(tables))
        (folder / "eval_summary.json").write_text(json.dumps(SUMMARY))
        (folder / "eval_results.csv").write_text("")
        return subprocess.CompletedProcess(words, 0)

    tables = iter(["step,reward\n1,0.5\n", ""])
    monkeypatch.setattr(subprocess, "run", pretend)
    main(["--peer=other --out {folder}", f"--folder={tmp_path / 'runs'}", f"--csv={tmp_path / 'a.csv'}"])
    assert pd.read_csv(tmp_path / "a.csv").score.tolist() == [0.6]
    assert not (tmp_path / "a_steps.csv").exists()


def test_damaged_tables_are_refused_before_anything_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    table = tmp_path / "a.csv"
    for text in ("", 'a,b\n1,"2', "step,loss\n1,2\n"):
        table.write_text(text)
        for words in ([f"--draw={table}"], [f"--csv={table}"]):
            with pytest.raises(UserError, match=r"a\.csv "):
                main(words)
    table.write_text("setting,seed,failed\nx,0,code 2\n")
    (tmp_path / "a_steps.csv").touch()
    for words in ([f"--draw={table}"], [f"--csv={table}"]):
        with pytest.raises(UserError, match=r"a_steps\.csv cannot be read"):
            main(words)
    for wrong in (tmp_path, table / "b.csv"):
        with pytest.raises(UserError, match="csv="):
            main([f"--csv={wrong}"])


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    for flag in ("train", "evaluate", "peer"):
        with pytest.raises(UserError, match=f"{flag}="):
            main([f"--{flag}=--lr '1", f"--folder={tmp_path / 'runs'}", f"--csv={tmp_path / 'a.csv'}"])
    for words in (["--seeds=a"], ["--bogus=1"], ["--jobs=0"], ["--frontier=1"], [f"--draw={tmp_path / 'no.csv'}"]):
        with pytest.raises(UserError):
            main(words)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.study", "--draw", "nowhere.csv"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
